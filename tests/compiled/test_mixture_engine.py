"""The engine with the compiled runner, for a dense model and every kind of mixture: batches, prefix
cache, and experts plugged and unplugged beside native ones.
"""

from pathlib import Path
from typing import Any

import pytest
from tiny_expert import save_expert
from tiny_mixtures import MIXTURES
from tiny_model import tiny_model

from deepseek.compiled.runner import CompiledRunner
from deepseek.engine.engine import Engine
from deepseek.engine.load import Loaded
from deepseek.engine.request import Request, TokenEvent
from deepseek.engine.sampler import Sampling

PROMPTS = [(5, 17, 80, 200, 33), (9,), tuple(range(10, 41)), (7, 7, 7, 250, 250, 31, 100, 101)]
REQUESTS = [
    Request(prompt, Sampling(12, temperature=0.8, seed=n), ignore_end=True, logprobs=2)
    for n, prompt in enumerate(PROMPTS)
]
LONG = Request(PROMPTS[0], Sampling(30), ignore_end=True, logprobs=1)


@pytest.fixture(params=["dense", *MIXTURES])
def loaded(request: pytest.FixtureRequest) -> Loaded:
    fields: dict[str, Any] = {} if request.param == "dense" else MIXTURES[request.param]
    return tiny_model(head_dim=64, **fields)


def engine_of(loaded: Loaded, **options: Any) -> Engine:
    return Engine(*loaded, CompiledRunner(loaded.model), **options)


def together(engine: Engine, requests: list[Request]) -> list[list[TokenEvent]]:
    return [list(generation) for generation in [engine.submit(request) for request in requests]]


@pytest.mark.parametrize("with_expert", [False, True])
def test_alone_in_a_batch_and_behind_a_cached_prefix_the_same_bits(
    loaded: Loaded, with_expert: bool, tmp_path: Path
) -> None:
    if with_expert:
        loaded.model.experts.plug(save_expert(loaded, "always", tmp_path))
    with engine_of(loaded, prefill_chunk=8) as engine:
        batched = together(engine, REQUESTS)
        cached = together(engine, REQUESTS)
        assert engine.stats().cached_tokens == sum((len(prompt) - 1) // 8 * 8 for prompt in PROMPTS)
    with engine_of(loaded, prefill_chunk=8) as engine:
        alone = [events for one in REQUESTS for events in together(engine, [one])]
    assert batched == cached == alone
    spoken = {event.expert for events in batched for event in events}
    assert spoken == ({"always", None} if with_expert else {None})


def test_experts_come_and_go_between_steps(loaded: Loaded, tmp_path: Path) -> None:
    pack = save_expert(loaded, "always", tmp_path)
    with engine_of(loaded) as engine:
        plain = list(engine.submit(LONG))
        changed = []
        for number, event in enumerate(engine.submit(LONG)):
            changed.append(event)
            if number % 10 == 0:
                engine.plug(pack)
                with_expert = engine.submit(LONG)
                engine.unplug("always")
        assert changed == plain
        assert {event.expert for event in with_expert} == {"always"}
        assert list(engine.submit(LONG)) == plain
        assert engine.experts() == ()
