"""Rivals implemented in the benchmarks: DroPE in `position_length.py`, the learned indexer in
`hash_recall.py`.
"""

import sys
from importlib import import_module
from pathlib import Path
from types import ModuleType

import pytest
import torch
from torch import Tensor

from deepseek import DeepSeekModel, ModelConfig
from deepseek.kernels.lsh.intervals import Windows
from deepseek.train.hash.attention_inputs import HeadInputs, attention_scores

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
MODULES = ("code_rows", "long_rows", "position_length", "lightning_indexer", "results")
WINDOWS = Windows(local=8, sinks=2, bucket=8, num_buckets=4)


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch) -> dict[str, ModuleType]:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    for name in MODULES:
        monkeypatch.delitem(sys.modules, name, raising=False)
    return {name: import_module(name) for name in MODULES}


def test_drope_has_the_steps_of_the_others_on_the_same_rows(bench: dict[str, ModuleType]) -> None:
    steps_of = bench["position_length"].steps_of
    assert steps_of("scaffold", 2400) == 2100
    assert steps_of("scaffold", 2400) + steps_of("drope", 2400) == steps_of("rope", 2400)


def test_a_model_without_positions_takes_the_weights_of_one_that_rotates(
    bench: dict[str, ModuleType],
) -> None:
    shape = {
        "vocab_size": 16,
        "hidden_size": 32,
        "intermediate_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 1,
    }
    rotated = DeepSeekModel(ModelConfig(**shape, positional_encoding="rope")).eval()
    dropped = DeepSeekModel(ModelConfig(**shape, positional_encoding="none")).eval()
    dropped.load_state_dict(rotated.state_dict())
    sharper = bench["position_length"].scores_times(1.5)
    scaled = DeepSeekModel(ModelConfig(**shape, **sharper, positional_encoding="none")).eval()
    scaled.load_state_dict(rotated.state_dict())
    for weights in (dropped, scaled):
        for layer in weights.layers:
            layer.attention.q_proj.weight.data.mul_(30)  # far from uniform attention
    row = torch.arange(12)[None]
    with torch.no_grad():
        plain = dropped(row).logits
        for layer in dropped.layers:
            layer.attention.q_proj.weight.data.mul_(1.5)
        assert torch.allclose(scaled(row).logits, dropped(row).logits, atol=1e-5)
    assert not torch.allclose(plain, scaled(row).logits, atol=1e-3)


def test_only_the_first_copy_of_a_needle_is_left_out(bench: dict[str, ModuleType]) -> None:
    needle = torch.arange(100, 104)
    planted, without = bench["long_rows"].with_and_without(torch.arange(16), needle)
    assert planted.tolist() == [0, 1, 2, 3, *needle.tolist(), 8, 9, 10, 11, *needle.tolist()]
    assert without.tolist() == [*range(12), *needle.tolist()]


def test_the_summary_keeps_its_keys_and_goes_up_to_the_length(bench: dict[str, ModuleType]) -> None:
    bins = 4096 // bench["long_rows"].BIN
    record = {
        "loss": [float(number) for number in range(bins)],
        "top1": [10.0] * bins,
        "lines": [4.0] * bins,
        "completed": [1.0] * bins,
    }
    figures = bench["long_rows"].summary(record)
    assert figures["lines_2048_4096"] == 25.0
    assert (figures["loss_at_1024"], figures["loss_at_4096"]) == (3.0, bins - 1.0)
    assert {"top1_to_1024", "top1_1024_2048", "top1_2048_4096", "lines_to_1024"} <= figures.keys()


def heads(seed: int) -> HeadInputs:
    """Return inputs of four query heads and two key/value heads on a text of 96 tokens. Tokens are
    of eight kinds and attend to their own kind.
    """
    generator = torch.Generator().manual_seed(seed)
    kinds_GT = torch.randint(8, (2, 96), generator=generator)
    key_GTK = 4 * torch.eye(8)[kinds_GT]
    query_HTK = key_GTK.repeat_interleave(2, 0)
    return HeadInputs(query_HTK, key_GTK, query_HTK, key_GTK, torch.ones(2, 96, 8))


def unrotated(heads: Tensor, positions_N: Tensor) -> Tensor:
    return heads


@pytest.mark.parametrize("per_group", [False, True])
def test_a_trained_indexer_finds_more_attention_than_an_untrained_one(
    bench: dict[str, ModuleType], per_group: bool
) -> None:
    module = bench["lightning_indexer"]
    at_N = torch.arange(48, 96)
    recall = {}
    for steps in (0, 150):
        settings = module.IndexerSettings(per_group=per_group, steps=steps, learning_rate=1e-2)
        fitted = module.fit_indexer([heads(0), heads(1)], settings, WINDOWS, unrotated)
        inputs = heads(2)
        scores_HNS = attention_scores(inputs, at_N)
        chosen_HNS = module.indexed_keys(WINDOWS, 24, {0: fitted})(0, inputs, at_N, scores_HNS)
        assert (chosen_HNS.sum(-1) == 24).all()
        assert not chosen_HNS[scores_HNS.isinf()].any(), "a key after its query"
        recall[steps] = float((scores_HNS.softmax(-1) * chosen_HNS).sum(-1).mean())
    assert recall[150] > recall[0] + 0.1


def test_the_cost_of_an_indexer_grows_with_the_keys(bench: dict[str, ModuleType]) -> None:
    fitted = bench["lightning_indexer"].Indexer(1, 4, heads(0), unrotated)
    # Each of four heads: a dot product of width eight, and its weight.
    assert fitted.multiply_adds(2000) - fitted.multiply_adds(1000) == 1000 * 4 * 9
