"""The generations that answer one HTTP request, merged into one stream of events."""

import asyncio
import time
from collections import Counter
from collections.abc import AsyncIterator, Sequence
from functools import partial

from deepseek.infer.engine import Generation
from deepseek.infer.request import TokenEvent, Usage
from deepseek.server.errors import ApiError
from deepseek.server.metrics import Metrics


class Job:
    """Generations under way; `close` must be called, and ends what has not ended.

    Args:
        generations: in the order of the choices in the reply.
        choices: how many of them, one after the other, share a prompt.
        seconds: after which all of them are given up.
    """

    def __init__(self, generations: Sequence[Generation], choices: int, metrics: Metrics, seconds: float) -> None:
        self.generations, self._choices, self._metrics = generations, choices, metrics
        self._queue: asyncio.Queue[tuple[int, TokenEvent]] = asyncio.Queue()
        for index, generation in enumerate(generations):
            generation.subscribe(partial(self._take, index))
        self._started, self._seconds, self._expired = time.perf_counter(), seconds, False
        self._timer = asyncio.get_running_loop().call_later(seconds, self._expire)

    async def events(self) -> AsyncIterator[tuple[int, TokenEvent]]:
        """Yield the events of all generations as they come, with the number of the choice.

        Raises `ApiError` if one fails or takes too long.
        """
        left = len(self.generations)
        first = True
        while left:
            index, event = await self._queue.get()
            if first:
                self._metrics.first_token.observe(time.perf_counter() - self._started)
            first = False
            self._check(event)
            left -= event.finish_reason is not None
            yield index, event

    def usage(self) -> Usage:
        """Return what all generations used together; a prompt that several share counts once."""
        each = [generation.usage for generation in self.generations]
        experts: Counter[str | None] = Counter()
        for usage in each:
            experts.update(usage.experts)
        prompts = each[:: self._choices]
        prompt, cached = (sum(getattr(u, name) for u in prompts) for name in ("prompt_tokens", "cached_tokens"))
        return Usage(prompt, cached, sum(usage.completion_tokens for usage in each), experts)

    def close(self) -> None:
        """Cancel what still runs and count what was used."""
        self._timer.cancel()
        for generation in self.generations:
            generation.cancel()
        self._metrics.count(self.usage())

    def _take(self, index: int, event: TokenEvent) -> None:
        self._queue.put_nowait((index, event))

    def _expire(self) -> None:
        self._expired = True
        for generation in self.generations:
            generation.cancel()

    def _check(self, event: TokenEvent) -> None:
        if event.finish_reason == "error":
            raise ApiError(500, f"The generation failed: {event.error}", code="internal_error")
        if event.finish_reason == "cancelled":
            if self._expired:
                raise ApiError(504, f"The answer took longer than {self._seconds:g} s; ask for less.", code="timeout")
            raise ApiError(503, "The server stopped this answer because it is shutting down.", code="draining")
