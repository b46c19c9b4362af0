"""The engine: serves many concurrent requests from one model while experts are plugged and
unplugged.
"""

import weakref
from collections.abc import Sequence
from functools import partial
from pathlib import Path

from transformers import PreTrainedModel, PreTrainedTokenizerFast

from deepseek import checks
from deepseek.engine.dispatch import DispatchingRunner
from deepseek.engine.embedding import ActiveEmbedding
from deepseek.engine.generation import Generation
from deepseek.engine.request import (
    EngineStats,
    EngineStoppedError,
    Grammar,
    QueueFullError,
    Request,
)
from deepseek.engine.runners import reference_runner
from deepseek.engine.scheduler import CACHE_BYTES, MAX_RUNNING, PREFILL_CHUNK, Scheduler
from deepseek.engine.sequence import ActiveSequence, activate
from deepseek.engine.vocabulary import Vocabulary
from deepseek.engine.worker import Worker
from deepseek.errors import ConfigError
from deepseek.model.experts import ExpertInfo
from deepseek.model.experts.arming import ArmingValue
from deepseek.model.language_model import LanguageModel, context_length
from deepseek.packs.pack import ExpertPack
from deepseek.runner import Runner

STOPPED = "The engine takes no more requests; start another one."
NOT_HERE = (
    "The engine's thread does not run in this process, because a fork copies no threads; start an "
    "engine in the new process."
)


