"""OpenAI's Responses API: the events and whole responses of an answer."""

import time
from collections.abc import AsyncIterator, Iterator
from secrets import token_hex
from typing import Literal

from deepseek.server.dialects.responses import ResponsesRequest
from deepseek.server.metrics import spoken
from deepseek.server.routes.chat_completions import ChatChunks
from deepseek.server.stream import Fields
from deepseek.server.translate import sent, usual_sampling


class ResponseEvents:
    """The events of one response; the last event holds the whole response.

    Args:
        body: the request.
        chunks: the answer, not started.
    """

    def __init__(self, body: ResponsesRequest, chunks: ChatChunks) -> None:
        self._body = body
        self._chunks = chunks
        self._sampling = {**usual_sampling(chunks.service), **sent(body)}
        self._id = f"resp_{token_hex(12)}"
        self._created = int(time.time())
        self._items: list[Fields] = []
        self._message: Fields | None = None  # the message that is being written
        self._unsent: list[Fields] = []  # log probabilities whose text is held back

    async def events(self) -> AsyncIterator[Fields]:
        """Yield all events with their sequence numbers."""
        number = 0
        async for event in self._events():
            yield {**event, "sequence_number": number}
            number += 1

    async def _events(self) -> AsyncIterator[Fields]:
        yield {"type": "response.created", "response": self._whole("in_progress")}
        yield {"type": "response.in_progress", "response": self._whole("in_progress")}
        status = "completed"
        async for choice in self._chunks.all_choices():
            delta = choice["delta"]
            for event in self._text(delta.get("content") or "", choice):
                yield event
            for call in delta.get("tool_calls", ()):
                for event in self._call(call["function"], call["id"]):
                    yield event
            if choice["finish_reason"] == "length":
                status = "incomplete"
        if not self._items or self._unsent:
            for event in self._delta("", None):
                yield event
        for event in self._close(status):
            yield event
        yield {"type": f"response.{status}", "response": self._whole(status)}

    def _text(self, text: str, choice: Fields) -> Iterator[Fields]:
        """Yield the events of more text, the first of which opens a message."""
        self._unsent += [] if choice["logprobs"] is None else choice["logprobs"]["content"]
        if text:
            yield from self._delta(text, choice["expert"])

    def _delta(self, text: str, expert: str | None) -> Iterator[Fields]:
        logprobs, self._unsent = self._unsent, []
        if self._message is None:
            yield from self._open()
        assert self._message is not None
        content = self._message["content"][0]
        content["text"] += text
        content["logprobs"] += logprobs
        yield {
            "type": "response.output_text.delta",
            **self._place(),
            "content_index": 0,
            "delta": text,
            "logprobs": logprobs,
            "expert": expert,
        }

    def _open(self) -> Iterator[Fields]:
        """Yield the events that open a message."""
        self._message = {
            "type": "message",
            "id": f"msg_{token_hex(12)}",
            "role": "assistant",
            "status": "in_progress",
            "content": [],
        }
        self._items.append(self._message)
        yield self._item_event("added", self._message)
        part = {"type": "output_text", "text": "", "annotations": [], "logprobs": []}
        self._message["content"] = [part]
        yield {
            "type": "response.content_part.added",
            **self._place(),
            "content_index": 0,
            "part": {**part, "logprobs": []},
        }

    def _close(self, status: str) -> Iterator[Fields]:
        """Yield the events that close the open message, if there is one."""
        if self._message is None:
            return
        part = self._message["content"][0]
        place = {**self._place(), "content_index": 0}
        yield {
            "type": "response.output_text.done",
            **place,
            "text": part["text"],
            "logprobs": part["logprobs"],
        }
        yield {"type": "response.content_part.done", **place, "part": part}
        self._message["status"] = status
        yield self._item_event("done", self._message)
        self._message = None

    def _call(self, function: Fields, call_id: str) -> Iterator[Fields]:
        """Yield the events of one call."""
        yield from self._close("completed")
        self._unsent = []  # those of the call, which is no text
        item = {
            "type": "function_call",
            "id": f"fc_{token_hex(12)}",
            "call_id": call_id,
            "name": function["name"],
            "arguments": "",
            "status": "in_progress",
        }
        self._items.append(item)
        yield self._item_event("added", item)
        arguments = function["arguments"]
        kind = "response.function_call_arguments"
        yield {"type": f"{kind}.delta", **self._place(), "delta": arguments}
        yield {
            "type": f"{kind}.done",
            **self._place(),
            "name": item["name"],
            "arguments": arguments,
        }
        item |= {"arguments": arguments, "status": "completed"}
        yield self._item_event("done", item)

    def _place(self) -> Fields:
        """Return the fields that say which item an event is about: the last one."""
        return {"item_id": self._items[-1]["id"], "output_index": len(self._items) - 1}

    def _item_event(self, what: Literal["added", "done"], item: Fields) -> Fields:
        place = {"output_index": len(self._items) - 1}
        return {"type": f"response.output_item.{what}", **place, "item": dict(item)}

    def _whole(self, status: str) -> Fields:
        """Return the response object, with the usage once it is over."""
        body = self._body
        over = status != "in_progress"
        incomplete = {"reason": "max_output_tokens"} if status == "incomplete" else None
        text = body.model_dump(by_alias=True, include={"text"})["text"]
        choice = body.tool_choice or "auto"
        return {
            "id": self._id,
            "object": "response",
            "created_at": self._created,
            "completed_at": int(time.time()) if status == "completed" else None,
            "status": status,
            "error": None,
            "incomplete_details": incomplete,
            "instructions": body.instructions,
            "model": body.model,
            "output": [dict(item) for item in self._items] if over else [],
            "previous_response_id": None,
            "max_output_tokens": body.max_output_tokens,
            "max_tool_calls": body.max_tool_calls,
            "temperature": self._sampling["temperature"],
            "top_p": self._sampling.get("top_p", 1.0),
            "presence_penalty": body.presence_penalty or 0.0,
            "frequency_penalty": body.frequency_penalty or 0.0,
            "top_logprobs": body.top_logprobs or 0,
            "tools": [function.model_dump() for function in body.tools or ()],
            "tool_choice": choice if isinstance(choice, str) else choice.model_dump(),
            "parallel_tool_calls": body.parallel_tool_calls is not False,
            "reasoning": None if body.reasoning is None else body.reasoning.model_dump(),
            "text": {**text, "verbosity": text["verbosity"] or "medium"},
            "truncation": "disabled",
            "store": False,
            "background": False,
            "service_tier": "default",
            "metadata": body.metadata or {},
            "user": body.user,
            "safety_identifier": body.safety_identifier,
            "prompt_cache_key": body.prompt_cache_key,
            **(self._used() if over else {"usage": None}),
        }

    def _used(self) -> Fields:
        """Return the usage with this route's field names, and the number of tokens per expert."""
        usage = self._chunks.job.usage()
        fields = {
            "input_tokens": usage.prompt_tokens,
            "input_tokens_details": {"cached_tokens": usage.cached_tokens, "cache_write_tokens": 0},
            "output_tokens": usage.completion_tokens,
            "output_tokens_details": {"reasoning_tokens": 0},
            "total_tokens": usage.prompt_tokens + usage.completion_tokens,
        }
        return {"usage": fields, "experts": spoken(usage.experts)}
