"""A converted GGUF file computes what `transformers` computes from the file."""

from dataclasses import replace
from pathlib import Path

import gguf
import numpy as np
import pytest
import tiny_gguf
import torch
from gguf import GGMLQuantizationType as Kind
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from deepseek.checkpoint.gguf import config, convert
from deepseek.checkpoint.gguf.reader import read_gguf
from deepseek.checkpoint.licence import licence_of, read_licence, write_card
from deepseek.checkpoint.store import file_digest
from deepseek.errors import CheckpointError, ConfigError, UserError

IDS = torch.arange(2, 82).reshape(2, 40)


def converted(file: Path, dtype: str | None = None) -> Path:
    folder = file.with_suffix("")
    folder.mkdir()
    convert.convert_gguf(file, folder, dtype)
    return folder


def logits(model: torch.nn.Module) -> torch.Tensor:
    with torch.inference_mode():
        return torch.nn.Module.float(model)(IDS).logits


def theirs(file: Path, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return logits(
        AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name, dtype=dtype)
    )


@pytest.mark.parametrize("architecture", tiny_gguf.CONFIGS)
def test_logits_are_those_of_the_model_and_of_transformers(
    architecture: str, tmp_path: Path
) -> None:
    model = tiny_gguf.tiny_model(architecture)
    file = tiny_gguf.write_gguf(model, tmp_path / "tiny.gguf", architecture)
    ours = AutoModelForCausalLM.from_pretrained(converted(file))
    assert ours.dtype == torch.float32
    assert type(ours) is type(model)
    assert torch.equal(logits(ours), theirs(file))
    assert torch.allclose(logits(ours), logits(model), atol=1e-6)  # Gemma's norms are stored + 1


@pytest.mark.parametrize("architecture", tiny_gguf.OTHERS)
def test_other_architectures_are_read_by_transformers(architecture: str, tmp_path: Path) -> None:
    model = tiny_gguf.write_other(architecture, tmp_path / "tiny.gguf")
    ours = AutoModelForCausalLM.from_pretrained(converted(tmp_path / "tiny.gguf"))
    assert type(ours) is type(model)
    assert torch.equal(logits(ours), logits(model))


@pytest.mark.parametrize("architecture", tiny_gguf.OTHERS)
def test_no_random_numbers_stand_for_a_missing_tensor(architecture: str, tmp_path: Path) -> None:
    file = tmp_path / "tiny.gguf"
    tiny_gguf.write_other(architecture, file, without="blk.1.ffn_down.weight")
    with pytest.raises(CheckpointError, match=r"no tensor for '.*1.*weight'.*1 missing, 0 unknown"):
        converted(file)


@pytest.mark.parametrize("architecture", ["gpt2", "lfm2"])
def test_more_layers_than_tensors_are_refused_at_once(architecture: str, tmp_path: Path) -> None:
    file = tmp_path / "tiny.gguf"
    tiny_gguf.write_other(architecture, file, facts={"block_count": 300})
    with pytest.raises(CheckpointError, match="states 300 layers and has"):
        converted(file)


@pytest.mark.parametrize("window", [8, 0])
def test_the_window_of_phi_3_is_read(window: int, tmp_path: Path) -> None:
    model = tiny_gguf.tiny_model("phi3", sliding_window=window or None)
    facts = {} if window else {"phi3.attention.sliding_window": 0}
    file = tiny_gguf.write_gguf(model, tmp_path / "tiny.gguf", "phi3", facts=facts)
    ours = AutoModelForCausalLM.from_pretrained(converted(file))
    assert ours.config.sliding_window == (window or None)
    assert torch.allclose(logits(ours), logits(model), atol=1e-6)


