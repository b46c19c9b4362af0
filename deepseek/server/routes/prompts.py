"""`/v1/experts/{name}/prompts`: prompts that show what an expert knows."""

import asyncio
from dataclasses import asdict
from typing import Any

from fastapi import APIRouter

from deepseek.checkpoint.store import read_object, write_json
from deepseek.errors import CheckpointError
from deepseek.evaluate.prompts import working_prompts
from deepseek.evaluate.quality import held_out_folder
from deepseek.packs.library import prompts_file
from deepseek.server.errors import ApiError
from deepseek.server.guard import ADMIN
from deepseek.server.json_body import JsonRoute
from deepseek.server.service import Service, TheService

router = APIRouter(route_class=JsonRoute)

Prompts = list[dict[str, Any]]


@router.get("/v1/experts/{name}/prompts")
async def list_prompts(name: str, service: TheService) -> dict[str, Any]:
    """List the prompts that were found for a plugged expert; there may be none."""
    digest = service.plugged(name).digest
    prompts = await asyncio.to_thread(stored_prompts, service, name, digest)
    return {"object": "list", "name": name, "prompts": prompts}


@router.post("/v1/experts/{name}/prompts", dependencies=[ADMIN])
async def find(name: str, service: TheService) -> dict[str, Any]:
    """Find prompts in the held-out text of a plugged expert, and keep them beside its pack."""
    prompts = await asyncio.to_thread(find_prompts, service, name)
    return {"object": "list", "name": name, "prompts": prompts}


def find_prompts(service: Service, name: str) -> Prompts:
    """Find prompts for a plugged expert, and keep them beside its pack.

    Raises:
        ApiError: no such expert is plugged, its held-out text is not on this machine, or the server
            is shutting down.
        UserError: the engine cannot answer now.
    """
    digest = service.plugged(name).digest
    if not held_out_folder(name).is_dir():
        raise ApiError(
            404,
            f"The held-out text of {name} is not here; train the expert on this machine.",
            param="name",
        )
    found = working_prompts(service.engine, name, check=service.admission.check_going_on)
    prompts = [asdict(prompt) for prompt in found]
    path = prompts_file(name, service.settings.experts_folder)
    write_json(path, {"digest": digest, "prompts": prompts})
    return prompts


def stored_prompts(service: Service, name: str, digest: str) -> Prompts:
    """Return the prompts beside an expert's pack, none if they are those of another content."""
    try:
        record = read_object(prompts_file(name, service.settings.experts_folder))
    except CheckpointError:
        return []
    prompts = record.get("prompts")
    return prompts if record.get("digest") == digest and isinstance(prompts, list) else []
