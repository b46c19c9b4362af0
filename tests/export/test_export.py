"""An exported model computes what the model computes, or the export is refused."""

import ctypes
import shutil
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny_adapter import write_adapter
from tiny_expert import save_base, save_expert
from tiny_model import tiny_model
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    MistralConfig,
    MixtralConfig,
    OlmoeConfig,
    PreTrainedConfig,
    Qwen2Config,
    Qwen3Config,
    Qwen3MoeConfig,
)

from deepseek.checkpoint.convert import convert_config
from deepseek.checkpoint.licence import read_licence, write_card
from deepseek.cli.main import main
from deepseek.engine.adapters import import_adapter
from deepseek.engine.load import load
from deepseek.errors import CheckpointError, ConfigError
from deepseek.export import export
from deepseek.export.export import FORMATS, difference, export_model
from deepseek.export.graph import Graph
from deepseek.export.stock import stock_config
from deepseek.kernels.moe.grouped_mm import mix_experts_everywhere, mix_experts_reference
from deepseek.model.config import ModelConfig
from deepseek.model.experts.scan import scan, scan_at_once
from deepseek.model.transformer import DeepSeekModel
from deepseek.packs.manifest import Metric
from deepseek.packs.pack import ExpertPack, read_pack, write_pack


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_base(tmp_path_factory.mktemp("base"))


def test_onnx_with_plugged_experts_says_what_the_model_says(base: Path, tmp_path: Path) -> None:
    import onnxruntime

    model = load(base, dtype="float32").model
    model.experts.max_experts = 1  # so that the two below compete
    for seed, name in enumerate(("loud", "louder")):
        model.experts.plug(save_expert(load(base, dtype="float32"), name, tmp_path, seed))
    assert difference(model, export.write_onnx(model, tmp_path)) < 1e-5
    session = onnxruntime.InferenceSession(tmp_path / "model.onnx")
    graph, ids = Graph(model), torch.tensor([[5, 9, 40, 3, 8, 11]])
    assert graph.inputs == [one.name for one in session.get_inputs()]
    inputs = dict(
        zip(
            graph.inputs,
            (ids, torch.ones_like(ids), torch.arange(6)[None], *graph.past(1)),
            strict=True,
        )
    )
    found = session.run(["logits"], {name: tensor.numpy() for name, tensor in inputs.items()})[0]
    expected = model(ids).logits
    torch.testing.assert_close(torch.from_numpy(found), expected, atol=1e-4, rtol=0)
    model.experts.arm(None)
    assert (model(ids).logits - expected).abs().max() > 0.1  # the experts had an effect


def test_onnx_of_a_mixture_with_windows(tmp_path: Path) -> None:
    model = tiny_model("dmoe").model
    windowed = DeepSeekModel(ModelConfig(**model.config.to_dict() | {"sliding_window": 7})).eval()
    windowed.load_state_dict(model.state_dict())
    assert difference(windowed, export.write_onnx(windowed, tmp_path)) < 1e-5


def test_openvino_with_8_bit_weights_is_small_and_close(base: Path, tmp_path: Path) -> None:
    pytest.importorskip("nncf")
    assert export_model(base, tmp_path / "out", "openvino", dtype="int8") > 1e-4  # quantised
    assert {file.name for file in (tmp_path / "out").iterdir()} >= {
        "openvino_model.xml",
        "tokenizer.json",
    }
    exact = sum(4 * one.numel() for one in load(base, dtype="float32").model.parameters())
    assert (tmp_path / "out" / "openvino_model.bin").stat().st_size < 0.4 * exact


