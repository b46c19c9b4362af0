"""From messages or a text to the tokens of a prompt, within limits of time and size."""

import re
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from types import FrameType
from typing import Any

from transformers import PreTrainedTokenizerFast

from deepseek.server.errors import ApiError
from deepseek.server.schema import ChatMessage
from deepseek.server.tools import Calling, described, plain_messages, tool_messages, with_preamble
from deepseek.text.chat_template import encode_rendered, render, user_ids

TEMPLATE_SECONDS = 2.0
"""Most time that a chat template may take; a plain one takes a millisecond."""


class PromptWriter:
    """Makes prompts for one model.

    Args:
        tokenizer: the model's.
        context: most tokens of prompt and answer together.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerFast, context: int) -> None:
        self.tokenizer = tokenizer
        self.context = context
        template = tokenizer.chat_template
        self.knows_tools = isinstance(template, str) and bool(re.search(r"\btools\b", template))
        self.longest_text = context * max(len(token.encode()) for token in tokenizer.get_vocab())

    def chat(self, messages: Sequence[ChatMessage], calling: Calling) -> list[int]:
        """Return the ids of a conversation after which the assistant speaks."""
        self.check_size(sum(len(message.text) for message in messages))
        if self.knows_tools:
            told = tool_messages(messages)
            tools = described(calling.tools)
        else:
            told = plain_messages(messages)
            tools = []
            if calling.tools:
                told = with_preamble(told, calling.tools)
        with time_limit(TEMPLATE_SECONDS):
            text = render(self.tokenizer, told, open_turn=True, tools=tools or None)
        self.check_size(len(text.encode()))
        return self.check(encode_rendered(self.tokenizer, text))

    def user_ids(self, messages: Sequence[ChatMessage]) -> tuple[int, ...]:
        """Return the ids of what tells what a conversation is about (see `text.chat.user_ids`)."""
        return user_ids(self.tokenizer, [{"role": m.role, "content": m.text} for m in messages])

    def text(self, prompt: str | Sequence[int]) -> list[int]:
        """Return the ids of a plain prompt, which may be ids already; an empty text starts from
        nothing.
        """
        if not isinstance(prompt, str):
            return self.check(list(prompt))
        self.check_size(len(prompt.encode()))
        ids = list(self.tokenizer(prompt).input_ids)
        return self.check(ids or [self.start()])

    def start(self) -> int:
        """Return the token that stands before any text."""
        for identity in (self.tokenizer.bos_token_id, self.tokenizer.eos_token_id):
            if identity is not None:
                return int(identity)
        raise ApiError(400, "The prompt is empty; give some text.", param="prompt")

    def check(self, ids: list[int]) -> list[int]:
        """Return `ids`; raise `ApiError` if they fill the context or are none of the
        vocabulary's.
        """
        if len(ids) >= self.context:
            raise self.too_long(f"{len(ids)} tokens")
        if max(ids) >= len(self.tokenizer):
            raise ApiError(
                400,
                f"Token {max(ids)} is not in the vocabulary of {len(self.tokenizer)}.",
                param="prompt",
            )
        return ids

    def check_size(self, size: int) -> None:
        """Raise `ApiError` for a text that cannot fit whatever its tokens are, before time is spent
        on it.
        """
        if size > self.longest_text:
            raise self.too_long(f"more than {self.longest_text} bytes")

    def too_long(self, size: str) -> ApiError:
        """Return the refusal of a prompt of this size."""
        message = f"The prompt has {size}, but prompt and answer share a context of {self.context} tokens; shorten it."
        return ApiError(400, message, param="messages", code="context_length_exceeded")


@contextmanager
def time_limit(seconds: float) -> Iterator[None]:
    """Within the block, refuse the request once Python code has run for longer than `seconds` (in
    this thread).

    A thread cannot be stopped from outside; here every line that it runs looks at the clock.
    """
    deadline = time.monotonic() + seconds

    def watch(_frame: FrameType, _event: str, _value: Any) -> Any:
        if time.monotonic() > deadline:
            raise ApiError(
                400, f"The chat template took longer than {seconds:g} s on these messages."
            )
        return watch

    before = sys.gettrace()
    sys.settrace(watch)
    try:
        yield
    finally:
        sys.settrace(before)
