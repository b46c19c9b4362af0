"""`POST /v1/embeddings`."""

import asyncio
import base64
import math
from array import array
from collections.abc import AsyncIterator, Sequence
from functools import partial
from typing import Any

from fastapi import APIRouter
from fastapi.responses import Response

from deepseek.engine.embedding import ActiveEmbedding
from deepseek.engine.request import EngineStoppedError, TokenUsage
from deepseek.server.admission import ComputingRoute, Job
from deepseek.server.errors import ApiError, about
from deepseek.server.openapi import Embeddings, described
from deepseek.server.schema import EmbeddingsRequest
from deepseek.server.service import Service, TheService
from deepseek.server.stream import Fields, Reply

router = APIRouter(route_class=ComputingRoute)


@router.post("/v1/embeddings", responses=described(Embeddings))
async def embeddings(body: EmbeddingsRequest, service: TheService) -> Response:
    """Return a unit vector for each text: the mean of the base model's last hidden states."""
    if service.named_experts(body.model):
        raise ApiError(
            400,
            "Embeddings are computed by the base alone; leave the experts out of model.",
            param="model",
        )
    check_dimensions(service, body.dimensions)
    job = await embed(service, texts(body))
    return Reply(replies(body, job), job=job, fold=lambda sent: sent[0])


def texts(body: EmbeddingsRequest) -> Sequence[str | Sequence[int]]:
    """Return the texts of a request, each as text or as ids."""
    single = isinstance(body.input, str) or isinstance(body.input[0], int)
    return [body.input] if single else body.input  # type: ignore[list-item,return-value]


async def embed(
    service: Service, texts: Sequence[str | Sequence[int]], cut: bool = False
) -> "EmbeddingJob":
    """Start to embed texts, and return the job that follows.

    Args:
        service: the server's state.
        texts: each as text or as ids.
        cut: whether texts that are too long lose their ends; default: they are refused.

    Raises:
        ApiError, UserError: a text is invalid.
        QueueFullError: the queue is full.
    """
    run = service.admission.run
    encode: Any = service.writer.beginning if cut else service.writer.text
    # One at a time, so that other requests have their turn, and a client that leaves ends it.
    with about("input"):
        ids = [await run(partial(encode, text)) for text in texts]
    submit = partial(service.engine.submit_texts, ids)  # it checks every id
    return EmbeddingJob(service, await run(submit, ActiveEmbedding.cancel))


class EmbeddingJob(Job):
    """The embedding of one HTTP request's texts.

    Args:
        service: the server's state.
        embedding: the computation.
    """

    def __init__(self, service: Service, embedding: ActiveEmbedding) -> None:
        super().__init__(service.admission, [embedding], service.settings.request_seconds)
        self.tokens = sum(map(len, embedding.texts))
        self._embedding = embedding
        self._metrics = service.metrics

    def usage(self) -> TokenUsage:
        """Return the number of tokens."""
        return TokenUsage(self.tokens)

    def close(self) -> None:
        """Cancel the computation if it is unfinished, else record its usage."""
        super().close()
        result = self._embedding.result
        if result.done() and result.exception() is None:
            self._metrics.count(self.usage())

    async def vectors(self) -> list[list[float]]:
        """Return the vectors.

        Raises:
            ApiError: the computation was cancelled or exceeded the time limit.
        """
        try:
            return await asyncio.wrap_future(self._embedding.result)
        except EngineStoppedError:
            raise self.cancelled() from None


async def replies(body: EmbeddingsRequest, job: EmbeddingJob) -> AsyncIterator[Fields]:
    """Yield the one reply."""
    vectors = await job.vectors()
    yield await asyncio.to_thread(reply, body, vectors, job.tokens)


def reply(body: EmbeddingsRequest, computed: list[list[float]], tokens: int) -> Fields:
    """Return the reply.

    Args:
        body: the request.
        computed: a unit vector for each text, `[texts][hidden_size]`.
        tokens: number of tokens in all texts.
    """
    vectors = shortened(computed, body.dimensions)
    encoded = [packed(vector) if body.encoding_format == "base64" else vector for vector in vectors]
    data = [
        {"object": "embedding", "index": index, "embedding": vector}
        for index, vector in enumerate(encoded)
    ]
    usage = {"prompt_tokens": tokens, "total_tokens": tokens}
    return {"object": "list", "model": body.model, "data": data, "usage": usage}


def check_dimensions(service: Service, dimensions: int | None) -> None:
    """Raise `ApiError` for more dimensions than the model's vectors have; None asks for all."""
    if dimensions is None:
        return
    width = service.engine.model.config.get_text_config(decoder=True).hidden_size
    if dimensions > width:
        raise ApiError(
            400,
            f"The model's vectors have {width} dimensions; ask for at most as many.",
            param="dimensions",
        )


def shortened(vectors: list[list[float]], dimensions: int | None) -> list[list[float]]:
    """Return the first dimensions of vectors, scaled to length 1 again, as OpenAI's API does.

    Args:
        vectors: unit vectors, `[texts][hidden_size]`.
        dimensions: number of dimensions to keep; None: all.
    """
    if dimensions is None:
        return vectors
    cut = [vector[:dimensions] for vector in vectors]
    return [[value / (math.hypot(*vector) or 1.0) for value in vector] for vector in cut]


def packed(vector: list[float]) -> str:
    """Return a vector as little-endian 32-bit floats in base64, OpenAI's encoding."""
    return base64.b64encode(array("f", vector).tobytes()).decode()