def test_what_fails_the_check_is_not_left(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(FORMATS, "hf", FORMATS["hf"]._replace(limits={"float32": -1.0}))
    with pytest.raises(CheckpointError, match="nothing was written"):
        export_model(base, tmp_path / "out", "hf")
    assert list(tmp_path.iterdir()) == []


def test_the_terms_of_the_base_go_along(base: Path, tmp_path: Path) -> None:
    folder = tmp_path / "base"
    shutil.copytree(base, folder)
    write_card(folder, "gemma", "https://example.org/terms", "A model.")
    (folder / "LICENSE").write_text("terms")
    export_model(folder, tmp_path / "out", "hf")
    assert read_licence(tmp_path / "out") == read_licence(folder)
    assert (tmp_path / "out" / "LICENSE").read_text() == "terms"


def test_an_adapter_is_refused_by_what_it_is(base: Path, tmp_path: Path) -> None:
    """Giving it a weight would not help, and "auto" does not arm it either."""
    layers = {"model.layers.0.self_attn.q_proj": (32, 32)}
    adapter = write_adapter(tmp_path / "peft", layers)
    path = tmp_path / "style.safetensors"
    import_adapter(adapter, name="style", base=base, out=path)
    for experts in ([path], {path: 1.0}):
        with pytest.raises(ConfigError, match=r"style is an adapter, and .* or leave it out"):
            export_model(base, tmp_path / "out", "onnx", experts=experts)
    assert not (tmp_path / "out").exists()


def test_an_expert_that_is_not_armed_is_not_left_out_in_silence(base: Path, tmp_path: Path) -> None:
    loaded = load(base, dtype="float32")
    pack = read_pack(save_expert(loaded, "poor", tmp_path))
    metrics = {"held-out": Metric(before=2.0, after=2.5)}
    manifest = pack.manifest.model_copy(update={"metrics": metrics})
    path = tmp_path / "poor.safetensors"
    write_pack(path, ExpertPack.seal(manifest, pack.tensors))
    with pytest.raises(ConfigError, match=r"poor is not known to be better .* --experts poor=1"):
        export_model(base, tmp_path / "out", "hf", experts=[path])
    with pytest.raises(ConfigError, match="No stock architecture has plugged experts"):
        export_model(base, tmp_path / "out", "hf", experts={path: 1.0})
    assert not (tmp_path / "out").exists()


def test_a_wrong_graph_is_noticed() -> None:
    model, wrong = tiny_model().model, tiny_model("window").model

    def step(new: tuple[torch.Tensor, ...], past: Any) -> tuple[torch.Tensor, Any]:
        ids, mask, positions = new
        output = wrong(ids, attention_mask=mask, position_ids=positions, cache=past)
        return output.logits, output.cache

    assert difference(wrong, step) < 1e-5
    assert difference(model, step) > 1e-2


SMALL: dict[str, Any] = {
    "vocab_size": 211,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
}
FAMILIES: list[PreTrainedConfig] = [
    LlamaConfig(**SMALL),
    LlamaConfig(**SMALL, attention_bias=True, tie_word_embeddings=True),
    MistralConfig(**SMALL, sliding_window=16),
    Qwen2Config(**SMALL, use_sliding_window=True, sliding_window=16, max_window_layers=1),
    Qwen3Config(**SMALL, head_dim=32),
    MixtralConfig(**SMALL, num_local_experts=4, num_experts_per_tok=2),
    OlmoeConfig(**SMALL, num_experts=8, num_experts_per_tok=2, clip_qkv=0.5, eos_token_id=7),
    Qwen3MoeConfig(
        **SMALL,
        head_dim=32,
        moe_intermediate_size=48,
        num_experts=8,
        num_experts_per_tok=3,
        norm_topk_prob=True,
        mlp_only_layers=[1],
    ),
]


@pytest.mark.parametrize("theirs", FAMILIES, ids=lambda config: config.model_type)
def test_a_stock_model_comes_back_as_itself(theirs: PreTrainedConfig) -> None:
    again = stock_config(ModelConfig(**convert_config(theirs.to_dict())))
    assert type(again) is type(theirs)
    assert again.head_dim == (getattr(theirs, "head_dim", None) or 16)
    spelt = {"head_dim", "max_window_layers"}  # expressed otherwise: the latter by layer_types
    one, other = (
        {key: value for key, value in said.to_diff_dict().items() if key not in spelt}
        for said in (again, theirs)
    )
    assert one == other


@pytest.mark.parametrize("theirs", [FAMILIES[2], FAMILIES[5]], ids=lambda config: config.model_type)
def test_stock_transformers_reads_the_folder(
    base: Path, tmp_path: Path, theirs: PreTrainedConfig
) -> None:
    from tiny_tokenizer import tiny_tokenizer

    torch.manual_seed(0)
    stock = AutoModelForCausalLM.from_config(theirs)
    for parameter in stock.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    stock.save_pretrained(tmp_path / "theirs")
    tiny_tokenizer().save_pretrained(tmp_path / "theirs")
    export_model(tmp_path / "theirs", tmp_path / "out", "hf", dtype="bfloat16")
    read = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert (type(read), read.dtype) == (type(stock), torch.bfloat16)
    ids = torch.randint(0, 211, (2, 30))
    ours = load(tmp_path / "theirs", dtype="bfloat16").model.float()
    with torch.no_grad():
        torch.testing.assert_close(read.float()(ids).logits, ours(ids).logits, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        ("lsh", "attention='lsh'"),
        ("dpe", "positional_encoding='dpe'"),
        ("dmoe", "num_shared_experts=1"),
    ],
)
def test_what_is_no_stock_architecture_is_refused(kind: str, reason: str) -> None:
    with pytest.raises(ConfigError, match=reason):
        stock_config(tiny_model(kind).model.config)
    if kind != "dmoe":
        with pytest.raises(ConfigError, match="no exported form"):
            Graph(tiny_model(kind).model)


