"""The caller's end of a request: events as they come, in a thread or in a coroutine."""

import asyncio
import contextlib
import threading
from collections import deque
from collections.abc import AsyncIterator, Callable, Iterator

from deepseek.infer.active import ActiveSequence
from deepseek.infer.request import TokenEvent, TokenLogprob, Usage


class Generation:
    """A request under way: iterate over its `TokenEvent`s, in one thread (`for`) or one coroutine (`async for`).

    Attributes:
        request: what was asked.
    """

    def __init__(self, sequence: ActiveSequence) -> None:
        self.request = sequence.request
        self._sequence = sequence
        self._events: deque[TokenEvent] = deque()
        self._over = False
        self._arrived = threading.Condition()
        self._wake: Callable[[], object] | None = None
        sequence.deliver = self._put

    def __iter__(self) -> Iterator[TokenEvent]:
        """Yield events as they come, waiting for them; the last one has a finish reason."""
        while not self._over:
            with self._arrived:
                self._arrived.wait_for(lambda: self._events)
                event = self._next()
            yield event

    async def __aiter__(self) -> AsyncIterator[TokenEvent]:
        """Yield events as they come, without blocking the event loop. Leaving early does not cancel."""
        loop = asyncio.get_running_loop()
        while not self._over:
            ready = loop.create_future()
            with self._arrived:
                event = self._next() if self._events else None
                self._wake = lambda ready=ready: loop.call_soon_threadsafe(_resolve, ready)
            if event is None:
                await ready
            else:
                yield event

    def cancel(self) -> None:
        """End it before the next step; its last event says "cancelled". It may have finished already. Thread safe."""
        self._sequence.cancelled = True

    @property
    def usage(self) -> Usage:
        """What it has used so far."""
        return self._sequence.usage

    @property
    def prompt_logprobs(self) -> tuple[TokenLogprob | None, ...]:
        """Of each prompt token, None for the first, which nothing predicts; complete before the first event.

        Empty unless the request asks for them.
        """
        return tuple(self._sequence.prompt_logprobs)

    def _next(self) -> TokenEvent:
        event = self._events.popleft()
        self._over = event.finish_reason is not None
        return event

    def _put(self, event: TokenEvent) -> None:
        with self._arrived:
            self._events.append(event)
            self._arrived.notify()
            wake, self._wake = self._wake, None
        if wake is not None:
            with contextlib.suppress(RuntimeError):  # the event loop has closed, and nobody waits any more
                wake()


def _resolve(ready: "asyncio.Future[None]") -> None:
    if not ready.done():
        ready.set_result(None)
