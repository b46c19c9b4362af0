"""`deepseek.serve`: bind the address, load the model, serve, drain on a signal."""

import asyncio
import errno
import logging
import resource
import socket
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import FrameType
from typing import Any

import uvicorn

from deepseek.checkpoint.files import expanded
from deepseek.checkpoint.models import model_name
from deepseek.data.text.document import Progress, silent
from deepseek.device.choose import choose_device, choose_dtype
from deepseek.device.names import Dtype
from deepseek.engine.engine import Engine
from deepseek.engine.load import Packs
from deepseek.engine.start import start_engine
from deepseek.errors import ConfigError, PackError, shown
from deepseek.packs.lock import Lock, check_digests, locked_packs, read_lock
from deepseek.server.app import create_app
from deepseek.server.connection import http_config
from deepseek.server.guard import is_loopback
from deepseek.server.request_log import configure
from deepseek.server.routes.teach import Teacher
from deepseek.server.schema import TeachRequest
from deepseek.server.service import Service
from deepseek.server.settings import Settings

log = logging.getLogger(__name__)

DRAIN_SECONDS = 20.0
"""Default time in seconds that running answers have to finish after a signal."""

POLL_SECONDS = 0.05

OPEN_FILES = 1 << 16
"""Maximum number of files that a server keeps open."""

END_SECONDS = 8.0
"""Seconds after that in which everything ends: streams (with an error), lessons, connections."""

FORCED_SECONDS = 1.0
"""Seconds in which answers, then the application, end after a second signal."""


def serve(
    model: str | Path = "smollm2-135m",
    *,
    experts: Packs | Callable[[], Packs] = (),
    lock: str | Path | None = None,
    lock_trusted: bool = False,
    settings: Settings | None = None,
    cache_gib: float = 1.0,
    expert_gib: float | None = None,
    max_running: int = 16,
    max_waiting: int = 64,
    int8: bool = True,
    device: str = "auto",
    dtype: Dtype = "auto",
    lesson: TeachRequest | None = None,
    replicas: int | None = None,
    cpus: float = 1.0,
    drain_seconds: float = DRAIN_SECONDS,
    announce: Callable[[str], None] = partial(print, flush=True),  # noqa: B008 - holds no state
    progress: Progress = silent,
) -> None:
    """Serve a model until SIGTERM or Ctrl-C; running requests have some time to finish.

    The memory that the model needs is printed to standard error before it is loaded.

    Args:
        model: a known base, a local folder or a hub id; default: `smollm2-135m`.
        experts: packs to plug at start, by file or by name, or their weights (see `load`), or a
            function that returns them, called when the base is loaded; default: none.
        lock: a lock file of `deepseek expert lock`: exactly its packs are plugged, in place of
            `experts`. Default: none.
        lock_trusted: whether the lock must be signed by a key in the trust folder. By default a
            lock may be unsigned, so that whoever can write the file can change the set.
        settings: settings of the server other than its engine; default: `Settings()`. Its `model`,
            `base` and `device` are overwritten.
        cache_gib: budget of the KV cache, in GiB.
        expert_gib: budget of the experts' weights, in GiB (see `load`); default: all stay in
            memory.
        max_running: most requests in a batch.
        max_waiting: most requests in the queue; further ones get status 429.
        int8, device, dtype: see `start_engine`. Experts are taught on the same device.
        lesson: an expert to train while the server runs, plugged when done; default: none.
        replicas: number of engines on Ray Serve, each in its own process. Default: None, a single
            engine in this process.
        cpus: processors of each replica; used only with `replicas`.
        drain_seconds: time that running answers have to finish after a signal, in seconds. Those
            that take longer end with an error, and lessons stop at their last checkpoint; at most
            `END_SECONDS` later the process ends.
        announce: called once with the address, when it can be reached.
        progress: told what the engine is waiting for while it is loaded, and then that it is ready;
            not with `replicas`.

    Raises:
        ConfigError: the address is taken, or reachable by others without a key, or an event loop
            runs in this thread.
        DeviceError: there is no such device, or it has too little memory.
        HubError, CheckpointError, PackError: the model or an expert cannot be loaded.
    """
    refuse_running_loop()
    choose_dtype(dtype, choose_device(device))  # a wrong one must not wait for the loading thread
    settings = replace(
        settings or Settings(), model=model_name(model), base=str(model), device=str(device)
    )
    configure(settings.log_level)
    locked = None if lock is None else read_lock(expanded(lock), lock_trusted)
    if locked is not None:
        experts = locked_packs(locked, settings.experts_folder)
    if expert_gib is not None:
        allow_open_files()
    listener = listen(settings)
    url = address(listener, settings.host)
    start = partial(
        start_engine,
        model,
        int8=int8,
        device=device,
        dtype=dtype,
        cache_bytes=int(cache_gib * (1 << 30)),
        expert_bytes=None if expert_gib is None else int(expert_gib * (1 << 30)),
        max_running=max_running,
        max_waiting=max_waiting,
    )
    if replicas is not None:
        from deepseek.server.replicas import serve_replicas

        with listener:
            port = listener.getsockname()[1]
        serve_replicas(
            settings,
            port,
            replicas,
            cpus,
            find_experts=as_function(experts),
            lock=locked,
            start=start,
            drain_seconds=drain_seconds,
            announce=partial(announce, url),
        )
        return
    app = create_app(None, settings, lesson)
    server = DrainingServer(
        http_config(app, timeout_graceful_shutdown=1),
        app.state.service,
        app.state.teacher,
        partial(
            start_locked,
            locked,
            start,
            as_function(experts),
            report=partial(print, file=sys.stderr, flush=True),
            progress=progress,
        ),
        drain_seconds,
        partial(progress, 1, 1, "ready"),
    )
    announce(url)
    server.run(sockets=[listener])
    server.close()