GEMMA: dict[str, Any] = {
    "hidden_act": "gelu_pytorch_tanh",
    "post_norms": True,
    "scale_embeddings": True,
    "sliding_window": 16,
    "full_attention_layers": [1],
    "unit_offset_norms": True,
}


@pytest.mark.parametrize(
    ("family", "fields"),
    [
        ("gemma2", {"attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0}),
        ("gemma3_text", {"qk_norm": "head", "local_rope_theta": 100.0}),
    ],
)
def test_a_gemma_of_ours_has_a_stock_architecture(family: str, fields: dict[str, Any]) -> None:
    config = ModelConfig(**SMALL | GEMMA | fields)
    assert config.query_pre_attn_scalar is None  # Gemma's class has head_dim for None
    assert stock_config(config).model_type == family
    # As read from a checkpoint of Gemma, which states it.
    scaled = ModelConfig(**SMALL | GEMMA | fields, query_pre_attn_scalar=24)
    assert stock_config(scaled).query_pre_attn_scalar == 24
    with pytest.raises(ConfigError, match="hidden_act='gelu_pytorch_tanh'"):
        stock_config(ModelConfig(**SMALL | GEMMA | fields, query_pre_attn_scalar=24.5))
    with pytest.raises(ConfigError, match="clip_qkv"):
        stock_config(ModelConfig(**SMALL | GEMMA | fields, clip_qkv=0.5))


def test_mistakes_are_told(base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    expert = save_expert(load(base, dtype="float32"), "loud", tmp_path)
    for mistake, arguments in {
        "exists already": (base, tmp_path, "onnx"),
        "'onnx'": (base, tmp_path / "out", "onx"),
        "dtype of onnx": (base, tmp_path / "out", "onnx", "int4"),
        "needs a GPU and tensorrt": (base, tmp_path / "out", "tensorrt"),
        "plugged experts": (base, tmp_path / "out", "hf", None, [expert]),
    }.items():
        with pytest.raises(ConfigError, match=mistake):
            export_model(
                *arguments[:3], **dict(zip(("dtype", "experts"), arguments[3:], strict=False))
            )
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("to", "name"), [("onnx", "onnxruntime"), ("onnx", "onnxscript"), ("openvino", "nncf")]
)
def test_a_missing_package_is_told_before_anything_is_loaded(
    to: str, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(ConfigError, match=rf"{name}.*pip install 'deepseek-dmoe\[export\]'"):
        export_model(tmp_path / "no such base", tmp_path / "out", to)
    assert not (tmp_path / "out").exists()


def test_graphs_compute_experts_and_gates_as_the_model_does() -> None:
    torch.manual_seed(0)
    x, gate_up, down = torch.randn(7, 8), torch.randn(5, 12, 8), torch.randn(5, 8, 6)
    # 5 marks an unused slot.
    ids = torch.stack([torch.randperm(6)[:3] for _ in range(7)])
    weights = torch.rand(7, 3).masked_fill(ids == 5, 0.0)
    parts = (x, gate_up, down, ids, weights)
    torch.testing.assert_close(mix_experts_everywhere(*parts), mix_experts_reference(*parts))
    keep, terms = torch.rand(2, 9, 1, 3) * 0.9 + 0.1, torch.randn(2, 9, 4, 3)
    torch.testing.assert_close(scan_at_once(keep, terms), scan(keep, terms))


class FakeTensorRT:
    """TensorRT's API on the CPU: takes shapes and addresses like the real one, and computes with
    ONNX Runtime.
    """

    ERROR = STRONGLY_TYPED = 0

    def __init__(self) -> None:
        self.Logger = self.NetworkDefinitionCreationFlag = self.Builder = self.OnnxParser = (
            self.Runtime
        ) = self
        self.shapes: dict[str, tuple[Any, ...]] = {}
        self.inputs: dict[str, tuple[int, ...]] = {}
        self.addresses: dict[str, int] = {}

    def __call__(self, *_: Any) -> "FakeTensorRT":
        return self

    create_network = create_builder_config = create_optimization_profile = __call__
    deserialize_cuda_engine = create_execution_context = __call__

    def parse_from_file(self, path: str) -> bool:
        import onnxruntime

        self.session = onnxruntime.InferenceSession(path)
        return True

    def set_shape(self, name: str, *shapes: tuple[int, ...]) -> None:
        self.shapes[name] = shapes

    def add_optimization_profile(self, profile: Any) -> None:
        assert set(self.shapes) == {one.name for one in self.session.get_inputs()}

    def build_serialized_network(self, *_: Any) -> bytes:
        return b"plan"

    def set_input_shape(self, name: str, shape: tuple[int, ...]) -> None:
        least, _, most = self.shapes[name]
        assert all(
            low <= size <= high for low, size, high in zip(least, shape, most, strict=True)
        ), (name, shape)
        self.inputs[name] = shape

    def set_tensor_address(self, name: str, address: int) -> None:
        assert address
        self.addresses[name] = address

    def get_tensor_shape(self, name: str) -> tuple[int, ...]:
        feeds = {}
        for one in self.session.get_inputs():
            kind = {
                "tensor(int64)": np.int64,
                "tensor(float)": np.float32,
                "tensor(float16)": np.float16,
            }[one.type]
            feeds[one.name] = np.empty(self.inputs[one.name], kind)
            ctypes.memmove(
                feeds[one.name].ctypes.data, self.addresses[one.name], feeds[one.name].nbytes
            )
        names = [one.name for one in self.session.get_outputs()]
        self.results = dict(zip(names, self.session.run(names, feeds), strict=True))
        return self.results[name].shape

    def execute_async_v3(self, stream: int) -> bool:
        for name, result in self.results.items():
            ctypes.memmove(
                self.addresses[name], np.ascontiguousarray(result).ctypes.data, result.nbytes
            )
        return True


def test_the_tensorrt_path_without_a_gpu(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(export, "GPU", "cpu")
    monkeypatch.setitem(sys.modules, "tensorrt", FakeTensorRT())
    expert = save_expert(load(base, dtype="float32"), "loud", tmp_path)
    assert export_model(base, tmp_path / "out", "tensorrt", experts=[expert]) < 2e-2
    assert (tmp_path / "out" / "model.plan").read_bytes() == b"plan"
    assert not list((tmp_path / "out").glob("*.onnx*"))
    monkeypatch.setattr(Graph, "write", lambda *_: None)
    for call, answer, message in (
        ("parse_from_file", False, "cannot read"),
        ("build_serialized_network", None, "build"),
    ):
        with monkeypatch.context() as patch, pytest.raises(CheckpointError, match=message):
            patch.setattr(FakeTensorRT, "parse_from_file", lambda *_: True)
            patch.setattr(FakeTensorRT, call, lambda *_, answer=answer: answer)
            patch.setattr(FakeTensorRT, "get_error", lambda *_: "no such node", raising=False)
            export_model(base, tmp_path / "again", "tensorrt", experts=[expert])


def test_the_command_says_what_it_did(
    base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["export", str(base), str(tmp_path / "out"), "--to", "hf"])
    assert stop.value.code == 0
    assert "logits differ" in capsys.readouterr().out
    assert (tmp_path / "out" / "config.json").exists()
