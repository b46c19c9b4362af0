"""`POST /v1/messages` and `/v1/messages/count_tokens`: Anthropic's API."""

from functools import partial

from fastapi import APIRouter
from fastapi.responses import Response

from deepseek.server.admission import ComputingRoute
from deepseek.server.dialects.anthropic import CountRequest, MessageEvents, MessagesRequest
from deepseek.server.errors import AnthropicErrorBody, documented
from deepseek.server.openapi import MessageReply, TokenCountReply, described
from deepseek.server.routes.chat_completions import answer
from deepseek.server.service import TheService
from deepseek.server.stream import Reply
from deepseek.server.tools import Calling

router = APIRouter(route_class=ComputingRoute, responses=documented(AnthropicErrorBody))


@router.post("/v1/messages", responses=described(MessageReply, streamed=True))
async def messages(body: MessagesRequest, service: TheService) -> Response:
    """Answer a conversation, as one message or as server-sent events."""
    chunks = await answer(service, body.chat())
    events = MessageEvents(chunks)
    return Reply(
        events.events(),
        job=chunks.job,
        layout="named events",
        fold=None if body.stream else events.fold,
    )


@router.post("/v1/messages/count_tokens", responses=described(TokenCountReply))
async def count_tokens(body: CountRequest, service: TheService) -> dict[str, int]:
    """Count the tokens of a prompt."""
    service.named_experts(body.model)
    chat = body.chat()
    calling = Calling.of(chat)
    continued = bool(chat.continue_final_message)
    ids = await service.admission.convert(
        partial(service.counter.chat, chat.messages, calling, continued)
    )
    return {"input_tokens": len(ids)}
