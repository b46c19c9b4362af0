"""Turn messages or plain text into prompt token ids, within limits of time and size."""

import re
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from types import FrameType
from typing import Any

from transformers import PreTrainedTokenizerFast

from deepseek.data.text.document import Document
from deepseek.data.text.encode import header
from deepseek.errors import DataError
from deepseek.server.errors import ApiError, about
from deepseek.server.schema import ChatMessage
from deepseek.server.tools import Calling, described, plain_messages, tool_messages, with_preamble
from deepseek.text.chat_template import (
    ControlTokens,
    check_variables,
    encode_rendered,
    render,
    user_ids,
)
from deepseek.text.infilling import encode_around_gap, infill_layout
from deepseek.text.tokenizer import document_start_ids, encode_continued, encode_plain

PIECE = 1 << 15
"""Characters of a long text that are encoded at a time while its length is checked."""

TEMPLATE_SECONDS = 2.0
"""Time limit for rendering a chat template; a typical one takes a millisecond."""

GAP_CHARACTERS = 16
"""Texts that may be truncated are first cut to this many characters per token of the context, and
then encoded. Tokens have fewer on average, in code about three.
"""

LEAST_AROUND = 16
"""Minimum number of tokens for the texts around a gap, even if the answer may fill the context."""


def can_continue(messages: Sequence[ChatMessage]) -> bool:
    """Return whether a conversation ends with text of the assistant, after another message."""
    return len(messages) > 1 and messages[-1].role == "assistant" and not messages[-1].tool_calls


@dataclass(frozen=True)
class EditorGap:
    """A text with a gap, as an editor sends it.

    Attributes:
        prefix: lines before the cursor's line.
        line: the cursor's line up to the cursor.
        suffix: the text after the cursor.
        others: name and text of pieces of other files.
        passages: text to put before the others; default: none.
    """

    prefix: str
    line: str
    suffix: str
    others: Sequence[tuple[str, str]] = ()
    passages: str = ""


