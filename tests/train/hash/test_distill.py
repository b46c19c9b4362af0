"""Fitting a hash: it beats a random one on a retrieval task, resumes, and matches the kernel."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from deepseek.errors import TrainError
from deepseek.evaluate.attention_recall import attention_kept, best_keys, hashed_keys, local_keys
from deepseek.kernels.lsh.intervals import Windows
from deepseek.kernels.lsh.reference import candidate_mask
from deepseek.model.attention.hash import LinearHash
from deepseek.model.attention.lsh import Hash, RandomHash
from deepseek.model.config import ModelConfig
from deepseek.model.kv_cache import KVCache
from deepseek.model.transformer import DeepSeekModel
from deepseek.train.hash.attention_inputs import (
    HeadInputs,
    attention_scores,
    near_keys,
    recent_in_bucket,
    stream_layers,
)
from deepseek.train.hash.distill import HashSettings, distill_hashes, fit_hash

HEADS, GROUPS, WIDTH = 4, 2, 16
SMALL = HashSettings(
    num_buckets=32, bucket_window=16, local_window=16, sinks=2, queries=96, solver_steps=30
)


def retrieval(seed: int, length: int = 384, topics: int = 24) -> HeadInputs:
    """Return heads whose queries attend to the keys of one topic; all keys also share an offset."""
    fixed = torch.Generator().manual_seed(0)
    topic_CK = torch.nn.functional.normalize(torch.randn(topics, WIDTH, generator=fixed), dim=-1)
    wanted_HC = torch.stack([torch.randperm(topics, generator=fixed) for _ in range(HEADS)])
    generator = torch.Generator().manual_seed(seed)
    key = 4.0 * topic_CK[torch.randint(topics, (GROUPS, length), generator=generator)]
    query = (
        8.0
        * topic_CK[wanted_HC.gather(1, torch.randint(topics, (HEADS, length), generator=generator))]
    )
    # A direction that all keys share and queries ignore, as in real models; it misleads a random
    # hash.
    key = key + 6.0 * torch.randn(GROUPS, 1, WIDTH, generator=fixed)
    value = torch.randn(GROUPS, length, WIDTH, generator=generator)
    noise = [torch.randn(part.shape, generator=generator) * 0.3 for part in (query, key)]
    return HeadInputs(query + noise[0], key + noise[1], query + noise[0], key + noise[1], value)


def recall(one: Hash, probes: int = 3) -> float:
    inputs, at_N = retrieval(seed=9), torch.arange(200, 384, 4)
    scores_HNS = attention_scores(inputs, at_N)
    kept_HNS = hashed_keys(SMALL.windows, probes, {0: one})(0, inputs, at_N, scores_HNS)
    return float((scores_HNS.softmax(-1) * kept_HNS).sum(-1).mean())


def test_distillation_finds_more_than_calibration_and_that_more_than_chance() -> None:
    texts = [retrieval(seed) for seed in (1, 2, 3)]

    def still(query_HNK: Tensor, _: Tensor) -> Tensor:
        return query_HNK

    chance = recall(RandomHash(SMALL.num_buckets, WIDTH))
    calibrated = recall(fit_hash(texts, HashSettings(**{**vars(SMALL), "solver_steps": 0}), still))
    distilled = recall(fit_hash(texts, SMALL, still))
    assert chance + 0.2 < calibrated
    assert calibrated - 0.01 <= distilled
    assert distilled > 0.8


def test_candidates_are_those_of_the_kernels_reference() -> None:
    torch.manual_seed(0)
    windows, length = Windows(local=7, sinks=3, bucket=4, num_buckets=5), 60
    key_codes = torch.randint(5, (1, GROUPS, length))
    query_codes = torch.rand(1, HEADS, length, 5).argsort(-1)[..., :2]
    dense = candidate_mask(query_codes, key_codes, bucket_window=4, local_window=7, sinks=3)[0]

    class Given:
        def key_codes(self, _: Tensor) -> Tensor:
            return key_codes

        def query_codes(self, _: Tensor, probes: int) -> Tensor:
            return query_codes

    at_N = torch.arange(length)
    scores = torch.zeros(HEADS, length, length).masked_fill(
        ~torch.ones(length, length).tril().bool(), -torch.inf
    )
    chosen = hashed_keys(windows, 2, {0: Given()})(0, retrieval(0, length), at_N, scores)
    assert torch.equal(chosen, dense)
    assert not (
        recent_in_bucket(key_codes[0], at_N, windows) & near_keys(at_N, length, windows)
    ).any()


@pytest.fixture(scope="module")
def model() -> DeepSeekModel:
    torch.manual_seed(0)
    config = ModelConfig(
        vocab_size=97,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=128,
        initializer_range=0.2,
    )
    return DeepSeekModel(config).eval()


def fit(model: DeepSeekModel, state: Path, **changes: Any) -> dict[int, LinearHash]:
    ids = torch.randint(97, (2, 96), generator=torch.Generator().manual_seed(1))
    return distill_hashes(model, ids, SMALL, [1, 2], state, **changes)


def test_an_interrupted_run_goes_on_and_ends_with_the_same_bits(
    model: DeepSeekModel, tmp_path: Path
) -> None:
    whole = fit(model, tmp_path / "whole")
    assert whole.keys() == {1, 2}

    def stop(done: int, total: int, _: str) -> None:
        assert total == 3
        if done == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fit(model, tmp_path / "cut", progress=stop)
    assert [folder.name for folder in (tmp_path / "cut").iterdir()] == ["step-00000001"]
    resumed = fit(model, tmp_path / "cut")
    for layer, one in whole.items():
        assert all(
            torch.equal(part, resumed[layer].tensors()[name])
            for name, part in one.tensors().items()
        )


def test_a_state_of_other_texts_makes_room(model: DeepSeekModel, tmp_path: Path) -> None:
    fit(model, tmp_path, identity="one text")

    def stop(done: int, _total: int, _what: str) -> None:
        if done == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fit(model, tmp_path, identity="another", progress=stop)
    assert [folder.name for folder in tmp_path.iterdir()] == ["step-00000001"]


def test_a_resumed_run_returns_the_layers_that_are_asked_for(
    model: DeepSeekModel, tmp_path: Path
) -> None:
    fit(model, tmp_path)
    ids = torch.randint(97, (2, 96), generator=torch.Generator().manual_seed(1))
    assert distill_hashes(model, ids, SMALL, [2], tmp_path).keys() == {2}


def test_short_texts_are_refused(model: DeepSeekModel, tmp_path: Path) -> None:
    with pytest.raises(TrainError, match="far keys"):
        distill_hashes(model, torch.ones(1, 40, dtype=torch.long), SMALL, [1], tmp_path)


def test_the_best_keys_bound_what_any_way_keeps(model: DeepSeekModel) -> None:
    ids = torch.randint(97, (2, 128))
    windows = SMALL.windows
    random = {layer: RandomHash(SMALL.num_buckets, 8, layer) for layer in range(3)}
    ways = {
        "local": local_keys(windows),
        "hash": hashed_keys(windows, 1, random),
        "best": best_keys(windows, 18 + 16),
    }
    for layer, kept in attention_kept(model, ids, ways, queries=8, first_layer=1):
        assert layer >= 1
        assert (kept["local"].recall <= kept["hash"].recall).all()
        assert (kept["hash"].recall <= kept["best"].recall + 1e-6).all()
        assert (kept["best"].keys == 34).all()


@pytest.mark.parametrize("positions", ["learned", "rope"])
@torch.no_grad()
def test_the_heads_see_what_they_see_in_the_model(positions: str) -> None:
    torch.manual_seed(0)
    config = ModelConfig(
        vocab_size=97,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        initializer_range=0.2,
        positional_encoding=positions,
    )
    model = DeepSeekModel(config).eval()
    ids = torch.randint(97, (2, 20))
    cache = KVCache()
    model(ids, cache=cache)
    for layer, texts in stream_layers(model, ids):
        for row, inputs in enumerate(texts):
            torch.testing.assert_close(inputs.key_GTK, cache.layers[layer].keys[row])
            torch.testing.assert_close(inputs.value_GTK, cache.layers[layer].values[row])
