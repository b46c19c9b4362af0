"""`/api/...`: Ollama's API, so that its clients find this server."""

import asyncio
import time
from collections.abc import AsyncIterator
from typing import Any

from fastapi import APIRouter
from fastapi.responses import JSONResponse, Response

from deepseek.server.admission import AnyTypeComputingRoute
from deepseek.server.dialects.ollama import (
    NANOSECONDS,
    AnswerLines,
    OlderEmbed,
    OllamaChat,
    OllamaEmbed,
    OllamaGenerate,
    ShowRequest,
    base_name,
    now,
)
from deepseek.server.errors import ApiError, OllamaErrorBody, documented
from deepseek.server.openapi import STREAMED_LINES
from deepseek.server.routes import chat_completions, completions
from deepseek.server.routes.embeddings import EmbeddingJob, check_dimensions, embed, shortened
from deepseek.server.service import Service, TheService
from deepseek.server.stream import Fields, Reply

router = APIRouter(
    prefix="/api", route_class=AnyTypeComputingRoute, responses=documented(OllamaErrorBody)
)

NEVER = "0001-01-01T00:00:00Z"
"""Ollama's time for a model that is never unloaded."""


@router.head("/version", include_in_schema=False)
@router.get("/version")
async def version(service: TheService) -> dict[str, str]:
    """Return the version of this package."""
    return {"version": service.version}


@router.head("/tags", include_in_schema=False)
@router.get("/tags")
async def tags(service: TheService) -> dict[str, Any]:
    """List the models."""
    return {"models": listed(service)}


@router.get("/ps")
async def loaded(service: TheService) -> dict[str, Any]:
    """List the loaded models, which are all of them."""
    running = {"expires_at": NEVER, "size_vram": 0, "context_length": service.writer.context}
    return {"models": [{**model, **running} for model in listed(service)]}


@router.post("/show")
async def show(body: ShowRequest, service: TheService) -> dict[str, Any]:
    """Describe one model."""
    service.named_experts(base_name(body.wanted))
    config = service.engine.model.config.get_text_config(decoder=True)
    architecture = "llama"
    template = service.engine.tokenizer.chat_template
    return {
        "modelfile": "",
        "parameters": "",
        "template": template if isinstance(template, str) else "",
        "details": details(service),
        "model_info": {
            "general.architecture": architecture,
            "general.parameter_count": service.size.parameters,
            f"{architecture}.context_length": service.writer.context,
            f"{architecture}.embedding_length": config.hidden_size,
            f"{architecture}.block_count": config.num_hidden_layers,
        },
        "capabilities": ["completion", "tools", "insert"],
        "modified_at": service.started.isoformat(),
    }


@router.post("/chat", responses=STREAMED_LINES)
async def chat(body: OllamaChat, service: TheService) -> Response:
    """Answer a conversation, as lines of JSON or as one object."""
    if not body.messages:
        message = {"role": "assistant", "content": ""}
        return loading_reply(service, body.model, {"message": message})
    started = time.perf_counter()
    chunks = await chat_completions.answer(service, body.chat())
    return reply(AnswerLines(body.model, chunks, "message", started), chunks, body.stream)


@router.post("/generate", responses=STREAMED_LINES)
async def generate(body: OllamaGenerate, service: TheService) -> Response:
    """Continue a prompt, as lines of JSON or as one object."""
    if not body.prompt:
        return loading_reply(service, body.model, {"response": ""})
    started = time.perf_counter()
    chunks = (
        await completions.answer(service, body.completion(service.settings.answer_tokens))
        if body.raw or body.suffix
        else await chat_completions.answer(service, body.chat())
    )
    return reply(AnswerLines(body.model, chunks, "response", started), chunks, body.stream)


def reply(lines: AnswerLines, chunks: Any, stream: bool | None) -> Reply:
    """Return the reply; this API streams unless the request says no."""
    return Reply(
        lines.lines(), job=chunks.job, layout="lines", fold=lines.fold if stream is False else None
    )


def loading_reply(service: Service, model: str, content: dict[str, Any]) -> Response:
    """Return the reply to an empty prompt, by which clients ask for the model to be loaded.

    Raises:
        ApiError: there is no such model.
    """
    service.named_experts(base_name(model))
    fields = {"model": model, "created_at": now(), "done": True, "done_reason": "load"}
    return JSONResponse({**fields, **content})


@router.post("/embed")
async def embeddings(body: OllamaEmbed, service: TheService) -> Response:
    """Return a unit vector for each text."""
    check_dimensions(service, body.dimensions)
    if not body.input:
        return loading_reply(service, body.model, {"embeddings": []})
    started = time.perf_counter()
    texts = [body.input] if isinstance(body.input, str) else body.input
    job = await embedding_job(service, body.model, texts, cut=body.truncate is not False)
    return Reply(vectors(body, job, started), job=job, fold=lambda sent: sent[0])


@router.post("/embeddings")
async def older_embeddings(body: OlderEmbed, service: TheService) -> Response:
    """Return a unit vector for one text."""
    if not body.prompt:
        return loading_reply(service, body.model, {"embedding": []})
    job = await embedding_job(service, body.model, [body.prompt])
    return Reply(vector(job), job=job, fold=lambda sent: sent[0])


async def embedding_job(
    service: Service, model: str, texts: list[str], cut: bool = False
) -> EmbeddingJob:
    """Start to embed texts, and return the job that follows.

    Args:
        service: the server's state.
        model: the model's name in the request, the base alone.
        texts: the texts.
        cut: see `embed`.

    Raises:
        ApiError: the name has experts.
    """
    if service.named_experts(base_name(model)):
        raise ApiError(400, "Embeddings are computed by the base alone.", param="model")
    return await embed(service, texts, cut)


async def vectors(body: OllamaEmbed, job: EmbeddingJob, started: float) -> AsyncIterator[Fields]:
    """Yield the one reply to a request for embeddings.

    Args:
        body: the request.
        job: the computation.
        started: `time.perf_counter()` at the start.
    """
    found = await asyncio.to_thread(shortened, await job.vectors(), body.dimensions)
    yield {
        "model": body.model,
        "embeddings": found,
        "total_duration": int((time.perf_counter() - started) * NANOSECONDS),
        "load_duration": 0,
        "prompt_eval_count": job.tokens,
    }


async def vector(job: EmbeddingJob) -> AsyncIterator[Fields]:
    """Yield the one reply to a request for the embedding of one text."""
    yield {"embedding": (await job.vectors())[0]}


def listed(service: Service) -> list[dict[str, Any]]:
    """Return the models as Ollama lists them; all are the base, with other experts."""
    base = {
        "modified_at": service.started.isoformat(),
        "size": service.size.nbytes,
        "digest": service.digest,
        "details": details(service),
    }
    return [{"name": name, "model": name, **base} for name in service.models()]


def details(service: Service) -> dict[str, Any]:
    """Return the model's family and size."""
    family = service.engine.model.config.model_type
    return {
        "parent_model": "",
        "format": "safetensors",
        "family": family,
        "families": [family],
        "parameter_size": f"{service.size.parameters / 1e6:.1f}M",
        "quantization_level": service.size.precision,
    }
