"""The ASGI application: routes, the guard middleware and the web page.

A request passes these steps: guard (host, origin, key, size, readiness) -> route -> `ask` ->
engine -> `GenerationJob` -> JSON reply or server-sent events.
"""

import asyncio
import gc
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any

from fastapi import FastAPI
from fastapi import Request as HttpRequest
from fastapi.middleware.cors import CORSMiddleware
from fastapi.responses import FileResponse, JSONResponse, Response
from fastapi.staticfiles import StaticFiles
from prometheus_client import CONTENT_TYPE_LATEST
from starlette.datastructures import Headers
from starlette.routing import Route

from deepseek import checks
from deepseek.engine.engine import Engine
from deepseek.server.admission import ComputingRoute
from deepseek.server.errors import ApiError, ErrorBody, documented, install
from deepseek.server.guard import REQUEST_IDS, Guard, foreign_origin
from deepseek.server.openapi import METRICS, describe
from deepseek.server.routes import (
    chat_completions,
    completions,
    embeddings,
    llama_cpp,
    messages,
    models,
    ollama,
    preferences,
    prompts,
    responses,
    teach,
)
from deepseek.server.schema import TeachRequest
from deepseek.server.service import Service
from deepseek.server.settings import Settings

STATIC = Path(__file__).parent / "static"
REVALIDATED = {"Cache-Control": "no-cache"}
"""Header of the web page and its files: after an upgrade, no browser may mix old and new ones."""

ROUTERS = (
    chat_completions,
    completions,
    responses,
    embeddings,
    messages,
    ollama,
    llama_cpp,
    models,
    prompts,
    teach,
    preferences,
)


ASKS_NETWORK = "Access-Control-Request-Private-Network"
"""Header by which a browser asks whether a public page may reach a private address."""

ALLOWS_NETWORK = "Access-Control-Allow-Private-Network"
"""Header by which that is allowed."""


class PageFiles(StaticFiles):
    """The files of the web page; with an `ETag`, revalidating an unchanged file is cheap."""

    def file_response(self, *args: Any, **options: Any) -> Response:
        """Return a file, or the reply that it has not changed (304).

        Args:
            args, options: see `StaticFiles`.
        """
        response = super().file_response(*args, **options)
        response.headers.update(REVALIDATED)
        return response


class Preflight(CORSMiddleware):
    """Answers the requests by which browsers ask whether a page of another site may send one."""

    def preflight_response(self, request_headers: Headers) -> Response:
        """Return the reply, an error in our layout for a page that may not.

        A page that may send requests may also send them to this machine's own network, which some
        browsers ask about in the same preflight (Private Network Access).

        Args:
            request_headers: headers of the browser's request.
        """
        asked = request_headers.mutablecopy()
        asks_network = asked.get(ASKS_NETWORK, "") == "true"
        if asks_network:  # Starlette refuses it, or does not know it, depending on its version
            del asked[ASKS_NETWORK]
        response = super().preflight_response(asked)
        origin = request_headers["origin"]
        if response.status_code != 200 and not self.is_allowed_origin(origin):
            return foreign_origin(origin).response("")
        if response.status_code == 200 and asks_network:
            response.headers[ALLOWS_NETWORK] = "true"
        return response


