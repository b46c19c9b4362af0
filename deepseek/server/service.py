"""What all routes share: the engine, the settings, what a request's words mean to the engine, and
what is under way.
"""

import asyncio
import gc
import json
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass, field
from functools import lru_cache, partial
from pathlib import Path
from secrets import token_urlsafe
from typing import Annotated, Any

from fastapi import Depends
from fastapi import Request as HttpRequest

from deepseek.checkpoint.store import home
from deepseek.engine.engine import Engine
from deepseek.engine.generation import Generation
from deepseek.engine.request import ExpertChoice, Grammar, Request, TokenEvent, TokenUsage
from deepseek.engine.sampler import Sampling
from deepseek.packs.library import experts_folder
from deepseek.server.errors import ApiError
from deepseek.server.fleet import Fleet
from deepseek.server.indexes import Indexes
from deepseek.server.metrics import Metrics
from deepseek.server.prompt import PromptWriter
from deepseek.server.schema import ExpertsField, JsonSchema, SamplingFields


class GenerationJob:
    """Generations under way; `close` must be called, and ends what has not ended.

    Args:
        generations: in the order of the choices in the reply.
        choices: how many of them, one after the other, share a prompt.
        seconds: after which all of them are given up.
    """

    def __init__(
        self, generations: Sequence[Generation], choices: int, metrics: Metrics, seconds: float
    ) -> None:
        self.generations = generations
        self._choices = choices
        self._metrics = metrics
        self._queue: asyncio.Queue[tuple[int, TokenEvent]] = asyncio.Queue()
        for index, generation in enumerate(generations):
            generation.subscribe(partial(self._take, index))
        self._started = time.perf_counter()
        self._seconds = seconds
        self._expired = False
        self._timer = asyncio.get_running_loop().call_later(seconds, self._expire)

    async def events(self) -> AsyncIterator[tuple[int, TokenEvent]]:
        """Yield the events of all generations as they come, with the number of the choice.

        Raises `ApiError` if one fails or takes too long.
        """
        left = len(self.generations)
        first = True
        while left:
            index, event = await self._queue.get()
            if first:
                self._metrics.first_token.observe(time.perf_counter() - self._started)
            first = False
            self._check(event)
            left -= event.finish_reason is not None
            yield index, event

    def usage(self) -> TokenUsage:
        """Return what all generations used together; a prompt that several share counts once."""
        each = [generation.usage for generation in self.generations]
        experts: Counter[str | None] = Counter()
        for usage in each:
            experts.update(usage.experts)
        prompts = each[:: self._choices]
        prompt, cached = (
            sum(getattr(u, name) for u in prompts) for name in ("prompt_tokens", "cached_tokens")
        )
        return TokenUsage(prompt, cached, sum(usage.completion_tokens for usage in each), experts)

    def close(self) -> None:
        """Cancel what still runs and count what was used."""
        self._timer.cancel()
        for generation in self.generations:
            generation.cancel()
        self._metrics.count(self.usage())

    def _take(self, index: int, event: TokenEvent) -> None:
        self._queue.put_nowait((index, event))

    def _expire(self) -> None:
        self._expired = True
        for generation in self.generations:
            generation.cancel()

    def _check(self, event: TokenEvent) -> None:
        if event.finish_reason == "error":
            raise ApiError(500, f"The generation failed: {event.error}", code="internal_error")
        if event.finish_reason == "cancelled":
            if self._expired:
                raise ApiError(
                    504,
                    f"The answer took longer than {self._seconds:g} s; ask for less.",
                    code="timeout",
                )
            raise ApiError(
                503, "The server stopped this answer because it is shutting down.", code="draining"
            )


SEPARATOR = "+"
BASE_ALONE = "none"
"""`smollm2-135m+none`: no expert speaks. No expert can have this name."""


