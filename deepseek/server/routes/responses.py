"""`POST /v1/responses`; nothing is stored."""

from fastapi import APIRouter
from fastapi.responses import Response

from deepseek.server.admission import ComputingRoute
from deepseek.server.dialects.response_events import ResponseEvents
from deepseek.server.dialects.responses import ResponsesRequest
from deepseek.server.openapi import ResponseReply, described
from deepseek.server.routes.chat_completions import answer
from deepseek.server.service import TheService
from deepseek.server.stream import Reply

router = APIRouter(route_class=ComputingRoute)


@router.post("/v1/responses", responses=described(ResponseReply, streamed=True))
async def responses(body: ResponsesRequest, service: TheService) -> Response:
    """Answer an input, as one reply or as server-sent events."""
    chunks = await answer(service, body.chat())
    return Reply(
        ResponseEvents(body, chunks).events(),
        job=chunks.job,
        layout="named events",
        fold=None if body.stream else lambda events: events[-1]["response"],
    )
