"""Open Responses: our own versions of the published compliance cases, with the published schemas.

The published cases (openresponses/openresponses, `compliance-tests.ts`) are in no package, so each
is reimplemented here from its description, with the same identifier. Every response and event is
validated by the Pydantic models of `openresponses-types`, which are generated from the published
OpenAPI description. `file-search` and `offline-web-search`, which are optional there, need tools
that run on the server; our server must refuse them, as well as images, files and stored
conversations.
"""

import json
from collections.abc import Iterator
from functools import partial
from typing import Any

import httpx
import openresponses_types.types as published
from cases import Case, Target, expect, run
from pydantic import BaseModel

WEATHER: dict[str, Any] = {
    "type": "function",
    "name": "get_weather",
    "description": "Tells the weather of a place.",
    "parameters": {
        "type": "object",
        "properties": {"location": {"type": "string", "description": "a city"}},
        "required": ["location"],
    },
}
PIXEL = "data:image/png;base64,aGk="
ENDS = ("response.completed", "response.incomplete", "response.failed")

EVENTS: dict[str, type[BaseModel]] = {
    "response.created": published.ResponseCreatedStreamingEvent,
    "response.in_progress": published.ResponseInProgressStreamingEvent,
    "response.completed": published.ResponseCompletedStreamingEvent,
    "response.incomplete": published.ResponseIncompleteStreamingEvent,
    "response.failed": published.ResponseFailedStreamingEvent,
    "response.output_item.added": published.ResponseOutputItemAddedStreamingEvent,
    "response.output_item.done": published.ResponseOutputItemDoneStreamingEvent,
    "response.content_part.added": published.ResponseContentPartAddedStreamingEvent,
    "response.content_part.done": published.ResponseContentPartDoneStreamingEvent,
    "response.output_text.delta": published.ResponseOutputTextDeltaStreamingEvent,
    "response.output_text.done": published.ResponseOutputTextDoneStreamingEvent,
    "response.function_call_arguments.delta": (
        published.ResponseFunctionCallArgumentsDeltaStreamingEvent
    ),
    "response.function_call_arguments.done": (
        published.ResponseFunctionCallArgumentsDoneStreamingEvent
    ),
    "error": published.ErrorStreamingEvent,
}


class Responses:
    """The `/v1/responses` route, called without OpenAI's client."""

    def __init__(self, target: Target) -> None:
        self._http = httpx.Client(base_url=target.url, timeout=300)
        self._usual = {"model": target.model}
        if target.penalty:
            self._usual["frequency_penalty"] = target.penalty

    def ask(self, asked: Any, **fields: Any) -> dict[str, Any]:
        """Return a response, validated against the published schema."""
        reply = self._http.post("/v1/responses", json=self._body(asked, fields))
        expect(reply.status_code == 200, f"HTTP {reply.status_code}: {reply.text}")
        response = reply.json()
        published.ResponseResource.model_validate_json(reply.text)
        return response

    def events(self, asked: Any, **fields: Any) -> list[dict[str, Any]]:
        """Return the events of a stream, validated against the published schemas and for numbering
        and completeness.
        """
        body = {**self._body(asked, fields), "stream": True}
        events: list[dict[str, Any]] = []
        with self._http.stream("POST", "/v1/responses", json=body) as reply:
            expect(reply.status_code == 200, f"HTTP {reply.status_code}")
            name = ""
            for line in reply.iter_lines():
                if line.startswith("event:"):
                    name = line.removeprefix("event:").strip()
                if line.startswith("data:") and "[DONE]" not in line:
                    data = line.removeprefix("data:")
                    events.append(json.loads(data))
                    kind = events[-1]["type"]
                    expect(name == kind, f"event {name} holds {kind}")
                    EVENTS[kind].model_validate_json(data)
        numbers = [event["sequence_number"] for event in events]
        expect(numbers == list(range(len(events))), f"{numbers}")
        expect(events[-1]["type"] in ENDS, f"the last event is {events[-1]['type']}")
        return events

    def refusal(self, asked: Any, **fields: Any) -> str:
        """Return the error message of a request that must be refused."""
        reply = self._http.post("/v1/responses", json=self._body(asked, fields))
        expect(reply.status_code == 400, f"HTTP {reply.status_code}: {reply.text}")
        return str(reply.json()["error"]["message"])

    def _body(self, asked: Any, fields: dict[str, Any]) -> dict[str, Any]:
        return {**self._usual, "input": asked, **fields}


