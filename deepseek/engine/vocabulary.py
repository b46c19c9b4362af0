"""The engine's view of tokens: end tokens, detokenisation, and the tokens that a grammar allows."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache

import llguidance
import llguidance.hf
import numpy as np
from numpy.typing import NDArray
from transformers import PreTrainedTokenizerFast

from deepseek import checks
from deepseek.engine.grammar import LIMITS, NO_FORCING, llguidance_form, unusable
from deepseek.engine.grammar_trial import Trial, in_one_line
from deepseek.engine.request import Grammar
from deepseek.errors import ConfigError
from deepseek.model.language_model import LanguageModel
from deepseek.text.tokenizer import document_end_id

TRIAL = Trial()

MOST_OPENING = 4
"""Maximum number of tokens at the end of a prompt that are sampled again."""

COMPILED = 16
"""Maximum number of compiled grammars that a vocabulary caches."""


def end_ids(model: LanguageModel) -> list[int]:
    """Return the ids of the end tokens of a model's generation config.

    Raises:
        ConfigError: its `eos_token_id` is neither an id nor a list of ids.
    """
    configured = model.generation_config.eos_token_id if model.generation_config else None
    listed = configured if isinstance(configured, list) else [configured]
    ids = [i for i in listed if i is not None]
    checks.sequence("eos_token_id", ids, checks.whole, "token ids")
    return ids


class Vocabulary:
    """The tokens of a model.

    Args:
        model: the model, for its number of logits and its end tokens.
        tokenizer: the model's tokenizer.

    Attributes:
        tokenizer: as passed.
        size: number of logits.
        ends: ids of the end tokens.
    """

    def __init__(self, model: LanguageModel, tokenizer: PreTrainedTokenizerFast) -> None:
        self.tokenizer = tokenizer
        self.size = model.config.get_text_config(decoder=True).vocab_size
        self.ends = frozenset([*end_ids(model), document_end_id(tokenizer)])
        self._compiled = lru_cache(maxsize=COMPILED)(self._compile)

    def matcher(self, grammar: Grammar) -> "Matcher":
        """Return a matcher at the start of a grammar.

        Args:
            grammar: the grammar to follow.

        Raises:
            ConfigError: the grammar does not compile.
        """
        lark = llguidance_form(grammar)
        if complaint := TRIAL.complaint(lark):
            raise unusable(grammar, complaint)
        compiled = self._compiled(lark)
        if compiled.is_error():
            raise unusable(grammar, in_one_line(compiled.get_error()))
        return Matcher(compiled.deep_copy())

    def _compile(self, lark: str) -> llguidance.LLMatcher:
        """Return a matcher at the start of a grammar, to be copied: compiling takes far longer."""
        matcher = llguidance.LLMatcher(self._tokens, lark, log_level=0, limits=LIMITS)
        if not matcher.is_error():
            # A grammar that refers to itself without end compiles, and fails at its first token.
            matcher.compute_logit_bias()
        return matcher

    def token_bytes(self, token: int) -> bytes:
        """Return the bytes of a token's text, which can be part of a character.

        Args:
            token: its id.
        """
        return bytes(self._tokens.decode_bytes([token]))

    def opening(self, ids: Sequence[int]) -> "Opening":
        """Return the end of a prompt that can be sampled again at the start of a reply.

        It is the last token, and those before it that belong to the same word, with the character
        before the word: a word that is not finished is often divided where the whole word is not,
        and many tokens begin with a space or a full stop. Of a text that ends in white space, it is
        the tokens of that white space.

        Control tokens, parts of a character, and tokens whose text differs at the beginning of a
        text, where some tokenizers drop a space, cannot be sampled again.

        Args:
            ids: the prompt's ids.
        """
        tokens, text = 0, ""
        for token in reversed(ids[-MOST_OPENING:]):
            piece = self._tokens.decode_bytes([token]).decode(errors="replace")
            if not piece or TextStream(self.tokenizer).push(token) != piece:
                break
            if text and not _belong_together(piece, text):
                break
            tokens, text = tokens + 1, piece + text
        return Opening(tokens, text)

    def begins_with(self, opening: str) -> "Matcher":
        """Return a matcher of the texts that begin with `opening`.

        Trailing white space is not extended: tokens of deeper indentation begin with it too, but a
        cursor after white space marks where the text is to begin.
        """
        rest = r"/([^ \t](?s:.*))?/" if opening[-1] in " \t" else "/(?s:.*)/"
        lark = f"start: {json.dumps(opening)} REST\nREST: {rest}"
        lark = f"%llguidance {json.dumps(NO_FORCING)}\n{lark}"
        return Matcher(llguidance.LLMatcher(self._tokens, lark, log_level=0, limits=LIMITS))

    @cached_property
    def _tokens(self) -> llguidance.LLTokenizer:
        # Created lazily: construction is slow, and only requests with a grammar, token healing or
        # pieces of characters need it.
        return llguidance.hf.from_tokenizer(
            self.tokenizer, n_vocab=self.size, eos_token=sorted(self.ends)
        )


@dataclass(frozen=True)
class Opening:
    """The end of a prompt that is sampled again (`Request.heal`).

    Attributes:
        tokens: number of the prompt's last tokens that it consists of.
        text: their text, with which the generated text must begin.
    """

    tokens: int = 0
    text: str = ""


def _belong_together(piece: str, text: str) -> bool:
    """Return whether a token's text may form one token with a part of the text after it."""
    if text[0].isalnum():
        return piece[-1].isalnum() or (len(piece) == 1 and piece != "\n")
    return piece[-1].isspace() and text.isspace()


