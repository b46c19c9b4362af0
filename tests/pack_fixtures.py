"""Fixtures: a tiny base in memory, and modules and packs for it."""

from collections.abc import Callable

import pytest
import torch

from deepseek.model.config import ModelConfig
from deepseek.model.experts import ExpertModule
from deepseek.model.transformer import DeepSeekModel
from deepseek.packs.manifest import MOMENTS, BaseDescription
from deepseek.packs.pack import ExpertPack

WIDTH, LAYERS = 32, 4
BASE = BaseDescription(
    name="tiny", weights="a" * 64, tokenizer="b" * 64, hidden_size=WIDTH, num_layers=LAYERS
)


@pytest.fixture(autouse=True)
def own_home(tmp_path_factory, monkeypatch):
    monkeypatch.setenv("DEEPSEEK_HOME", str(tmp_path_factory.mktemp("home")))


@pytest.fixture
def model() -> DeepSeekModel:
    torch.manual_seed(0)
    config = ModelConfig(
        vocab_size=96,
        hidden_size=WIDTH,
        intermediate_size=48,
        num_hidden_layers=LAYERS,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        initializer_range=0.3,
    )
    model = DeepSeekModel(config).eval()
    model.experts.base = BASE
    return model


def new_module(
    name: str, layers: tuple[int, ...] = (1, 3), seed: int = 0, bias: float = 0.0
) -> ExpertModule:
    """Return a module with random output and random gates, which fire more often with `bias` > 0
    and less often with `bias` < 0.
    """
    torch.manual_seed(seed)
    module = ExpertModule(name, layers, WIDTH, 24)
    for layer in module.layers:
        torch.nn.init.normal_(module.at(layer).down_proj, std=0.3)
        module.set_gate(
            layer,
            torch.randn(WIDTH + 1) / 4,
            threshold=-bias,
            moments=torch.randn(MOMENTS, WIDTH) / 4,
        )
    return module


@pytest.fixture
def base() -> BaseDescription:
    return BASE


@pytest.fixture
def make_module() -> Callable[..., ExpertModule]:
    return new_module


@pytest.fixture
def make_pack() -> Callable[..., ExpertPack]:
    def make(name: str = "code", **how) -> ExpertPack:
        return new_module(name, **how).to_pack(
            BASE, "Apache-2.0", domain="Python", dtype=torch.float32
        )

    return make


@pytest.fixture
def ids() -> torch.Tensor:
    return torch.randint(0, 96, (2, 40), generator=torch.Generator().manual_seed(1))


def is_one_sentence(message: str) -> bool:
    """Whether an error message is one printable sentence."""
    return (
        message.isascii()
        and message.isprintable()
        and message.endswith(".")
        and ". " not in message
    )
