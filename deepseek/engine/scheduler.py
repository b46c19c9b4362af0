"""The scheduler: admits sequences and composes each step within a key/value budget. It has no
threads.
"""

import logging
from collections import Counter, deque
from collections.abc import Mapping
from dataclasses import replace

import torch

from deepseek.compiled.abi import RECENT
from deepseek.engine.embedding import ActiveEmbedding
from deepseek.engine.prefix import PrefixCache, restore_within
from deepseek.engine.request import FinishReason
from deepseek.engine.sampler import Logits
from deepseek.engine.sequence import ActiveSequence
from deepseek.model.experts.weight_cache import WeightCache
from deepseek.runner import Chunk, Runner, Segment, SequenceState

MAX_RUNNING = 16
PREFILL_CHUNK = 64
# Maximum number of guessed tokens in a step, over all sequences (see `engine/sequence.py`). A step
# with more rows takes longer, and the compiled state can rewind at most RECENT - 1 tokens.
MAX_GUESSES = RECENT - 1
CACHE_BYTES = 1 << 30

log = logging.getLogger(__name__)


class Scheduler:
    """Runs sequences and embeddings side by side; admission is first in, first out.

    A sequence is admitted only when its worst-case memory is free, and that memory stays reserved
    until it ends. So a running sequence never fails or stalls because of others, and no preemption
    is needed. The prefix cache uses what is not reserved.

    Args:
        runner: computes the forward passes.
        weights: memory of the experts whose weights are read when they are needed; default:
            without a limit.
        cache_bytes, max_running, prefill_chunk: see `Engine`.

    Attributes:
        weights: as passed.
        waiting: the queue of what has not been admitted; any thread may append.
        running: what has been admitted, in the order of admission; an embedding moves to the end
            after each of its texts.
        prefixes: the prefix cache.
        reserved: bytes reserved for the running sequences.
        steps, prompt_tokens, cached_tokens, shared_tokens, completion_tokens, finished: counters,
            see `EngineStats`.
    """

    def __init__(
        self,
        runner: Runner,
        weights: WeightCache | None = None,
        *,
        cache_bytes: int = CACHE_BYTES,
        max_running: int = MAX_RUNNING,
        prefill_chunk: int = PREFILL_CHUNK,
    ) -> None:
        self.runner = runner
        self.weights = weights or WeightCache()
        self.cache_bytes = cache_bytes
        self.max_running = max_running
        self.prefill_chunk = prefill_chunk
        self.waiting: deque[ActiveSequence | ActiveEmbedding] = deque()
        self.running: list[ActiveSequence | ActiveEmbedding] = []
        self.prefixes = PrefixCache()
        self.reserved = self.steps = self.prompt_tokens = self.cached_tokens = 0
        self.shared_tokens = self.completion_tokens = 0
        self.finished: Counter[str] = Counter()

    @property
    def idle(self) -> bool:
        """Whether no sequence runs or waits."""
        return not self.running and not self.waiting

    def need(self, sequence: ActiveSequence | ActiveEmbedding) -> int:
        """Return the number of bytes to reserve for a sequence or an embedding while it runs."""
        if isinstance(sequence, ActiveEmbedding):
            return sequence.state_bytes
        state_bytes = self.runner.state_bytes(sequence.capacity, sequence.armed)
        return state_bytes + sequence.stream_bytes

    @torch.inference_mode()
    def step(self) -> None:
        """Remove cancelled sequences, admit waiting ones, and compute one batch."""
        for sequence in [queued for queued in (*self.running, *self.waiting) if queued.cancelled]:
            self.end(sequence, "cancelled")
        self._admit()
        batch, embeddings = self._batch()
        for embedding in embeddings:
            self._embed(embedding)
        if not batch:
            return
        output = self.runner.forward([chunk for _, chunk in batch])
        self.steps += 1
        logits_RV = output.logits_RV.numpy()
        row = 0
        for (sequence, chunk), segments in zip(batch, output.segments, strict=True):
            rows = slice(row, row := row + chunk.keep)
            self._store(sequence, segments)
            self._advance(sequence, logits_RV[rows], output.experts[rows])

    def end(
        self,
        sequence: ActiveSequence | ActiveEmbedding,
        reason: FinishReason,
        error: str | None = None,
    ) -> None:
        """End a sequence or an embedding early and deliver its last event.

        Args:
            sequence: what to end, running or waiting.
            reason: its finish reason.
            error: one sentence on the failure, if the reason is "error".
        """
        self._release(sequence)
        self.finished[reason] += 1
        if isinstance(sequence, ActiveEmbedding):
            sequence.finish(reason, error)
        else:
            sequence.deliver(sequence.finish(reason, error))

    def end_all(self, reason: FinishReason, error: str | None = None) -> None:
        """End all running and waiting sequences (see `end`)."""
        for sequence in (*self.running, *self.waiting):
            self.end(sequence, reason, error)

    def _admit(self) -> None:
        """Admit waiting sequences while the budget allows.

        Admission is first in, first out: a blocked sequence holds up those behind it.
        """
        while self.waiting and len(self.running) < self.max_running:
            sequence = self.waiting[0]
            need = self.need(sequence)
            if self.reserved + need > self.cache_bytes:
                return
            if isinstance(sequence, ActiveSequence):
                if not self.weights.reserve(sequence.expert_bytes):
                    return
                # Marks its blocks as recently used, so that `shrink` evicts others first.
                self.prefixes.match(sequence.keys)
            self.reserved += need
            self.prefixes.shrink(self.cache_bytes - self.reserved)
            self.running.append(self.waiting.popleft())

    def _start(self, sequence: ActiveSequence) -> bool:
        """Start an admitted sequence from its cached prefix, and return whether that worked. If one
        of its experts cannot be read, this sequence alone fails.

        It starts when it gets its first chunk: by then, sequences of the same prompt that were
        admitted together, such as the answers of one request, have stored its blocks.
        """
        try:
            sequence.state = self.runner.start(sequence.armed, sequence.capacity, sequence.cuts)
        except Exception as error:  # other sequences must not be affected
            self._fail(sequence, error)
            return False
        sequence.begun = True
        matched = self.prefixes.match(sequence.keys)
        restored = restore_within(matched, self.cache_bytes - self.reserved)
        sequence.stream_bytes = restored.stream_bytes
        self.reserved += sequence.stream_bytes
        self.prefixes.shrink(self.cache_bytes - self.reserved)
        for segment in restored.segments:
            sequence.state.extend(segment)
        sequence.cached_tokens = sequence.state.length
        self.prompt_tokens += len(sequence.request.prompt_ids)
        self.cached_tokens += sequence.cached_tokens
        self.shared_tokens += restored.blocks * self.prefill_chunk - sequence.cached_tokens
        return True

    def _batch(self) -> tuple[list[tuple[ActiveSequence, Chunk]], list[ActiveEmbedding]]:
        """Return the next chunk of each decoding sequence, and prefill chunks and embeddings of at
        most `prefill_chunk` tokens in total.

        So a decoding sequence never waits for more than one chunk, whatever else was asked.
        """
        batch = []
        embeddings = []
        free_tokens = self.prefill_chunk
        guesses = MAX_GUESSES // max(1, len(self.running))
        for sequence in list(self.running):  # a copy: one that fails to start is removed
            if isinstance(sequence, ActiveEmbedding):
                # A text that cannot be cut has a step of its own.
                if sequence.next_size <= free_tokens or free_tokens == self.prefill_chunk:
                    embeddings.append(sequence)
                free_tokens -= sequence.next_size
                continue
            if sequence.state is None and (free_tokens <= 0 or not self._start(sequence)):
                continue
            chunk = sequence.next_chunk(guesses)
            if sequence.prefilling:
                free_tokens -= len(chunk.ids)
                if free_tokens < 0:
                    continue
            batch.append((sequence, replace(chunk, store=self._stored_parts(sequence, chunk))))
        return batch, embeddings

    def _embed(self, embedding: ActiveEmbedding) -> None:
        """Compute the next chunk of an embedding; an error ends only that one."""
        try:
            complete = embedding.advance()
        except Exception as error:  # other sequences must not be affected
            self.end(embedding, "error", f"{type(error).__name__}: {error}")
            return
        if complete:
            self.end(embedding, "stop")
        elif embedding.between_texts:
            # A prompt behind it waits for one text, not for thousands.
            self.running.remove(embedding)
            self.running.append(embedding)

    def _stored_parts(self, sequence: ActiveSequence, chunk: Chunk) -> list[int]:
        """Return the parts of the layers at which a chunk completes a prompt block that is not in
        the prefix cache, while there is memory for it.
        """
        assert sequence.state is not None
        blocks, remainder = divmod(sequence.state.length + len(chunk.ids), self.prefill_chunk)
        if remainder or self.reserved >= self.cache_bytes:
            return []
        return [
            number
            for number, part in enumerate(sequence.keys)
            if blocks <= len(part.keys) and part.keys[blocks - 1] not in self.prefixes
        ]

    def _store(self, sequence: ActiveSequence, segments: Mapping[int, Segment]) -> None:
        """Store segments of the prompt block that the last step completed in the prefix cache."""
        assert sequence.state is not None
        block = sequence.state.length // self.prefill_chunk - 1
        # Upper parts first, so that they are evicted first: without lower ones they are useless.
        for part, segment in sorted(segments.items(), reverse=True):
            free_bytes = self.cache_bytes - self.reserved
            self.prefixes.add(sequence.keys[part].keys[block], segment, free_bytes)

    def _advance(
        self, sequence: ActiveSequence, logits_RV: Logits, experts: tuple[str | None, ...]
    ) -> None:
        """Pass logits on to their sequence and deliver its new events.

        An error in a sequence, such as a grammar that turns out to be too complex, ends only that
        sequence.
        """
        try:
            events = sequence.advance(logits_RV, experts)
        except Exception as error:  # other sequences must not be affected
            self._fail(sequence, error)
            return
        for event in events:
            self.completion_tokens += 1
            if event.finish_reason is not None:
                self._release(sequence)
                self.finished[event.finish_reason] += 1
            sequence.deliver(event)

    def _fail(self, sequence: ActiveSequence, error: Exception) -> None:
        """End one sequence with an error."""
        self.finished["error"] += 1
        self._release(sequence)
        sequence.deliver(sequence.failure(error))

    def _release(self, sequence: ActiveSequence | ActiveEmbedding) -> None:
        """Remove a sequence or an embedding from its list; free its memory and reservation."""
        if sequence not in self.running:
            self.waiting.remove(sequence)
            return
        self.running.remove(sequence)
        self.reserved -= self.need(sequence)
        if isinstance(sequence, ActiveSequence):
            self.weights.release(sequence.expert_bytes)
            if sequence.state is not None:
                _close(sequence.state)
                sequence.state = None


def _close(state: SequenceState) -> None:
    """Free the memory of a state.

    An error in it must not prevent the delivery of the sequence's last event.
    """
    try:
        state.close()
    except Exception:
        log.exception("the memory of a sequence was not freed")
