"""Estimate what passes over packed rows, or sampled answers, will take, from one timed batch."""

import time
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from transformers import PreTrainedTokenizerFast

from deepseek.data import Batch
from deepseek.device.estimate import Estimate
from deepseek.device.memory import peak_memory, synchronize
from deepseek.model.language_model import LanguageModel
from deepseek.model.transformer import DeepSeekModel
from deepseek.text.chat_template import encode_prompt
from deepseek.text.messages import Message
from deepseek.train.loop.losses import held_out_loss
from deepseek.train.rl.judge import ROWS, Judge, check_room, generate_pairs


def of_passes(model: LanguageModel, passes: Iterable[tuple[list[Batch], int]]) -> Estimate:
    """Return what forward passes will take; the first batch is computed twice.

    Args:
        model: the model, whose armed experts take part.
        passes: batches, and how often each of them is computed.
    """
    tokens = 0
    seen: list[Batch] = []
    for batches, count in passes:
        tokens += count * sum(batch.input_ids.numel() for batch in batches)
        seen += batches
    batch = seen[0]
    held_out_loss(model, [batch])
    synchronize(model.device)
    started = time.perf_counter()
    held_out_loss(model, [batch])
    synchronize(model.device)
    seconds = (time.perf_counter() - started) / batch.input_ids.numel() * tokens
    work = f"{tokens:,} tokens in all passes"
    return Estimate(work, seconds, peak_memory(model.device), model.device)


def of_pairs(
    model: DeepSeekModel,
    tokenizer: PreTrainedTokenizerFast,
    prompts: Sequence[Sequence[Message]],
    judges: Mapping[str, Judge],
    *,
    answers: int,
    new_tokens: int,
    **sampling: Any,
) -> Estimate:
    """Return what `generate_pairs` will take; the first batch of answers is sampled, judged and
    thrown away.

    Args:
        model: model that answers.
        tokenizer: its tokenizer.
        prompts: conversations that end with a user turn.
        judges: judges by name.
        answers: answers to sample per prompt.
        new_tokens: maximum tokens per answer.
        sampling: other arguments of `generate_pairs`.

    Raises:
        ConfigError: as `generate_pairs`.
    """
    encoded = [encode_prompt(tokenizer, prompt) for prompt in prompts]
    check_room(encoded, model.config.max_position_embeddings - new_tokens)
    first = prompts[: max(1, ROWS // answers)]
    started = time.perf_counter()
    pairs = [
        *generate_pairs(
            model, tokenizer, first, judges, answers=answers, new_tokens=new_tokens, **sampling
        )
    ]
    seconds = (time.perf_counter() - started) * len(prompts) / len(first)
    work = (
        f"{len(prompts):,} x {answers} answers (pairs from the first {len(first)} x {answers}: "
        f"{len(pairs)})"
    )
    return Estimate(work, seconds, peak_memory(model.device), model.device)
