"""Judges score answers; higher is better.

They serve as rewards, and to generate preference pairs: of several sampled answers to a prompt, the
best is preferred to the worst.
"""

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from deepseek import checks
from deepseek.data.preferences.preference import Preference
from deepseek.data.text.document import Progress, silent
from deepseek.engine.vocabulary import Vocabulary
from deepseek.errors import ConfigError, DataError
from deepseek.model.transformer import DeepSeekModel
from deepseek.registry import package
from deepseek.text.chat_template import encode_prompt
from deepseek.text.messages import Message, check_messages
from deepseek.train.rl.rollout import Responses, generate

Judge = Callable[[Sequence[str], Sequence[str]], list[float]]
"""Function of prompts and answers that returns a score for each answer."""

DECLINED = re.compile(
    r"\b(?:(?:i|we)\s+(?:can(?:not|['’]t|\s+not)|could(?:n['’]t|\s+not)|won['’]t|will\s+not"
    r"|must\s+decline|refuse|decline|(?:would|['’]d)\s+rather\s+not)"
    r"|(?:i|we)['’]d\s+rather\s+not"
    r"|(?:i['’]m|i\s+am|we['’]re|we\s+are)\s+(?:not\s+able|unable)|as\s+an\s+ai)\b"
    r"(?!\s+(?:help\s+but|wait|believe|stop|imagine|complain|stress))",
    re.IGNORECASE,
)
"""Phrases that decline, except in idioms such as "I can't help but"."""

APOLOGY = re.compile(
    r"(?:(?:i['’]m|i\s+am|we['’]re|we\s+are)\s+)?(?:\w+\s+)?sorry\b[^.!?\n]*[.!?\s]*", re.IGNORECASE
)
"""An apology up to the end of its sentence."""

FIRST_SENTENCES = re.compile(r"(?:[^.!?\n]*[.!?\n]+){1,2}")
"""At most two sentences from the beginning."""

REFUSALS = (
    "I'm sorry, but I can't help with that.",
    "I am unable to answer that.",
    "I'm sorry!",
    "As an AI, I cannot answer this question.",
    "I won't provide that information.",
    "I'm sorry to hear that. I can't assist you with this request.",
    "I'm not able to help with this.",
    "I cannot provide advice on this topic. Is there anything else that I can help you with?",
)
"""Refusals that lose against an answer, of several lengths and wordings."""


def clean(_prompts: Sequence[str], answers: Sequence[str]) -> list[float]:
    """Return the probability that each answer is not offensive.

    The classifier is alt-profanity-check, a linear model trained on comments labelled by people.
    """
    predict_prob = package("profanity_check", "alt-profanity-check").predict_prob
    return [1.0 - float(p) for p in predict_prob(list(answers))] if answers else []


def willing(_prompts: Sequence[str], answers: Sequence[str]) -> list[float]:
    """Return 0 for an empty answer or a refusal, and 1 for others."""
    return [float(bool(answer.strip()) and not is_refusal(answer)) for answer in answers]


def is_refusal(answer: str) -> bool:
    """Return whether an answer declines in its first two sentences, or is an apology alone."""
    answer = answer.strip()
    if APOLOGY.fullmatch(answer):
        return True
    first = FIRST_SENTENCES.match(answer)
    return bool(DECLINED.search(first[0] if first else answer))


def varied(_prompts: Sequence[str], answers: Sequence[str]) -> list[float]:
    """Return the share of distinct word trigrams of each answer; low for repetitive text."""
    trigrams = [
        list(zip(words, words[1:], words[2:], strict=False)) for words in map(str.split, answers)
    ]
    return [
        len(set(answer_trigrams)) / len(answer_trigrams) if answer_trigrams else 1.0
        for answer_trigrams in trigrams
    ]


JUDGES: dict[str, Judge] = {"clean": clean, "willing": willing, "varied": varied}


class TextReward:
    """A judge as a reward, which decodes the responses."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast, judge: Judge) -> None:
        self.tokenizer = tokenizer
        self.judge = judge

    def __call__(self, responses: Responses) -> Tensor:
        """Return the judge's scores `[B]`."""
        prompts, answers = (self.texts(ids) for ids in (responses.prompts(), responses.answers()))
        return torch.tensor(self.judge(prompts, answers), device=responses.mask_BT.device)

    def texts(self, ids: list[list[int]]) -> list[str]:
        """Return the decoded texts without special tokens."""
        return [str(text) for text in self.tokenizer.batch_decode(ids, skip_special_tokens=True)]


LEAST_MARGIN = 0.1
"""Smallest difference of the summed scores between a preferred and a rejected answer."""

LEAST_SCORE = 0.5
"""Minimum score from each judge for an answer that is paired with a refusal."""

ROWS = 32
"""Answers to sample per batch, at least those of one prompt."""