class Engine:
    """Continuous-batching inference engine.

    Each step runs one forward pass over a ragged batch of prefill chunks and decode tokens. Every
    public method is thread safe; a dedicated worker thread runs the steps. The output of a request
    does not depend on the other requests in its batch, as far as the runner promises: bit for bit
    (`CompiledRunner`) or up to rounding (`TorchRunner`).

    >>> with Engine(model, tokenizer) as engine:
    ...     for event in engine.submit(Request(tuple(ids))):
    ...         print(event.text, end="")

    Args:
        model: the model with its expert set.
        tokenizer: the model's tokenizer.
        runner: computes the forward passes; default `reference_runner(model)`, which also computes
            the sequences whose experts `runner` does not support, such as adapters.
        cache_bytes: key/value budget in bytes, shared by running requests and the prefix cache;
            default 1 GiB.
        max_running: maximum number of requests in a batch; default 16.
        max_waiting: maximum length of the queue; default 64. Requests that are submitted together
            may exceed it while the batch has free places.
        prefill_chunk: maximum number of prompt tokens in one step, and the block size of the prefix
            cache in tokens; default 64. Smaller chunks delay the decoding sequences less.

    Attributes:
        model, tokenizer, runner, max_running: as passed.
        max_requests: maximum number of requests in batch and queue together.

    Raises:
        ConfigError: a limit is not a positive integer.
    """

    def __init__(
        self,
        model: LanguageModel,
        tokenizer: PreTrainedTokenizerFast,
        runner: Runner | None = None,
        *,
        cache_bytes: int = CACHE_BYTES,
        max_running: int = MAX_RUNNING,
        max_waiting: int = 64,
        prefill_chunk: int = PREFILL_CHUNK,
    ) -> None:
        checks.instance("model", model, PreTrainedModel)
        checks.instance("tokenizer", tokenizer, PreTrainedTokenizerFast)
        cache_bytes = checks.whole("cache_bytes", cache_bytes, least=1)
        max_running = checks.whole("max_running", max_running, least=1)
        prefill_chunk = checks.whole("prefill_chunk", prefill_chunk, least=1)
        self.model = model
        self.tokenizer = tokenizer
        reference = self._reference = reference_runner(model)
        self.runner: Runner = reference if runner is None else runner
        self._vocabulary = Vocabulary(model, tokenizer)
        self.max_running = max_running
        self._max_waiting = checks.whole("max_waiting", max_waiting, least=1)
        self.max_requests = max_running + max_waiting
        self._scheduler = Scheduler(
            reference if runner is None else DispatchingRunner(runner, reference),
            model.experts.weight_cache,
            cache_bytes=cache_bytes,
            max_running=max_running,
            prefill_chunk=prefill_chunk,
        )
        self._draining = False
        self._worker = Worker(self._scheduler, model)
        # An engine that nobody closed would keep its thread, and so the model, for ever.
        weakref.finalize(self, self._worker.abandon).atexit = False

    def submit(self, request: Request) -> Generation:
        """Queue a request and return its stream of events.

        The request uses the experts that are armed now. Plugging or unplugging experts later does
        not affect it.

        Args:
            request: the prompt and its options.

        Raises:
            QueueFullError: the queue is full; the error carries the number of seconds to wait
                before a retry.
            EngineStoppedError: the engine is draining or closed, or this is a forked process.
            ConfigError: the request can never run: it is too long for the model or for
                `cache_bytes`, has token ids outside the vocabulary, its grammar does not compile,
                or its experts need more memory at once than the budget has.
            PackError: the request names an expert that is not plugged.
            GrammarCompilerError: the request has a grammar, and none can be compiled here.
        """
        checks.instance("request", request, Request)
        return self.submit_all([request])[0]

    def submit_all(self, requests: Sequence[Request]) -> list[Generation]:
        """Queue requests that belong together and return their streams of events.

        All are accepted or none: they are if the queue is not full, and batch and queue together
        have places for all, even if the queue alone does not.

        Args:
            requests: the prompts and their options.

        Raises:
            ConfigError: there are more than `max_requests`, or one can never run (see `submit`).
            QueueFullError, EngineStoppedError, PackError, GrammarCompilerError: see `submit`.
        """
        checks.sequence("requests", requests, partial(checks.instance, kind=Request), "requests")
        if len(requests) > self.max_requests:
            raise ConfigError(
                f"{len(requests)} answers are wanted at once, but at most {self.max_requests} can "
                "run and wait here; ask for fewer, or allow more by max_waiting (--max-waiting)."
            )
        self.check_open()
        runner = self._scheduler.runner
        chunk = self._scheduler.prefill_chunk
        sequences: list[ActiveSequence] = []
        for request in requests:
            sequence = activate(
                request, self.model, self._vocabulary, chunk, runner.divides, runner.expert_bytes
            )
            self._check_memory(sequence, sequence.capacity)
            sequences.append(sequence)
        generations = [Generation(sequence) for sequence in sequences]
        self._enqueue(sequences)
        return generations

    def check_open(self) -> None:
        """Raise the error that `submit` would raise when the engine takes no requests.

        A server calls this before it parses a request.

        Raises:
            QueueFullError: the queue is full.
            EngineStoppedError: the engine is draining or closed, or this is a forked process.
        """
        if self._draining:
            raise EngineStoppedError(STOPPED)
        if not self._worker.is_alive:
            raise EngineStoppedError(NOT_HERE)
        waiting = len(self._scheduler.waiting)
        if waiting >= self._max_waiting:
            raise self._full(waiting)

    def embed(self, ids: Sequence[int]) -> list[float]:
        """Return the embedding of one text (see `submit_texts`), and block until it is computed.

        Args:
            ids: tokens of the text, at least one and at most the model's context.

        Returns:
            The embedding: `hidden_size` numbers.

        Raises:
            ConfigError, QueueFullError, EngineStoppedError: see `submit_texts`.
        """
        return self.submit_texts([ids]).result.result()[0]

    def submit_texts(self, texts: Sequence[Sequence[int]]) -> ActiveEmbedding:
        """Queue texts to be embedded and return the computation.

        An embedding is the mean of the base model's last hidden states over a text, normalised to
        length 1; experts are not used. Texts pass the same queue and budget as requests, and each
        step computes at most one chunk of a text.

        Args:
            texts: tokens of each text, at least one and at most the model's context.

        Raises:
            ConfigError: there is no text, a text has no ids, more than the model's context, or ids
                outside the vocabulary, or it does not fit into `cache_bytes`.
            QueueFullError: the queue is full.
            EngineStoppedError: the engine is draining or closed, or this is a forked process.
        """
        context = context_length(self.model)
        if not texts:
            raise ConfigError("There is no text to embed; give at least one.")
        texts = [checks.prompt("ids", ids, self._vocabulary.size) for ids in texts]
        for ids in texts:
            if not 1 <= len(ids) <= context:
                raise ConfigError(
                    f"The text has {len(ids)} tokens, but 1 to {context} are possible."
                )
        embedding = ActiveEmbedding(
            self.model, self._reference, texts, self._scheduler.prefill_chunk
        )
        self._check_memory(embedding, max(map(len, texts)))
        self._enqueue([embedding])
        return embedding

    def _full(self, ahead: int) -> QueueFullError:
        """Return the error for requests that have no place.

        Args:
            ahead: number of requests before them.
        """
        finished_count = self._scheduler.finished.total()
        seconds_per_request = self._worker.seconds / finished_count if finished_count else 1.0
        return QueueFullError(ahead, min(max(1.0, ahead * seconds_per_request), 60.0))

    def _check_memory(self, sequence: ActiveSequence | ActiveEmbedding, tokens: int) -> None:
        """Raise `ConfigError` for a computation that needs more than `cache_bytes`.

        Args:
            sequence: the computation.
            tokens: maximum number of tokens whose keys and values it keeps at a time.
        """
        need = self._scheduler.need(sequence)
        budget = self._scheduler.cache_bytes
        if need > budget:
            raise ConfigError(
                f"{tokens} tokens need {need} bytes of keys and values, "
                f"but the cache has {budget}; "
                "shorten the prompt, ask for fewer tokens or give the engine a larger cache."
            )

    def _enqueue(self, sequences: Sequence[ActiveSequence | ActiveEmbedding]) -> None:
        """Put computations into the queue, all or none.

        Args:
            sequences: the computations, at most `max_requests`.

        Raises:
            QueueFullError, EngineStoppedError: see `check_open`, or not all have a place.
        """
        scheduler = self._scheduler
        with self._worker.changed:
            self.check_open()
            ahead = len(scheduler.waiting) + len(scheduler.running)
            if ahead + len(sequences) > self.max_requests:
                raise self._full(ahead)
            scheduler.waiting.extend(sequences)
            self._worker.changed.notify_all()

    def plug(self, source: str | Path | ExpertPack, *, in_place: bool = False) -> ExpertInfo:
        """Plug an expert for requests submitted from now on (see `ExpertSet.plug`).

        Args:
            source: an expert pack, loaded or as the path of its file.
            in_place: replace the plugged expert of the same name, if any, and keep its arming.

        Raises:
            PackError: the pack cannot be read, or does not fit the base model.
        """
        return self.model.experts.plug(source, self.runner.prepare, in_place=in_place)

    def unplug(self, name: str) -> None:
        """Unplug an expert; requests in flight keep it until they finish.

        Args:
            name: name of the expert.

        Raises:
            PackError: no expert of this name is plugged.
        """
        self.model.experts.unplug(name)

    def arm(self, names: ArmingValue = "auto") -> tuple[str, ...]:
        """Choose the experts for requests that do not choose any themselves (see `ExpertSet.arm`).

        Args:
            names: a name, several names, names with weights, "auto" or None, as in
                `ExpertSet.arm`; default "auto".

        Returns:
            The names of the armed experts.
        """
        return self.model.experts.arm(names)

    def experts(self) -> tuple[ExpertInfo, ...]:
        """Return the plugged experts, sorted by name."""
        return self.model.experts.list()

    def token_bytes(self, token: int) -> bytes:
        """Return the bytes of a token's text, which can be part of a character.

        Args:
            token: its id.
        """
        return self._vocabulary.token_bytes(token)

    def check_grammar(self, grammar: Grammar) -> None:
        """Compile a grammar, whose compiled form is cached for the requests that have it.

        Args:
            grammar: the grammar.

        Raises:
            ConfigError, GrammarCompilerError: it cannot be compiled (see `submit`).
        """
        self._vocabulary.matcher(grammar)

    def stats(self) -> EngineStats:
        """Return the engine's counters and its current load."""
        scheduler = self._scheduler
        return EngineStats(
            running=len(scheduler.running),
            waiting=len(scheduler.waiting),
            cache_bytes=scheduler.cache_bytes,
            reserved_bytes=scheduler.reserved,
            prefix_bytes=scheduler.prefixes.nbytes,
            prompt_tokens=scheduler.prompt_tokens,
            cached_tokens=scheduler.cached_tokens,
            shared_tokens=scheduler.shared_tokens,
            completion_tokens=scheduler.completion_tokens,
            finished=dict(scheduler.finished),
            steps=scheduler.steps,
            step_seconds=self._worker.seconds,
            expert_bytes=scheduler.weights.nbytes,
            expert_loads=scheduler.weights.loads,
        )

    def drain(self, timeout: float | None = None) -> bool:
        """Refuse new requests and wait for those already submitted.

        Args:
            timeout: maximum time to wait, in seconds; None waits without limit.

        Returns:
            Whether all requests finished in time.
        """
        checks.optional(partial(checks.number, least=0))("timeout", timeout)
        with self._worker.changed:
            self._draining = True
            return self._worker.changed.wait_for(lambda: self._worker.is_idle, timeout)

    def close(self) -> None:
        """Cancel all requests and stop the engine's thread. Further calls do nothing."""
        self._draining = True
        self._worker.close()

    def __enter__(self) -> "Engine":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
