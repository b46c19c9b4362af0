"""Base class of request bodies, and the types of their fields."""

from functools import partial
from typing import Annotated, Any, Literal, TypeVar

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    StringConstraints,
    model_validator,
)

from deepseek.model.experts.arming import MAX_WEIGHT
from deepseek.packs.manifest import Name
from deepseek.server.field_errors import DIGITS, TOOL_NAME

Item = TypeVar("Item")
Several = Annotated[list[Item], Field(fail_fast=True)]
"""A list of which only the first mistake is reported, as a body can hold a million."""

TokenCount = Annotated[int, Field(ge=1, le=1 << 20)]
TokenId = Annotated[int, Field(ge=0, le=1 << 31)]
Ids = Annotated[Several[TokenId], Field(min_length=1)]
Penalty = Annotated[float, Field(ge=-2, le=2)]
TopP = Annotated[float, Field(ge=0, le=1)]
TopK = Annotated[int, Field(ge=-1, le=1 << 20), AfterValidator(partial(max, 0))]
"""0 means all tokens, for vLLM's and llama.cpp's clients -1 too."""
Text = Annotated[str, StringConstraints(min_length=1)]
StopText = Annotated[str, StringConstraints(min_length=1, max_length=256)]
ShortText = Annotated[str, StringConstraints(max_length=512)]
ExpertName = Name
ArmedName = ExpertName | Literal["auto"]
RetrieveField = bool | Annotated[int, Field(ge=1, le=16)] | ExpertName
"""Which passages of the experts' training text to put into a prompt: true takes them from the
indexes of all experts that may fire, a number sets how many passages, a name selects one expert's
index.
"""
ExpertWeight = Annotated[float, Field(gt=0, le=MAX_WEIGHT)]
ArmedExperts = (
    Several[ArmedName]
    | Annotated[dict[ArmedName, ExpertWeight], Field(max_length=64)]
    | Literal["auto"]
)
"""Names of experts, or names with weights, which scale what an expert or adapter adds. "auto",
alone or among the names, stands for the experts that the server arms by itself.
"""
ToolName = Annotated[str, StringConstraints(pattern=TOOL_NAME)]
BiasKey = Annotated[str, StringConstraints(pattern=DIGITS)]


MEDIA = {
    "image": "images",
    "image_url": "images",
    "input_image": "images",
    "document": "documents",
    "file": "files",
    "input_file": "files",
    "audio": "sounds",
    "input_audio": "sounds",
    "video_url": "videos",
}
"""Types of message parts that are not text, with their names in messages."""


def text_only(content: Any) -> Any:
    """Return the unvalidated content of a message if all its parts are text.

    Raises:
        ValueError: it has a part that is not text.
    """
    for part in content if isinstance(content, list) else []:
        kind = part.get("type") if isinstance(part, dict) else None
        if isinstance(kind, str) and kind in MEDIA:
            raise ValueError(f"{MEDIA[kind]} are not supported, because the model reads text only")
    return content


def not_stored(value: Any) -> Any:
    """Return the value of a field that refers to something stored, which must be null.

    Raises:
        ValueError: it refers to something.
    """
    if value is not None:
        raise ValueError("nothing is stored here; send the whole conversation instead")
    return value


Stored = Annotated[None, BeforeValidator(not_stored)]
"""A reference to a stored response, conversation or prompt."""


class Body(BaseModel):
    """Base of all bodies: strict JSON types without coercion, and no unknown fields.

    A field that is null and not required is ignored, known or not, because many clients send all
    the fields that they know.
    """

    model_config = ConfigDict(
        extra="forbid", strict=True, allow_inf_nan=False, validate_by_name=True
    )

    @model_validator(mode="before")
    @classmethod
    def _without_nulls(cls, fields: Any) -> Any:
        # Most parts of a body have no null, and a body can have very many parts.
        if not isinstance(fields, dict) or None not in fields.values():
            return fields
        required = {
            part
            for name, field in cls.model_fields.items()
            if field.is_required()
            for part in (name, field.alias)
        }
        return {
            name: value for name, value in fields.items() if value is not None or name in required
        }
