"""Embeddings of texts, computed chunk by chunk between the chunks of prompts."""

from collections.abc import Sequence
from concurrent.futures import Future

import torch

from deepseek.engine.request import EngineStoppedError, FinishReason
from deepseek.model.language_model import BaseText, LanguageModel
from deepseek.runner import Runner


class ActiveEmbedding:
    """Computes the embeddings of texts, one after another.

    The vector of a text is the mean of the last hidden states over its tokens, normalised to
    length 1. Experts are not used, so that embeddings stay comparable when experts come and go.

    Args:
        model: the model.
        runner: the reference runner, which tells how much memory a text needs.
        texts: tokens of each text, at least one.
        block: maximum number of tokens in one chunk. The few stock models without a cache of keys
            and values compute a text in one chunk.

    Attributes:
        state_bytes: maximum memory of keys and values, in bytes: that of the longest text.
        cancelled: set by any thread to end the computation before the next step.
        result: the vectors, `[texts][hidden_size]`, when all are computed.
    """

    def __init__(
        self, model: LanguageModel, runner: Runner, texts: Sequence[Sequence[int]], block: int
    ) -> None:
        self.texts = texts
        self.state_bytes = runner.state_bytes(max(map(len, texts)), None)
        self.cancelled = False
        self.result: Future[list[list[float]]] = Future()
        self.result.set_running_or_notify_cancel()  # so that no waiting caller can cancel it
        self._model = model
        self._block = block
        self._vectors: list[list[float]] = []
        self._sum_D = torch.zeros((), device=model.device)
        self._restart()

    def cancel(self) -> None:
        """Stop before the next step; thread safe. `result` then raises `EngineStoppedError`."""
        self.cancelled = True

    @property
    def next_size(self) -> int:
        """Number of tokens in the next chunk."""
        left = len(self._ids) - self._done
        return min(self._block, left) if self._text.continues else left

    @property
    def between_texts(self) -> bool:
        """Whether the next chunk is the first one of a text."""
        return self._done == 0

    @torch.inference_mode()
    def advance(self) -> bool:
        """Compute the next chunk; return whether it was the last one."""
        ids = self._ids[self._done : self._done + self.next_size]
        hidden_BTD = self._text.hidden(torch.tensor([list(ids)], device=self._model.device))
        self._sum_D = self._sum_D + hidden_BTD[0].float().sum(0)
        self._done += len(ids)
        if self._done == len(self._ids):
            mean_D = torch.nn.functional.normalize(self._sum_D, dim=0)
            self._vectors.append([float(value) for value in mean_D])
            if len(self._vectors) == len(self.texts):
                self.result.set_result(self._vectors)
                return True
            self._restart()
        return False

    def finish(self, reason: FinishReason, error: str | None) -> None:
        """Free the memory, and end `result` with an error if it is incomplete.

        Args:
            reason: why the computation ends.
            error: one sentence on a failure.
        """
        self._text = BaseText(self._model)
        if not self.result.done():
            failure = RuntimeError(error) if reason == "error" else EngineStoppedError(STOPPED)
            self.result.set_exception(failure)

    def _restart(self) -> None:
        """Begin with the next text."""
        self._ids = self.texts[len(self._vectors)]
        self._done = 0
        self._sum_D = torch.zeros((), device=self._model.device)
        self._text = BaseText(self._model)


STOPPED = "The engine stopped this computation; ask again."
