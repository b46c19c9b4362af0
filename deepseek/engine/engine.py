"""The engine: many requests at once over one model, while experts come and go."""

import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedTokenizerFast

from deepseek.engine.generation import Generation
from deepseek.engine.request import EngineStats, EngineStoppedError, QueueFullError, Request
from deepseek.engine.scheduler import CACHE_BYTES, MAX_RUNNING, PREFILL_CHUNK, Scheduler
from deepseek.engine.sequence import activate
from deepseek.engine.torch_runner import TorchRunner
from deepseek.engine.vocabulary import Vocabulary
from deepseek.errors import ConfigError
from deepseek.model.experts import ExpertInfo
from deepseek.model.kv_cache import KVCache
from deepseek.model.transformer import DeepSeekModel
from deepseek.packs.pack import ExpertPack
from deepseek.runner import Runner

STOPPED = "The engine takes no more requests; start another one."

log = logging.getLogger(__name__)


class Engine:
    """Runs requests side by side: each step is one ragged batch of prompt pieces and next tokens.

    Every public method may be called from any thread. One thread of its own runs the steps. The
    same request gives the same tokens whatever else runs.

    >>> with Engine(model, tokenizer) as engine:
    ...     for event in engine.submit(Request(tuple(ids))):
    ...         print(event.text, end="")

    Args:
        runner: computes the model; default `TorchRunner(model)`.
        cache_bytes: budget of keys and values, of running requests and stored prefixes together.
        max_running: most requests in a batch.
        max_waiting: most requests that wait for their turn.
        prefill_chunk: most prompt tokens in one step, and the tokens of one block of the prefix
            cache. A smaller chunk holds up the other sequences for a shorter time.
    """

    def __init__(
        self,
        model: DeepSeekModel,
        tokenizer: PreTrainedTokenizerFast,
        runner: Runner | None = None,
        *,
        cache_bytes: int = CACHE_BYTES,
        max_running: int = MAX_RUNNING,
        max_waiting: int = 64,
        prefill_chunk: int = PREFILL_CHUNK,
    ) -> None:
        self.model = model
        self.tokenizer = tokenizer
        self.runner: Runner = TorchRunner(model) if runner is None else runner
        self._vocabulary = Vocabulary(model, tokenizer)
        self._max_waiting = max_waiting
        self._scheduler = Scheduler(
            self.runner,
            cache_bytes=cache_bytes,
            max_running=max_running,
            prefill_chunk=prefill_chunk,
        )
        self._jobs: deque[tuple[Future[Any], Callable[[], Any]]] = deque()
        self._changed = threading.Condition()
        self._draining = self._closed = False
        self._seconds = 0.0
        self._worker = threading.Thread(target=self._run, name="engine", daemon=True)
        self._worker.start()

    def submit(self, request: Request) -> Generation:
        """Queue `request`; its experts are those armed now, whatever is plugged or unplugged before
        it ends.

        Raises:
            QueueFullError: too many wait; it says when to come back.
            EngineStoppedError: the engine drains or is closed.
            ConfigError: it can never run: too long for the model or for `cache_bytes`, ids outside
                the vocabulary, or a grammar that does not compile.
            PackError: it names an expert that is not plugged.
        """
        self.check_open()
        sequence = activate(request, self.model, self._vocabulary, self._scheduler.prefill_chunk)
        need = self._scheduler.need(sequence)
        budget = self._scheduler.cache_bytes
        if need > budget:
            raise ConfigError(
                f"{sequence.capacity} tokens need {need} bytes of keys and values, but the cache has {budget}; "
                "shorten the prompt, ask for fewer tokens or give the engine a larger cache."
            )
        generation = Generation(sequence)
        with self._changed:
            self.check_open()
            self._scheduler.waiting.append(sequence)
            self._changed.notify_all()
        return generation

    def check_open(self) -> None:
        """Raise what `submit` would raise if no more requests are taken, for good or for now,
        without reading one.
        """
        if self._draining:
            raise EngineStoppedError(STOPPED)
        waiting = len(self._scheduler.waiting)
        ended = self._scheduler.finished.total()
        if waiting >= self._max_waiting:
            pace = self._seconds / ended if ended else 1.0
            raise QueueFullError(waiting, min(max(1.0, waiting * pace), 60.0))

    def embed(self, ids: Sequence[int]) -> list[float]:
        """Return the mean of the last hidden states of a text, of length 1, by the base alone.
        Blocks.

        Raises `ConfigError` if there are no ids or more than the model's context;
        `EngineStoppedError`.
        """
        context = self.model.config.max_position_embeddings
        if not 1 <= len(ids) <= context:
            raise ConfigError(f"The text has {len(ids)} tokens, but 1 to {context} are possible.")
        done: Future[list[float]] = Future()
        with self._changed:
            if self._draining:
                raise EngineStoppedError(STOPPED)
            self._jobs.append((done, lambda: embedding(self.model, ids)))
            self._changed.notify_all()
        return done.result()

    def plug(self, source: str | Path | ExpertPack) -> ExpertInfo:
        """Plug an expert for requests that are submitted from now on (see `ExpertSet.plug`). Raises
        `PackError`.
        """
        return self.model.experts.plug(source, self.runner.prepare)

    def unplug(self, name: str) -> None:
        """Unplug an expert; requests under way keep it until they end. Raises `PackError` if there
        is none.
        """
        self.model.experts.unplug(name)

    def arm(self, names: str | Iterable[str] | None = "auto") -> tuple[str, ...]:
        """Choose who speaks in requests that do not choose themselves (see `ExpertSet.arm`)."""
        return self.model.experts.arm(names)

    def experts(self) -> tuple[ExpertInfo, ...]:
        """Return what is plugged, sorted by name."""
        return self.model.experts.list()

    def stats(self) -> EngineStats:
        """Return what the engine is doing and has done."""
        scheduler = self._scheduler
        return EngineStats(
            running=len(scheduler.running),
            waiting=len(scheduler.waiting),
            cache_bytes=scheduler.cache_bytes,
            reserved_bytes=scheduler.reserved,
            prefix_bytes=scheduler.prefixes.nbytes,
            prompt_tokens=scheduler.prompt_tokens,
            cached_tokens=scheduler.cached_tokens,
            completion_tokens=scheduler.completion_tokens,
            finished=dict(scheduler.finished),
            steps=scheduler.steps,
            step_seconds=self._seconds,
        )

    def drain(self, timeout: float | None = None) -> bool:
        """Take no more requests and wait for those submitted. Returns whether all ended within
        `timeout` seconds.
        """
        with self._changed:
            self._draining = True
            return self._changed.wait_for(lambda: self._scheduler.idle and not self._jobs, timeout)

    def close(self) -> None:
        """Cancel what runs or waits and end the engine's thread. It may be called twice."""
        with self._changed:
            self._draining = self._closed = True
            self._changed.notify_all()
        self._worker.join()

    def __enter__(self) -> "Engine":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _run(self) -> None:
        """Step while there is something to do, until the engine is closed."""
        while True:
            with self._changed:
                self._changed.wait_for(
                    lambda: self._closed or self._jobs or not self._scheduler.idle
                )
                if self._closed:
                    break
            started = time.perf_counter()
            self._do_jobs()
            try:
                self._scheduler.step()
            except Exception as error:  # the batch is lost, the engine is not
                log.exception("a step failed")
                for sequence in list(self._scheduler.running):
                    self._scheduler.end(sequence, "error", f"{type(error).__name__}: {error}")
            self._seconds += time.perf_counter() - started
            with self._changed:
                self._changed.notify_all()
        self._scheduler.end_all("cancelled")
        for done, _ in self._jobs:
            done.set_exception(EngineStoppedError(STOPPED))

    def _do_jobs(self) -> None:
        while self._jobs:
            done, job = self._jobs[0]
            try:
                done.set_result(job())
            except Exception as error:  # it is the caller's
                done.set_exception(error)
            self._jobs.popleft()


@torch.inference_mode()
def embedding(model: DeepSeekModel, ids: Sequence[int]) -> list[float]:
    """Return the mean of the last hidden states over the tokens `ids`, scaled to length 1, by the
    base alone.
    """
    cache = KVCache()
    cache.started = True  # without experts, so that texts stay comparable whatever is plugged
    output = model(
        torch.tensor([list(ids)], device=model.device),
        cache=cache,
        output_hidden_states=True,
        logits_to_keep=1,
    )
    mean_D = output.hidden_states[-1][0].float().mean(0)
    return [float(value) for value in torch.nn.functional.normalize(mean_D, dim=0)]
