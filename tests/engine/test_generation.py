"""A generation's events: none is lost when a loop over them is left early."""

import asyncio

import pytest
from tiny_model import tiny_model
from waiting import wait_for

from deepseek.engine.engine import Engine
from deepseek.engine.generation import Generation
from deepseek.engine.request import Request, TokenEvent
from deepseek.engine.sampler import Sampling

LONG = Request((5, 17, 80, 200, 33), Sampling(max_new_tokens=50), ignore_end=True)


async def first_events(generation: Generation, count: int) -> list[TokenEvent]:
    """Read at most `count` events, and leave the loop."""
    events: list[TokenEvent] = []
    async for event in generation:
        events.append(event)
        if len(events) == count:
            break
    return events


async def within_a_minute(generation: Generation) -> list[TokenEvent]:
    return await asyncio.wait_for(first_events(generation, 1000), 60)


@pytest.mark.parametrize("is_awaited", [False, True])
def test_events_that_a_coroutine_left_unread_are_those_of_the_next_loop(is_awaited: bool) -> None:
    with Engine(*tiny_model()) as engine:
        expected = list(engine.submit(LONG))
        generation = engine.submit(LONG)
        events = asyncio.run(first_events(generation, 3))
        wait_for(lambda: engine.stats().running == 0)  # so that the rest arrives while nobody reads
        events += asyncio.run(within_a_minute(generation)) if is_awaited else list(generation)
    assert events == expected


def test_a_coroutine_that_was_cancelled_may_come_back() -> None:
    """That is what `asyncio.wait_for` does when the time is up."""

    async def read(engine: Engine) -> list[list[TokenEvent]]:
        running, queued = engine.submit_all([LONG, LONG])
        reading = asyncio.create_task(first_events(queued, 1))
        await asyncio.sleep(0)  # until it waits
        reading.cancel()
        with pytest.raises(asyncio.CancelledError):
            await reading
        queued.cancel()
        await asyncio.to_thread(wait_for, lambda: sum(engine.stats().finished.values()) == 2)
        return [await within_a_minute(generation) for generation in (running, queued)]

    with Engine(*tiny_model(), max_running=1) as engine:
        whole, cancelled = asyncio.run(read(engine))
    assert len(whole) == 50
    assert [event.finish_reason for event in cancelled] == ["cancelled"]
