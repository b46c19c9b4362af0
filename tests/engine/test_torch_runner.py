"""A sequence in a batch gives the same result as alone, for every architecture."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_expert import save_expert
from tiny_model import tiny_model

from deepseek.engine.load import Loaded
from deepseek.engine.torch_runner import TorchRunner
from deepseek.kernels import decode_attention
from deepseek.model.experts.module import ExpertModule
from deepseek.runner import Chunk, RunnerOutput, SequenceState

TOLERANCE = 1e-4
STEEP = 5e-4
"""Tolerances of `TorchRunner` on fp32 logits: without dynamic positions, and with them, whose steep
random biases amplify rounding.
"""

MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "dense": ("dense", {}),
    "window": ("window", {}),
    "alibi": ("dense", {"positional_encoding": "alibi"}),
    "learned": ("dense", {"positional_encoding": "learned"}),
    "dpe": ("dpe", {}),
    "dmoe": ("dmoe", {}),
    "topk": ("dmoe", {"routing_strategy": "topk"}),
    "every expert": ("dmoe", {"routing_strategy": "dense"}),
    "shared pool": ("dmoe", {"expert_sharing": 2}),
    "gemma3": (
        "window",
        {
            "full_attention_layers": [1],
            "hidden_act": "gelu_pytorch_tanh",
            "local_rope_theta": 100.0,
            "post_norms": True,
            "qk_norm": "head",
            "query_pre_attn_scalar": 5.0,
            "scale_embeddings": True,
            "unit_offset_norms": True,
        },
    ),
    "lsh": ("lsh", {}),
    "lsh, one round": ("lsh", {"lsh_rounds": 1}),
    "lsh with dpe": ("lsh", {"positional_encoding": "dpe", "train_len": 16}),
    "lsh with a far field": ("lsh", {"lsh_far_field": True, "lsh_local_window": 8}),
}


@dataclass(frozen=True)
class Text:
    """The chunks of one sequence, and the experts that it arms."""

    chunks: tuple[tuple[int, ...], ...]
    experts: tuple[str, ...]


def texts(names: tuple[str, ...]) -> st.SearchStrategy[Text]:
    """Return texts whose prompts of up to three chunks are followed by single tokens."""
    token = st.integers(3, 250)
    prompt = st.lists(st.lists(token, min_size=1, max_size=6), min_size=1, max_size=2)
    decoded = st.lists(st.lists(token, min_size=1, max_size=1), max_size=8)
    chosen = st.lists(st.sampled_from(names), unique=True) if names else st.just([])
    return st.builds(
        lambda first, more, experts: Text(tuple(map(tuple, first + more)), tuple(experts)),
        prompt,
        decoded,
        chosen,
    )


def runs(loaded: Loaded, written: Sequence[Text], order: Sequence[int]) -> list[RunnerOutput]:
    """Compute texts in steps and return each text's outputs, for all tokens.

    Args:
        loaded: the model.
        written: the texts.
        order: number of texts in each step; texts take turns.
    """
    runner = TorchRunner(loaded.model)
    states: list[SequenceState] = [
        runner.start(loaded.model.experts.choose(text.experts), 64) for text in written
    ]
    pending = [list(text.chunks) for text in written]
    logits: list[list[torch.Tensor]] = [[] for _ in written]
    experts: list[list[str | None]] = [[] for _ in written]
    queue = list(range(len(written)))
    for step in range(1000):
        batch, queue = (queue[: (n := order[step % len(order)])], queue[n:])
        chunks = [Chunk(states[i], ids, len(ids)) for i in batch for ids in [pending[i].pop(0)]]
        output = runner.forward(chunks)
        row = 0
        for i, chunk in zip(batch, chunks, strict=True):
            rows = slice(row, row := row + chunk.keep)
            logits[i].append(output.logits_RV[rows])
            experts[i] += output.experts[rows]
        queue += [i for i in batch if pending[i]]
        if not queue:
            break
    return [
        RunnerOutput(torch.cat(parts), tuple(names), ())
        for parts, names in zip(logits, experts, strict=True)
    ]


@pytest.fixture(scope="module", params=MODELS)
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Loaded:
    kind, changes = MODELS[request.param]
    loaded = tiny_model(kind, **changes)
    folder = tmp_path_factory.mktemp("packs")
    for seed, name in enumerate(("one", "two")):
        loaded.model.experts.plug(save_expert(loaded, name, folder, seed=seed))
    return loaded


@settings(max_examples=6)
@given(
    written=st.lists(texts(("one", "two")), min_size=2, max_size=4),
    order=st.lists(st.integers(1, 4), min_size=1, max_size=4),
)
def test_a_text_beside_others_is_as_alone(
    model: Loaded, written: list[Text], order: list[int]
) -> None:
    beside = runs(model, written, order)
    for text, output in zip(written, beside, strict=True):
        (alone,) = runs(model, [text], [1])
        tolerance = STEEP if model.model.config.positional_encoding == "dpe" else TOLERANCE
        torch.testing.assert_close(output.logits_RV, alone.logits_RV, atol=tolerance, rtol=0)
        assert output.experts == alone.experts
        assert all((name is not None) == bool(text.experts) for name in output.experts[1:])


def test_a_batch_is_as_the_model_over_whole_texts(model: Loaded) -> None:
    """The cached states of a batch add up to one pass without a cache."""
    written = [
        Text(((5, 6, 7, 8, 9), *((token,) for token in range(20, 31))), ()),
        Text(((9,), (8,), *((token,) for token in range(40, 60))), ()),
        Text((tuple(range(100, 130)), (3,)), ()),
    ]
    for text, output in zip(written, runs(model, written, [3]), strict=True):
        ids = torch.tensor([[token for chunk in text.chunks for token in chunk]])
        with model.model.experts.arming(None):
            expected = model.model(ids, use_cache=False).logits[0]
        # The two use different kernels, and the parameters of a tiny model amplify rounding.
        torch.testing.assert_close(output.logits_RV, expected, atol=1e-3, rtol=0)


def test_sequences_with_the_same_experts_share_one_call(tmp_path: Path) -> None:
    loaded = tiny_model()
    loaded.model.experts.plug(save_expert(loaded, "one", tmp_path))
    choose = loaded.model.experts.choose
    runner = TorchRunner(loaded.model)
    states = [runner.start(choose(names), 8) for names in ((), ("one",), (), ("one",))]
    runner.forward([Chunk(state, (5, 6)) for state in states])
    calls: list[int] = []
    for module in loaded.model.experts.choose(("one",)).roster.modules:  # type: ignore[union-attr]
        assert isinstance(module, ExpertModule)
        module.at(1).register_forward_hook(lambda _, inputs, __: calls.append(len(inputs[0])))
    output = runner.forward([Chunk(state, (7,)) for state in states])
    assert calls == [2]
    assert output.experts == (None, "one", None, "one")


@pytest.mark.parametrize(
    ("kind", "calls"),
    [("dense", 3), ("window", 3), ("alibi", 3), ("dpe", 3), ("lsh, one round", 3), ("lsh", 1)],
)
def test_decoding_sequences_attend_in_one_call_of_the_kernel(
    kind: str, calls: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In every layer of these kinds; with several rounds of hashing, only in exact layers."""
    base, changes = MODELS[kind]
    runner = TorchRunner(tiny_model(base, **changes).model)
    states = [runner.start(None, 40) for _ in range(3)]
    runner.forward([Chunk(state, range(3, 12 + n), 0) for n, state in enumerate(states)])
    batches: list[int] = []
    attend = decode_attention.attend

    def counted(query_RHK: torch.Tensor, *arguments: Any) -> torch.Tensor:
        batches.append(len(query_RHK))
        return attend(query_RHK, *arguments)

    monkeypatch.setattr(decode_attention, "attend", counted)
    runner.forward([Chunk(state, (5,)) for state in states])
    assert batches == [3] * calls
    runner.forward([Chunk(states[0], (6,)), Chunk(states[1], (7, 8)), Chunk(states[2], (9,))])
    assert batches == [3] * calls + [2] * calls
    assert [state.length for state in states] == [11, 13, 13]
