"""`/v1/models`, `/v1/embeddings`, `/tokenizer_info`: what is served, and what it makes of a text besides more text."""

import asyncio
import base64
from array import array
from typing import Any

from fastapi import APIRouter

from deepseek.infer.engine import Engine
from deepseek.server.errors import ApiError
from deepseek.server.prompt import PromptWriter
from deepseek.server.replies import Embeddings, Model, Models, described
from deepseek.server.schema import EmbeddingsRequest
from deepseek.server.service import TheService
from deepseek.text.tokenizer import tokenizer_digest

router = APIRouter()


@router.get("/v1/models", responses=described(Models))
async def models(service: TheService) -> dict[str, Any]:
    """List the base model as it is armed, alone, with each expert, and with all of them."""
    return {"object": "list", "data": [card(name) for name in service.models()]}


@router.get("/v1/models/{model}", responses=described(Model))
async def model(model: str, service: TheService) -> dict[str, Any]:
    """Describe one model: the base, or the base with any set of plugged experts."""
    service.named_experts(model)
    return card(model)


def card(name: str) -> dict[str, Any]:
    """Return a model as OpenAI lists it."""
    return {"id": name, "object": "model", "created": 0, "owned_by": "deepseek"}


@router.post("/v1/embeddings", responses=described(Embeddings))
async def embeddings(body: EmbeddingsRequest, service: TheService) -> dict[str, Any]:
    """Return a vector of length 1 for each text: the mean of the base model's last hidden states."""
    if service.named_experts(body.model):
        raise ApiError(400, "Embeddings are made by the base alone; leave the experts out of model.", param="model")
    texts = body.input if isinstance(body.input, list) and not isinstance(body.input[0], int) else [body.input]
    vectors, tokens = await asyncio.to_thread(embed, service.engine, service.writer, texts)
    told = [packed(vector) if body.encoding_format == "base64" else vector for vector in vectors]
    data = [{"object": "embedding", "index": index, "embedding": vector} for index, vector in enumerate(told)]
    usage = {"prompt_tokens": tokens, "total_tokens": tokens}
    return {"object": "list", "model": body.model, "data": data, "usage": usage}


def embed(engine: Engine, writer: PromptWriter, texts: list[Any]) -> tuple[list[list[float]], int]:
    """Return the vectors of texts, and how many tokens they have."""
    prompts = [writer.text(text) for text in texts]
    return [engine.embed(ids) for ids in prompts], sum(map(len, prompts))


def packed(vector: list[float]) -> str:
    """Return a vector as OpenAI's client wants it: little-endian 32-bit floats in base64."""
    return base64.b64encode(array("f", vector).tobytes()).decode()


@router.get("/tokenizer_info")
async def tokenizer_info(service: TheService) -> dict[str, Any]:
    """Describe the tokenizer, as evaluation harnesses ask."""
    tokenizer = service.engine.tokenizer
    return {
        "model": service.settings.model,
        "vocab_size": len(tokenizer),
        "max_model_len": service.writer.context,
        "bos_token": tokenizer.bos_token,
        "eos_token": tokenizer.eos_token,
        "pad_token": tokenizer.pad_token,
        "chat_template": tokenizer.chat_template,
        "digest": tokenizer_digest(tokenizer),
    }
