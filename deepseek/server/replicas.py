"""Many replicas of the server on Ray Serve: each runs the application with its own engine, behind
Ray's proxy.

The ledger (`fleet.py`), a separate actor, holds the shared set of experts. A replica that loses the
ledger exits, and Ray starts another one.
"""

import os
import signal
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from typing import Any

from fastapi import FastAPI

from deepseek.checkpoint.hub import resolve
from deepseek.engine.engine import Engine
from deepseek.engine.load import Packs, arming_at_start
from deepseek.errors import ConfigError
from deepseek.packs.library import find_pack
from deepseek.packs.lock import Lock, check_digests
from deepseek.packs.manifest import BaseDescription
from deepseek.packs.pack import read_pack
from deepseek.server.app import create_app
from deepseek.server.fleet import Fleet, Ledger
from deepseek.server.request_log import configure
from deepseek.server.service import Service
from deepseek.server.settings import Settings
from deepseek.train.jobs.cluster import connect

APP = "deepseek"
QUIET = {"enable_access_log": False, "log_level": "WARNING"}
PROXY_SECONDS = "60"
"""Time limit in seconds for the start of Ray's proxy. Ray's default of 5 is too short while models
are being loaded on the same machine.
"""


def serve_replicas(
    settings: Settings,
    port: int,
    replicas: int,
    cpus: float,
    *,
    find_experts: Callable[[], Packs],
    lock: Lock | None,
    start: Callable[[], Engine],
    drain_seconds: float,
    announce: Callable[[], None],
) -> None:
    """Serve with many replicas until SIGTERM or Ctrl-C; running requests are finished first.

    Args:
        settings: settings of every replica.
        port: port of Ray's proxy.
        replicas: number of replicas.
        cpus: processors of each replica.
        find_experts: returns the packs to plug (see `serve`).
        lock: the lock that the packs must agree with; None: any packs.
        start: creates a replica's engine; called in the replica's process.
        drain_seconds: time that running answers have to finish after a signal, in seconds.
        announce: called once, when all replicas are ready.

    Raises:
        ConfigError: Ray is missing, has too few processors, or cannot start the replicas.

    Other errors are raised as by `start_engine`.
    """
    if settings.teach_root is not None:
        raise ConfigError(
            "Lessons need a single server; leave --teach-root out, and plug what `expert train` "
            "makes."
        )
    base = BaseDescription.of(resolve(settings.base), settings.model)
    experts = find_experts()
    packs = [read_pack(find_pack(expert), base=base) for expert in experts]
    if lock is not None:
        check_digests(lock, {pack.manifest.name: pack.manifest.digest for pack in packs})
    arming = arming_at_start(experts, [pack.manifest for pack in packs])
    os.environ.setdefault("RAY_SERVE_PROXY_READY_CHECK_TIMEOUT_S", PROXY_SECONDS)
    ray = connect("Serving with many replicas", "ray.serve")
    try:
        if replicas * cpus > (available := ray.cluster_resources().get("CPU", 0)):
            raise ConfigError(
                f"{replicas} x {cpus:g} processors are wanted, Ray has {available:g}; "
                "lower --replicas or --cpus."
            )
        ledger = ray.remote(num_cpus=0, max_restarts=-1)(Ledger).remote(packs, arming)
        deployment = ray.serve.deployment(
            ray.serve.ingress(builder(settings, start, ledger))(),
            name=APP,
            num_replicas=replicas,
            ray_actor_options={"num_cpus": cpus},
            logging_config=QUIET,
            graceful_shutdown_timeout_s=drain_seconds,
            # Never reached: each replica has its own queue and refuses requests when it is full.
            max_ongoing_requests=1 << 16,
        )
        with suppress(TimeoutError):  # the proxy is not up after 60 s; `run` checks again
            ray.serve.start(
                http_options={"host": settings.host, "port": port}, logging_config=QUIET
            )
        ray.serve.run(deployment.bind(), name=APP, route_prefix="/", logging_config=QUIET)
        signal.signal(signal.SIGTERM, signal.default_int_handler)
        announce()
        with suppress(KeyboardInterrupt):
            threading.Event().wait()
        end = time.monotonic() + drain_seconds
        while (
            any(report.active for report in call(ledger, "reports", True).values())
            and time.monotonic() < end
        ):
            time.sleep(0.1)
        ray.serve.delete(APP)
    except (RuntimeError, TimeoutError) as error:
        raise ConfigError(
            f"Ray cannot serve the replicas ({' '.join(str(error).split())})."
        ) from None
    finally:
        ray.shutdown()


def builder(settings: Settings, start: Callable[[], Engine], ledger: Any) -> Callable[[], FastAPI]:
    """Return the function that creates the application in a replica.

    Model and engine are created in the replica's process and never serialised.
    """

    def build() -> FastAPI:
        import ray

        configure(settings.log_level)
        app = create_app(None, settings)
        context = ray.get_runtime_context()
        service: Service = app.state.service

        def take(draining: bool) -> tuple[int, str]:
            service.draining = draining
            return service.active, service.metrics.text().decode()

        engine = start()
        fleet = Fleet(engine, partial(call, ledger), take, partial(os._exit, 1))
        fleet.join(str(context.get_actor_id()), context.current_actor)
        service.attach(engine, fleet)
        return app

    return build


def call(ledger: Any, method: str, *arguments: Any) -> Any:
    """Call a method of the ledger, a Ray actor, and return its result."""
    import ray

    return ray.get(getattr(ledger, method).remote(*arguments))
