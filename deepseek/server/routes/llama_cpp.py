"""llama.cpp's own routes: `/completion`, `/infill`, `/tokenize`, `/detokenize`, `/apply-template`,
`/props`.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from fastapi import APIRouter
from fastapi.responses import Response

from deepseek.retrieval.passages import Passage
from deepseek.server.admission import AnyTypeComputingRoute
from deepseek.server.dialects.infill import InfillRequest
from deepseek.server.dialects.llama_cpp import (
    DetokenizeRequest,
    NativeChunks,
    NativeCompletion,
    TemplateRequest,
    TokenizeRequest,
)
from deepseek.server.encoding import encoded_aside
from deepseek.server.errors import ApiError, about
from deepseek.server.openapi import STREAMED
from deepseek.server.prompt import EditorGap
from deepseek.server.retrieve import Retrieval, answer_tokens, described_passages
from deepseek.server.routes import completions
from deepseek.server.schema import ChatMessage, CompletionRequest
from deepseek.server.service import Service, TheService
from deepseek.server.stream import Reply
from deepseek.server.token_text import TokenReader, TokenText
from deepseek.server.tools import Calling
from deepseek.text.tokenizer import encode_document, encode_plain

router = APIRouter(route_class=AnyTypeComputingRoute)

MOST_RESERVED = 4
"""Largest part of the context that is kept free for the text in a gap, as a divisor."""

MAX_PIECES = 1 << 16
"""Most tokens of a reply that has their texts, of which each takes some hundred bytes."""


@router.post("/completion", responses=STREAMED)
async def completion(body: NativeCompletion, service: TheService) -> Response:
    """Continue a text, as one reply or as server-sent events."""
    started = time.perf_counter()
    settings = service.settings
    request = body.completion(settings.model, settings.answer_tokens)
    chunks = await completions.answer(service, request)
    native = NativeChunks(body, chunks, started)
    fold = None if body.stream else native.fold
    return Reply(native.chunks(), job=chunks.job, layout="unterminated", fold=fold)


@router.post("/infill", responses=STREAMED)
async def infill(body: InfillRequest, service: TheService) -> Response:
    """Fill a gap in a text, as an editor's plug-in asks for it."""
    started = time.perf_counter()
    settings = service.settings
    gap = body.gap
    request = body.completion(settings.model, settings.answer_tokens)
    prompt = await service.admission.run(partial(gap_prompt, service, gap, request))
    request.prompt = prompt.ids
    request.retrieve = None  # done
    heal = bool(gap.prefix or gap.line) and not service.writer.layout.has_tokens
    chunks = await completions.answer(service, request, heal, prompt.document_ids)
    if prompt.passages is not None:
        chunks.retrieved = described_passages(prompt.passages)
    native = NativeChunks(body, chunks, started)
    fold = None if body.stream else native.fold
    return Reply(native.chunks(), job=chunks.job, layout="unterminated", fold=fold)


@dataclass(frozen=True)
class GapPrompt:
    """The prompt of a text with a gap.

    Attributes:
        ids: its token ids.
        document_ids: the same without passages, from which gates judge the topic.
        passages: the passages put before the text; None: the request does not retrieve.
    """

    ids: list[int]
    document_ids: tuple[int, ...]
    passages: list[Passage] | None