@pytest.mark.parametrize(
    ("architecture", "kind"),
    [("llama", kind) for kind in (Kind.F16, Kind.BF16, Kind.Q4_0, Kind.Q4_1, Kind.Q5_0, Kind.Q5_1)]
    + [("qwen3moe", Kind.Q8_0), ("gemma2", Kind.Q8_0)],
)
def test_quantised_files_are_read_exactly(architecture: str, kind: Kind, tmp_path: Path) -> None:
    model = tiny_gguf.tiny_model(architecture)
    file = tiny_gguf.write_gguf(model, tmp_path / "tiny.gguf", architecture, quantisation=kind)
    ours = AutoModelForCausalLM.from_pretrained(converted(file), dtype="auto")
    exact = {Kind.F16: torch.float16, Kind.BF16: torch.bfloat16}.get(kind, torch.float32)
    assert ours.dtype == exact
    assert torch.equal(logits(ours), theirs(file, exact))


@pytest.mark.parametrize("kind", [Kind.F32, Kind.F16, Kind.BF16])
def test_matrices_keep_every_bit_and_vectors_are_rounded_to_their_dtype(
    kind: Kind, tmp_path: Path
) -> None:
    model = tiny_gguf.tiny_model("llama")
    file = tiny_gguf.write_gguf(model, tmp_path / "tiny.gguf", "llama", quantisation=kind)
    weights = load_file(converted(file) / "model.safetensors")
    dtype = {Kind.F16: torch.float16, Kind.BF16: torch.bfloat16}.get(kind, torch.float32)
    names = {f"blk.0.{part}.weight" for part in ("attn_norm", "ffn_norm", "ffn_down")}
    values = {name: torch.from_numpy(read_gguf(file).values(name)) for name in names}
    stored = [weights[name] for name in weights if ".layers.0." in name]
    for value in values.values():
        assert value.dim() == 1 or torch.equal(value.to(dtype).float(), value.float())
        assert any(one.shape == value.shape and torch.equal(one, value.to(dtype)) for one in stored)


def test_weights_can_be_narrower(tmp_path: Path) -> None:
    model = tiny_gguf.tiny_model("gemma2")
    file = tiny_gguf.write_gguf(model, tmp_path / "t.gguf", "gemma2", quantisation=Kind.Q8_0)
    ours = AutoModelForCausalLM.from_pretrained(converted(file, "bfloat16"), dtype="auto")
    assert ours.dtype == torch.bfloat16
    assert torch.equal(logits(ours), theirs(file, torch.bfloat16))
    with pytest.raises(ConfigError, match="bfloat16"):
        convert.convert_gguf(file, tmp_path, "bfloat")


