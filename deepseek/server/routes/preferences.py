"""`/v1/preferences`: pairs of answers for a person to judge, and what was judged."""

import asyncio
from collections.abc import Callable
from contextlib import closing
from typing import Annotated, Any, TypeVar

from fastapi import APIRouter, Path, Query

from deepseek.data.preferences.database import REVIEWED, Preference, PreferenceDatabase
from deepseek.server.errors import ApiError
from deepseek.server.guard import ADMIN
from deepseek.server.schema import PreferenceRequest, ReviewRequest
from deepseek.server.service import Service, TheService
from deepseek.server.tools import plain_messages

router = APIRouter()
T = TypeVar("T")


@router.get("/v1/preferences")
async def next_pair(
    service: TheService, after: Annotated[int, Query(ge=0, le=1 << 62)] = 0
) -> dict[str, Any]:
    """Show the next pair after `after` that nobody has reviewed, in an order that does not tell
    which was preferred.
    """
    return await with_database(service, lambda database: unreviewed(database, after))


@router.post("/v1/preferences", status_code=201, dependencies=[ADMIN])
async def record(body: PreferenceRequest, service: TheService) -> dict[str, Any]:
    """Add a judged pair."""
    if body.chosen == body.rejected:
        raise ApiError(
            400, "The two answers are the same; there is nothing to prefer.", param="rejected"
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
    """Record which of two shown answers is better; what the pair was before stays in its
    history.
    """

    def judge(database: PreferenceDatabase) -> None:
        pair = database.get(number)
        chosen, rejected = shown(pair) if body.choice == 0 else reversed(shown(pair))
        turned = chosen != pair.chosen
        scores = {name: both[::-1] if turned else both for name, both in pair.scores.items()}
        database.revise(
            number,
            chosen=chosen,
            rejected=rejected,
            labels=(*(pair.labels), *({REVIEWED} - {*pair.labels})),
            scores={**scores, body.reviewer: (1.0, 0.0)},
        )

    await with_database(service, judge)
    return {"object": "preference", "id": number, "new": False}


async def with_database(service: Service, work: Callable[[PreferenceDatabase], T]) -> T:
    """Return what `work` gives, done in a thread with the open database."""
    path = service.settings.preferences

    def opened() -> T:
        with closing(PreferenceDatabase(path)) as database:
            return work(database)

    return await asyncio.to_thread(opened)


def unreviewed(database: PreferenceDatabase, after: int) -> dict[str, Any]:
    """Return the next pair to review (or None), and how many pairs there are."""
    pair = database.unreviewed(after)
    (pairs, reviewed) = database.reviewed()
    told = None
    if pair is not None:
        told = {
            "id": pair.id,
            "prompt": [dict(message) for message in pair.prompt],
            "answers": list(shown(pair)),
        }
    return {"object": "preference", "pair": told, "pairs": pairs, "reviewed": reviewed}


def shown(pair: Preference) -> tuple[str, str]:
    """Return both answers in the order of their texts, which says nothing about the preference."""
    first, second = sorted((pair.chosen, pair.rejected))
    return first, second
