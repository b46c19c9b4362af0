"""Fake server replies for the tests of the web page."""

import json
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from playwright.sync_api import Page, Route


def chunks(*texts: str, finish: str | None = "stop", expert: str | None = None) -> str:
    """Return an answer's stream as the server sends it, without usage."""
    ends = [None] * len(texts) + [finish]
    choices = [
        {"index": 0, "delta": {"content": text}, "finish_reason": end, "expert": expert}
        for text, end in zip([*texts, ""], ends, strict=True)
    ]
    return "".join(f"data: {json.dumps({'choices': [one]})}\n\n" for one in choices)


REFUSAL = 'data: {"error": {"message": "The queue is full."}}\n\n'
"""The stream of a request that the server refuses."""


def hold(page: "Page", path: str) -> "list[Route]":
    """Hold requests to a path, and return the list that they are added to."""
    held: list[Route] = []
    page.route(path, lambda route: held.append(route))
    return held


BEGUN = """body => {
    window.fetch = async (path, { signal }) => {
        const start = (controller) => {
            controller.enqueue(new TextEncoder().encode(body));
            signal.addEventListener("abort", () => controller.error(signal.reason));
        };
        return new Response(new ReadableStream({ start }));
    };
}"""
"""Answers all requests of a page with the beginning of a stream that never continues."""