class Matcher:
    """Position of one text in its grammar."""

    def __init__(self, matcher: llguidance.LLMatcher) -> None:
        self._matcher = matcher

    def allowed(self) -> NDArray[np.bool_]:
        """Return the mask `[V]` of the tokens that may come next.

        It includes the end tokens if the grammar may end here.

        Raises:
            ConfigError: the grammar turns out to be too complex.
        """
        mask = self._matcher.compute_logit_bias()
        self._check()
        return np.frombuffer(mask, np.uint8) != 0

    def take(self, token: int) -> bool:
        """Advance by an allowed token.

        Args:
            token: its id.

        Returns:
            Whether the text is complete and cannot continue.

        Raises:
            ConfigError: the grammar turns out to be too complex.
        """
        self._matcher.consume_token(token)
        self._check()
        return bool(self._matcher.is_stopped())

    def _check(self) -> None:
        if self._matcher.is_error():
            reason = in_one_line(self._matcher.get_error())
            raise ConfigError(f"The grammar has become too complex ({reason}); simplify it.")


class TextStream:
    """Incremental detokeniser.

    It emits only whole characters, and holds back text that may be the start of a stop text.

    Args:
        tokenizer: the model's tokenizer.
        stop: strings that end the text; they are not part of it.
        skip: number of characters at the beginning that are not part of the text.

    Attributes:
        skip: number of characters that are still to be skipped.
        stop_text: the stop text that has been reached, the first one in the text; None before.
    """

    def __init__(
        self, tokenizer: PreTrainedTokenizerFast, stop: Sequence[str] = (), skip: int = 0
    ) -> None:
        self._tokenizer = tokenizer.backend_tokenizer
        self._stop = stop
        self._ids: list[int] = []  # the latest tokens, on which the next one's text may depend
        self._read = 0  # number of them whose text is complete
        self._known = ""  # the text of these
        self._pending = ""
        self.skip = skip
        self.stop_text: str | None = None

    @property
    def held(self) -> int:
        """Number of characters that are held back."""
        return len(self._pending)

    def push(self, token: int) -> str:
        """Append a token and return the text that can be emitted now.

        Args:
            token: its id.
        """
        decoded = self._decode(token)
        self._pending += decoded[self.skip :]
        self.skip -= min(self.skip, len(decoded))
        reached = [stop for stop in self._stop if stop in self._pending]
        if reached:
            self.stop_text = min(reached, key=self._pending.find)
            return self._release(self._pending.find(self.stop_text))
        return self._release(len(self._pending) - begun(self._pending, self._stop))

    def flush(self) -> str:
        """Return the text that was held back as a possible stop text; an incomplete character is
        dropped.
        """
        return self._release(len(self._pending))

    def _decode(self, token: int) -> str:
        """Return the text that a token completes.

        Like `DecodeStream` of `tokenizers`, but that fails at bytes that are not UTF-8, where byte
        fallback rewrites text that has been returned already.
        """
        self._ids.append(token)
        text = self._tokenizer.decode(self._ids)
        if len(text) <= len(self._known) or text.endswith("\ufffd"):
            return ""
        added = text[len(self._known) :]
        self._ids = self._ids[self._read :]
        self._read = len(self._ids)
        self._known = self._tokenizer.decode(self._ids)
        return added

    def _release(self, count: int) -> str:
        text = self._pending[:count]
        self._pending = self._pending[count:]
        return text


def begun(text: str, stop: Sequence[str]) -> int:
    """Return the length of the longest suffix of `text` that is a proper prefix of one of the
    `stop` texts.
    """
    return max(
        (
            n
            for mark in stop
            for n in range(1, min(len(mark), len(text) + 1))
            if text.endswith(mark[:n])
        ),
        default=0,
    )
