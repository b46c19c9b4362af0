"""The application: routes, the guard before them, and the page.

request -> guard (host, origin, key, size, readiness) -> route -> ask -> engine -> job -> reply or
server-sent events
"""

import asyncio
import gc
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from fastapi import FastAPI
from fastapi import Request as HttpRequest
from fastapi.responses import FileResponse, JSONResponse, PlainTextResponse, Response
from fastapi.staticfiles import StaticFiles
from prometheus_client import CONTENT_TYPE_LATEST

from deepseek.engine.engine import Engine
from deepseek.server.errors import DOCUMENTED, install
from deepseek.server.guard import Guard
from deepseek.server.routes import (
    chat_completions,
    completions,
    models,
    preferences,
    responses,
    teach,
)
from deepseek.server.schema import TeachRequest
from deepseek.server.service import Service, Settings

STATIC = Path(__file__).parent / "static"
ROUTERS = (chat_completions, completions, responses, models, teach, preferences)


def create_app(
    engine: Engine | None = None,
    settings: Settings | None = None,
    lesson: TeachRequest | None = None,
) -> FastAPI:
    """Return the ASGI application. Without an engine it says that it is loading until
    `app.state.service.attach`.

    Args:
        lesson: an expert to train as soon as there is an engine.
    """
    service = Service(settings or Settings())
    if engine is not None:
        service.attach(engine)

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        first = asyncio.create_task(app.state.teacher.begin(lesson)) if lesson is not None else None
        yield
        if first is not None:
            first.cancel()
        await app.state.teacher.stop()
        gc.unfreeze()  # see `Service.attach`

    app = FastAPI(
        title="deepseek",
        version="1",
        docs_url=None,
        redoc_url=None,
        lifespan=lifespan,
        responses=DOCUMENTED,
    )
    app.state.service, app.state.teacher = service, teach.Teacher(service)
    install(app)
    for room in ROUTERS:
        app.include_router(room.router)
    add_state_routes(app, service)
    app.mount("/static", StaticFiles(directory=STATIC), name="static")
    app.add_middleware(Guard, service=service)
    return app


def add_state_routes(app: FastAPI, service: Service) -> None:
    """Add the routes that tell about the server itself, and the page."""

    @app.get("/health")
    async def health() -> dict[str, str]:
        """Say that the process lives; needs no key."""
        return {"status": "ok"}

    @app.get("/ready")
    async def ready() -> dict[str, Any]:
        """Say whether requests are served; 503 while the model is loaded and while the server shuts
        down.
        """
        if service.refusal is not None:
            raise service.refusal
        return {"status": "ready", "model": service.settings.model}

    @app.get("/metrics", response_class=PlainTextResponse)
    async def metrics() -> Response:
        """Tell figures in Prometheus' text form."""
        fleet = service.fleet
        text = service.metrics.text() if fleet is None else await asyncio.to_thread(fleet.metrics)
        return Response(text, media_type=CONTENT_TYPE_LATEST)

    @app.get("/", include_in_schema=False)
    async def page() -> Response:
        """Show the web page."""
        return FileResponse(STATIC / "index.html", headers={"Cache-Control": "no-cache"})

    @app.get("/v1/me", include_in_schema=False)
    async def me(request: HttpRequest) -> Response:
        """Tell the page what it may offer."""
        settings = service.settings
        may = {"admin": request.state.role == "admin", "teach": settings.teach_root is not None}
        return JSONResponse(
            {
                "model": settings.model,
                **may,
                "keyed": bool(settings.api_keys or settings.admin_keys),
            }
        )