@pytest.mark.parametrize("kind", gguf.quants._type_traits)
def test_every_encoding_is_dequantised_as_the_gguf_package_does(
    kind: Kind, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, size = gguf.GGML_QUANT_SIZES[kind]
    data = np.random.default_rng(0).integers(0, 60, (6, 2 * size), dtype=np.uint8)
    writer = gguf.GGUFWriter(tmp_path / "t.gguf", "llama")
    writer.add_tensor("t.weight", data, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    monkeypatch.setattr("deepseek.checkpoint.gguf.reader.CHUNK", 512)  # so there are several
    values = read_gguf(tmp_path / "t.gguf").values("t.weight")
    np.testing.assert_array_equal(values, gguf.quants.dequantize(data, kind))


def test_what_transformers_leaves_out_is_read(tmp_path: Path) -> None:
    """Head and expert widths other than the defaults; `transformers` refuses these files."""
    fields = {"head_dim": 24, "moe_intermediate_size": 96}
    model = tiny_gguf.tiny_model("qwen3moe", **fields)
    file = tiny_gguf.write_gguf(model, tmp_path / "tiny.gguf", "qwen3moe")
    ours = AutoModelForCausalLM.from_pretrained(converted(file))
    assert torch.equal(logits(ours), logits(model))


def test_llama_3_positions_are_scaled(tmp_path: Path) -> None:
    scaling = {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
        "rope_theta": 10000.0,
    }
    model = tiny_gguf.tiny_model("llama", rope_parameters=scaling)
    factors = config.llama3_factors(scaling, 10000.0, 8).astype(np.float32)
    original = tiny_gguf.gguf_tensors

    def with_factors(model: torch.nn.Module, architecture: str) -> dict[str, np.ndarray]:
        return original(model, architecture) | {"rope_freqs.weight": factors}

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tiny_gguf, "gguf_tensors", with_factors)
        file = tiny_gguf.write_gguf(model, tmp_path / "tiny.gguf")
        ours = AutoModelForCausalLM.from_pretrained(converted(file))
        assert torch.equal(logits(ours), logits(model))
        assert not torch.equal(logits(ours), logits(tiny_gguf.tiny_model("llama")))
        factors *= 1.5
        tiny_gguf.write_gguf(model, tmp_path / "other.gguf")
        with pytest.raises(CheckpointError, match="not Llama 3's"):
            convert.convert_gguf(tmp_path / "other.gguf", tmp_path)


def test_linear_scaling_is_read_and_another_is_refused(tmp_path: Path) -> None:
    scaling = {"rope_type": "linear", "factor": 4.0, "rope_theta": 10000.0}
    model = tiny_gguf.tiny_model("llama", rope_parameters=scaling)
    facts = {"llama.rope.scaling.type": "linear", "llama.rope.scaling.factor": 4.0}
    file = tiny_gguf.write_gguf(model, tmp_path / "tiny.gguf", facts=facts)
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(converted(file))), logits(model))
    facts["llama.rope.scaling.type"] = "longrope"
    tiny_gguf.write_gguf(model, tmp_path / "other.gguf", facts=facts)
    with pytest.raises(CheckpointError, match="longrope"):
        convert.convert_gguf(tmp_path / "other.gguf", tmp_path)


@pytest.mark.parametrize("key", ["rope.scaling.factor", "rope.scale_linear"])
def test_a_factor_without_a_type_scales_linearly_as_in_llama_cpp(key: str, tmp_path: Path) -> None:
    model = tiny_gguf.tiny_model("llama")
    file = tiny_gguf.write_gguf(model, tmp_path / "tiny.gguf", facts={f"llama.{key}": 4.0})
    assert config.model_config(read_gguf(file)).rope_parameters == {
        "rope_type": "linear",
        "rope_theta": 10000.0,
        "factor": 4.0,
    }


@pytest.mark.parametrize(
    ("key", "value"),
    [("rope.dimension_count", 8), *((f"rope.scaling.{key}", 2.5) for key in config.SCALING)],
)
def test_a_rotation_that_no_config_says_is_refused(key: str, value: float, tmp_path: Path) -> None:
    model = tiny_gguf.tiny_model("llama")
    file = tiny_gguf.write_gguf(model, tmp_path / "tiny.gguf", facts={f"llama.{key}": value})
    with pytest.raises(CheckpointError, match=key):
        config.model_config(read_gguf(file))


def test_the_rotary_base_of_every_family_is_read(tmp_path: Path) -> None:
    file = read_gguf(tiny_gguf.write_gguf(tiny_gguf.tiny_model("llama"), tmp_path / "tiny.gguf"))
    for architecture in config.FAMILIES:
        facts = {key.replace("llama.", f"{architecture}."): file.facts[key] for key in file.facts}
        facts |= {"general.architecture": architecture, f"{architecture}.rope.freq_base": 5e5}
        rotary = config.model_config(replace(file, facts=facts)).rope_parameters
        assert rotary.get("full_attention", rotary)["rope_theta"] == 5e5


def test_large_models_are_written_in_shards(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(convert, "SHARD_BYTES", 100_000)
    file = tiny_gguf.write_gguf(tiny_gguf.tiny_model("llama"), tmp_path / "tiny.gguf")
    folder = converted(file)
    shards = sorted(folder.glob("*.safetensors"))
    assert len(shards) > 2
    assert shards[0].name == f"model-00001-of-{len(shards):05}.safetensors"
    for shard in shards:
        tensors = load_file(shard).values()
        assert len(tensors) == 1 or sum(tensor.nbytes for tensor in tensors) <= 100_000
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(folder)), theirs(file))


