"""llama.cpp's `POST /infill`, which its editor plug-ins llama.vim and llama.vscode send."""

import time
from collections.abc import AsyncIterator
from typing import Annotated

from pydantic import Field

from deepseek.server.body import Body, Ids, Several, ShortText
from deepseek.server.dialects.llama_cpp import NativeChunks, NativeCompletion
from deepseek.server.prompt import EditorGap
from deepseek.server.routes.completions import CompletionChunks
from deepseek.server.stream import Fields

Milliseconds = Annotated[int, Field(ge=-1, le=1 << 31)]


class ExtraContext(Body):
    """A piece of another file."""

    text: str
    filename: ShortText = ""
    time: float | int | Several[int] | None = None


class InfillRequest(NativeCompletion):
    """`POST /infill`: `prompt` is the cursor's line up to the cursor.

    Tokens are chosen greedily unless the request sets a temperature.
    """

    prompt: str = ""
    input_prefix: str = ""
    input_suffix: str = ""
    input_extra: Annotated[Several[ExtraContext], Field(max_length=256)] = Field(
        default_factory=list
    )
    n_indent: Annotated[int, Field(ge=0, le=1 << 16)] | None = None
    t_max_predict_ms: Milliseconds | None = None
    response_fields: Annotated[Several[ShortText], Field(max_length=64)] | None = None

    # Settings that do not change an answer.
    t_max_prompt_ms: Milliseconds | None = None
    n_cache_reuse: int | None = None

    @property
    def gap(self) -> EditorGap:
        """The text with its gap."""
        others = [(extra.filename, extra.text) for extra in self.input_extra]
        return EditorGap(self.input_prefix, self.prompt, self.input_suffix, others)

    def native(self, ids: Ids) -> NativeCompletion:
        """Return the request to continue a prompt of these ids."""
        known = NativeCompletion.model_fields
        fields = {name: getattr(self, name) for name in known if name in self.model_fields_set}
        return NativeCompletion(**{"temperature": 0.0, **fields, "prompt": ids})


class BlockText:
    """The text of a gap. It ends before a line that leaves its block, or at a line end once the
    time is up.

    Args:
        indent: characters of white space that a line of the block begins with, at least.
        seconds: time limit of the text in seconds.
    """

    def __init__(self, indent: int, seconds: float) -> None:
        self.finish: str | None = None
        """Finish reason once the text has ended."""
        self._indent = indent
        self._seconds = seconds
        self._held = ""  # a line end and the white space after it, until the line's indent is known

    def take(self, piece: str, elapsed: float) -> str:
        """Return the text that can be sent after the next piece.

        Args:
            piece: the piece; there are none after the end.
            elapsed: seconds since the first piece.
        """
        decided = ""
        for character in piece:
            if character == "\n" and elapsed > self._seconds:
                self.finish = "length"
                return decided
            if character == "\n" or (self._held and character in " \t"):
                self._held += character
                continue
            if self._held and len(self._held.rpartition("\n")[2]) < self._indent:
                self.finish = "stop"
                return decided
            decided += self._held + character
            self._held = ""
        return decided

    def rest(self) -> str:
        """Return the text that is still held back when the answer has ended by itself."""
        return self._held


class InfillChunks(NativeChunks):
    """The chunks of a filled gap, which ends before a line that leaves its block, or when time is
    up.

    Args:
        body: the request.
        chunks: the answer, not started.
        started: when the request came, by `time.perf_counter`.
    """

    def __init__(self, body: InfillRequest, chunks: CompletionChunks, started: float) -> None:
        super().__init__(body, chunks, started)
        limit = body.t_max_predict_ms
        seconds = limit / 1000 if limit is not None and limit > 0 else float("inf")
        self._text = BlockText(body.n_indent or 0, seconds)
        self._fields = body.response_fields

    async def choices(self) -> AsyncIterator[Fields]:
        """Yield the pieces of the text up to its end.

        As in llama.cpp, `n_indent` ends the text before a line with less white space at its
        beginning, and `t_max_predict_ms` ends it at the end of a line.
        """
        first: float | None = None
        async for choice in super().choices():
            now = time.perf_counter()
            first = now if first is None else first
            text = self._text.take(choice["text"], now - first)
            if self._text.finish is not None:
                yield {**choice, "text": text, "finish_reason": self._text.finish}
                return
            if choice["finish_reason"] is not None:
                text += self._text.rest()
            yield {**choice, "text": text}

    def fold(self, chunks: list[Fields]) -> Fields:
        """Return the whole reply, or those of its fields that the request names.

        A slash in a name leads into a field; the reply has it under the whole name. No names ask
        for all fields.
        """
        reply = super().fold(chunks)
        if not self._fields:
            return reply
        values = ((path, value_at(reply, path)) for path in self._fields)
        return {path: value for path, value in values if value is not None}


def value_at(fields: object, path: str) -> object:
    """Return the value at a path of names, such as "timings/prompt_n"; None if there is none."""
    for name in path.split("/"):
        fields = fields.get(name) if isinstance(fields, dict) else None
    return fields
