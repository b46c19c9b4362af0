"""The engine: many requests at once over one model, while experts come and go."""

from collections.abc import AsyncIterator, Iterable, Iterator, Sequence
from pathlib import Path

from transformers import PreTrainedTokenizerFast

from deepseek.infer.request import EngineStats, Request, TokenEvent, TokenLogprob, Usage
from deepseek.infer.runner import Runner
from deepseek.model.experts import ExpertInfo
from deepseek.model.transformer import DeepSeekModel
from deepseek.packs.pack import ExpertPack


class Generation:
    """A request under way: iterate over its `TokenEvent`s, in one thread (`for`) or one coroutine (`async for`).

    Attributes:
        request: what was asked.
    """

    request: Request

    def __iter__(self) -> Iterator[TokenEvent]:
        """Yield events as they come, waiting for them; the last one has a finish reason."""
        raise NotImplementedError

    def __aiter__(self) -> AsyncIterator[TokenEvent]:
        """Yield events as they come, without blocking the event loop. Leaving early does not cancel."""
        raise NotImplementedError

    def cancel(self) -> None:
        """End it before the next step; its last event says "cancelled". It may have finished already. Thread safe."""
        raise NotImplementedError

    @property
    def usage(self) -> Usage:
        """What it has used so far."""
        raise NotImplementedError

    @property
    def prompt_logprobs(self) -> tuple[TokenLogprob | None, ...]:
        """Of each prompt token, None for the first, which nothing predicts; complete before the first event.

        Empty unless the request asks for them.
        """
        raise NotImplementedError


class Engine:
    """Runs requests side by side: each step is one ragged batch of prompt pieces and next tokens.

    Every public method may be called from any thread. One thread of its own runs the steps. The same request gives the
    same tokens whatever else runs.

    >>> with Engine(model, tokenizer) as engine:
    ...     for event in engine.submit(Request(tuple(ids))):
    ...         print(event.text, end="")

    Args:
        runner: computes the model; default `TorchRunner(model)`.
        cache_bytes: budget of keys and values, of running requests and stored prefixes together.
        max_running: most requests in a batch.
        max_waiting: most requests that wait for their turn.
        prefill_chunk: most prompt tokens in one step, and the tokens of one block of the prefix cache. A smaller chunk
            holds up the other sequences for a shorter time.
    """

    def __init__(
        self,
        model: DeepSeekModel,
        tokenizer: PreTrainedTokenizerFast,
        runner: Runner | None = None,
        *,
        cache_bytes: int = 1 << 30,
        max_running: int = 16,
        max_waiting: int = 64,
        prefill_chunk: int = 64,
    ) -> None:
        raise NotImplementedError

    def submit(self, request: Request) -> Generation:
        """Queue `request`; its experts are those armed now, whatever is plugged or unplugged before it ends.

        Raises:
            QueueFullError: too many wait; it says when to come back.
            EngineStoppedError: the engine drains or is closed.
            ConfigError: it can never run: too long for the model or for `cache_bytes`, ids outside the vocabulary, or a
                grammar that does not compile.
            PackError: it names an expert that is not plugged.
        """
        raise NotImplementedError

    def embed(self, ids: Sequence[int]) -> list[float]:
        """Return the mean of the last hidden states of a text, of length 1, by the base alone. Blocks.

        Raises `ConfigError` if there are no ids or more than the model's context; `EngineStoppedError`.
        """
        raise NotImplementedError

    def plug(self, source: str | Path | ExpertPack) -> ExpertInfo:
        """Plug an expert for requests that are submitted from now on (see `ExpertSet.plug`). Raises `PackError`."""
        raise NotImplementedError

    def unplug(self, name: str) -> None:
        """Unplug an expert; requests under way keep it until they end. Raises `PackError` if there is none."""
        raise NotImplementedError

    def arm(self, names: str | Iterable[str] | None = "auto") -> tuple[str, ...]:
        """Choose who speaks in requests that do not choose themselves (see `ExpertSet.arm`)."""
        raise NotImplementedError

    def experts(self) -> tuple[ExpertInfo, ...]:
        """Return what is plugged, sorted by name."""
        raise NotImplementedError

    def stats(self) -> EngineStats:
        """Return what the engine is doing and has done."""
        raise NotImplementedError

    def drain(self, timeout: float | None = None) -> bool:
        """Take no more requests and wait for those submitted. Returns whether all ended within `timeout` seconds."""
        raise NotImplementedError

    def close(self) -> None:
        """Cancel what runs or waits and end the engine's thread. It may be called twice."""
        raise NotImplementedError

    def __enter__(self) -> "Engine":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