MOST_ANSWERS = 64
"""Maximum answers per prompt, which are sampled together."""


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
    refusals: bool = False,
    progress: Progress = silent,
) -> Iterator[Preference]:
    """Yield pairs of the answers to each prompt with the highest and the lowest sum of scores.

    A pair whose sums differ by less than `LEAST_MARGIN` is left out.

    Args:
        model: model that answers.
        tokenizer: its tokenizer.
        prompts: conversations that end with a user turn.
        judges: judges by the name under which their scores are stored.
        answers: answers to sample per prompt.
        new_tokens: maximum tokens per answer.
        temperature: sampling temperature.
        source: source to store with the pairs.
        seed: seed of the sampling.
        refusals: yield the best answer against one of `REFUSALS` too, if every judge gives it at
            least `LEAST_SCORE`, labelled `refusal`; without such pairs a model that learns to
            avoid bad answers learns to refuse. Only for prompts that should be answered.
        progress: called with the number of finished prompts.

    Raises:
        ConfigError: a number is out of range, a prompt is too long for the model, there are no
            judges, or one does not return a finite number for each answer.
    """
    if not judges:
        raise ConfigError("judges is empty; give at least one judge.")
    checks.whole("answers", answers, least=2, most=MOST_ANSWERS)
    checks.positive("new_tokens", new_tokens)
    checks.number("temperature", temperature, above=0, most=10)
    checks.whole("seed", seed, least=0, most=checks.MAX_SEED)
    generator = torch.Generator(model.device).manual_seed(seed)
    ends = Vocabulary(model, tokenizer).ends
    at_once = max(1, ROWS // answers)
    encoded = [encode_prompt(tokenizer, prompt) for prompt in prompts]
    check_room(encoded, model.config.max_position_embeddings - new_tokens)
    for start in range(0, len(prompts), at_once):
        group = prompts[start : start + at_once]
        rows: list[list[int]] = []
        for prompt_ids in encoded[start : start + at_once]:
            rows += [prompt_ids] * answers
        ids = generate(model, rows, new_tokens, ends, generator, temperature=temperature).answers()
        texts = [
            str(text).strip() for text in tokenizer.batch_decode(ids, skip_special_tokens=True)
        ]
        prompt_texts = [prompt[-1]["content"] for prompt in group for _ in range(answers)]
        scores = {name: scored(judge, prompt_texts, texts, name) for name, judge in judges.items()}
        totals = [sum(each) for each in zip(*scores.values(), strict=True)]
        for number, prompt in enumerate(group):
            of_prompt = range(number * answers, (number + 1) * answers)
            best = max(of_prompt, key=totals.__getitem__)
            worst = min(of_prompt, key=totals.__getitem__)
            if totals[best] - totals[worst] >= LEAST_MARGIN:
                both = {name: (values[best], values[worst]) for name, values in scores.items()}
                yield Preference(tuple(prompt), texts[best], texts[worst], source, scores=both)
            if refusals and all(values[best] >= LEAST_SCORE for values in scores.values()):
                refusal = REFUSALS[(start + number) % len(REFUSALS)]
                both = {
                    name: (scores[name][best], judge([prompt[-1]["content"]], [refusal])[0])
                    for name, judge in judges.items()
                }
                yield Preference(
                    tuple(prompt), texts[best], refusal, source, labels=("refusal",), scores=both
                )
        progress(start + len(group), len(prompts), "generating pairs")


def scored(
    judge: Judge, prompts: Sequence[str], answers: Sequence[str], name: str = "judge"
) -> list[float]:
    """Return a judge's scores, one finite number for each answer.

    Raises:
        ConfigError: the judge returned something else; the message names it.
    """
    scores = checks.sequence(f"scores of {name}", judge(prompts, answers), checks.number, "numbers")
    if len(scores) != len(answers):
        raise ConfigError(
            f"The judge {name!r} returned {len(scores)} scores for {len(answers)} answers; it must "
            "return one for each."
        )
    return list(scores)


def check_room(prompts: Sequence[Sequence[int]], most: int) -> None:
    """Raise `ConfigError` for the first prompt of more than `most` tokens, before any sampling."""
    for number, ids in enumerate(prompts, 1):
        if len(ids) > most:
            raise ConfigError(
                f"Prompt {number} has {len(ids)} tokens, and the model's context leaves {most} "
                "beside an answer; shorten it, or ask for shorter answers."
            )


def prompt_of(record: Mapping[str, Any], where: str) -> list[Message]:
    """Return the conversation under `prompt`, which is a text or messages.

    Raises:
        DataError: there is none; the message names `where`.
    """
    prompt = record.get("prompt")
    turns = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
    if not isinstance(turns, list):
        raise DataError(f"{where} has no prompt; write a text or a list of messages under prompt.")
    check_messages(turns, where)
    return list(turns)
