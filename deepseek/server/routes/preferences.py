"""`/v1/preferences`: show pairs of answers to a reviewer and record the judgements."""

import asyncio
import sqlite3
from collections.abc import Callable
from contextlib import closing
from typing import Annotated, Any, TypeVar

from fastapi import APIRouter, Path, Query

from deepseek.data.preferences.database import (
    REVIEWED,
    DatabaseFailedError,
    MissingPreferenceError,
    PreferenceDatabase,
)
from deepseek.data.preferences.preference import Preference
from deepseek.server.errors import ApiError, disk_full
from deepseek.server.guard import ADMIN
from deepseek.server.json_body import JsonRoute
from deepseek.server.schema import PreferenceRequest, ReviewRequest
from deepseek.server.service import Service, TheService
from deepseek.server.tools import plain_messages

router = APIRouter(route_class=JsonRoute)
T = TypeVar("T")


@router.get("/v1/preferences", dependencies=[ADMIN])
async def next_pair(
    service: TheService, after: Annotated[int, Query(ge=0, le=1 << 62)] = 0
) -> dict[str, Any]:
    """Show the next unreviewed pair with an id above `after`, which anyone may have sent.

    The order of the two answers does not reveal which one was preferred.
    """
    return await with_database(service, lambda database: unreviewed(database, after))


@router.post("/v1/preferences", status_code=201, dependencies=[ADMIN])
async def record(body: PreferenceRequest, service: TheService) -> dict[str, Any]:
    """Add a judged pair."""
    if body.chosen == body.rejected:
        raise ApiError(
            400, "The two answers are the same; send two different ones.", param="rejected"
        )
    pair = Preference(
        tuple(plain_messages(body.prompt)),
        body.chosen,
        body.rejected,
        body.reviewer,
        (REVIEWED,),
        {body.reviewer: (1.0, 0.0)},
    )
    number = await with_database(service, lambda database: database.add(pair))
    return {"object": "preference", "id": number, "new": number is not None}


@router.post("/v1/preferences/{number}", dependencies=[ADMIN])
async def review(
    number: Annotated[int, Path(ge=1, le=1 << 62)], body: ReviewRequest, service: TheService
) -> dict[str, Any]:
    """Record which of the two shown answers is better; the pair's history keeps its old state."""

    def judge(pair: Preference) -> dict[str, Any]:
        chosen, rejected = shown(pair) if body.choice == 0 else reversed(shown(pair))
        swapped = chosen != pair.chosen
        scores = {name: both[::-1] if swapped else both for name, both in pair.scores.items()}
        return {
            "chosen": chosen,
            "rejected": rejected,
            "labels": (*(pair.labels), *({REVIEWED} - {*pair.labels})),
            "scores": {**scores, body.reviewer: (1.0, 0.0)},
        }

    await with_database(service, lambda database: database.revise_by(number, judge))
    return {"object": "preference", "id": number, "new": False}


async def with_database(service: Service, work: Callable[[PreferenceDatabase], T]) -> T:
    """Run `work` with the open preference database in a thread and return its result.

    Raises:
        ApiError: there is no such pair (404), the disk is full (507), or the database cannot be
            used now (503).
    """
    path = service.settings.preferences

    def run() -> T:
        with closing(PreferenceDatabase(path)) as database:
            return work(database)

    try:
        return await asyncio.to_thread(run)
    except MissingPreferenceError:
        raise ApiError(
            404, "There is no such preference; GET /v1/preferences shows one.", param="number"
        ) from None
    except DatabaseFailedError as error:
        cause = error.__cause__
        if isinstance(cause, sqlite3.Error) and cause.sqlite_errorcode == sqlite3.SQLITE_FULL:
            raise disk_full() from None
        raise ApiError(
            503,
            f"The preference database cannot be used now ({cause}); try again later.",
            code="database_failed",
        ) from None


def unreviewed(database: PreferenceDatabase, after: int) -> dict[str, Any]:
    """Return the next unreviewed pair (or None), and how many pairs there are and are reviewed."""
    pair = database.unreviewed(after)
    (pairs, reviewed) = database.reviewed()
    pair_fields = None
    if pair is not None:
        pair_fields = {
            "id": pair.id,
            "prompt": [dict(message) for message in pair.prompt],
            "answers": list(shown(pair)),
        }
    return {"object": "preference", "pair": pair_fields, "pairs": pairs, "reviewed": reviewed}


def shown(pair: Preference) -> tuple[str, str]:
    """Return both answers sorted by text, an order that is independent of the preference."""
    first, second = sorted((pair.chosen, pair.rejected))
    return first, second
