"""A request under way, as the caller sees it: its events, in a thread or in an event loop."""

import asyncio
import contextlib
import threading
from collections import deque
from collections.abc import AsyncIterator, Callable, Iterator

from deepseek.engine.request import TokenEvent, TokenLogprob, TokenUsage
from deepseek.engine.sequence import ActiveSequence


class Generation:
    """A request under way: iterate over its `TokenEvent`s, in one thread (`for`) or one coroutine
    (`async for`).

    Attributes:
        request: what was asked.
    """

    def __init__(self, sequence: ActiveSequence) -> None:
        self.request = sequence.request
        self._sequence = sequence
        self._events: deque[TokenEvent] = deque()
        self._over = False
        self._arrived = threading.Condition()
        self._put: Callable[[TokenEvent], object] = self._events.append
        sequence.deliver = self._deliver

    def __iter__(self) -> Iterator[TokenEvent]:
        """Yield events as they come, waiting for them; the last one has a finish reason."""
        while not self._over:
            with self._arrived:
                self._arrived.wait_for(lambda: self._events)
                event = self._events.popleft()
            self._over = event.finish_reason is not None
            yield event

    async def __aiter__(self) -> AsyncIterator[TokenEvent]:
        """Yield events as they come, without blocking the event loop. Leaving early does not
        cancel.
        """
        queue: asyncio.Queue[TokenEvent] = asyncio.Queue()
        self.subscribe(queue.put_nowait)
        while not self._over:
            event = await queue.get()
            self._over = event.finish_reason is not None
            yield event

    def subscribe(self, put: Callable[[TokenEvent], object]) -> None:
        """Have `put` called in the running event loop with every event, those that came before
        first.
        """
        loop = asyncio.get_running_loop()

        def soon(event: TokenEvent) -> None:
            with contextlib.suppress(
                RuntimeError
            ):  # the event loop has closed, and nobody waits any more
                loop.call_soon_threadsafe(put, event)

        with self._arrived:
            while self._events:
                soon(self._events.popleft())
            self._put = soon

    def cancel(self) -> None:
        """End it before the next step; its last event says "cancelled". It may have finished
        already. Thread safe.
        """
        self._sequence.cancelled = True

    @property
    def usage(self) -> TokenUsage:
        """What it has used so far."""
        return self._sequence.usage

    @property
    def prompt_logprobs(self) -> tuple[TokenLogprob | None, ...]:
        """Of each prompt token, None for the first, which nothing predicts; complete before the
        first event.

        Empty unless the request asks for them.
        """
        return tuple(self._sequence.prompt_logprobs)

    def _deliver(self, event: TokenEvent) -> None:
        with self._arrived:
            self._put(event)
            if (
                event.finish_reason is not None
            ):  # the last one: then nothing refers to itself, and all goes at once
                self._put = self._sequence.deliver = self._events.append
            self._arrived.notify()
