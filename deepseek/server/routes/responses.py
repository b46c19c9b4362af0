"""`POST /v1/responses`: text in, text out; nothing is stored."""

import time
from collections.abc import AsyncIterator
from secrets import token_hex

from fastapi import APIRouter
from fastapi.responses import Response

from deepseek.engine.request import Request
from deepseek.server.json_body import JsonRoute
from deepseek.server.metrics import spoken
from deepseek.server.openapi import ResponseReply, described
from deepseek.server.schema import ChatMessage, ResponsesRequest
from deepseek.server.service import GenerationJob, Service, TheService, ask, wanted_schema
from deepseek.server.stream import Fields, Reply
from deepseek.server.tools import Calling

router = APIRouter(route_class=JsonRoute)


@router.post("/v1/responses", responses=described(ResponseReply, streamed=True))
async def responses(body: ResponsesRequest, service: TheService) -> Response:
    """Answer an input, as one reply or as server-sent events."""
    job = await service.start(lambda: [plan(service, body)])
    events = ResponseEvents(body, job).events()
    return Reply(
        events,
        job=job,
        layout="named events",
        fold=None if body.stream else lambda sent: sent[-1]["response"],
    )


def plan(service: Service, body: ResponsesRequest) -> Request:
    """Return the engine's request for an HTTP request."""
    turns = (
        [ChatMessage(role="user", content=body.input)]
        if isinstance(body.input, str)
        else body.input
    )
    instructions = (
        [] if body.instructions is None else [ChatMessage(role="system", content=body.instructions)]
    )
    schema = wanted_schema(body.text.format.type, body.text.format)
    ids = service.writer.chat([*instructions, *turns], Calling())
    user_ids = service.writer.user_ids(turns)
    return ask(service, body, ids, body.max_output_tokens, schema=schema, user_ids=user_ids)


class ResponseEvents:
    """The events of one response; the last event holds the whole response."""

    def __init__(self, body: ResponsesRequest, job: GenerationJob) -> None:
        self.body = body
        self.job = job
        self.id = f"resp_{token_hex(12)}"
        self.message = f"msg_{token_hex(12)}"
        self.created = int(time.time())

    async def events(self) -> AsyncIterator[Fields]:
        """Yield all events with their sequence numbers."""
        number = 0
        async for event in self._events():
            yield {**event, "sequence_number": number}
            number += 1

    async def _events(self) -> AsyncIterator[Fields]:
        text = ""
        status = "completed"
        item = {"item_id": self.message, "output_index": 0}
        place = {**item, "content_index": 0}
        yield {"type": "response.created", "response": self.whole("in_progress")}
        yield {"type": "response.in_progress", "response": self.whole("in_progress")}
        yield {"type": "response.output_item.added", **item, "item": self.item("in_progress")}
        yield {"type": "response.content_part.added", **place, "part": part("")}
        async for _, event in self.job.events():
            text += event.text
            status = "incomplete" if event.finish_reason == "length" else "completed"
            if event.text:
                delta: Fields = {"delta": event.text, "logprobs": [], "expert": event.expert}
                yield {"type": "response.output_text.delta", **place, **delta}
        yield {"type": "response.output_text.done", **place, "text": text, "logprobs": []}
        yield {"type": "response.content_part.done", **place, "part": part(text)}
        yield {"type": "response.output_item.done", **item, "item": self.item(status, part(text))}
        yield {
            "type": f"response.{status}",
            "response": self.whole(status, self.item(status, part(text))),
        }

    def item(self, status: str, *content: Fields) -> Fields:
        """Return the output message; without `content` while it has no text."""
        return {
            "type": "message",
            "id": self.message,
            "role": "assistant",
            "status": status,
            "content": list(content),
        }

    def whole(self, status: str, *output: Fields) -> Fields:
        """Return the response object, with the usage once there is an output."""
        request_fields = self.body.model_dump(
            by_alias=True,
            include={"instructions", "max_output_tokens", "model", "text", "temperature", "top_p"},
        )
        incomplete = {"reason": "max_output_tokens"} if status == "incomplete" else None
        return {
            "id": self.id,
            "object": "response",
            "created_at": self.created,
            "status": status,
            "error": None,
            **request_fields,
            "incomplete_details": incomplete,
            "metadata": self.body.metadata or {},
            "output": list(output),
            "parallel_tool_calls": False,
            "tool_choice": "none",
            "tools": [],
            **(self.used() if output else {"usage": None}),
        }

    def used(self) -> Fields:
        """Return the usage with this route's field names, and the number of tokens per expert."""
        usage = self.job.usage()
        fields = {
            "input_tokens": usage.prompt_tokens,
            "input_tokens_details": {"cached_tokens": usage.cached_tokens, "cache_write_tokens": 0},
            "output_tokens": usage.completion_tokens,
            "output_tokens_details": {"reasoning_tokens": 0},
            "total_tokens": usage.prompt_tokens + usage.completion_tokens,
        }
        return {"usage": fields, "experts": spoken(usage.experts)}


def part(text: str) -> Fields:
    """Return the content part of a text."""
    return {"type": "output_text", "text": text, "annotations": [], "logprobs": []}
