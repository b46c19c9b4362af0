"""Synthetic pairs: the model answers each prompt several times, judges score the answers, the best meets the worst."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from transformers import PreTrainedTokenizerFast

from deepseek.data.document import Progress, silent
from deepseek.data.preferences import Preference
from deepseek.errors import DataError
from deepseek.infer.vocabulary import Vocabulary
from deepseek.text.chat import Message, check_messages, encode_prompt
from deepseek.train.judge import Judge
from deepseek.train.rollout import generate

LEAST_MARGIN = 0.1
"""Difference of the summed scores below which two answers are taken to be equally good."""

ROWS = 32
"""Answers sampled at once, at least those of one prompt."""


def generate_pairs(
    model: Any,
    tokenizer: PreTrainedTokenizerFast,
    prompts: Sequence[Sequence[Message]],
    judges: Mapping[str, Judge],
    *,
    answers: int = 4,
    new_tokens: int = 32,
    temperature: float = 1.0,
    source: str = "",
    seed: int = 0,
    progress: Progress = silent,
) -> Iterator[Preference]:
    """Yield at most one pair a prompt: the answers of the highest and the lowest sum of scores, if they differ.

    Args:
        prompts: conversations that end with the user's turn.
        judges: by the name under which their scores are stored.
        answers: answers sampled to each prompt.
        new_tokens, temperature: of the answers.
        source: what is put down as the pairs' source.
        progress: told of prompts done.
    """
    generator = torch.Generator(model.device).manual_seed(seed)
    ends, at_once = Vocabulary(model, tokenizer).ends, max(1, ROWS // answers)
    for start in range(0, len(prompts), at_once):
        group = prompts[start : start + at_once]
        rows = [encode_prompt(tokenizer, prompt) for prompt in group for _ in range(answers)]
        ids = generate(model, rows, new_tokens, ends, generator, temperature=temperature).answers()
        texts = [str(text).strip() for text in tokenizer.batch_decode(ids, skip_special_tokens=True)]
        asked = [prompt[-1]["content"] for prompt in group for _ in range(answers)]
        scores = {name: judge(asked, texts) for name, judge in judges.items()}
        totals = [sum(each) for each in zip(*scores.values(), strict=True)]
        for number, prompt in enumerate(group):
            of_prompt = range(number * answers, (number + 1) * answers)
            best, worst = max(of_prompt, key=totals.__getitem__), min(of_prompt, key=totals.__getitem__)
            if totals[best] - totals[worst] >= LEAST_MARGIN:
                both = {name: (found[best], found[worst]) for name, found in scores.items()}
                yield Preference(tuple(prompt), texts[best], texts[worst], source, scores=both)
        progress(start + len(group), len(prompts), "generating pairs")


def prompt_of(record: Mapping[str, Any], where: str) -> list[Message]:
    """Return the conversation under `prompt`, a text or messages; raise `DataError` naming `where` if there is none."""
    prompt = record.get("prompt")
    turns = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
    if not isinstance(turns, list):
        raise DataError(f"{where} has no prompt; write a text or a list of messages under prompt.")
    check_messages(turns, where)
    return list(turns)
