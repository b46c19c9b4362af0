"""Which sequences run, and what each step computes, within a budget of key/value bytes. No threads
here.
"""

from collections import Counter, deque

import torch

from deepseek.compiled.abi import RECENT
from deepseek.engine.prefix import PrefixCache
from deepseek.engine.request import FinishReason
from deepseek.engine.sampler import Logits
from deepseek.engine.sequence import ActiveSequence
from deepseek.runner import Chunk, Runner

MAX_RUNNING = 16
PREFILL_CHUNK = 64
MAX_GUESSES = (
    RECENT - 1
)  # of all sequences together: with more rows a step takes longer (see `engine/sequence.py`)
CACHE_BYTES = 1 << 30


class Scheduler:
    """Runs sequences side by side, first come, first served.

    A sequence starts only when all the memory that it can ever need is free, and keeps it reserved
    until it ends: those that run never fail or wait because of others. Stored prefixes live in what
    is not reserved.

    Args:
        cache_bytes, max_running, prefill_chunk: see `Engine`.

    Attributes:
        waiting: sequences that have not started; any thread may append.
        running: those that have, in the order of their start.
        reserved: bytes that the running ones may need.
    """

    def __init__(
        self,
        runner: Runner,
        *,
        cache_bytes: int = CACHE_BYTES,
        max_running: int = MAX_RUNNING,
        prefill_chunk: int = PREFILL_CHUNK,
    ) -> None:
        self.runner = runner
        self.cache_bytes = cache_bytes
        self.max_running = max_running
        self.prefill_chunk = prefill_chunk
        self.waiting: deque[ActiveSequence] = deque()
        self.running: list[ActiveSequence] = []
        self.prefixes = PrefixCache()
        self.reserved = self.steps = self.prompt_tokens = self.cached_tokens = (
            self.completion_tokens
        ) = 0
        self.finished: Counter[str] = Counter()

    @property
    def idle(self) -> bool:
        """Whether nothing runs or waits."""
        return not self.running and not self.waiting

    def need(self, sequence: ActiveSequence) -> int:
        """Return the bytes that are reserved for a sequence while it runs."""
        return self.runner.state_bytes(sequence.capacity, sequence.armed)

    @torch.inference_mode()
    def step(self) -> None:
        """Drop what is cancelled, start what fits, and compute one batch."""
        for sequence in [one for one in (*self.running, *self.waiting) if one.cancelled]:
            self.end(sequence, "cancelled")
        self._admit()
        batch = self._batch()
        if not batch:
            return
        output = self.runner.forward([chunk for _, chunk in batch])
        self.steps += 1
        logits_RV = output.logits_RV.numpy()
        row = 0
        for sequence, chunk in batch:
            rows = slice(row, row := row + chunk.keep)
            self._store(sequence)
            self._advance(sequence, logits_RV[rows], output.experts[rows])

    def end(self, sequence: ActiveSequence, reason: FinishReason, error: str | None = None) -> None:
        """End a sequence before its time."""
        self._release(sequence)
        self.finished[reason] += 1
        sequence.deliver(sequence.finish(reason, error))

    def end_all(self, reason: FinishReason, error: str | None = None) -> None:
        """End all that runs or waits."""
        for sequence in (*self.running, *self.waiting):
            self.end(sequence, reason, error)

    def _admit(self) -> None:
        """Start waiting sequences while there is room; the first one waits for room, and those
        behind it for it.
        """
        while self.waiting and len(self.running) < self.max_running:
            sequence = self.waiting[0]
            need = self.need(sequence)
            if self.reserved + need > self.cache_bytes:
                return
            self.reserved += need
            self.prefixes.match(
                sequence.reusable
            )  # they count as used, so that others are forgotten first
            self.prefixes.shrink(self.cache_bytes - self.reserved)
            sequence.state = self.runner.start(sequence.armed, sequence.capacity)
            self.running.append(self.waiting.popleft())
            for segment in self.prefixes.match(sequence.reusable):
                sequence.state.extend(segment)
            sequence.cached_tokens = sequence.state.length
            self.prompt_tokens += len(sequence.request.prompt_ids)
            self.cached_tokens += sequence.cached_tokens

    def _batch(self) -> list[tuple[ActiveSequence, Chunk]]:
        """Return the next token of every sequence that speaks, and prompt pieces of `prefill_chunk`
        tokens at most.
        """
        batch = []
        room = self.prefill_chunk
        guesses = MAX_GUESSES // max(1, len(self.running))
        for sequence in self.running:
            chunk = sequence.next_chunk(guesses)
            if sequence.prefilling:
                room -= len(chunk.ids)
                if room < 0:
                    continue
            batch.append((sequence, chunk))
        return batch

    def _store(self, sequence: ActiveSequence) -> None:
        """Put the block of the prompt that has just been completed into the prefix cache."""
        assert sequence.state is not None
        blocks, rest = divmod(sequence.state.length, self.prefill_chunk)
        room = self.cache_bytes - self.reserved
        if (
            room > 0
            and rest == 0
            and blocks <= len(sequence.keys)
            and sequence.keys[blocks - 1] not in self.prefixes
        ):
            segment = sequence.state.segment(sequence.state.length - self.prefill_chunk)
            self.prefixes.add(sequence.keys[blocks - 1], segment, room)

    def _advance(
        self, sequence: ActiveSequence, logits_RV: Logits, experts: tuple[str | None, ...]
    ) -> None:
        """Hand a sequence its logits; what goes wrong there, such as too complex a grammar, ends it
        alone.
        """
        try:
            events = sequence.advance(logits_RV, experts)
        except Exception as error:  # whatever it is, the others go on
            self.end(sequence, "error", f"{type(error).__name__}: {error}")
            return
        for event in events:
            self.completion_tokens += 1
            if event.finish_reason is not None:
                self._release(sequence)
                self.finished[event.finish_reason] += 1
            sequence.deliver(event)

    def _release(self, sequence: ActiveSequence) -> None:
        if sequence.state is None:
            self.waiting.remove(sequence)
            return
        self.running.remove(sequence)
        self.reserved -= self.need(sequence)
        sequence.state.close()
        sequence.state = None
