"""Admission of computing requests: count them, plan them in a few threads, cancel them when the
client leaves or time is up, and end them when the server drains.

A request passes these limits in turn: `Engine.check_open` before its body is read, `planning` while
its prompt is made, the engine's queue, and `Job` while it runs.
"""

import asyncio
from abc import ABC, abstractmethod
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import asynccontextmanager, contextmanager, suppress
from functools import partial
from typing import Any, Protocol, TypeVar

from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response

from deepseek.engine.engine import Engine
from deepseek.engine.request import QueueFullError, TokenUsage
from deepseek.server.errors import ApiError
from deepseek.server.json_body import AnyTypeRoute, Handler, JsonRoute

PLANNERS = 2
"""Number of threads that make prompts: templates, tokenizer, retrieval."""

CONSTRAINED = 1
"""Number of threads for prompts of requests with a grammar, which may take seconds to compile, one
after the other. They are separate so that other prompts do not wait for grammars.
"""

CONVERTERS = 1
"""Number of threads for routes that only convert between texts and tokens, of up to a whole body.
They are separate so that prompts do not wait for conversions.
"""

MOST_APART = 128
"""Maximum number of requests in each of the separate lanes."""

PLAN_SECONDS = 30.0
"""Time limit for making a prompt, waiting for a thread included."""

T = TypeVar("T")


class Cancellable(Protocol):
    """A computation in the engine."""

    def cancel(self) -> None:
        """Stop before the next step; thread safe."""


class Lane:
    """Threads for one kind of work, and the number of requests that use them.

    Args:
        threads: number of threads.
        name: prefix of their names.

    Attributes:
        requests: number of requests whose work waits or runs.
    """

    def __init__(self, threads: int, name: str) -> None:
        self.requests = 0
        self.threads = ThreadPoolExecutor(threads, name)


class Admission:
    """The computing requests of one server, from their bodies to their last tokens.

    Attributes:
        planning: number of requests whose prompts are being made, those in a separate lane left
            out.
        planners: the threads that make most prompts.
        constrained: the lane of prompts with grammars.
        converters: the lane of conversions.
        jobs: the running jobs.
        ended: whether every job is cancelled, now and later.
    """

    def __init__(self) -> None:
        self.planning = 0
        self.jobs: set[Job] = set()
        self.ended = False
        self.planners = Lane(PLANNERS, "plan")
        self.constrained = Lane(CONSTRAINED, "constrain")
        self.converters = Lane(CONVERTERS, "convert")

    @asynccontextmanager
    async def plan(self, engine: Engine) -> AsyncIterator[None]:
        """Count a request and limit its time while its prompt is made.

        Args:
            engine: the engine that the prompt is for.

        Raises:
            QueueFullError: as many requests as the engine can hold are being planned.
            ApiError: the time is up (504).
        """
        if self.planning >= engine.max_requests:
            raise QueueFullError(self.planning, 1.0)
        self.planning += 1
        try:
            async with asyncio.timeout(PLAN_SECONDS):
                yield
        except TimeoutError:
            raise ApiError(
                504,
                f"The prompt took longer than {PLAN_SECONDS:g} s to prepare; "
                "shorten it, or try again when the server is less busy.",
                code="timeout",
            ) from None
        finally:
            self.planning -= 1

    async def run(self, work: Callable[[], T], abandon: Callable[[T], object] | None = None) -> T:
        """Run `work` in one of the planning threads and return its result.

        Args:
            work: what to run. If the caller is cancelled before a thread is free, it never runs.
            abandon: called with the result if the caller is cancelled meanwhile.
        """
        return await _in_thread(self.planners, work, abandon)

    async def run_constrained(
        self, work: Callable[[], T], abandon: Callable[[T], object] | None = None
    ) -> T:
        """Run `work`, which may compile a grammar, in a thread of its own, and return its result.

        Args:
            work, abandon: see `run`.

        Raises:
            QueueFullError: `MOST_APART` other requests with grammars are in the making.
        """
        with self._apart(self.constrained):
            return await _in_thread(self.constrained, work, abandon)

    async def convert(self, work: Callable[[], T]) -> T:
        """Run `work` in a thread of the conversions and return its result.

        Args:
            work: what to run. If the caller is cancelled before a thread is free, it never runs.

        Raises:
            QueueFullError: `MOST_APART` other conversions wait or run.
        """
        with self._apart(self.converters):
            return await _in_thread(self.converters, work)

    @contextmanager
    def _apart(self, lane: Lane) -> Iterator[None]:
        """Count a request in a separate lane, so that it takes no place of those that only plan."""
        if lane.requests >= MOST_APART:
            raise QueueFullError(lane.requests, 1.0)
        lane.requests += 1
        self.planning -= 1
        try:
            yield
        finally:
            self.planning += 1
            lane.requests -= 1

    def end(self) -> None:
        """Cancel all jobs, now and later; their clients get status 503."""
        self.ended = True
        for job in tuple(self.jobs):
            job.cancel()

    def check_going_on(self) -> None:
        """Raise an `ApiError` once every job is cancelled."""
        if self.ended:
            raise draining()

    def close(self) -> None:
        """Let the threads end."""
        for lane in (self.planners, self.constrained, self.converters):
            lane.threads.shutdown(wait=False, cancel_futures=True)


