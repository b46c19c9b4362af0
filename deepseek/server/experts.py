"""`/v1/experts`: what is plugged, and plugging, unplugging and arming on the live server."""

import asyncio
import tempfile
from dataclasses import asdict
from pathlib import Path
from typing import Any

from fastapi import APIRouter
from fastapi import Request as HttpRequest

from deepseek.errors import PackError
from deepseek.model.experts import ExpertInfo
from deepseek.packs.library import SUFFIX
from deepseek.packs.pack import read_pack
from deepseek.server.errors import ApiError
from deepseek.server.guard import ADMIN
from deepseek.server.schema import ArmRequest, PlugRequest
from deepseek.server.service import Service, service_of

router = APIRouter()


@router.get("/v1/experts")
async def experts(request: HttpRequest) -> dict[str, Any]:
    """List what is plugged, and what lies in the experts folder beside it."""
    service = service_of(request)
    plugged = [described(info) for info in service.engine.experts()]
    names = {info["name"] for info in plugged}
    return {"object": "list", "data": plugged, "available": sorted(packs(service).keys() - names)}


@router.get("/v1/experts/{name}")
async def inspect(name: str, request: HttpRequest) -> dict[str, Any]:
    """Show the papers of an expert that is plugged or lies in the experts folder."""
    service = service_of(request)
    plugged = {info.name: info for info in service.engine.experts()}
    if name in plugged:
        return {**described(plugged[name]), "manifest": service.engine.model.experts.manifest(name).model_dump()}
    pack = await asyncio.to_thread(read_pack, pack_path(service, name))
    return {"object": "expert", "name": name, "plugged": False, "manifest": pack.manifest.model_dump()}


@router.post("/v1/experts", status_code=201, dependencies=[ADMIN])
async def plug(body: PlugRequest, request: HttpRequest) -> dict[str, Any]:
    """Plug a pack of the experts folder; requests that start from now on may use it."""
    service = service_of(request)
    if any(info.name == body.name for info in service.engine.experts()):
        raise ApiError(409, f"The expert {body.name} is plugged already; unplug it first.", param="name")
    return described(await asyncio.to_thread(service.experts_owner.plug, pack_path(service, body.name)))


BINARY = {
    "requestBody": {
        "required": True,
        "content": {"application/octet-stream": {"schema": {"type": "string", "format": "binary"}}},
    }
}


@router.post("/v1/experts/upload", status_code=201, dependencies=[ADMIN], openapi_extra=BINARY)
async def upload(request: HttpRequest) -> dict[str, Any]:
    """Plug the pack that is the body of the request; it stays until it is unplugged or the server ends."""
    owner = service_of(request).experts_owner
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / f"upload{SUFFIX}"
        with path.open("wb") as file:
            async for piece in request.stream():
                file.write(piece)
        try:
            return described(await asyncio.to_thread(owner.plug, path))
        except PackError as error:
            raise ApiError(400, str(error).replace(str(path), "upload"), code="invalid_pack") from None


@router.delete("/v1/experts/{name}", dependencies=[ADMIN])
async def unplug(name: str, request: HttpRequest) -> dict[str, Any]:
    """Unplug an expert; requests under way keep it until they end."""
    service = service_of(request)
    if all(info.name != name for info in service.engine.experts()):
        raise ApiError(404, f"No expert named {name!r:.80} is plugged.", param="name")
    await asyncio.to_thread(service.experts_owner.unplug, name)
    return {"object": "expert", "name": name, "plugged": False}


@router.post("/v1/experts/arm", dependencies=[ADMIN])
async def arm(body: ArmRequest, request: HttpRequest) -> dict[str, Any]:
    """Choose who may speak where a request does not choose: "auto" is everyone plugged, now and later."""
    armed = await asyncio.to_thread(service_of(request).experts_owner.arm, body.arm)
    return {"object": "list", "armed": list(armed)}


def described(info: ExpertInfo) -> dict[str, Any]:
    """Return a plugged expert as clients see it."""
    return {"object": "expert", "plugged": True, **asdict(info)}


def packs(service: Service) -> dict[str, Path]:
    """Return the packs in the experts folder, name to file."""
    return {path.stem: path for path in service.settings.experts_folder.glob(f"*{SUFFIX}")}


def pack_path(service: Service, name: str) -> Path:
    """Return the file of a pack, found in the folder's listing: no path is ever made of what a client sent."""
    found = packs(service).get(name)
    if found is None:
        raise ApiError(404, f"There is no expert named {name!r:.80} in the experts folder.", param="name")
    return found