def refuse_running_loop() -> None:
    """Raise `ConfigError` if an event loop runs in this thread, as in a notebook: the server runs
    one of its own, and would find out only after the model began to load.
    """
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return
    raise ConfigError(
        "serve() runs an event loop, but this thread runs one already, as notebooks do; use "
        "`deepseek serve` in a terminal, or give create_app(engine) to a server in this loop."
    )


def as_function(experts: Packs | Callable[[], Packs]) -> Callable[[], Packs]:
    """Return a function that returns the packs."""
    return experts if callable(experts) else lambda: experts


def start_locked(
    lock: Lock | None,
    start: Callable[..., Engine],
    find_experts: Callable[[], Packs],
    **options: Any,
) -> Engine:
    """Start an engine, and check that the packs it has plugged are those of a lock.

    Args:
        lock: the lock; None: nothing is checked.
        start: starts the engine.
        find_experts: returns the packs to plug.
        options: further arguments of `start`.

    Raises:
        PackError: a pack was changed between its check and the end of loading the base.
    """
    engine = start(experts=find_experts(), **options)
    try:
        if lock is not None:
            check_digests(lock, {info.name: info.digest for info in engine.experts()})
    except PackError:
        engine.close()
        raise
    return engine


class DrainingServer(uvicorn.Server):
    """A Uvicorn server that loads its engine in the background and drains before it exits.

    Until the engine is loaded, requests get status 503. After the first signal, the server refuses
    new requests, stops a lesson, and exits when the running answers are finished or their time is
    up. A second signal ends it at once.

    Args:
        config: Uvicorn's configuration.
        service: the state shared by all routes; the engine is attached to it.
        teacher: runs the lessons.
        make_engine: loads the engine; called once, in a thread.
        drain_seconds: time that running answers have to finish after a signal, in seconds.
        ready: called when the engine is loaded; default: none.
    """

    def __init__(
        self,
        config: uvicorn.Config,
        service: Service,
        teacher: Teacher,
        make_engine: Callable[[], Engine],
        drain_seconds: float = DRAIN_SECONDS,
        ready: Callable[[], None] = lambda: None,
    ) -> None:
        super().__init__(config)
        self.service = service
        self.teacher = teacher
        self.failure: BaseException | None = None
        self._drain_seconds = drain_seconds
        self._draining: asyncio.Task[None] | None = None
        self._make_engine = make_engine
        self._ready = ready
        self._loading = threading.Thread(target=self._load, name="load", daemon=True)
        self._loading.start()

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Drain at the first signal; exit at once at the second."""
        if self.service.draining:
            self.should_exit = self.force_exit = True
        self.service.draining = True

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Close the connections and end the application, after a second signal too. Uvicorn would
        then cancel it, with a traceback for the application and for every running answer.
        """
        if self.force_exit:
            self._end_now()  # before Uvicorn waits for the connections and cancels their answers
        await super().shutdown(sockets)
        if self.force_exit:
            self._end_now()  # the second signal may have come meanwhile
            if tasks := self.server_state.tasks:
                await asyncio.wait(tasks, timeout=FORCED_SECONDS)
            with suppress(TimeoutError):
                await asyncio.wait_for(self.lifespan.shutdown(), FORCED_SECONDS)

    def _end_now(self) -> None:
        """End all answers and the lesson, because the end of the application would wait for it."""
        self.service.admission.end()
        self.teacher.kill()

    async def on_tick(self, counter: int) -> bool:
        """Begin to drain after a signal; Uvicorn calls this ten times a second."""
        if self.service.draining and self._draining is None:
            self._draining = asyncio.create_task(self._drain())
        return await super().on_tick(counter)

    async def _drain(self) -> None:
        """Let running answers finish, end those that take too long, then exit."""
        log.info(
            "shutting down; %d requests have %g s to end", self.service.active, self._drain_seconds
        )
        stopping = asyncio.create_task(self.teacher.stop())
        deadline = time.monotonic() + self._drain_seconds
        await self._idle(deadline)
        if self.service.active:
            log.warning("%d requests are ended before their answers", self.service.active)
        self.service.admission.end()
        await self._idle(time.monotonic() + END_SECONDS / 2)
        left = max(deadline - time.monotonic(), END_SECONDS / 2)
        await asyncio.wait([stopping], timeout=left)
        stopping.cancel()
        self.should_exit = True

    async def _idle(self, deadline: float) -> None:
        """Wait until no request runs, at most until `deadline` on the monotonic clock."""
        while self.service.active and time.monotonic() < deadline:
            await asyncio.sleep(POLL_SECONDS)

    def close(self) -> None:
        """Close the engine; raise the error that loading it ended with, if any.

        An engine that is still being loaded is abandoned.
        """
        self.teacher.kill()  # after a second signal, a lesson may still run
        self._loading.join(timeout=1)
        if self.failure is not None:
            raise self.failure
        if self.service.loaded:
            self.service.engine.close()

    def _load(self) -> None:
        try:
            engine = self._make_engine()
            self.service.attach(engine)
            for info in engine.experts():
                log.info("plugged %s (%s)", info.name, "armed" if info.armed else "not armed")
            self._ready()
        except BaseException as error:
            self.failure = error
            self.should_exit = True


