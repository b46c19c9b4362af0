"""Judges of answers: each gives every answer a number, higher is better.

They make rewards, and synthetic pairs: the model answers each prompt several times, the best meets
the worst.
"""

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from deepseek.data.preferences.database import Preference
from deepseek.data.text.document import Progress, silent
from deepseek.engine.vocabulary import Vocabulary
from deepseek.errors import DataError
from deepseek.model.transformer import DeepSeekModel
from deepseek.registry import package
from deepseek.text.chat_template import Message, check_messages, encode_prompt
from deepseek.train.rl.rollout import Responses, generate

Judge = Callable[[Sequence[str], Sequence[str]], list[float]]
"""Scores each answer to its prompt."""

REFUSAL = re.compile(
    r"\b(i('m| am) (sorry|unable|not able)|as an ai"
    r"|i (can('t|not)|won't|will not|must decline)\b.{0,40}\b(help|assist|provide|do))\b",
    re.IGNORECASE,
)


def clean(_prompts: Sequence[str], answers: Sequence[str]) -> list[float]:
    """Return the probability that each answer is not offensive.

    By alt-profanity-check, a linear classifier that its authors trained on comments labelled by
    people.
    """
    predict_prob = package("profanity_check", "alt-profanity-check").predict_prob
    return [1.0 - float(p) for p in predict_prob(list(answers))] if answers else []


def willing(_prompts: Sequence[str], answers: Sequence[str]) -> list[float]:
    """Return 0 for an answer that is empty or refuses, and 1 for others."""
    return [float(bool(answer.strip()) and not REFUSAL.search(answer)) for answer in answers]


def varied(_prompts: Sequence[str], answers: Sequence[str]) -> list[float]:
    """Return the share of an answer's runs of three words that occur once; an answer in circles is
    no answer.
    """
    runs = [
        list(zip(words, words[1:], words[2:], strict=False)) for words in map(str.split, answers)
    ]
    return [len(set(run)) / len(run) if run else 1.0 for run in runs]


JUDGES: dict[str, Judge] = {"clean": clean, "willing": willing, "varied": varied}


class TextReward:
    """A judge as a reward: the responses are decoded for it."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast, judge: Judge) -> None:
        self.tokenizer = tokenizer
        self.judge = judge

    def __call__(self, responses: Responses) -> Tensor:
        """Return the judge's scores `[B]`."""
        prompts, answers = (self.texts(ids) for ids in (responses.prompts(), responses.answers()))
        return torch.tensor(self.judge(prompts, answers), device=responses.mask_BT.device)

    def texts(self, ids: list[list[int]]) -> list[str]:
        """Return the texts of ids without control tokens."""
        return [str(text) for text in self.tokenizer.batch_decode(ids, skip_special_tokens=True)]


LEAST_MARGIN = 0.1
"""Difference of the summed scores below which two answers are taken to be equally good."""

ROWS = 32
"""Answers sampled at once, at least those of one prompt."""


def generate_pairs(
    model: DeepSeekModel,
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
    """Yield at most one pair a prompt: the answers of the highest and the lowest sum of scores, if
    they differ.

    Args:
        prompts: conversations that end with the user's turn.
        judges: by the name under which their scores are stored.
        answers: answers sampled to each prompt.
        new_tokens, temperature: of the answers.
        source: what is put down as the pairs' source.
        progress: told of prompts done.
    """
    generator = torch.Generator(model.device).manual_seed(seed)
    ends = Vocabulary(model, tokenizer).ends
    at_once = max(1, ROWS // answers)
    for start in range(0, len(prompts), at_once):
        group = prompts[start : start + at_once]
        rows = [encode_prompt(tokenizer, prompt) for prompt in group for _ in range(answers)]
        ids = generate(model, rows, new_tokens, ends, generator, temperature=temperature).answers()
        texts = [
            str(text).strip() for text in tokenizer.batch_decode(ids, skip_special_tokens=True)
        ]
        asked = [prompt[-1]["content"] for prompt in group for _ in range(answers)]
        scores = {name: judge(asked, texts) for name, judge in judges.items()}
        totals = [sum(each) for each in zip(*scores.values(), strict=True)]
        for number, prompt in enumerate(group):
            of_prompt = range(number * answers, (number + 1) * answers)
            best = max(of_prompt, key=totals.__getitem__)
            worst = min(of_prompt, key=totals.__getitem__)
            if totals[best] - totals[worst] >= LEAST_MARGIN:
                both = {name: (found[best], found[worst]) for name, found in scores.items()}
                yield Preference(tuple(prompt), texts[best], texts[worst], source, scores=both)
        progress(start + len(group), len(prompts), "generating pairs")


def prompt_of(record: Mapping[str, Any], where: str) -> list[Message]:
    """Return the conversation under `prompt`, a text or messages; raise `DataError` naming `where`
    if there is none.
    """
    prompt = record.get("prompt")
    turns = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
    if not isinstance(turns, list):
        raise DataError(f"{where} has no prompt; write a text or a list of messages under prompt.")
    check_messages(turns, where)
    return list(turns)
