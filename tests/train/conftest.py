"""A base model small enough to train at once, in a folder like a real one."""

import random
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from deepseek.model.config import ModelConfig
from deepseek.model.transformer import DeepSeekModel

WORDS = (
    "alpha",
    "beta",
    "gamma",
    "delta",
    "epsilon",
    "zeta",
    "eta",
    "theta",
    "iota",
    "kappa",
    "lambda",
    "mu",
    "nu",
    "xi",
    "omicron",
    "pi",
    "rho",
    "sigma",
    "tau",
)


def sentence(seed: int, length: int = 60) -> str:
    """Return words, each with three possible followers, so that there is something to learn."""
    draw, place, words = random.Random(seed), seed, []
    for _ in range(length):
        words.append(WORDS[place % len(WORDS)])
        place = place * 3 + draw.randrange(3)
    return " ".join(words)


@pytest.fixture(scope="session")
def tiny_base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a four-layer model and its tokenizer."""
    folder = tmp_path_factory.mktemp("tiny-base")
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=320,
        special_tokens=["<|endoftext|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    tokenizer.train_from_iterator([sentence(seed) for seed in range(20)], trainer)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<|endoftext|>", bos_token="<|endoftext|>"
    )
    fast.save_pretrained(folder)
    torch.manual_seed(0)
    config = ModelConfig(
        vocab_size=len(fast),
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
    )
    DeepSeekModel(config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def text_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Forty short files."""
    folder = tmp_path_factory.mktemp("text")
    for seed in range(40):
        (folder / f"{seed:02}.txt").write_text(sentence(seed, 120) + "\n")
    return folder


@pytest.fixture(scope="session")
def domains(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two folders of short files: words, and functions."""
    root = tmp_path_factory.mktemp("domains")
    for name in ("words", "code"):
        (root / name).mkdir()
    for seed in range(30):
        (root / "words" / f"{seed:02}.txt").write_text(sentence(seed, 90) + ".\n")
        body = "".join(f"    value += {word}\n" for word in sentence(seed + 40, 20).split())
        (root / "code" / f"{seed:02}.py").write_text(
            f"def f{seed}(value):\n{body}    return value\n"
        )
    return root


@pytest.fixture
def fp32(monkeypatch: pytest.MonkeyPatch) -> None:
    """Compute in fp32 even if the CPU has bf16 units, for exact comparisons."""
    monkeypatch.setattr("deepseek.model.precision.fast_dtype", lambda _: torch.float32)
