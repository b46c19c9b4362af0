"""`/v1/models`, `/tokenizer_info`, and `/v1/experts` to list, plug, unplug and
arm experts.
"""

import asyncio
import tempfile
from dataclasses import asdict
from pathlib import Path
from typing import Any

from fastapi import APIRouter
from fastapi import Request as HttpRequest
from pydantic import TypeAdapter, ValidationError

from deepseek.errors import PackError
from deepseek.model.experts import ExpertInfo
from deepseek.model.experts.arming import Arming
from deepseek.packs.library import SUFFIX
from deepseek.packs.listing import read_manifest
from deepseek.server.body import ExpertName
from deepseek.server.errors import ApiError
from deepseek.server.guard import ADMIN
from deepseek.server.json_body import JsonRoute
from deepseek.server.openapi import Model, Models, described
from deepseek.server.schema import ArmRequest, PlugRequest
from deepseek.server.service import Service, TheService
from deepseek.text.tokenizer import tokenizer_digest

router = APIRouter(route_class=JsonRoute)

NAME = TypeAdapter[str](ExpertName)


@router.get("/v1/models", responses=described(Models))
async def models(service: TheService) -> dict[str, Any]:
    """List the base model as it is armed, alone, with each expert, and with all of them."""
    names = service.models()
    page = {"has_more": False, "first_id": names[0], "last_id": names[-1]}
    return {"object": "list", "data": [card(service, name) for name in names], **page}


@router.get("/v1/models/{model:path}", responses=described(Model))
async def model(model: str, service: TheService) -> dict[str, Any]:
    """Describe one model: the base, or the base with any set of plugged experts."""
    if not model:
        raise ApiError(404, "The name of a model is missing; GET /v1/models lists them.")
    service.named_experts(model)
    return card(service, model)


def card(service: Service, name: str) -> dict[str, Any]:
    """Return a model as OpenAI's and Anthropic's clients read it."""
    return {
        "id": name,
        "object": "model",
        "created": int(service.started.timestamp()),
        "owned_by": "deepseek",
        "max_model_len": service.writer.context,
        "type": "model",
        "display_name": name,
        "created_at": service.started.isoformat(),
    }


@router.get("/tokenizer_info")
async def tokenizer_info(service: TheService) -> dict[str, Any]:
    """Describe the tokenizer, for evaluation harnesses."""
    tokenizer = service.engine.tokenizer
    return {
        "model": service.settings.model,
        "vocab_size": len(tokenizer),
        "max_model_len": service.writer.context,
        "bos_token": tokenizer.bos_token,
        "eos_token": tokenizer.eos_token,
        "pad_token": tokenizer.pad_token,
        "chat_template": tokenizer.chat_template,
        "digest": tokenizer_digest(tokenizer),
    }


@router.get("/v1/experts")
async def experts(service: TheService) -> dict[str, Any]:
    """List the plugged experts, and the other packs in the experts folder; of both, those that the
    key may use.
    """
    plugged = [plugged_expert(info) for info in service.visible_experts()]
    names = {info["name"] for info in plugged}
    return {"object": "list", "data": plugged, "available": sorted(packs(service).keys() - names)}


@router.get("/v1/experts/{name}")
async def inspect(name: str, service: TheService) -> dict[str, Any]:
    """Show the manifest of an expert that is plugged or in the experts folder."""
    service.check_use(name, "name")
    plugged = {info.name: info for info in service.engine.experts()}
    if name in plugged:
        return {
            **plugged_expert(plugged[name]),
            "manifest": service.engine.model.experts.manifest(name).model_dump(),
        }
    manifest = await asyncio.to_thread(read_manifest, pack_path(service, name))
    return {"object": "expert", "name": name, "plugged": False, "manifest": manifest.model_dump()}


@router.post("/v1/experts", status_code=201, dependencies=[ADMIN])
async def plug(body: PlugRequest, service: TheService) -> dict[str, Any]:
    """Plug a pack of the experts folder; requests that start from now on can use it. With "replace"
    it takes the place of the plugged expert of its name, and is armed as that was.
    """
    if not body.replace and is_plugged(service, body.name):
        raise ApiError(
            409,
            f'The expert {body.name} is plugged already; unplug it first, or send "replace": true.',
            param="name",
        )
    path = pack_path(service, body.name)
    name = (await asyncio.to_thread(read_manifest, path)).name
    if name != body.name:
        raise ApiError(
            409,
            f"The file {path.name} holds the expert {name}, not {body.name}; rename the file.",
            param="name",
        )
    return plugged_expert(
        await service.change(lambda owner: owner.plug(path, in_place=body.replace))
    )


BINARY = {
    "requestBody": {
        "required": True,
        "content": {"application/octet-stream": {"schema": {"type": "string", "format": "binary"}}},
    }
}


@router.post("/v1/experts/upload", status_code=201, dependencies=[ADMIN], openapi_extra=BINARY)
async def upload(request: HttpRequest, service: TheService) -> dict[str, Any]:
    """Plug the pack in the request body; it stays until it is unplugged or the server stops."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / f"upload{SUFFIX}"
        with path.open("wb") as file:
            async for piece in request.stream():
                file.write(piece)
        try:
            name = (await asyncio.to_thread(read_manifest, path)).name
            if is_plugged(service, name):
                raise ApiError(409, f"The expert {name} is plugged already; unplug it first.")
            return plugged_expert(await service.change(lambda owner: owner.plug(path)))
        except PackError as error:
            raise ApiError(
                400, str(error).replace(str(path), "upload"), code="invalid_pack"
            ) from None


@router.delete("/v1/experts/{name}", dependencies=[ADMIN])
async def unplug(name: str, service: TheService) -> dict[str, Any]:
    """Unplug an expert; running requests keep it until they end."""
    plugged = service.plugged(name).name
    await service.change(lambda owner: owner.unplug(plugged))
    return {"object": "expert", "name": name, "plugged": False}


@router.post("/v1/experts/arm", dependencies=[ADMIN])
async def arm(body: ArmRequest, service: TheService) -> dict[str, Any]:
    """Set the experts that may fire in requests that select none; "auto" is every plugged expert,
    now and later.
    """
    for name in Arming.parse(body.arm).named:
        service.plugged(name, "arm")
    armed = await service.change(lambda owner: owner.arm(body.arm))
    return {"object": "list", "armed": list(armed)}


def plugged_expert(info: ExpertInfo) -> dict[str, Any]:
    """Return a plugged expert as clients see it."""
    return {"object": "expert", "plugged": True, **asdict(info)}


def is_plugged(service: Service, name: str) -> bool:
    """Return whether an expert of this name is plugged."""
    return any(info.name == name for info in service.engine.experts())


def packs(service: Service) -> dict[str, Path]:
    """Return the packs in the experts folder that the key may use, as files by name.

    Files with names that no expert can have, such as bytes that are not UTF-8, are left out.
    """
    files = service.settings.experts_folder.glob(f"*{SUFFIX}")
    by_name = {path.stem: path for path in files if is_name(path.stem)}
    return {name: path for name, path in by_name.items() if service.may_use(name)}


def is_name(text: str) -> bool:
    """Return whether an expert can have this name."""
    try:
        NAME.validate_python(text)
    except ValidationError:
        return False
    return True


def pack_path(service: Service, name: str) -> Path:
    """Return the file of a pack in the experts folder.

    The name is looked up in the folder's listing, so that a client's text never becomes a path.

    Raises:
        ApiError: there is no such pack.
    """
    path = packs(service).get(name)
    if path is None:
        raise ApiError(
            404, f"There is no expert named {name!r:.80} in the experts folder.", param="name"
        )
    return path