def test_experts_are_saved_one_by_one_as_transformers_saves_them(tmp_path: Path) -> None:
    model = tiny_gguf.tiny_model("qwen3moe")
    file = tiny_gguf.write_gguf(model, tmp_path / "tiny.gguf", "qwen3moe")
    model.save_pretrained(tmp_path / "saved")
    saved = load_file(tmp_path / "saved/model.safetensors")
    ours = load_file(converted(file) / "model.safetensors")
    assert ours.keys() == saved.keys()
    assert all(torch.equal(ours[name], saved[name]) for name in saved)


@pytest.mark.parametrize("architecture", ["llama", "gemma2", "phi3"])
def test_the_tokenizer_is_the_one_of_transformers(architecture: str, tmp_path: Path) -> None:
    model = tiny_gguf.tiny_model(architecture)
    file = tiny_gguf.write_gguf(model, tmp_path / "t.gguf", architecture, split_rule="qwen2")
    ours = AutoTokenizer.from_pretrained(converted(file))
    original = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
    text = "the ape  had a\nbad gem 12345<|im_end|>"
    assert ours(text).input_ids == original(text).input_ids
    assert ours.decode(ours(text).input_ids) == original.decode(original(text).input_ids)
    chat = ours.apply_chat_template([{"role": "user", "content": "hi"}], tokenize=False)
    assert chat == "hi<|im_end|>"
    assert (ours.bos_token_id, ours.eos_token_id, ours.pad_token_id) == (1, 2, 0)


@pytest.mark.parametrize("rule", ["llama-bpe", "tekken", "qwen2"])
@pytest.mark.parametrize("begins", [None, True, False])
def test_some_rules_take_words_whole_and_begin_a_text_as_llama_cpp_does(
    rule: str, begins: bool | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The expected ids are llama.cpp's for the same files; no merge produces the token "cat"."""
    written = gguf.GGUFWriter.add_token_list

    def with_a_word(writer: gguf.GGUFWriter, tokens: list[str]) -> None:
        written(writer, [*tokens[:-2], "cat", tokens[-1]])
        if begins is not None:
            writer.add_add_bos_token(begins)

    monkeypatch.setattr(gguf.GGUFWriter, "add_token_list", with_a_word)
    file = tiny_gguf.write_gguf(tiny_gguf.tiny_llama(), tmp_path / "t.gguf", split_rule=rule)
    ids = AutoTokenizer.from_pretrained(converted(file))("cat").input_ids
    whole = rule != "qwen2"
    assert (ids[0] == 1) is (whole if begins is None else begins)
    assert (ids[-1] == 258) is whole


@pytest.mark.parametrize("theta", [10000.0, 1e-05, 3580165449.0, 283461213.0, 0.1])
def test_a_number_is_the_shortest_that_rounds_to_it(theta: float) -> None:
    stored = float(np.float32(theta))
    assert np.float32(config._shortest(stored)) == np.float32(theta)
    assert len(repr(config._shortest(stored))) <= len(repr(theta))


def test_a_turn_may_end_otherwise_than_a_document(tmp_path: Path) -> None:
    facts = {"tokenizer.ggml.eot_token_id": 1}
    file = tiny_gguf.write_gguf(tiny_gguf.tiny_llama(), tmp_path / "tiny.gguf", facts=facts)
    ours = AutoModelForCausalLM.from_pretrained(converted(file))
    assert ours.generation_config.eos_token_id == [2, 1]


def test_converting_twice_gives_the_same_bytes(tmp_path: Path) -> None:
    file = tiny_gguf.write_gguf(tiny_gguf.tiny_model("gemma2"), tmp_path / "t.gguf", "gemma2")
    first = converted(file)
    second = tmp_path / "second"
    second.mkdir()
    convert.convert_gguf(file, second)
    names = sorted(path.name for path in first.iterdir())
    assert names == sorted(path.name for path in second.iterdir())
    assert all(file_digest(first / name) == file_digest(second / name) for name in names)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"written_as": "mambo"}, "architecture 'mambo'"),
        ({"split_rule": "smolm"}, "rule 'smolm'.*'smollm'"),
        ({"facts": {"split.count": 3}}, "one of 3 parts"),
        ({"written_as": "qwen2"}, "no tensor for 'blk.0.attn_k.bias'"),
        ({"written_as": "gpt2"}, "transformers cannot read the gpt2 model"),
    ],
)
def test_a_file_that_is_not_read_is_refused(
    changes: dict[str, object], message: str, tmp_path: Path
) -> None:
    file = tiny_gguf.write_gguf(tiny_gguf.tiny_llama(), tmp_path / "tiny.gguf", **changes)
    with pytest.raises(UserError, match=message):
        convert.convert_gguf(file, tmp_path)


