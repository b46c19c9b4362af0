"""The running generations of one HTTP request, and how they are submitted to the engine."""

import asyncio
import time
from collections import Counter
from collections.abc import AsyncIterator, Sequence
from dataclasses import replace
from functools import partial

from deepseek.engine.engine import Engine
from deepseek.engine.generation import Generation
from deepseek.engine.request import Request, TokenEvent, TokenUsage
from deepseek.errors import PackError
from deepseek.server.admission import Admission, Job
from deepseek.server.errors import ApiError
from deepseek.server.keys import Experts
from deepseek.server.metrics import Metrics

TRIES = 8
"""Maximum number of submissions of requests that must see the same experts, while these change."""


class GenerationJob(Job):
    """The running generations of one HTTP request; `close` must be called and cancels the rest.

    Args:
        generations: the generations, in the order of the choices in the reply.
        choices: number of consecutive generations that share a prompt (`n` in the request).
        admission: where the job is registered until it is closed.
        metrics: where its usage is counted.
        seconds: time limit in seconds.
        tells_cached: whether `usage` reports how much of the prompts came from the prefix cache,
            which all keys share.
    """

    def __init__(
        self,
        generations: Sequence[Generation],
        choices: int,
        admission: Admission,
        metrics: Metrics,
        *,
        seconds: float,
        tells_cached: bool,
    ) -> None:
        super().__init__(admission, generations, seconds)
        self.generations = generations
        self._choices = choices
        self._metrics = metrics
        self._tells_cached = tells_cached
        self._queue: asyncio.Queue[tuple[int, TokenEvent]] = asyncio.Queue()
        for index, generation in enumerate(generations):
            generation.subscribe(partial(self._take, index))
        self._started = time.perf_counter()

    async def events(self) -> AsyncIterator[tuple[int, TokenEvent]]:
        """Yield the events of all generations as they arrive, each with the index of its choice.

        Raises:
            ApiError: a generation failed, was cancelled or exceeded the time limit.
        """
        left = len(self.generations)
        first = True
        while left:
            index, event = await self._queue.get()
            self._check(event)
            if first:
                self._metrics.first_token.observe(time.perf_counter() - self._started)
            first = False
            left -= event.finish_reason is not None
            yield index, event

    def usage(self) -> TokenUsage:
        """Return the total usage for the reply; a prompt shared by several generations counts
        once.
        """
        usage = self._usage()
        return usage if self._tells_cached else replace(usage, cached_tokens=0)

    def close(self) -> None:
        """Cancel the unfinished generations and record the usage, unless all were still queued."""
        super().close()
        if any(generation.begun for generation in self.generations):
            self._metrics.count(self._usage())

    def _usage(self) -> TokenUsage:
        each = [generation.usage for generation in self.generations]
        experts: Counter[str | None] = Counter()
        for usage in each:
            experts.update(usage.experts)
        prompts = each[:: self._choices]
        return TokenUsage(
            sum(usage.prompt_tokens for usage in prompts),
            sum(usage.cached_tokens for usage in prompts),
            sum(usage.completion_tokens for usage in each),
            experts,
        )

    def _take(self, index: int, event: TokenEvent) -> None:
        self._queue.put_nowait((index, event))

    def _check(self, event: TokenEvent) -> None:
        if event.refused:
            raise ApiError(400, str(event.error), code="invalid_value")
        if event.finish_reason == "error":
            raise ApiError(500, f"The generation failed: {event.error}", code="internal_error")
        if event.finish_reason == "cancelled":
            raise self.cancelled()


def submit_within(
    engine: Engine, requests: Sequence[Request], allowed: Experts
) -> list[Generation]:
    """Submit requests that choose among the same experts, and use none but the allowed ones.

    All other plugged experts are denied to them. An expert that is plugged during the submission
    would not be denied, and only the later requests would see it. So all are submitted again if the
    set has changed meanwhile.

    Args:
        engine: the engine.
        requests: the requests.
        allowed: names of the allowed experts; None: all.

    Raises:
        ApiError: the experts keep changing (503), or an allowed one was unplugged just now (404).

    Other errors are raised as by `Engine.submit_all`.
    """
    for _ in range(TRIES):
        plugged = engine.experts()
        others = [info.name for info in plugged if allowed is not None and info.name not in allowed]
        try:
            generations = engine.submit_all([denying(request, others) for request in requests])
        except PackError:
            if allowed is None:
                raise
            # The engine's message suggests names of plugged experts.
            raise ApiError(
                404, "An expert of this request is not plugged any more; leave it out."
            ) from None
        if engine.experts() is plugged:  # every change makes a new tuple
            return generations
        cancel(generations)
    raise ApiError(503, "The experts are being changed; try again in a moment.", code="changing")


def denying(request: Request, names: Sequence[str]) -> Request:
    """Return a request with further experts that must not fire.

    Args:
        request: the request.
        names: names of the experts.
    """
    choice = request.experts
    return replace(request, experts=replace(choice, deny=(*choice.deny, *names)))


def cancel(generations: Sequence[Generation]) -> None:
    """Cancel generations whose client has left."""
    for generation in generations:
        generation.cancel()
