"""A fitted hash: what its codes depend on, its file, and its use in a model."""

from pathlib import Path

import pytest
import torch
from torch import nn

from deepseek import DeepSeekModel, ModelConfig
from deepseek.errors import CheckpointError, ConfigError
from deepseek.model.attention.hash import (
    LinearHash,
    load_hashes,
    named_tensors,
    plug_hashes,
    save_hashes,
)
from deepseek.model.attention.lsh import RandomHash

HEADS, GROUPS, WIDTH, BUCKETS = 4, 2, 16, 6


def some_hash(seed: int = 0) -> LinearHash:
    torch.manual_seed(seed)
    shapes = (
        (GROUPS, WIDTH, BUCKETS),
        (GROUPS, BUCKETS),
        (HEADS, WIDTH, BUCKETS),
        (HEADS, BUCKETS),
    )
    return LinearHash(*(torch.randn(shape) for shape in shapes))


def small_model(**changes: object) -> DeepSeekModel:
    torch.manual_seed(0)
    shape = {
        "vocab_size": 97,
        "hidden_size": 64,
        "intermediate_size": 64,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 128,
        "attention": "lsh",
        "lsh_num_buckets": BUCKETS,
        "lsh_probes": 2,
        "lsh_bucket_window": 3,
        "lsh_local_window": 7,
        "lsh_exact_layers": [0],
    }
    return DeepSeekModel(ModelConfig(**(shape | changes))).eval()


def test_the_code_of_a_key_depends_on_that_key_alone() -> None:
    one, keys = some_hash(), torch.randn(2, GROUPS, 50, WIDTH)
    codes = one.key_codes(keys)
    assert codes.shape == (2, GROUPS, 50)
    others = torch.randn_like(keys)
    others[:, :, 17] = keys[:, :, 17]
    assert torch.equal(one.key_codes(others)[:, :, 17], codes[:, :, 17])
    assert torch.equal(one.key_codes(keys[:, :, 17:18])[:, :, 0], codes[:, :, 17])


@pytest.mark.parametrize("one", [some_hash(), RandomHash(BUCKETS, WIDTH)], ids=["fitted", "random"])
def test_autocast_changes_no_code(one: LinearHash | RandomHash) -> None:
    keys, queries = torch.randn(1, GROUPS, 2000, WIDTH), torch.randn(1, HEADS, 2000, WIDTH)
    exact = one.key_codes(keys), one.query_codes(queries, 3)
    with torch.autocast("cpu", torch.bfloat16):
        mixed = one.key_codes(keys), one.query_codes(queries, 3)
    assert all(map(torch.equal, exact, mixed))


def test_probes_are_different_buckets_and_the_likeliest_come_first() -> None:
    one, queries = some_hash(), torch.randn(2, HEADS, 30, WIDTH)
    codes = one.query_codes(queries, 4)
    assert codes.shape == (2, HEADS, 30, 4)
    assert all(len(set(row)) == 4 for row in codes.flatten(0, 2).tolist())
    assert torch.equal(one.query_codes(queries, 2), codes[..., :2])


def test_a_saved_hash_comes_back_bit_for_bit(tmp_path: Path) -> None:
    hashes = {2: some_hash(), 11: some_hash(1)}
    save_hashes(tmp_path / "lsh" / "hash.safetensors", hashes, "base")
    loaded = load_hashes(tmp_path / "lsh" / "hash.safetensors", "base")
    assert loaded.keys() == hashes.keys()
    for layer, one in hashes.items():
        assert all(
            torch.equal(tensor, loaded[layer].tensors()[name])
            for name, tensor in one.tensors().items()
        )


def test_a_missing_damaged_or_foreign_file_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "hash.safetensors"
    with pytest.raises(CheckpointError, match="does not exist"):
        load_hashes(path, "base")
    save_hashes(path, {0: some_hash()}, "base")
    with pytest.raises(CheckpointError, match="another model"):
        load_hashes(path, "other")
    path.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(CheckpointError, match="damaged"):
        load_hashes(path, "base")


def test_a_model_takes_its_hashes_and_hashes_before_positions() -> None:
    model = small_model()
    hashes = {1: some_hash(), 2: some_hash(1)}
    plug_hashes(model, hashes)
    read: list[torch.Tensor] = []
    plugged = model.layers[1].attention.hash
    codes = plugged.key_codes
    plugged.key_codes = lambda key: (read.append(key), codes(key))[1]  # type: ignore[func-returns-value]
    # The same token everywhere: the keys of layer 1 could differ only by position.
    ids = torch.full((1, 40), 5)
    model(ids)
    first, last = read[0][0, :, 0], read[0][0, :, -1]
    torch.testing.assert_close(first, last, atol=1e-4, rtol=1e-4)


def test_models_share_no_hash_of_their_callers() -> None:
    hashes = {1: some_hash(), 2: some_hash(1)}
    before = {name: tensor.clone() for name, tensor in named_tensors(hashes).items()}
    one, other = small_model(), small_model()
    for model in (one, other):
        plug_hashes(model, hashes)
    nn.Module.to(one, "meta")
    for layer, given in hashes.items():
        for name, tensor in other.layers[layer].attention.hash.tensors().items():
            assert torch.equal(tensor, before[f"{layer}.{name}"])
            assert torch.equal(given.tensors()[name], tensor)


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_a_cast_of_the_model_leaves_its_hashes_alone(dtype: torch.dtype) -> None:
    model, hashes = small_model(), {1: some_hash(), 2: some_hash(1)}
    before = {name: tensor.clone() for name, tensor in named_tensors(hashes).items()}
    plug_hashes(model, hashes)
    model.to(dtype)
    after = named_tensors({layer: model.layers[layer].attention.hash for layer in hashes})
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())
    ids = torch.arange(40)[None]
    logits = model(ids).logits
    assert logits.dtype == dtype and logits.isfinite().all()
    assert model(ids[:, :1]).logits.isfinite().all()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"lsh_num_buckets": 9}, "set lsh_num_buckets=6"),
        ({"lsh_exact_layers": []}, "no hash for layer 0"),
        ({"attention": "full"}, 'attention="lsh"'),
        ({"lsh_rounds": 2}, "one round"),
    ],
)
def test_a_hash_that_does_not_fit_the_model_is_refused(
    changes: dict[str, object], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        plug_hashes(small_model(**changes), {1: some_hash(), 2: some_hash(1)})
