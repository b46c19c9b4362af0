"""Many replicas of the server on Ray Serve: each is our application with an engine of its own,
behind Ray's proxy.

What belongs to all of them, the experts, is the ledger's (`fleet.py`), an actor beside them. A
replica that no longer knows what the others have ends itself, and Ray starts another one.
"""

import os
import signal
import threading
import time
from collections.abc import Callable, Iterable
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

from fastapi import FastAPI

from deepseek.checkpoint.hub import resolve
from deepseek.engine.engine import Engine
from deepseek.errors import ConfigError
from deepseek.packs.library import find_pack
from deepseek.packs.manifest import BaseDescription
from deepseek.packs.pack import read_pack
from deepseek.server.app import create_app
from deepseek.server.fleet import Fleet, Ledger
from deepseek.server.run import DRAIN_SECONDS
from deepseek.server.service import Service, Settings
from deepseek.train.jobs.cluster import connect

APP = "deepseek"
QUIET = {"enable_access_log": False, "log_level": "WARNING"}
PROXY_SECONDS = "60"
"""In which Ray's proxy must have started; Ray's own 5 are too few where models are loaded beside
it.
"""


def serve_replicas(
    settings: Settings,
    port: int,
    replicas: int,
    cpus: float,
    *,
    experts: Iterable[str | Path],
    start: Callable[[], Engine],
    announce: Callable[[], None],
) -> None:
    """Serve with many replicas until SIGTERM or Ctrl-C; answers under way are finished first.

    Args:
        settings: of every replica. port: where Ray's proxy listens.
        replicas, cpus: how many, and processors of each.
        experts: see `serve`. start: makes the engine of a replica, there.
        announce: called once, when all replicas are ready.

    Raises `ConfigError` if Ray is missing, too small, or cannot start the replicas; else as
    `start_engine`.
    """
    if settings.teach_root is not None:
        raise ConfigError(
            "Lessons need a single server; leave --teach-root out, and plug what `expert train` makes."
        )
    base = BaseDescription.of(resolve(settings.base), settings.model)
    packs = [read_pack(find_pack(expert), base=base) for expert in experts]
    os.environ.setdefault("RAY_SERVE_PROXY_READY_CHECK_TIMEOUT_S", PROXY_SECONDS)
    ray = connect("Serving with many replicas", "ray.serve")
    try:
        if replicas * cpus > (there := ray.cluster_resources().get("CPU", 0)):
            raise ConfigError(
                f"{replicas} x {cpus:g} processors are wanted, Ray has {there:g}; see --replicas, --cpus."
            )
        ledger = ray.remote(num_cpus=0, max_restarts=-1)(Ledger).remote(packs)
        deployment = ray.serve.deployment(
            ray.serve.ingress(builder(settings, start, ledger))(),
            name=APP,
            num_replicas=replicas,
            ray_actor_options={"num_cpus": cpus},
            logging_config=QUIET,
            graceful_shutdown_timeout_s=DRAIN_SECONDS,
            max_ongoing_requests=1
            << 16,  # each replica has a queue of its own, and says itself when it is full
        )
        with suppress(TimeoutError):  # in its 60 s the proxy has not come up; `run` looks again
            ray.serve.start(
                http_options={"host": settings.host, "port": port}, logging_config=QUIET
            )
        ray.serve.run(deployment.bind(), name=APP, route_prefix="/", logging_config=QUIET)
        signal.signal(signal.SIGTERM, signal.default_int_handler)
        announce()
        with suppress(KeyboardInterrupt):
            threading.Event().wait()
        end = time.monotonic() + DRAIN_SECONDS
        while (
            any(one.active for one in call(ledger, "reports", True).values())
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
    """Return what a replica calls to become the application; model and engine are made there, and
    never travel.
    """

    def build() -> FastAPI:
        import ray

        app = create_app(None, settings)
        here = ray.get_runtime_context()
        service: Service = app.state.service

        def take(draining: bool) -> tuple[int, str]:
            service.draining = draining
            return service.active, service.metrics.text().decode()

        engine = start()
        fleet = Fleet(engine, partial(call, ledger), take, partial(os._exit, 1))
        fleet.join(str(here.get_actor_id()), here.current_actor)
        service.attach(engine, fleet)
        return app

    return build


def call(ledger: Any, method: str, *arguments: Any) -> Any:
    """Call a method of the ledger, which is an actor of Ray, and wait for what it returns."""
    import ray

    return ray.get(getattr(ledger, method).remote(*arguments))
