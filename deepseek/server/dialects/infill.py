"""llama.cpp's `POST /infill`, which its editor plug-ins llama.vim and llama.vscode send."""

from typing import Annotated

from pydantic import Field

from deepseek.server.body import Body, Several, ShortText
from deepseek.server.dialects.llama_cpp import NativeCompletion
from deepseek.server.errors import ApiError
from deepseek.server.prompt import EditorGap
from deepseek.server.schema import CompletionRequest


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

    @property
    def gap(self) -> EditorGap:
        """The text with its gap.

        Raises:
            ApiError: there is no text around the gap.
        """
        others = [(extra.filename, extra.text) for extra in self.input_extra]
        around = (self.input_prefix, self.prompt, self.input_suffix)
        if not any(around) and not any(text for _, text in others):
            raise ApiError(
                400,
                "There is no text around the gap; send input_prefix or input_suffix.",
                param="input_prefix",
                code="invalid_value",
            )
        return EditorGap(self.input_prefix, self.prompt, self.input_suffix, others)

    def completion(self, model: str, limit: int) -> CompletionRequest:
        request = super().completion(model, limit)
        if request.temperature is None:
            request.temperature = 0.0
        return request
