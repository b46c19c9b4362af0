"""Keys and values of the layers below an expert are shared by all sequences that agree there;
replies are bit for bit those without a prefix cache.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_model import tiny_model

from deepseek.compiled.runner import CompiledRunner
from deepseek.engine.engine import Engine
from deepseek.engine.load import Loaded
from deepseek.engine.prefix import Restored, restore_within
from deepseek.engine.request import ExpertChoice, Request, TokenEvent
from deepseek.engine.sampler import Sampling
from deepseek.engine.scheduler import Scheduler
from deepseek.engine.sequence import activate
from deepseek.engine.torch_runner import TorchRunner
from deepseek.engine.vocabulary import Vocabulary
from deepseek.model.experts import ExpertModule
from deepseek.model.layer_parts import choose_cuts, layer_parts
from deepseek.runner import Runner

LAYERS = {
    "top": [4],
    "upper": [3, 4],
    "middle": [2, 3, 4],
    "low": [1, 2, 3, 4],
    "apart": [1, 4],
    "bottom": [0, 1],
}
COMPILED = {
    "hidden_size": 64,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 64,
    "max_position_embeddings": 256,
}
NORMED = {
    "hidden_act": "gelu_pytorch_tanh",
    "post_norms": True,
    "scale_embeddings": True,
    "sliding_window": 30,
    "full_attention_layers": [1],
    "local_rope_theta": 100.0,
}
COMPILED_KINDS: dict[str, tuple[str, dict[str, Any]]] = {
    "compiled": ("dense", COMPILED),
    "compiled dpe": ("dpe", COMPILED),
    "compiled dpe, normed": ("dpe", COMPILED | NORMED),
    "compiled mixture": ("dmoe", COMPILED),
    "compiled lsh": ("lsh", COMPILED | {"lsh_far_field": True}),
}
KINDS = [*COMPILED_KINDS, "dense", "lsh", "dpe", "dmoe", "normed"]


@dataclass(frozen=True)
class Ask:
    """A request: its length, the token at which it diverges from the others, and its experts."""

    length: int
    leaves: int
    experts: tuple[str, ...]
    scored: bool

    def request(self) -> Request:
        ids = [(7 * i * i + 3 * i) % 80 + 3 for i in range(self.length)]
        ids[self.leaves :] = [90] * (self.length - self.leaves)
        return Request(
            tuple(ids),
            Sampling(max_new_tokens=3),
            ExpertChoice(self.experts),
            ignore_end=True,
            logprobs=3,
            prompt_logprobs=self.scored,
            scored_from=self.length // 2 + 1 if self.scored else 1,
        )


ASKS = st.builds(
    lambda length, leaves, experts, scored: Ask(length, min(leaves, length), experts, scored),
    st.integers(2, 56),
    st.integers(0, 60),
    st.lists(st.sampled_from(sorted(LAYERS)), max_size=3, unique=True).map(tuple),
    st.booleans(),
)


class Bench:
    """A model with experts at several layers, and its runner.

    Args:
        loaded: the model.
        runner: the runner.
        together: maximum number of requests in a batch; 1 if results depend on the batch.
    """

    def __init__(self, loaded: Loaded, runner: Runner, together: int) -> None:
        self.model = loaded.model
        self.runner = runner
        self.together = together
        self.vocabulary = Vocabulary(*loaded)
        self.alone = cache(self._alone)

    def run(self, asked: Sequence[Ask], scheduler: Scheduler, divided: bool) -> list[object]:
        """Return all events and prompt log probabilities of requests that are submitted at once."""
        sequences = []
        events: list[list[TokenEvent]] = []
        for ask in asked:
            divides = scheduler.runner.divides if divided else lambda _: False
            block = scheduler.prefill_chunk
            one = activate(ask.request(), self.model, self.vocabulary, block, divides)
            told: list[TokenEvent] = []
            one.deliver = told.append
            sequences.append(one)
            events.append(told)
        scheduler.waiting.extend(sequences)
        while not scheduler.idle:
            scheduler.step()
            held = sum(one.state.nbytes for one in sequences if one.state is not None)
            assert held <= scheduler.reserved
            assert scheduler.reserved + scheduler.prefixes.nbytes <= scheduler.cache_bytes
        assert scheduler.reserved == 0
        return [(told, one.prompt_logprobs) for told, one in zip(events, sequences, strict=True)]

    def _alone(self, ask: Ask, block: int) -> object:
        """Return the same for one request alone, without a prefix cache."""
        return self.run([ask], Scheduler(self.runner, prefill_chunk=block), False)[0]


def bench(kind: str) -> Bench:
    other = ("dense", NORMED) if kind == "normed" else (kind, {})
    shape, fields = COMPILED_KINDS.get(kind, other)
    loaded = tiny_model(shape, num_hidden_layers=5, **fields)
    model = loaded.model
    for seed, (name, layers) in enumerate(LAYERS.items()):
        torch.manual_seed(seed)
        module = ExpertModule.beside(model.layers, name, layers, 16, seed=seed)
        for layer in layers:
            torch.nn.init.normal_(module.at(layer).down_proj, std=0.3)
            module.set_gate(layer, torch.randn(module.hidden_size + 1) * 0.3)
        pack = module.requires_grad_(False).to_pack(model.experts.base, "Apache-2.0")
        model.experts.plug(pack)
    if kind in COMPILED_KINDS:
        return Bench(loaded, CompiledRunner(model), 3)
    return Bench(loaded, TorchRunner(model), 1)


@pytest.fixture(scope="module", params=KINDS)
def kind_of_bench(request: pytest.FixtureRequest) -> Bench:
    return bench(request.param)


@settings(max_examples=5)
@given(
    rounds=st.lists(st.lists(ASKS, min_size=1, max_size=3), min_size=2, max_size=4),
    block=st.sampled_from([5, 8, 16]),
    budget=st.sampled_from([150_000, 400_000, 1 << 30]),
)
def test_what_is_shared_changes_no_bit(
    rounds: list[list[Ask]], block: int, budget: int, kind_of_bench: Bench
) -> None:
    bench = kind_of_bench
    scheduler = Scheduler(
        bench.runner, cache_bytes=budget, max_running=bench.together, prefill_chunk=block
    )
    for asked in rounds:
        expected = [bench.alone(ask, block) for ask in asked]
        assert bench.run(asked, scheduler, True) == expected


@pytest.mark.parametrize("kind", COMPILED_KINDS)
def test_whole_pages_are_shared_part_by_part(kind: str) -> None:
    one = bench(kind)
    scheduler = Scheduler(one.runner, prefill_chunk=32)
    for experts in [(), ("top",), ("upper",), ("middle", "top"), ("top",)]:
        ask = Ask(200, 200, experts, False)
        assert one.run([ask], scheduler, True) == [one.alone(ask, 32)]
    assert (scheduler.shared_tokens, scheduler.cached_tokens) == (3 * 192, 192)


def test_a_prompt_read_once_serves_every_set_that_begins_above() -> None:
    one = bench("compiled")
    assert choose_cuts(5, one.model.experts.first_layers) == (2, 3, 4)
    scheduler = Scheduler(one.runner, prefill_chunk=8)
    shared = []
    for experts in [(), ("top",), ("upper",), ("middle", "top"), ("low",), ("apart",), ("top",)]:
        before = scheduler.shared_tokens, scheduler.cached_tokens
        one.run([Ask(50, 50, experts, False)], scheduler, True)
        shared.append((scheduler.shared_tokens - before[0], scheduler.cached_tokens - before[1]))
    # All 48 tokens of full blocks are shared, even with an expert in the middle. Experts that begin
    # below every cut share nothing, and a repeated set takes all its layers from the cache.
    assert shared == [(0, 0), (48, 0), (48, 0), (48, 0), (0, 0), (0, 0), (0, 48)]


def test_experts_with_the_same_ones_below_share_up_to_the_first_other() -> None:
    one = bench("compiled")
    scheduler = Scheduler(one.runner, prefill_chunk=8)
    one.run([Ask(50, 50, ("low",), False)], scheduler, True)
    assert scheduler.shared_tokens == 0
    one.run([Ask(50, 50, ("low", "top"), False)], scheduler, True)
    assert scheduler.shared_tokens == 48


def test_a_chat_goes_on_with_other_experts_from_the_first_one_on() -> None:
    one = bench("dense")
    tokenizer = tiny_model().tokenizer
    turns = [(), ("top",), ("upper", "top"), ()]
    with Engine(one.model, tokenizer, one.runner, prefill_chunk=8) as engine:
        for number, experts in enumerate(turns):
            request = Ask(20 + 10 * number, 60, experts, False).request()
            told = [event.token_id for event in engine.submit(request)]
            with Engine(one.model, tokenizer, one.runner, prefill_chunk=8) as fresh:
                assert told == [event.token_id for event in fresh.submit(request)]
        stats = engine.stats()
    # Turn 2 reuses the two blocks of turn 1, turn 3 the three of turn 2; turn 4 reuses all layers
    # of turn 1's two blocks, and the lower layers of turn 3's other three.
    assert (stats.shared_tokens, stats.cached_tokens) == (16 + 24 + 24, 16)


@pytest.mark.parametrize("kind", ["dense", "compiled"])
def test_a_pass_may_resume_above_all_layers_of_an_expert(kind: str) -> None:
    one = bench(kind)
    scheduler = Scheduler(one.runner, prefill_chunk=8)
    shared = []
    for experts in [("bottom",), ("bottom", "top"), ("bottom", "upper"), ("bottom",)]:
        ask = Ask(40, 40, experts, False)
        assert one.run([ask], scheduler, True) == [one.alone(ask, 8)]
        shared.append(scheduler.shared_tokens)
    assert shared == [0, 32, 64, 64]


@pytest.mark.parametrize("shape", ["dense", "dmoe"])
@pytest.mark.parametrize("runner", [CompiledRunner, TorchRunner])
def test_what_was_stored_before_a_plug_at_other_layers_serves_after_it(
    shape: str, runner: Callable[[Any], Runner]
) -> None:
    model, tokenizer = tiny_model(shape, num_hidden_layers=8, **COMPILED)
    request = Ask(200, 200, (), False).request()
    module = ExpertModule.beside(model.layers, "low", [3, 4], 16)
    pack = module.requires_grad_(False).to_pack(model.experts.base, "Apache-2.0")
    told = []
    with Engine(model, tokenizer, runner(model)) as engine:
        for change in (engine.plug, None, None, engine.unplug, None):
            told.append([event.token_id for event in engine.submit(request)])
            if change is not None:
                change(pack if change == engine.plug else "low")
        cached = engine.stats().cached_tokens
    assert told == [told[0]] * 5 and len(told[0]) == 3
    assert cached >= 2 * 192, "a second request with the same parts takes all from the cache"


def test_parts_cover_all_layers_once() -> None:
    parts = layer_parts(9, (3, 6))
    assert [part.cached for part in parts] == [range(4), range(4, 7), range(7, 9)]
    assert [part.gated for part in parts] == [range(3), range(3, 6), range(6, 9)]
    assert [part.cut for part in parts] == [3, 6, None]
    (whole,) = layer_parts(9, ())
    assert (whole.cached, whole.gated, whole.cut) == (range(9), range(9), None)


def test_cuts_are_where_most_experts_begin_and_pay() -> None:
    assert choose_cuts(30, ()) == (27,)
    assert choose_cuts(30, (27, 24, 24, 0, 5)) == (24, 27)
    assert choose_cuts(30, (20, 21, 22, 22, 23, 23)) == (22, 23, 27)
    assert choose_cuts(3, ()) == ()


class Part:
    """A segment of 100 bytes with a residual stream of `stream_bytes`."""

    def __init__(self, stream_bytes: int) -> None:
        self.nbytes = 100
        self.stream_bytes = stream_bytes


def test_streams_that_do_not_fit_the_budget_are_left_out() -> None:
    lower = [Part(10) for _ in range(4)]
    upper = [Part(0)]
    assert restore_within([lower, upper], 100) == Restored([*lower, *upper], 4, 30)
    assert restore_within([lower, upper], 29) == Restored([*lower[:3], *upper], 3, 20)
    assert restore_within([lower, []], 0) == Restored([], 0, 0)