def create_app(
    engine: Engine | None = None,
    settings: Settings | None = None,
    lesson: TeachRequest | None = None,
) -> FastAPI:
    """Return the ASGI application.

    Args:
        engine: the engine that answers requests. Default: none yet; the server answers 503
            ("loading") until `app.state.service.attach` is called.
        settings: the server's settings; default: `Settings()`.
        lesson: an expert to train as soon as an engine is attached; default: none.

    Raises:
        ConfigError: an argument has a wrong type.
    """
    for name, value, kind in (
        ("engine", engine, Engine),
        ("settings", settings, Settings),
        ("lesson", lesson, TeachRequest),
    ):
        checks.optional(partial(checks.instance, kind=kind))(name, value)
    service = Service(settings or Settings())
    if engine is not None:
        service.attach(engine)

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        teaching = (
            asyncio.create_task(app.state.teacher.begin(lesson)) if lesson is not None else None
        )
        yield
        if teaching is not None:
            teaching.cancel()
        await app.state.teacher.stop()
        service.close()
        gc.unfreeze()  # undoes the freeze in `Service.attach`

    app = FastAPI(
        title="deepseek",
        version=service.version,
        openapi_url=None,
        docs_url=None,
        redoc_url=None,
        lifespan=lifespan,
        responses=documented(ErrorBody),
    )
    app.state.service, app.state.teacher = service, teach.Teacher(service)
    install(app)
    for module in ROUTERS:
        app.include_router(module.router)
    add_state_routes(app, service)
    app.mount("/static", PageFiles(directory=STATIC), name="static")
    routes = [*app.routes, *chain.from_iterable(module.router.routes for module in ROUTERS)]
    computing = frozenset(route.path for route in routes if isinstance(route, ComputingRoute))
    paths = frozenset(route.path for route in routes if isinstance(route, Route))
    app.state.paths = paths
    app.state.routes = [route for route in routes if isinstance(route, Route)]
    app.add_middleware(Guard, service=service, computing=computing, paths=paths)
    # Outside the guard, because a browser's preflight request has no key. Cookies are not allowed:
    # a page of another site needs its own key.
    app.add_middleware(
        Preflight,
        allow_origins=sorted(service.settings.origins),
        allow_methods=["*"],
        allow_headers=["*"],
        expose_headers=["Retry-After", *REQUEST_IDS],
    )
    return app


def add_state_routes(app: FastAPI, service: Service) -> None:
    """Add the routes that report the server's own state, and the web page."""

    # Balancers, and Ollama's own program, ask with HEAD first.
    @app.head("/health", include_in_schema=False)
    @app.get("/health")
    async def health() -> dict[str, str]:
        """Report that the process is alive; needs no key."""
        return {"status": "ok"}

    @app.head("/ready", include_in_schema=False)
    @app.get("/ready")
    async def ready() -> dict[str, str]:
        """Report whether requests are served; 503 while the model loads or the server drains. Needs
        no key.
        """
        if service.refusal is not None:
            raise service.refusal
        return {"status": "ready"}

    @app.get("/openapi.json", include_in_schema=False)
    async def description() -> Response:
        """Return the OpenAPI description, made at the first request, which takes about a second."""
        return JSONResponse(await asyncio.to_thread(describe, app))

    @app.get("/metrics", response_class=Response, responses=METRICS)
    async def metrics(request: HttpRequest) -> Response:
        """Return the metrics in Prometheus' text format; they count the tokens of every expert."""
        if request.state.permissions.experts is not None:
            raise ApiError(
                403,
                "The metrics are those of all experts; use a key that may use all of them.",
                code="expert_not_allowed",
            )
        fleet = service.fleet
        text = service.metrics.text() if fleet is None else await asyncio.to_thread(fleet.metrics)
        return Response(text, media_type=CONTENT_TYPE_LATEST)

    @app.head("/", include_in_schema=False)
    @app.get("/", include_in_schema=False)
    async def page() -> Response:
        """Serve the web page."""
        return FileResponse(STATIC / "index.html", headers=REVALIDATED)

    @app.get("/v1/me", include_in_schema=False)
    async def me(request: HttpRequest) -> Response:
        """Tell the page which actions to offer."""
        settings = service.settings
        permissions = {
            "admin": request.state.permissions.role == "admin",
            "teach": settings.teach_root is not None,
        }
        return JSONResponse(
            {
                "model": settings.model,
                "licence": service.licence,
                **permissions,
                "keyed": bool(settings.api_keys or settings.admin_keys),
            }
        )
