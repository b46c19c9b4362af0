"""State shared by all routes: engine, settings and running jobs."""

import asyncio
import gc
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from copy import copy
from datetime import UTC, datetime
from functools import partial
from hashlib import sha256
from importlib import metadata
from typing import Annotated, Any, TypeVar

from fastapi import Depends
from fastapi import Request as HttpRequest

from deepseek.checkpoint.licence import read_licence
from deepseek.engine.engine import Engine
from deepseek.engine.generation import Generation
from deepseek.engine.request import ExpertChoice, Request
from deepseek.model.experts import ExpertInfo
from deepseek.model.experts.arming import Arming
from deepseek.model.language_model import context_length
from deepseek.server.admission import Admission
from deepseek.server.errors import ApiError
from deepseek.server.fleet import Fleet
from deepseek.server.indexes import Indexes
from deepseek.server.job import GenerationJob, cancel, submit_within
from deepseek.server.keys import Experts
from deepseek.server.metrics import Metrics
from deepseek.server.model_size import ModelSize, model_size
from deepseek.server.prompt import PromptWriter
from deepseek.server.schema import ExpertsField
from deepseek.server.settings import Settings
from deepseek.server.token_text import TokenTexts

T = TypeVar("T")

SEPARATOR = "+"
OLLAMA_TAG = ":latest"
"""Tag that Ollama's clients add to a model's name."""

BASE_ALONE = "none"
"""`smollm2-135m+none` is the base with no expert armed. No expert can have this name."""


