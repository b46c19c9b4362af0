"""Generate one sequence token by token, and say which expert spoke."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from tokenizers.decoders import DecodeStream
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from deepseek.errors import ConfigError
from deepseek.infer.sampler import Sampler, Sampling
from deepseek.model.kv_cache import KVCache
from deepseek.model.output import ModelOutput
from deepseek.model.transformer import DeepSeekModel
from deepseek.text.tokenizer import document_end_id


@dataclass(frozen=True)
class Piece:
    """One generated token.

    Attributes:
        token_id: its id.
        text: what it adds to the text; empty while a character is still incomplete.
        expert: the expert with the largest weight where the token was predicted, or None where none fired.
    """

    token_id: int
    text: str
    expert: str | None


@torch.inference_mode()
def stream(
    model: DeepSeekModel, tokenizer: PreTrainedTokenizerFast, prompt: Sequence[int], sampling: Sampling
) -> Iterator[Piece]:
    """Yield the tokens that follow the ids `prompt`, until an end token or `max_new_tokens`.

    The experts armed at the first token stay with the sequence, whatever is plugged meanwhile.

    Raises:
        ConfigError: the prompt is empty, or longer than the model's context.
    """
    limit = min(sampling.max_new_tokens, model.config.max_position_embeddings - len(prompt))
    if not prompt or limit < 1:
        raise ConfigError(
            f"The prompt has {len(prompt)} tokens, but 1 to {model.config.max_position_embeddings - 1} are possible; "
            "shorten it or give some text."
        )
    cache, sampler, ends = KVCache(), Sampler(sampling, model.device), end_ids(model, tokenizer)
    decoder = DecodeStream(skip_special_tokens=True)
    seen = torch.tensor(prompt, device=model.device)
    step = seen
    for _ in range(limit):
        output = model(step[None], cache=cache, logits_to_keep=1)
        token = sampler.next_token(output.logits[0, -1], seen)
        if token in ends:
            return
        yield Piece(token, decoder.step(tokenizer.backend_tokenizer, token) or "", speaker(output))
        step = torch.tensor([token], device=model.device)
        seen = torch.cat((seen, step))


def end_ids(model: DeepSeekModel, tokenizer: PreTrainedTokenizerFast) -> set[int]:
    """Return the ids after which a text is over."""
    configured = model.generation_config.eos_token_id if model.generation_config else None
    listed = configured if isinstance(configured, list) else [configured]
    return {int(i) for i in listed if i is not None} | {document_end_id(tokenizer)}


def speaker(output: ModelOutput) -> str | None:
    """Return the expert that weighed most at the last position of `output`, or None."""
    if output.experts is None:
        return None
    weights_M: Tensor = output.experts.attribution()[0, -1]
    return output.experts.names[int(weights_M.argmax())] if bool((weights_M > 0).any()) else None