def test_a_tensor_of_another_shape_is_refused(tmp_path: Path) -> None:
    model = tiny_gguf.tiny_llama()
    model.config.intermediate_size += 32
    tiny_gguf.write_gguf(model, tmp_path / "tiny.gguf")
    with pytest.raises(CheckpointError, match=r"holds 'blk.0.ffn_\w+.weight' as .* asks for"):
        convert.convert_gguf(tmp_path / "tiny.gguf", tmp_path)


@pytest.mark.parametrize(
    ("name", "expected", "restricted"),
    [
        ("apache-2.0", "Apache-2.0", False),
        ("mit", "MIT", False),
        ("gemma", "LicenseRef-Gemma", True),
        ("llama3.2", "LicenseRef-Llama3.2", True),
        ("any words", "LicenseRef-Any-words", False),
        ("openrail++", "LicenseRef-Openrail--", True),
        ("creativeml-openrail-m", "LicenseRef-Creativeml-openrail-m", True),
        ("BigCode-OpenRAIL-M", "LicenseRef-BigCode-OpenRAIL-M", True),
        ("bigscience-bloom-rail-1.0", "LicenseRef-Bigscience-bloom-rail-1.0", True),
        ("trail-1.0", "LicenseRef-Trail-1.0", False),
    ],
)
def test_a_licence_id_becomes_an_spdx_expression(
    name: str, expected: str, restricted: bool, tmp_path: Path
) -> None:
    assert licence_of(name).name == expected
    write_card(tmp_path, name, "https://example.org/terms", "A model: ours.")
    licence = read_licence(tmp_path)
    assert (licence.name, licence.link) == (expected, "https://example.org/terms")
    assert licence.restricted is licence_of(licence.name).restricted is restricted
    assert ("use restrictions" in str(licence)) is restricted


@pytest.mark.parametrize(
    "card",
    [
        "---\nbase_model: acme/my---model\nlicense: gemma\n---\n",
        "---\n# ---- card ----\nlicense: gemma\n---\n",
        "---\nwidget:\n- text: 'a --- b'\nlicense: gemma\n---\n",
        "\ufeff---\r\nlicense: gemma\r\n---\r\n# A model",
    ],
)
def test_dashes_within_a_card_hide_no_licence(card: str, tmp_path: Path) -> None:
    (tmp_path / "README.md").write_text(card)
    assert read_licence(tmp_path).restricted


@pytest.mark.parametrize("card", ["", "# A model", "---\n- x\n---\n", "---\nlicense: [", "---"])
def test_a_card_without_a_licence_states_none(card: str, tmp_path: Path) -> None:
    assert read_licence(tmp_path).name == ""
    (tmp_path / "README.md").write_text(card)
    assert read_licence(tmp_path).name == ""
