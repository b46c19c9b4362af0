"""Tokens as the engine sees them: which end a text, what text they make, and what a grammar
allows.
"""

import json
from collections.abc import Sequence
from functools import cached_property
from typing import Any

import llguidance
import llguidance.hf
import numpy as np
from numpy.typing import NDArray
from tokenizers.decoders import DecodeStream
from transformers import PreTrainedTokenizerFast

from deepseek.engine.request import Grammar
from deepseek.errors import ConfigError
from deepseek.model.transformer import DeepSeekModel
from deepseek.text.tokenizer import document_end_id

WHITESPACE = r"\n?[ \t]{0,32}"
"""What may stand between the parts of a JSON text: room for pretty printing, none to go on with
blanks for ever.
"""

REAL_YEAR = r"^([1-9]|0[1-9]|00[1-9]|000[1-9])"
"""How a date begins. The formats allow the year 0, which the date types of most languages cannot
hold.
"""


class Vocabulary:
    """The tokens of a model.

    Attributes:
        size: number of the model's logits.
        ends: ids after which a text is over.
    """

    def __init__(self, model: DeepSeekModel, tokenizer: PreTrainedTokenizerFast) -> None:
        self.tokenizer = tokenizer
        self.size = model.config.vocab_size
        configured = model.generation_config.eos_token_id if model.generation_config else None
        listed = configured if isinstance(configured, list) else [configured]
        self.ends = frozenset(
            {int(i) for i in listed if i is not None} | {document_end_id(tokenizer)}
        )

    def matcher(self, grammar: Grammar) -> "Matcher":
        """Return a matcher at the start of `grammar`; raise `ConfigError` if it does not
        compile.
        """
        try:
            matcher = llguidance.LLMatcher(self._tokens, _compiled(grammar), log_level=0)
        except ValueError as error:
            raise ConfigError(
                f"The {grammar.kind} is no JSON object ({error}); correct it."
            ) from error
        if matcher.is_error():
            raise ConfigError(
                f"The {grammar.kind} cannot be used ({_first_line(matcher)}); correct it."
            )
        return Matcher(matcher)

    @cached_property
    def _tokens(self) -> llguidance.LLTokenizer:
        # It takes a while to make, and only requests with a grammar need it.
        return llguidance.hf.from_tokenizer(
            self.tokenizer, n_vocab=self.size, eos_token=sorted(self.ends)
        )


def _compiled(grammar: Grammar) -> str:
    if grammar.kind == "regex":
        return llguidance.LLMatcher.grammar_from_regex(grammar.text)
    if grammar.kind == "lark":
        return llguidance.LLMatcher.grammar_from_lark(grammar.text)
    schema = _with_real_years(json.loads(grammar.text))
    return llguidance.LLMatcher.grammar_from_json_schema(
        schema, overrides={"whitespace_pattern": WHITESPACE}
    )


def _with_real_years(schema: Any) -> Any:
    """Return a JSON schema whose dates, where they have no pattern of their own, begin with a year
    after 0.
    """
    if isinstance(schema, list):
        return [_with_real_years(part) for part in schema]
    if not isinstance(schema, dict):
        return schema
    changed = {
        key: value if key in ("const", "enum") else _with_real_years(value)
        for key, value in schema.items()
    }
    return (
        {"pattern": REAL_YEAR, **changed}
        if schema.get("format") in ("date", "date-time")
        else changed
    )


class Matcher:
    """Follows one text through its grammar."""

    def __init__(self, matcher: llguidance.LLMatcher) -> None:
        self._matcher = matcher

    def allowed(self) -> NDArray[np.bool_]:
        """Return which tokens `[V]` may come next; end tokens may where the grammar can end.

        Raises `RuntimeError` if the grammar turns out to be too complex.
        """
        marks = self._matcher.compute_logit_bias()
        self._check()
        return np.frombuffer(marks, np.uint8) != 0

    def take(self, token: int) -> bool:
        """Go on by an allowed `token`; return whether the text is complete and cannot go on."""
        self._matcher.consume_token(token)
        self._check()
        return bool(self._matcher.is_stopped())

    def _check(self) -> None:
        if self._matcher.is_error():
            raise RuntimeError(_first_line(self._matcher))


def _first_line(matcher: llguidance.LLMatcher) -> str:
    return matcher.get_error().strip().partition("\n")[0]


class TextStream:
    """Turns tokens into text that is safe to show: whole characters, and no beginning of a stop
    text.

    Args:
        stop: texts that end the text; they are not part of it.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerFast, stop: Sequence[str] = ()) -> None:
        self._tokenizer = tokenizer.backend_tokenizer
        self._stop = stop
        self._decoder = DecodeStream(skip_special_tokens=True)
        self._held = ""

    def push(self, token: int) -> tuple[str, bool]:
        """Return the text that `token` sets free, and whether a stop text has come."""
        self._held += self._decoder.step(self._tokenizer, token) or ""
        places = [place for place in map(self._held.find, self._stop) if place >= 0]
        if places:
            return self._release(min(places)), True
        return self._release(len(self._held) - begun(self._held, self._stop)), False

    def flush(self) -> str:
        """Return what was held back because it might have become a stop text; an incomplete
        character is dropped.
        """
        return self._release(len(self._held))

    def _release(self, count: int) -> str:
        text = self._held[:count]
        self._held = self._held[count:]
        return text


def begun(text: str, stop: Sequence[str]) -> int:
    """Return the length of the longest end of `text` with which one of the `stop` texts begins."""
    return max(
        (
            n
            for mark in stop
            for n in range(1, min(len(mark), len(text) + 1))
            if text.endswith(mark[:n])
        ),
        default=0,
    )
