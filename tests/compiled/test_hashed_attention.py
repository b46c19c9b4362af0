"""LSH attention in the compiled step: candidates, buckets, and outputs given the buckets."""

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from quantised_twin import quantised_twin
from torch import Tensor

from deepseek.compiled.abi import PAGE
from deepseek.compiled.candidates import choose, list_tokens
from deepseek.compiled.runner import CompiledRunner, supports
from deepseek.compiled.state import CompiledState
from deepseek.errors import ConfigError
from deepseek.kernels.lsh.far_field import PER_LEVEL, edges
from deepseek.kernels.lsh.reference import candidate_mask
from deepseek.model.attention.hash import LinearHash, plug_hashes
from deepseek.model.config import ModelConfig
from deepseek.model.transformer import DeepSeekModel
from deepseek.runner import Chunk

SHAPE: dict[str, Any] = {
    "vocab_size": 90,
    "hidden_size": 96,
    "intermediate_size": 100,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "initializer_range": 0.1,
    "attention": "lsh",
    # One hashed layer, so that the step's buffers keep its buckets.
    "lsh_exact_layers": [0, 2],
}
HASHED = 1
KINDS: dict[str, dict[str, Any]] = {
    "plain": {},
    "dpe": {"positional_encoding": "dpe", "train_len": 64},
    "alibi": {"positional_encoding": "alibi", "num_key_value_heads": 1},
    "far field": {"lsh_far_field": True, "qk_norm": "head"},
    "heads of 80": {"head_dim": 80, "query_pre_attn_scalar": 30.0, "num_key_value_heads": 4},
}


class Recorded:
    """A hash that returns given codes."""

    def __init__(self, key_codes: Tensor, query_codes: Tensor) -> None:
        self.codes = (key_codes, query_codes)

    def key_codes(self, _key: Tensor) -> Tensor:
        return self.codes[0]

    def query_codes(self, _query: Tensor, _probes: int) -> Tensor:
        return self.codes[1]


def build(**changes: Any) -> DeepSeekModel:
    torch.manual_seed(0)
    model = DeepSeekModel(ModelConfig(**SHAPE | changes)).eval()
    for name, parameter in model.named_parameters():
        if "score_bias" in name:
            torch.nn.init.normal_(parameter, std=0.01)
    return model


def recorded(runner: CompiledRunner, state: CompiledState) -> Recorded:
    """Return the buckets that the step found in the hashed layer."""
    part = state.parts[0]
    shape = part.shape
    pages = [page[HASHED * shape.layer_bytes :] for page in part.pages]
    codes = [page[shape.codes_start : shape.sums_start].view(np.uint16) for page in pages]
    by_page = [one.reshape(shape.groups * shape.rounds, PAGE) for one in codes]
    keys = np.concatenate(by_page, 1)[:, : state.length].astype(np.int64)
    queries = runner._work._buffers["query_codes"][: state.length]
    heads = torch.from_numpy(queries.swapaxes(0, 1).copy())
    return Recorded(torch.from_numpy(keys)[None], heads[None])


def agreement(a: Tensor, b: Tensor) -> float:
    return float((a == b).double().mean())


@settings(max_examples=25, deadline=None)
@given(
    kind=st.sampled_from(list(KINDS)),
    local=st.integers(1, 200),
    sinks=st.integers(0, 90),
    window=st.integers(1, 40),
    buckets=st.integers(1, 9),
    probes=st.integers(1, 9),
    rounds=st.integers(1, 3),
    length=st.integers(1, 300),
)
@torch.no_grad()
def test_logits_are_those_of_the_model_given_the_buckets(
    kind: str,
    local: int,
    sinks: int,
    window: int,
    buckets: int,
    probes: int,
    rounds: int,
    length: int,
) -> None:
    model = build(
        **KINDS[kind],
        lsh_local_window=local,
        lsh_sinks=sinks,
        lsh_bucket_window=window,
        lsh_num_buckets=buckets,
        lsh_probes=probes,
        lsh_rounds=rounds,
    )
    ids = torch.randint(0, 90, (length,), generator=torch.Generator().manual_seed(1)).tolist()
    runner = CompiledRunner(model)
    state = runner.start(None, 512)
    found = runner.forward([Chunk(state, ids, length)]).logits_RV
    twin = quantised_twin(model)
    attention: Any = twin.layers[HASHED].attention
    seen: dict[str, Tensor] = {}
    own = attention.hash

    class Watched(Recorded):
        """Recorded codes; also stores the codes of the model's own hash."""

        def key_codes(self, key: Tensor) -> Tensor:
            seen["keys"] = own.key_codes(key)
            return self.codes[0]

        def query_codes(self, query: Tensor, probes: int) -> Tensor:
            seen["queries"] = own.query_codes(query, probes)
            return self.codes[1]

    del attention.hash
    attention.hash = Watched(*recorded(runner, state).codes)
    expected = twin(torch.tensor([ids])).logits[0]
    assert (found - expected).norm() < 0.03 * expected.norm()
    if length > local:
        # Quantised activations may change a bucket where two have nearly the same score.
        least = 0.9 if length > 50 else 0.5
        assert agreement(seen["keys"], attention.hash.codes[0]) > least
        assert agreement(seen["queries"], attention.hash.codes[1]) > least