def gap_prompt(service: Service, gap: EditorGap, request: CompletionRequest) -> GapPrompt:
    """Return the prompt of a text with a gap, with passages if the request retrieves.

    Args:
        service: the server's state.
        gap: the text.
        request: the request to fill the gap.
    """
    limit = request.max_tokens or 0
    # A large limit is not reserved in full: it would leave no room for the text around the gap.
    reserved = min(limit, service.settings.answer_tokens, service.writer.context // MOST_RESERVED)
    ids = service.writer.gap(gap, reserved)
    retrieval = (
        Retrieval.if_possible(service, request, service.settings.infill_passages)
        if request.retrieve is None
        else Retrieval.of(service, request)
    )
    if retrieval is None:
        return GapPrompt(ids, tuple(ids), None)
    answer = answer_tokens(service, limit)
    with_passages, passages = retrieval.for_editor(gap, ids, service, answer)
    return GapPrompt(service.writer.gap(with_passages, reserved), tuple(ids), passages)


@router.post("/tokenize", response_model=dict[str, Any])
async def tokenize(body: TokenizeRequest, service: TheService) -> Response:
    """Return the token ids of a text or a conversation."""

    def tokens() -> dict[str, Any]:
        ids = token_ids(service, body)
        return {
            "tokens": pieces(service, ids) if body.with_pieces else ids,
            "count": len(ids),
            "max_model_len": service.writer.context,
        }

    return await converted(service, tokens)


async def converted(service: Service, make: Callable[[], dict[str, Any]]) -> Response:
    """Return the reply of a route that only converts; it can be as large as a request.

    Args:
        service: the server's state.
        make: makes the reply's fields, in a thread.
    """
    fields = await service.admission.convert(make)
    return Response(await encoded_aside(lambda: fields), media_type="application/json")


def token_ids(service: Service, body: TokenizeRequest) -> list[int]:
    """Return the token ids that a request asks for.

    Raises:
        ApiError: there is no text.
    """
    if body.messages is not None:
        return conversation_ids(service, body, body.messages)
    # vLLM's clients send `prompt` and mean the special tokens; llama.cpp's send `content`.
    special = body.add_special
    if body.prompt is not None:
        special = body.add_special_tokens is not False
    text = body.content if body.prompt is None else body.prompt
    if text is None:
        raise ApiError(400, "There is no text; send content, prompt or messages.", param="content")
    tokenizer = service.engine.tokenizer
    if not body.parse_special:
        return encode_document(tokenizer, text) if special else encode_plain(tokenizer, [text])[0]
    return list(tokenizer(text, add_special_tokens=special).input_ids)


def pieces(service: Service, ids: Sequence[int]) -> list[dict[str, Any]]:
    """Return tokens with their pieces of text.

    Raises:
        ApiError: there are too many.
    """
    if len(ids) > MAX_PIECES:
        raise ApiError(
            400,
            f"The text has {len(ids)} tokens, but at most {MAX_PIECES} come with their pieces; "
            "send it in parts, or without with_pieces.",
            param="with_pieces",
        )
    reader = TokenReader(service.tokens)
    return [{"id": identity, "piece": piece(reader.at(identity)(identity))} for identity in ids]


def piece(token: TokenText) -> str | list[int]:
    """Return the text of a token, or its bytes if these are not whole characters."""
    content = token.content
    if "\ufffd" not in token.text or content is None:
        return token.text
    try:
        return content.decode()
    except UnicodeDecodeError:
        return list(content)


@router.post("/detokenize", response_model=dict[str, str])
async def detokenize(body: DetokenizeRequest, service: TheService) -> Response:
    """Return the text of token ids; llama.cpp's clients read `content`, vLLM's `prompt`."""

    def content() -> dict[str, str]:
        with about("tokens"):
            ids = service.counter.check(body.tokens) if body.tokens else []
        text = str(service.engine.tokenizer.decode(ids))
        return {"content": text, "prompt": text}

    return await converted(service, content)


@router.post("/apply-template", response_model=dict[str, str])
async def apply_template(body: TemplateRequest, service: TheService) -> Response:
    """Return a conversation as the text of a prompt."""

    def prompt() -> dict[str, str]:
        ids = conversation_ids(service, body, body.messages)
        return {"prompt": str(service.engine.tokenizer.decode(ids))}

    return await converted(service, prompt)


def conversation_ids(
    service: Service, body: TokenizeRequest | TemplateRequest, messages: Sequence[ChatMessage]
) -> list[int]:
    """Return the token ids of a conversation with the tools and variables of a request."""
    calling = Calling(tuple(body.tools or ()))
    return service.counter.chat(messages, calling, variables=body.chat_template_kwargs)


@router.get("/props")
async def props(service: TheService) -> dict[str, Any]:
    """Describe the model and the server."""
    tokenizer = service.engine.tokenizer
    template = tokenizer.chat_template
    return {
        "default_generation_settings": {"n_ctx": service.writer.context},
        "total_slots": service.engine.max_running,
        "model_alias": service.settings.model,
        "model_path": service.settings.model,
        "chat_template": template if isinstance(template, str) else "",
        "bos_token": tokenizer.bos_token or "",
        "eos_token": tokenizer.eos_token or "",
        "modalities": {"vision": False, "audio": False},
        "build_info": f"deepseek {service.version}",
    }