def draining() -> ApiError:
    """Return the reason why the end of the server stopped an answer."""
    return ApiError(
        503, "The server stopped this answer because it is shutting down.", code="draining"
    )


class Job(ABC):
    """The running computations of one HTTP request; `close` must be called and cancels the rest.

    Args:
        admission: where the job is registered until it is closed.
        tasks: the computations.
        seconds: time limit in seconds, after which all are cancelled.
    """

    def __init__(self, admission: Admission, tasks: Sequence[Cancellable], seconds: float) -> None:
        self._admission = admission
        self._tasks = tasks
        self._seconds = seconds
        self._expired = False
        self._timer = asyncio.get_running_loop().call_later(seconds, self._expire)
        admission.jobs.add(self)
        if admission.ended:
            self.cancel()

    @abstractmethod
    def usage(self) -> TokenUsage:
        """Return the tokens used so far."""

    def cancel(self) -> None:
        """Stop all computations before the next step."""
        for task in self._tasks:
            task.cancel()

    def close(self) -> None:
        """Cancel what is unfinished and forget the job."""
        self._timer.cancel()
        self.cancel()
        self._admission.jobs.discard(self)

    def cancelled(self) -> ApiError:
        """Return the reason why a computation was cancelled."""
        if self._expired:
            return ApiError(
                504,
                f"The answer took longer than {self._seconds:g} s; ask for less.",
                code="timeout",
            )
        return draining()

    def _expire(self) -> None:
        self._expired = True
        self.cancel()


class ComputingRoute(JsonRoute):
    """A route that makes a prompt, or whose replies the engine computes.

    If the queue is full, `Guard` refuses its POST requests before they reach it.
    """

    async def answer(self, handler: Handler, request: Request) -> Response:
        """Run the handler until the reply begins, the client leaves, or the time is up."""
        if request.method != "POST":
            return await handler(request)
        service = request.app.state.service
        async with service.admission.plan(service.engine):
            return await unless_gone(request, handler(request))


class AnyTypeComputingRoute(AnyTypeRoute, ComputingRoute):
    """A `ComputingRoute` that reads its body as JSON whatever its media type."""


async def unless_gone(request: Request, work: Coroutine[Any, Any, T]) -> T:
    """Return what `work` returns; cancel it when the client leaves.

    Args:
        request: the request, whose body has been read.
        work: a coroutine.

    Raises:
        ClientDisconnect: the client has left.
    """
    working = asyncio.create_task(work)
    leaving = asyncio.create_task(_gone(request))
    try:
        try:
            await asyncio.wait((working, leaving), return_when=asyncio.FIRST_COMPLETED)
        except asyncio.CancelledError:
            # The time was up just after the reply was ready; its job ends only when it is sent.
            if not working.done():
                raise
        if working.done():
            return working.result()
        raise ClientDisconnect
    finally:
        leaving.cancel()
        working.cancel()
        with suppress(asyncio.CancelledError, Exception):
            await working


async def _gone(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


async def _in_thread(
    lane: Lane, work: Callable[[], T], abandon: Callable[[T], object] | None = None
) -> T:
    """Run `work` in a thread of `lane` and return its result; see `Admission.run`."""
    planned = lane.threads.submit(work)
    try:
        return await asyncio.wrap_future(planned)
    except asyncio.CancelledError:
        if abandon is not None:
            planned.add_done_callback(partial(_abandoned, abandon))
        raise


def _abandoned(abandon: Callable[[T], object], planned: "Future[T]") -> None:
    if not planned.cancelled() and planned.exception() is None:
        abandon(planned.result())
