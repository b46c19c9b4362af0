"""The caller's view of a running request: its events, for a thread or for an event loop."""

import asyncio
import contextlib
import threading
from collections import deque
from collections.abc import AsyncIterator, Callable, Iterator

from deepseek.engine.request import TokenEvent, TokenLogprob, TokenUsage
from deepseek.engine.sequence import ActiveSequence


class Generation:
    """A running request.

    Iterate over its `TokenEvent`s from one thread (`for`) or one coroutine (`async for`). A loop
    that is left early loses no event: the next one goes on where it ended.

    Args:
        sequence: the request's state in the engine.

    Attributes:
        request: the request that was submitted.
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
        """Yield events as they arrive, blocking between them; the last one has a finish reason."""
        while not self._over:
            with self._arrived:
                self._arrived.wait_for(lambda: self._events)
                event = self._events.popleft()
            self._over = event.finish_reason is not None
            yield event

    async def __aiter__(self) -> AsyncIterator[TokenEvent]:
        """Yield events as they arrive, without blocking the event loop.

        Leaving the loop early does not cancel the request; call `cancel` for that. Another loop,
        here or in a thread, goes on with the next event.
        """
        arrived = asyncio.Event()
        wake = _caller_in_loop(arrived.set)

        def put_and_wake(event: TokenEvent) -> None:
            self._events.append(event)
            wake()

        with self._arrived:
            self._put = put_and_wake
        while not self._over:
            while not self._events:
                arrived.clear()  # only this event loop sets it, so nothing comes in between
                await arrived.wait()
            event = self._events.popleft()
            self._over = event.finish_reason is not None
            yield event

    def subscribe(self, put: Callable[[TokenEvent], object]) -> None:
        """Call `put` with every event, in the running event loop.

        Events that arrived earlier are delivered first.

        Args:
            put: takes one event and must not block.
        """
        put_in_loop = _caller_in_loop(put)
        with self._arrived:
            while self._events:
                put_in_loop(self._events.popleft())
            self._put = put_in_loop

    def cancel(self) -> None:
        """Stop the request before the next step; thread safe.

        Its last event then has the finish reason "cancelled", unless it has finished already.
        """
        self._sequence.cancelled = True

    @property
    def begun(self) -> bool:
        """Whether the request has left the queue to be computed."""
        return self._sequence.begun

    @property
    def usage(self) -> TokenUsage:
        """Tokens used so far."""
        return self._sequence.usage

    @property
    def prompt_logprobs(self) -> tuple[TokenLogprob | None, ...]:
        """Log probabilities of the prompt tokens, complete before the first event.

        The first token has None, because nothing predicts it. Empty unless the request asks for
        them.
        """
        return tuple(self._sequence.prompt_logprobs)

    def _deliver(self, event: TokenEvent) -> None:
        """Pass an event on to the consumer; called by the engine's thread."""
        with self._arrived:
            self._put(event)
            # The last event breaks the reference cycles, so that memory is freed at once, without
            # the garbage collector.
            if event.finish_reason is not None:
                self._put = self._sequence.deliver = self._events.append
            self._arrived.notify()


def _caller_in_loop(function: Callable[..., object]) -> Callable[..., None]:
    """Return a function for any thread that has `function` called in the running event loop."""
    loop = asyncio.get_running_loop()

    def call(*arguments: object) -> None:
        # A closed event loop raises RuntimeError; then nobody waits for the event.
        with contextlib.suppress(RuntimeError):
            loop.call_soon_threadsafe(function, *arguments)

    return call
