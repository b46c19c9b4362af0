"""Generate one sequence in the caller's own thread, for programs that need no engine."""

from collections import deque
from collections.abc import Iterator, Sequence

from transformers import PreTrainedTokenizerFast

from deepseek.infer.active import activate
from deepseek.infer.request import Request, TokenEvent
from deepseek.infer.sampler import Sampling
from deepseek.infer.scheduler import PREFILL_CHUNK, Scheduler
from deepseek.infer.torch_runner import TorchRunner
from deepseek.infer.vocabulary import Vocabulary
from deepseek.model.transformer import DeepSeekModel


def stream(
    model: DeepSeekModel, tokenizer: PreTrainedTokenizerFast, prompt: Sequence[int], sampling: Sampling
) -> Iterator[TokenEvent]:
    """Yield the tokens that follow the ids `prompt`, until an end token or `max_new_tokens`.

    The experts armed at the first token stay with the sequence, whatever is plugged meanwhile.

    Raises:
        ConfigError: the prompt is empty, or longer than the model's context.
    """
    request = Request(tuple(prompt), sampling)
    sequence = activate(request, model, Vocabulary(model, tokenizer), PREFILL_CHUNK)
    events: deque[TokenEvent] = deque()
    sequence.deliver = events.append
    scheduler = Scheduler(TorchRunner(model), prefill_chunk=PREFILL_CHUNK)
    scheduler.cache_bytes = scheduler.need(sequence)  # without room for prefixes, none is stored
    scheduler.waiting.append(sequence)
    while not scheduler.idle:
        scheduler.step()
        while events:
            yield events.popleft()
