"""From the fields that all generating routes share to a request to the engine."""

import json
from collections.abc import Sequence
from typing import Any

from deepseek.infer.request import Grammar, Request
from deepseek.infer.sampler import Sampling
from deepseek.server.errors import ApiError
from deepseek.server.schema import JsonSchema, SamplingFields
from deepseek.server.service import Service

DIALS = (
    "temperature", "top_p", "top_k", "min_p", "presence_penalty", "frequency_penalty", "repetition_penalty", "seed",
    "logit_bias",
)  # fmt: skip


def ask(
    service: Service, body: SamplingFields, prompt_ids: Sequence[int], max_tokens: int | None, *, choice: int = 0,
    schema: dict[str, Any] | None = None, logprobs: int | None = None, prompt_logprobs: bool = False,
) -> Request:  # fmt: skip
    """Return the engine's request for one answer.

    Args:
        max_tokens: None takes the server's limit; more than the context has room for is cut to it.
        choice: which of several answers to one prompt; each draws from a seed of its own.
        schema: JSON schema that the answer follows.
        logprobs, prompt_logprobs: see `Request`.

    Raises:
        ApiError, UserError: with the cause and the mend.
    """
    room = service.writer.context - len(prompt_ids)
    stop = getattr(body, "stop", None) or ()
    return Request(
        tuple(prompt_ids),
        sampling(body, min(max_tokens or service.settings.answer_tokens, room), choice),
        experts=service.experts(body.model, body.experts),
        stop=(stop,) if isinstance(stop, str) else tuple(stop),
        logprobs=logprobs,
        prompt_logprobs=prompt_logprobs,
        grammar=None if schema is None else Grammar("json_schema", json.dumps(schema)),
    )


def sampling(body: SamplingFields, max_tokens: int, choice: int) -> Sampling:
    """Return how the tokens of one answer are chosen; what the request leaves open is as OpenAI has it."""
    given = {name: value for name in DIALS if (value := getattr(body, name, None)) is not None}
    if "seed" in given:
        given["seed"] = (given["seed"] + choice) % (1 << 63)
    if "logit_bias" in given:
        given["logit_bias"] = {int(token): bias for token, bias in given["logit_bias"].items()}
    return Sampling(**{"temperature": 1.0, **given, "max_new_tokens": max_tokens})


def wanted_schema(kind: str, described: JsonSchema) -> dict[str, Any] | None:
    """Return the schema of an answer of this kind, None for free text. Raises `ApiError` if it is missing."""
    if kind == "json_schema" and described.schema_ is None:
        raise ApiError(400, "A format of type json_schema needs a schema.", param="json_schema.schema")
    return {"text": None, "json_object": {"type": "object"}, "json_schema": described.schema_}[kind]