@dataclass(frozen=True)
class Settings:
    """How a server behaves.

    Attributes:
        model: the name under which clients know the base model; it has no path in it.
        base: name, folder or hub id of the base, for trainings.
        host, port: where it listens; port 0 takes a free one.
        hosts: further names under which it may be addressed (`Host` header), beside loopback and
            `host`.
        api_keys: who may ask; none: everybody who reaches the server.
        admin_keys: who may change something; none: nobody where `api_keys` are set, else everybody.
        experts_folder: where packs are plugged from by name.
        teach_root: folder below which text to learn from may lie; None: no teaching.
        preferences: the preference database.
        max_body, max_upload: bytes of a request, and of an uploaded pack.
        request_seconds: after which an answer is given up.
        answer_tokens: most tokens of an answer that asks for no limit.
        secret: that the page's sessions are made of; replicas of one server share it.
    """

    model: str = "smollm2-135m"
    base: str = "smollm2-135m"
    host: str = "127.0.0.1"
    port: int = 8000
    hosts: frozenset[str] = frozenset()
    api_keys: frozenset[str] = frozenset()
    admin_keys: frozenset[str] = frozenset()
    experts_folder: Path = field(default_factory=experts_folder)
    teach_root: Path | None = None
    preferences: Path = field(default_factory=lambda: home() / "preferences.db")
    max_body: int = 4 << 20
    max_upload: int = 1 << 30
    request_seconds: float = 600.0
    answer_tokens: int = 512
    secret: str = field(default_factory=token_urlsafe, repr=False)


class Service:
    """The state of one server; `engine` comes later than the server itself, so that it can say that
    it is loading.
    """

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.metrics = Metrics()
        self.indexes = Indexes(settings.experts_folder)
        self.draining = False
        self.active = 0  # requests under way
        self.fleet: Fleet | None = None
        self._engine: Engine | None = None
        self._writer: PromptWriter | None = None
        self.token_text = lru_cache(maxsize=1 << 16)(self._token_text)

    def attach(self, engine: Engine, fleet: Fleet | None = None) -> None:
        """Begin to serve with `engine`, as one of a fleet or alone."""
        self.fleet = fleet
        self._writer = PromptWriter(engine.tokenizer, engine.model.config.max_position_embeddings)
        self.metrics.watch(engine)
        gc.collect()
        gc.freeze()  # a collection that goes over all that is loaded holds up every stream
        self._engine = engine

    @property
    def refusal(self) -> ApiError | None:
        """Why no request can be served now, or None."""
        if self.draining:
            return ApiError(503, "The server is shutting down; ask another one.", code="draining")
        if self._engine is None:
            return ApiError(
                503, "The model is being loaded; try again in a moment.", code="loading"
            )
        return None

    @property
    def engine(self) -> Engine:
        """The engine; raises `ApiError` while there is none."""
        if self._engine is None:
            raise self.refusal or ApiError(503, "There is no engine.")
        return self._engine

    @property
    def experts_owner(self) -> Engine | Fleet:
        """What plugs, unplugs and arms experts for the whole server."""
        return self.fleet or self.engine

    @property
    def writer(self) -> PromptWriter:
        """What makes prompts for the engine's model."""
        assert self._writer is not None
        return self._writer

    async def start(self, plan: Callable[[], Sequence[Request]], choices: int = 1) -> GenerationJob:
        """Submit the requests that `plan` makes, all or none, away from the event loop.

        Args:
            choices: how many of them, one after the other, share a prompt.
        """
        generations = await asyncio.to_thread(submit, self.engine, plan)
        return GenerationJob(generations, choices, self.metrics, self.settings.request_seconds)

    def experts(self, model: str, wanted: ExpertsField) -> ExpertChoice:
        """Return who may speak under a model name such as `smollm2-135m+code+zh` and the field
        `experts`.

        The plain name takes those that the server has armed. Raises `ApiError` if there is no such
        model, or if name and field both choose.
        """
        named = self.named_experts(model)
        if named is None:
            arm = wanted.arm if isinstance(wanted.arm, str) else tuple(wanted.arm)
        elif "arm" in wanted.model_fields_set:
            raise ApiError(
                400,
                "The model name chooses experts already; leave experts.arm out.",
                param="experts.arm",
            )
        else:
            arm = named
        return ExpertChoice(arm, tuple(wanted.deny), wanted.max_experts)

    def named_experts(self, model: str) -> tuple[str, ...] | None:
        """Return the experts in a model name, None for the plain one. Raises `ApiError` if one is
        not plugged.
        """
        base = self.settings.model
        plugged = {info.name for info in self.engine.experts()}
        if model == base:
            return None
        names = (
            model.removeprefix(base + SEPARATOR).split(SEPARATOR)
            if model.startswith(base + SEPARATOR)
            else []
        )
        if names == [BASE_ALONE]:
            return ()
        if not names or not plugged.issuperset(names):
            known = ", ".join(self.models())
            raise ApiError(
                404,
                f"There is no model {model!r:.100}; there are {known}.",
                param="model",
                code="model_not_found",
            )
        return tuple(names)

    def models(self) -> list[str]:
        """Return the names to choose from: the base as armed, alone, with each expert, and with
        all.
        """
        base = self.settings.model
        plugged = [info.name for info in self.engine.experts()]
        every = [SEPARATOR.join([base, *plugged])] if len(plugged) > 1 else []
        return [
            base,
            f"{base}{SEPARATOR}{BASE_ALONE}",
            *(f"{base}{SEPARATOR}{name}" for name in plugged),
            *every,
        ]

    def _token_text(self, identity: int) -> str:
        return str(self.engine.tokenizer.decode([identity]))