@settings(max_examples=100, deadline=None)
@given(
    st.integers(1, 200),
    st.integers(0, 140),
    st.integers(1, 70),
    st.integers(1, 5),
    st.integers(1, 3),
    st.integers(0, 299),
    st.randoms(use_true_random=False),
)
def test_candidates_are_those_of_the_reference(
    local: int, sinks: int, window: int, buckets: int, rounds: int, position: int, random: Any
) -> None:
    total = 300
    generator = np.random.default_rng(random.randrange(1 << 30))
    codes = generator.integers(0, buckets, (rounds, total))
    probes = int(generator.integers(1, buckets + 1))
    probed = np.stack([generator.permutation(buckets)[:probes] for _ in range(rounds)])
    pages = np.zeros((total // PAGE + 1, 8 + rounds * PAGE), np.uint16)
    for page, memory in enumerate(pages):
        own = codes[:, page * PAGE : (page + 1) * PAGE]
        memory[8:].reshape(rounds, PAGE)[:, : own.shape[1]] = own
    addresses = np.array([memory.ctypes.data for memory in pages])
    chosen = np.full(len(pages), -1)
    choose(chosen, addresses, 16, probed.ravel(), rounds, position, (local, sinks, window))
    positions, tokens = np.empty((2, total), np.int64)
    listed = chosen[: position // PAGE + 1]
    count = list_tokens(listed, addresses, 4, 2, positions, tokens)
    found = positions[:count]
    assert (tokens[:count] == addresses[found // PAGE] + 4 + 2 * (found % PAGE)).all()
    mask = candidate_mask(
        torch.from_numpy(probed.reshape(1, 1, 1, -1)),
        torch.from_numpy(codes[None, :, : position + 1]),
        bucket_window=window,
        local_window=local,
        sinks=sinks,
        rounds=rounds,
    )
    assert found.tolist() == mask[0, 0, 0].nonzero()[:, 0].tolist()


@pytest.mark.parametrize("per_head", [False, True])
@torch.no_grad()
def test_a_learned_hash_has_maps_of_its_own_for_each_head(per_head: bool) -> None:
    model = build(lsh_num_buckets=8, lsh_local_window=4, lsh_bucket_window=5, head_dim=32)
    if per_head:
        weights = [torch.randn(heads, 32, 8) for heads in (2, 4)]
        parts = (weights[0], torch.randn(2, 8), weights[1], torch.randn(4, 8))
        plug_hashes(model, {HASHED: LinearHash(*parts)})
    runner = CompiledRunner(model)
    state = runner.start(None, 256)
    ids = [(7 * i * i) % 90 for i in range(200)]
    runner.forward([Chunk(state, ids)])
    found = recorded(runner, state)
    twin = quantised_twin(model)
    attention: Any = twin.layers[HASHED].attention
    inputs: list[Any] = []
    compute = attention.inputs

    def watch(*arguments: Any) -> Any:
        inputs.append(compute(*arguments))
        return inputs[0]

    attention.inputs = watch
    twin(torch.tensor([ids]))
    keys = attention.hash.key_codes(inputs[0].plain_key_BGTK)
    queries = attention.hash.query_codes(inputs[0].plain_query_BHTK, 4)
    assert agreement(found.codes[0], keys) > 0.95
    assert agreement(found.codes[1], queries) > 0.9
    if per_head:
        other: Any = build(lsh_num_buckets=8, head_dim=32).layers[HASHED].attention
        assert agreement(found.codes[0], other.hash.key_codes(inputs[0].plain_key_BGTK)) < 0.5


def test_a_hash_of_another_kind_is_refused_by_name() -> None:
    class Custom(LinearHash):
        """A hash that the step does not support."""

    model = build(head_dim=32, lsh_num_buckets=2)
    parts = (torch.zeros(2, 32, 2), torch.zeros(2, 2), torch.zeros(4, 32, 2), torch.zeros(4, 2))
    attention: Any = model.layers[HASHED].attention
    attention.hash = Custom(*parts)
    assert not supports(model)
    with pytest.raises(ConfigError, match=r"hashes of the kind Custom\. Use TorchRunner"):
        CompiledRunner(model)


@pytest.mark.parametrize("blocks", [1, 2, 3, 7, 64, 1000, 12345])
def test_summaries_of_the_far_field_fit_the_space_for_them(blocks: int) -> None:
    from deepseek.compiled import far_field

    first, last = edges(torch.tensor([blocks]), blocks)
    assert int((first < last).sum()) <= far_field.SUMMARIES
    assert far_field.PER_LEVEL == PER_LEVEL