def listen(settings: Settings) -> socket.socket:
    """Return a socket that listens on the server's address.

    Raises:
        ConfigError: the address is taken or invalid, or reachable by others without a key.
    """
    if not is_loopback(settings.host) and not settings.api_keys:
        raise ConfigError(
            f"{settings.host} can be reached by others, so a key is needed; "
            "use --api-key-file or set DEEPSEEK_API_KEY."
        )
    family = socket.AF_INET6 if ":" in settings.host else socket.AF_INET
    listener = socket.socket(family, socket.SOCK_STREAM)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((settings.host, settings.port))
        listener.listen(2048)  # the backlog holds connections made before the event loop runs
    except TypeError:  # what Python raises for a name that no host can have
        listener.close()
        raise ConfigError(
            f"{shown(settings.host)} cannot be the name of a host; choose another --host."
        ) from None
    except OSError as error:
        listener.close()
        if error.errno == errno.EADDRINUSE:
            raise ConfigError(
                f"Port {settings.port} on {settings.host} is taken; "
                "choose another one with --port (0: any free port)."
            ) from None
        raise ConfigError(
            f"The server cannot listen on {settings.host}:{settings.port} ({error.strerror}); "
            "choose another --host or --port."
        ) from None
    return listener


def allow_open_files() -> None:
    """Raise this process's limit of open files as far as the system allows: every plugged expert
    whose weights are read on demand keeps a file open.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    most = OPEN_FILES if hard == resource.RLIM_INFINITY else min(hard, OPEN_FILES)
    if soft != resource.RLIM_INFINITY and soft < most:
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, hard))


def address(listener: socket.socket, host: str) -> str:
    """Return the URL of the server; `host` is the name to show in it."""
    return f"http://{f'[{host}]' if ':' in host else host}:{listener.getsockname()[1]}"