def said(role: str, content: Any) -> dict[str, Any]:
    """Return a message item."""
    return {"type": "message", "role": role, "content": content}


def cases(target: Target) -> Iterator[tuple[str, Case]]:
    route = Responses(target)
    weather = [said("user", "How is the weather in Oslo?")]
    pirate = [said("system", "Answer as a pirate would."), said("user", "Greet me.")]
    named = [
        said("user", "I am Alice."),
        said("assistant", "Pleased to meet you, Alice."),
        said("user", "Who am I?"),
    ]
    yield "basic-response", partial(completes, route, [said("user", "Greet me in three words.")])
    yield "streaming-response", partial(streams, route, [said("user", "Count up to five.")])
    yield "system-prompt", partial(completes, route, pirate)
    yield "multi-turn", partial(completes, route, named)
    yield "tool-calling", partial(calls, route, weather)
    yield "tool-calling-streaming", partial(calls_in_stream, route, weather)
    yield "tool-calling, required", partial(calls, route, weather, tool_choice="required")
    yield (
        "tool-calling-streaming, required",
        partial(calls_in_stream, route, weather, tool_choice="required"),
    )
    yield "function-call-roundtrip", partial(returns, route, weather)
    image = {"type": "input_image", "image_url": PIXEL}
    file = {"type": "input_file", "filename": "a.pdf", "file_data": "data:application/pdf;base64,"}
    yield "image-input, refused", partial(refuses, route, [said("user", [image])], "images")
    yield "file-input, refused", partial(refuses, route, [said("user", [file])], "files")
    yield (
        "previous-response-id, refused",
        partial(refuses, route, "Go on.", "stored", previous_response_id="resp_1"),
    )
    for name, tool in {
        "file-search": {"type": "file_search", "vector_store_ids": ["vs_1"]},
        "offline-web-search": {"type": "web_search"},
    }.items():
        yield f"{name}, refused", partial(refuses, route, "Search.", "tools", tools=[tool])
    yield "incomplete-response", partial(is_cut, route)


def completes(route: Responses, asked: Any) -> None:
    response = route.ask(asked)
    expect(response["output"], "no output")
    expect(response["status"] == "completed", f"status {response['status']}")


def streams(route: Responses, asked: Any) -> None:
    events = route.events(asked)
    deltas = [event["delta"] for event in events if event["type"] == "response.output_text.delta"]
    response = events[-1]["response"]
    whole = response["output"][0]["content"][0]["text"]
    expect("".join(deltas) == whole, "the deltas are not the text of the response")
    expect(response["status"] == "completed", f"status {response['status']}")


def calls(route: Responses, asked: Any, **fields: Any) -> None:
    response = route.ask(asked, tools=[WEATHER], **fields)
    kinds = [item["type"] for item in response["output"]]
    expect("function_call" in kinds, f"the output has {kinds}")


def calls_in_stream(route: Responses, asked: Any, **fields: Any) -> None:
    events = route.events(asked, tools=[WEATHER], **fields)
    steps = [
        (event["type"].removeprefix("response."), event.get("item", {}).get("type"))
        for event in events
    ]
    for step in [
        ("output_item.added", "function_call"),
        ("function_call_arguments.delta", None),
        ("function_call_arguments.done", None),
        ("output_item.done", "function_call"),
    ]:
        expect(step in steps, f"no {step[0]} of a call")


def returns(route: Responses, asked: list[Any]) -> None:
    choice = {"type": "function", "name": "get_weather"}
    first = route.ask(asked, tools=[WEATHER], tool_choice=choice)
    call = next(item for item in first["output"] if item["type"] == "function_call")
    result = {
        "type": "function_call_output",
        "call_id": call["call_id"],
        "output": '{"celsius": 4}',
    }
    second = route.ask([*asked, *first["output"], result], tools=[WEATHER])
    expect(second["output"], "no output")
    expect(second["status"] == "completed", f"status {second['status']}")


def refuses(route: Responses, asked: Any, word: str, **fields: Any) -> None:
    sentence = route.refusal(asked, **fields)
    expect(word in sentence, f"the refusal does not speak of {word}: {sentence}")


def is_cut(route: Responses) -> None:
    response = route.ask("Tell a long story.", max_output_tokens=16)
    expect(response["status"] == "incomplete", f"status {response['status']}")
    expect(response["incomplete_details"] == {"reason": "max_output_tokens"}, "no reason")


if __name__ == "__main__":
    run(cases, "openresponses-types")