class Service:
    """The state of one server, of version `version`, which started at `started`.

    The engine is attached later, so that the server can answer with 503 while the model loads.

    Attributes:
        allowed: names of the experts that requests may use; None: all. Set only in the views that
            `within` returns.
    """

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.version = metadata.version("deepseek-dmoe")
        self.started = datetime.now(UTC).replace(microsecond=0)
        self.metrics = Metrics(self.version)
        self.indexes = Indexes(settings.experts_folder)
        self.allowed: Experts = None
        self.draining = False
        self.active = 0  # running HTTP requests
        self.admission = Admission()
        self.fleet: Fleet | None = None
        self.licence = ""  # of the base; "" until the engine is attached, or without a folder
        self._changes = ThreadPoolExecutor(1, "change")
        self._engine: Engine | None = None
        self._writer: PromptWriter | None = None
        self._counter: PromptWriter | None = None
        self._size: ModelSize | None = None
        self._tokens: TokenTexts | None = None

    def attach(self, engine: Engine, fleet: Fleet | None = None) -> None:
        """Start to serve with `engine`, alone or as a member of `fleet`."""
        self.fleet = fleet
        self._writer = PromptWriter(engine.tokenizer, context_length(engine.model))
        self._counter = PromptWriter(engine.tokenizer, self.settings.max_body)
        self._size = model_size(engine)
        self._tokens = TokenTexts(engine)
        folder = engine.model.experts.base_folder
        self.licence = str(read_licence(folder)) if folder else ""
        self.metrics.watch(engine)
        gc.collect()
        gc.freeze()  # else a full collection scans all loaded objects and stalls every stream
        self._engine = engine

    def within(self, allowed: Experts) -> "Service":
        """Return the service as a key sees it: its requests see only the allowed experts.

        The view is for one request: it shares all parts, but does not see later changes of flags
        such as `draining`.

        Args:
            allowed: names of the experts that the key may use; None: all.
        """
        if allowed is None:
            return self
        view = copy(self)
        view.allowed = allowed
        return view

    @property
    def digest(self) -> str:
        """SHA-256 of what determines answers; a text is reproducible only while it is the same."""
        digests = [info.digest for info in self.visible_experts()]
        parts = [self.version, self.settings.base, str(self.engine.model.dtype), *digests]
        return sha256(chr(0).join(parts).encode()).hexdigest()

    @property
    def fingerprint(self) -> str:
        """The digest as OpenAI's API has it."""
        return f"fp_{self.digest[:12]}"

    @property
    def refusal(self) -> ApiError | None:
        """The reason why no request can be served now, or None."""
        if self.draining:
            return ApiError(503, "The server is shutting down; ask another one.", code="draining")
        if self._engine is None:
            return ApiError(
                503, "The model is being loaded; try again in a moment.", code="loading"
            )
        return None

    @property
    def loaded(self) -> bool:
        """Whether an engine is attached."""
        return self._engine is not None

    @property
    def engine(self) -> Engine:
        """The engine. Raises `ApiError` (503) while none is attached."""
        if self._engine is None:
            raise self.refusal or ApiError(503, "There is no engine.")
        return self._engine

    @property
    def experts_owner(self) -> Engine | Fleet:
        """The fleet, or without one the engine: it plugs, unplugs and arms for the whole server."""
        return self.fleet or self.engine

    async def change(self, apply: Callable[[Engine | Fleet], T]) -> T:
        """Call `apply` with the owner of the experts, in a thread, and return its result.

        Changes run one after another, because a fleet refuses a change if another has changed its
        state meanwhile. They have their own thread, so that replies never wait for a change.
        """
        changed = self._changes.submit(lambda: apply(self.experts_owner))
        return await asyncio.wrap_future(changed)

    def close(self) -> None:
        """Let the threads end."""
        self.admission.close()
        self._changes.shutdown(wait=False, cancel_futures=True)

    @property
    def writer(self) -> PromptWriter:
        """The prompt writer of the engine's model."""
        assert self._writer is not None
        return self._writer

    @property
    def counter(self) -> PromptWriter:
        """A prompt writer for routes that count and convert tokens. Any text that fits into a
        request is accepted, because clients count tokens to decide what to leave out.
        """
        assert self._counter is not None
        return self._counter

    @property
    def tokens(self) -> TokenTexts:
        """The texts of the model's tokens."""
        assert self._tokens is not None
        return self._tokens

    @property
    def size(self) -> ModelSize:
        """Size of the engine's base model."""
        assert self._size is not None
        return self._size

    async def start(
        self,
        plan: Callable[[], Sequence[Request]],
        choices: int = 1,
        *,
        is_constrained: bool = False,
    ) -> GenerationJob:
        """Submit the requests that `plan` returns and return the job that follows them.

        Planning (template, tokenizer, retrieval) and submission run in a thread, so that they do
        not block the event loop. Either all requests are admitted or none. If the caller is
        cancelled, they are too.

        Args:
            plan: returns the engine's requests.
            choices: number of consecutive requests that share a prompt; default: 1.
            is_constrained: whether `plan` compiles a grammar; default: no.

        Raises:
            ApiError, UserError: a request is invalid.
            QueueFullError: the queue has no room for all requests.
        """
        run = self.admission.run_constrained if is_constrained else self.admission.run
        generations = await run(partial(self._submit, plan), cancel)
        return GenerationJob(
            generations,
            choices,
            self.admission,
            self.metrics,
            seconds=self.settings.request_seconds,
            tells_cached=self.allowed is None,
        )

    def _submit(self, plan: Callable[[], Sequence[Request]]) -> list[Generation]:
        requests = plan()
        if self.allowed is None and len(requests) == 1:
            return self.engine.submit_all(requests)
        return submit_within(self.engine, requests, self.allowed)

    def experts(self, model: str, wanted: ExpertsField) -> ExpertChoice:
        """Return the experts that a request may use.

        Args:
            model: model name of the request, such as `smollm2-135m+code+zh`. The plain name of the
                base selects the experts that are armed on the server.
            wanted: field `experts` of the request.

        Raises:
            ApiError: there is no such model, name and field both select experts, or the key may
                not use one of them.
        """
        named = self.named_experts(model)
        if named is not None and "arm" in wanted.model_fields_set:
            raise ApiError(
                400,
                "The model name chooses experts already; leave experts.arm out.",
                param="experts.arm",
            )
        arm = wanted.choice if named is None else named
        if named is None:  # else they are known to be plugged
            for name in Arming.parse(arm).named:
                self.plugged(name, "experts.arm")
        return ExpertChoice(arm, tuple(wanted.deny), wanted.max_experts)

    def visible_experts(self) -> tuple[ExpertInfo, ...]:
        """Return the plugged experts that requests may use, sorted by name."""
        return tuple(info for info in self.engine.experts() if self.may_use(info.name))

    def plugged(self, name: str, param: str = "name") -> ExpertInfo:
        """Return a plugged expert.

        Args:
            name: its name.
            param: field that names it, for the error; default: "name".

        Raises:
            ApiError: the key may not use it (403), or no expert of this name is plugged (404).
        """
        self.check_use(name, param)
        for info in self.engine.experts():
            if info.name == name:
                return info
        raise ApiError(
            404,
            f"No expert named {name!r:.80} is plugged; POST /v1/experts plugs one.",
            param=param,
        )

    def may_use(self, name: str) -> bool:
        """Return whether requests may use an expert of this name, if there is one."""
        return self.allowed is None or name in self.allowed

    def check_use(self, name: str, param: str) -> None:
        """Raise `ApiError` (403) unless requests may use an expert of this name.

        The error is the same whether or not there is such an expert.

        Args:
            name: name of the expert.
            param: field that names it, for the error.
        """
        if not self.may_use(name):
            raise ApiError(
                403,
                f"This key may not use an expert named {name!r:.80}; it may use "
                f"{', '.join(sorted(self.allowed or ())) or 'none'}.",
                param=param,
                code="expert_not_allowed",
            )

    def named_experts(self, model: str) -> tuple[str, ...] | None:
        """Return the experts in a model name, None for the plain base name. Raises `ApiError`
        if one is not plugged, or the key may not use it.
        """
        served = {self.settings.model, *self.settings.aliases}
        # The routes of Ollama leave out this tag of a request's model.
        served |= {name.removesuffix(OLLAMA_TAG) for name in served}
        bases = [name for name in served if model == name or model.startswith(name + SEPARATOR)]
        base = max(bases, key=len, default=self.settings.model)
        plugged = {info.name for info in self.visible_experts()}
        if model in ("", base):  # llama.vim sends the empty name
            return None
        names = (
            model.removeprefix(base + SEPARATOR).split(SEPARATOR)
            if model.startswith(base + SEPARATOR)
            else []
        )
        if names == [BASE_ALONE]:
            return ()
        for name in names:
            self.check_use(name, "model")
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
        """Return the model names: the base as armed, alone, with each expert, and with all."""
        base = self.settings.model
        plugged = [info.name for info in self.visible_experts()]
        with_all = [SEPARATOR.join([base, *plugged])] if len(plugged) > 1 else []
        return [
            base,
            *sorted(self.settings.aliases),
            f"{base}{SEPARATOR}{BASE_ALONE}",
            *(f"{base}{SEPARATOR}{name}" for name in plugged),
            *with_all,
        ]


async def _service_of(request: HttpRequest) -> Any:
    return request.app.state.service.within(request.state.permissions.experts)


TheService = Annotated[Service, Depends(_service_of)]
"""Type of a route parameter that receives the app's `Service` as the request's key sees it."""