class PromptWriter:
    """Writes prompts for one model.

    Args:
        tokenizer: the model's tokenizer.
        context: most tokens of prompt and answer together.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerFast, context: int) -> None:
        self.tokenizer = tokenizer
        self.context = context
        template = tokenizer.chat_template
        self.knows_tools = isinstance(template, str) and bool(re.search(r"\btools\b", template))
        self.layout = infill_layout(tokenizer)
        # Otherwise the first conversation would compile their pattern within its time limit.
        ControlTokens.of(tokenizer)
        self.longest_token = max(len(token.encode()) for token in tokenizer.get_vocab())
        self.longest_text = context * self.longest_token

    def chat(
        self,
        messages: Sequence[ChatMessage],
        calling: Calling,
        continued: bool = False,
        variables: dict[str, Any] | None = None,
    ) -> list[int]:
        """Return the ids of a conversation, up to the start of the assistant's turn.

        Args:
            messages: the conversation.
            calling: the function calls to offer.
            continued: whether the prompt ends with the last message, an assistant's, whose turn
                stays open; default: a new turn is opened.
            variables: further variables of the template; default: none.

        Raises:
            ApiError: the prompt fills the context, a variable has the name of an argument of the
                template, or there is no assistant's message to continue.
            DataError: the template refuses the messages or takes too long.
        """
        with about("chat_template_kwargs"):
            check_variables(variables or {})
        self.check_size(sum(len(message.text) for message in messages), "messages")
        begun = ""
        if continued:
            if not can_continue(messages):
                raise ApiError(
                    400,
                    "Only an assistant's text after another message can be continued; end with a "
                    "user's message, without asking for a continuation.",
                    param="continue_final_message",
                )
            *messages, last = messages
            begun = ControlTokens.of(self.tokenizer).guard(last.text)
        if self.knows_tools:
            template_messages = tool_messages(messages)
            tools = described(calling.tools)
        else:
            template_messages = plain_messages(messages)
            tools = []
            if calling.tools:
                template_messages = with_preamble(template_messages, calling.tools)
        with time_limit(TEMPLATE_SECONDS):
            text = render(
                self.tokenizer,
                template_messages,
                open_turn=True,
                tools=tools or None,
                variables=variables,
            )
        text += begun
        self.check_text(text, "messages")
        return self.check(encode_rendered(self.tokenizer, text), "messages")

    def user_ids(self, messages: Sequence[ChatMessage]) -> tuple[int, ...]:
        """Return the ids from which gates judge the topic (see `text.chat_template.user_ids`)."""
        return user_ids(self.tokenizer, [{"role": m.role, "content": m.text} for m in messages])

    def text(self, prompt: str | Sequence[int]) -> list[int]:
        """Return the ids of a plain prompt, given as text or as ids.

        An empty text becomes the single token that starts a document.

        Raises:
            ApiError: the prompt fills the context or holds ids outside the vocabulary.
        """
        if not isinstance(prompt, str):
            return self.check(list(prompt))
        self.check_text(prompt)
        ids = list(self.tokenizer(prompt).input_ids)
        return self.check(ids or [self.start()])

    def beginning(self, text: str) -> list[int]:
        """Return the ids of as much of a text's beginning as the context holds."""
        ids = list(self.tokenizer(text[: self.context * GAP_CHARACTERS]).input_ids)
        return ids[: self.context - 1] or [self.start()]

    def infill(self, prompt: str | Sequence[int], suffix: str) -> list[int]:
        """Return the ids of a prompt whose continuation is followed by `suffix`.

        Raises:
            ApiError: the prompt is not text, or the two texts fill the context.
        """
        if not isinstance(prompt, str):
            raise ApiError(400, "suffix needs a prompt of text, not of ids.", param="suffix")
        self.check_text(prompt)
        self.check_text(suffix, "suffix")
        around = encode_around_gap(self.tokenizer, self.layout, prompt, suffix)
        before = document_start_ids(self.tokenizer)
        return self.check([*before, *self.layout.join(around.prefix, around.suffix)])

    def gap(self, gap: EditorGap, answer_tokens: int) -> list[int]:
        """Return the ids of an editor's text with a gap, shortened to what fits.

        The suffix keeps its beginning, in at most a quarter of the context; the text before the gap
        keeps its end, and passages and other files what is left, the later ones first.

        Args:
            gap: the text.
            answer_tokens: number of tokens to leave for the answer.
        """
        most = self.context * GAP_CHARACTERS
        files = "".join(f"{header(Document(text, name))}{text}\n" for name, text in gap.others)
        # With control tokens, the cursor's line begins the middle, which may come after the suffix.
        # Otherwise it is encoded with the lines before it: many tokenizers join a line end and the
        # indentation after it into one token, and a model never sees these two apart.
        prefix_text, line_text = (
            (gap.prefix, gap.line) if self.layout.has_tokens else (gap.prefix + gap.line, "")
        )
        around = encode_around_gap(
            self.tokenizer, self.layout, prefix_text[-most:], gap.suffix[:most]
        )
        (line,) = encode_continued(self.tokenizer, [line_text[-most:]])
        (others,) = encode_plain(self.tokenizer, [(gap.passages + files)[-most:]])
        before = document_start_ids(self.tokenizer)
        used = answer_tokens + len(before) + self.layout.markers
        free = max(LEAST_AROUND, self.context - used - 1)
        suffix = around.suffix[: free // 4]
        line = last(line, free - len(suffix))
        prefix = last(around.prefix, free - len(suffix) - len(line))
        others = last(others, free - len(suffix) - len(line) - len(prefix))
        return self.check([*before, *others, *self.layout.join(prefix, suffix), *line])

    def start(self) -> int:
        """Return the token that starts a document.

        Raises:
            ApiError: the tokenizer has no such token.
        """
        for identity in (self.tokenizer.bos_token_id, self.tokenizer.eos_token_id):
            if identity is not None:
                return int(identity)
        raise ApiError(400, "The prompt is empty; give some text.", param="prompt")

    def check(self, ids: list[int], field: str = "prompt") -> list[int]:
        """Return `ids`; raise `ApiError` if there are none, or they fill the context or are not in
        the vocabulary.

        Args:
            ids: token ids.
            field: the request's field to name in the error, here and below; default: "prompt".
        """
        if len(ids) >= self.context:
            raise self.too_long(f"{len(ids)} tokens", field)
        if not ids:  # a template can leave out every message
            raise ApiError(400, "The prompt is empty; give some text.", param=field)
        if max(ids) >= len(self.tokenizer):
            raise ApiError(
                400,
                f"Token {max(ids)} is not in the vocabulary of {len(self.tokenizer)}.",
                param=field,
            )
        return ids

    def check_text(self, text: str, field: str = "prompt") -> None:
        """Raise `ApiError` for a text with too many tokens, before all of it is encoded.

        The tokenizer takes a second for a megabyte. A cut between two pieces adds at most as many
        tokens as the longest token has bytes, and no token has less than one.
        """
        size = len(text.encode())
        self.check_size(size, field)
        if size < self.context:
            return
        tokens = 0
        for start in range(0, len(text) if len(text) > PIECE else 0, PIECE):
            tokens += len(encode_plain(self.tokenizer, [text[start : start + PIECE]])[0])
            if tokens - start // PIECE * self.longest_token >= self.context:
                raise self.too_long(f"more than {self.context} tokens", field)

    def check_size(self, size: int, field: str) -> None:
        """Raise `ApiError` for a text that is too long however it is tokenised, before any work on
        it.

        Args:
            size: characters or bytes of the text.
            field: see `check`.
        """
        if size > self.longest_text:
            raise self.too_long(f"more than {self.longest_text} bytes", field)

    def too_long(self, size: str, field: str) -> ApiError:
        """Return the error for a prompt of this size, such as "3000 tokens"."""
        # Clients recognise "prompt is too long" (Anthropic's) and "this model's maximum ..."
        # (OpenAI's).
        message = (
            f"The prompt is too long: it has {size}, but this model's maximum context length is "
            f"{self.context} tokens for prompt and answer together; shorten it."
        )
        return ApiError(400, message, param=field, code="context_length_exceeded")


def last(ids: list[int], count: int) -> list[int]:
    """Return the last `count` ids."""
    return ids[max(0, len(ids) - max(0, count)) :]


@contextmanager
def time_limit(seconds: float) -> Iterator[None]:
    """Raise `DataError` once the Python code in the block has run for longer than `seconds`.

    A thread cannot be stopped from outside, so a trace function checks the clock at every line
    that this thread runs.
    """
    deadline = time.monotonic() + seconds

    def watch(_frame: FrameType, _event: str, _value: Any) -> Any:
        if time.monotonic() > deadline:
            raise DataError(
                f"The chat template took longer than {seconds:g} s on these messages; shorten them."
            )
        return watch

    before = sys.gettrace()
    sys.settrace(watch)
    try:
        yield
    finally:
        sys.settrace(before)
