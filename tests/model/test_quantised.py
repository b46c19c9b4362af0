"""The stored matrices of a quantised checkpoint are used for layers whose weights are unchanged."""

import copy
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from tiny_expert import save_base
from torch import Tensor, nn

from deepseek.compiled.native_weights import _source
from deepseek.compiled.packing import MatrixSource, source_of
from deepseek.kernels.int8 import Int8Matrix, quantize
from deepseek.model.quantised import stored_form, with_large_quantised
from deepseek.model.transformer import DeepSeekModel

MIXTURE = {"num_experts": 4, "expert_dim": 64, "num_shared_experts": 1, "max_experts": 2}
SHAPE = {"hidden_size": 64, "intermediate_size": 128}
FOUR_BITS = "layers.1.attention.q_proj.weight"
IDS = torch.arange(3, 23)[None]


def quantised(folder: Path) -> Path:
    """Write a mixture with 8-bit weights, one matrix with 4 bits, not rounded to nearest."""
    save_base(folder, **SHAPE | MIXTURE)
    file = folder / "model.safetensors"
    tensors = load_file(file)
    generator = torch.Generator().manual_seed(1)
    small = with_large_quantised(tensors)
    for name, values in small.items():
        if name.endswith("_int8"):
            small[name] = values + torch.randint(0, 2, values.shape, generator=generator).byte()
            small[name] = small[name].to(torch.int8)
    small = {name: t for name, t in small.items() if not name.startswith(FOUR_BITS)}
    small |= stored_form(FOUR_BITS, quantize(tensors[FOUR_BITS], bits=4))
    save_file(small, file, metadata={"format": "pt"})
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return quantised(tmp_path_factory.mktemp("int8"))


@pytest.fixture(params=[torch.float32, torch.bfloat16], ids=str)
def model(request: pytest.FixtureRequest, folder: Path) -> DeepSeekModel:
    return DeepSeekModel.from_pretrained(folder, dtype=request.param)


def sources(model: DeepSeekModel) -> dict[str, tuple[MatrixSource, Tensor]]:
    """Return what the compiled runner packs for a matrix of each kind, and its weights."""
    block = model.layers[1]
    pool = block.feed_forward.pool
    layers = {
        "embedding": model.embed_tokens,
        "4 bits": block.attention.q_proj,
        "8 bits": block.attention.o_proj,
    }
    return {name: (source_of(layer), layer.weight) for name, layer in layers.items()} | {
        name: (_source(pool, name, 2), getattr(pool, name)[2])
        for name in ("gate_up_proj", "down_proj")
    }


def rows(source: MatrixSource) -> Int8Matrix:
    return source.rows(0, source.outputs)


def step(model: DeepSeekModel) -> None:
    model.requires_grad_(True)
    model(IDS, labels=IDS).loss.backward()
    torch.optim.SGD(model.parameters(), lr=1.0).step()


def add_to_data(model: DeepSeekModel) -> None:
    """Add to all weights as merging an adapter does: torch's version counters do not change."""
    for parameter in model.parameters():
        parameter.data += 0.01 * torch.ones_like(parameter)


def replace_data(model: DeepSeekModel) -> None:
    for parameter in model.parameters():
        parameter.data = 1.5 * parameter.data


def load_state(model: DeepSeekModel) -> None:
    model.load_state_dict({name: 1.5 * part for name, part in model.state_dict().items()})


def test_unchanged_weights_are_packed_as_they_are_stored(
    model: DeepSeekModel, folder: Path
) -> None:
    stored = load_file(folder / "model.safetensors")
    for one in (model, copy.deepcopy(model)):
        found = sources(one)
        assert found["4 bits"][0].bits == 4
        for source, weight in found.values():
            assert torch.equal(rows(source).float().to(weight.dtype), weight)
        values = rows(found["embedding"][0]).values
        assert torch.equal(values, stored["embed_tokens.weight_int8"])
        assert not torch.equal(values, quantize(model.embed_tokens.weight.detach()).values)
    assert not any("int8" in name for name in model.state_dict())
    assert isinstance(model.layers[0].attention.q_proj, nn.Linear)


@pytest.mark.parametrize("change", [step, add_to_data, replace_data, load_state])
def test_changed_weights_are_quantised_anew(
    model: DeepSeekModel, change: Callable[[DeepSeekModel], None]
) -> None:
    sources(model)  # as by an earlier runner
    change(model)
    for name, (source, weight) in sources(model).items():
        assert source.bits == 8, name
        expected = quantize(weight.detach())
        assert torch.equal(rows(source).values, expected.values), name
        assert torch.equal(rows(source).scales, expected.scales), name


def test_a_merged_adapter_is_packed(folder: Path) -> None:
    model = DeepSeekModel.from_pretrained(folder, dtype=torch.float32)
    config = LoraConfig(r=4, target_modules=["o_proj"], init_lora_weights=False)
    merged = get_peft_model(model, config).merge_and_unload()
    found = sources(merged)
    source, weight = found["8 bits"]
    assert torch.equal(rows(source).values, quantize(weight.detach()).values)
    assert found["4 bits"][0].bits == 4  # unchanged by the adapter


def test_a_weight_that_is_cast_is_still_the_stored_one(folder: Path) -> None:
    model = DeepSeekModel.from_pretrained(folder, dtype=torch.float32)
    nn.Module.to(model, torch.bfloat16)
    assert sources(model)["4 bits"][0].bits == 4
