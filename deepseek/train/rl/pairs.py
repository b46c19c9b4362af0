"""Preference pairs as an alignment reads them: prompts, and answers as token ids."""

from collections.abc import Sequence
from typing import Any

from transformers import PreTrainedTokenizerFast

from deepseek.data.preferences.preference import Preference
from deepseek.text.tokenizer import encode_continued


def answer_ids(
    tokenizer: PreTrainedTokenizerFast, texts: Sequence[str], most: int
) -> list[list[int]]:
    """Return answers as the model would have written them, with the end token unless they are cut.

    Args:
        tokenizer: tokenizer of the model.
        texts: the answers.
        most: maximum tokens per answer, end token included; longer ones are cut.
    """
    end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    return [[*ids, *end][:most] for ids in encode_continued(tokenizer, texts)]


def prompts_of(pairs: Sequence[Preference]) -> list[Any]:
    """Return the distinct prompts of pairs, in order of first appearance."""
    return list({repr(pair.prompt): pair.prompt for pair in pairs}.values())