def submit(engine: Engine, plan: Callable[[], Sequence[Request]]) -> list[Generation]:
    """Submit what `plan` makes; if one request is refused, none stays."""
    generations: list[Generation] = []
    try:
        generations.extend(engine.submit(request) for request in plan())
    except BaseException:
        for generation in generations:
            generation.cancel()
        raise
    return generations


async def _service_of(request: HttpRequest) -> Any:
    return request.app.state.service


TheService = Annotated[Service, Depends(_service_of)]
"""What a route names to be given the service of its app."""


DIALS = (
    "temperature",
    "top_p",
    "top_k",
    "min_p",
    "presence_penalty",
    "frequency_penalty",
    "repetition_penalty",
    "seed",
    "logit_bias",
)


def ask(
    service: Service,
    body: SamplingFields,
    prompt_ids: Sequence[int],
    max_tokens: int | None,
    *,
    choice: int = 0,
    schema: dict[str, Any] | None = None,
    logprobs: int | None = None,
    prompt_logprobs: bool = False,
    user_ids: tuple[int, ...] | None = None,
) -> Request:
    """Return the engine's request for one answer.

    Args:
        max_tokens: None takes the server's limit; more than the context has room for is cut to it.
        choice: which of several answers to one prompt; each draws from a seed of its own.
        schema: JSON schema that the answer follows.
        logprobs, prompt_logprobs: see `Request`.
        user_ids: its `user_ids`.

    Raises:
        ApiError, UserError: with the cause and the mend.
    """
    room = service.writer.context - len(prompt_ids)
    stop = getattr(body, "stop", None) or ()
    return Request(
        tuple(prompt_ids),
        sampling(body, min(max_tokens or service.settings.answer_tokens, room), choice),
        experts=service.experts(body.model, body.experts),
        user_ids=user_ids,
        stop=(stop,) if isinstance(stop, str) else tuple(stop),
        logprobs=logprobs,
        prompt_logprobs=prompt_logprobs,
        grammar=None if schema is None else Grammar("json_schema", json.dumps(schema)),
    )


def sampling(body: SamplingFields, max_tokens: int, choice: int) -> Sampling:
    """Return how the tokens of one answer are chosen; what the request leaves open is as OpenAI has
    it.
    """
    given = {name: value for name in DIALS if (value := getattr(body, name, None)) is not None}
    if "seed" in given:
        given["seed"] = (given["seed"] + choice) % (1 << 63)
    if "logit_bias" in given:
        given["logit_bias"] = {int(token): bias for token, bias in given["logit_bias"].items()}
    return Sampling(**{"temperature": 1.0, **given, "max_new_tokens": max_tokens})


def wanted_schema(kind: str, described: JsonSchema) -> dict[str, Any] | None:
    """Return the schema of an answer of this kind, None for free text. Raises `ApiError` if it is
    missing.
    """
    if kind == "json_schema" and described.schema_ is None:
        raise ApiError(
            400, "A format of type json_schema needs a schema.", param="json_schema.schema"
        )
    return {"text": None, "json_object": {"type": "object"}, "json_schema": described.schema_}[kind]
