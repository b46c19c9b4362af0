"""Request bodies: the supported subset of OpenAI's fields; any other field is refused by name."""

from copy import copy
from typing import TYPE_CHECKING, Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, StringConstraints, create_model, model_validator

from deepseek.engine.request import ArmChoice
from deepseek.model.experts.arming import MAX_WEIGHT
from deepseek.packs.manifest import Name
from deepseek.train.jobs.arguments import ExpertArguments
from deepseek.train.jobs.declaration import arguments_of

MAX_CHOICES = 16

Item = TypeVar("Item")
Several = Annotated[list[Item], Field(fail_fast=True)]
"""A list of which only the first mistake is reported: a body has room for a million."""

TokenCount = Annotated[int, Field(ge=1, le=1 << 20)]
TokenId = Annotated[int, Field(ge=0, le=1 << 31)]
Ids = Annotated[Several[TokenId], Field(min_length=1)]
Penalty = Annotated[float, Field(ge=-2, le=2)]
Text = Annotated[str, StringConstraints(min_length=1)]
StopText = Annotated[str, StringConstraints(min_length=1, max_length=256)]
ShortText = Annotated[str, StringConstraints(max_length=512)]
ExpertName = Name
ArmedName = ExpertName | Literal["auto"]
ExpertWeight = Annotated[float, Field(gt=0, le=MAX_WEIGHT)]
ArmedExperts = (
    Several[ArmedName]
    | Annotated[dict[ArmedName, ExpertWeight], Field(max_length=64)]
    | Literal["auto"]
)
"""Names of experts, or names with weights, which scale what an expert or adapter adds; "auto", also
among the names, stands for those that the server arms by itself.
"""
ToolName = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9_-]{1,64}$")]
BiasKey = Annotated[str, StringConstraints(pattern=r"^[0-9]{1,9}$")]
FormatKind = Literal["text", "json_object", "json_schema"]


class Body(BaseModel):
    """Base of all bodies: strict JSON types without coercion, and no unknown fields.

    An unknown field that is null asks for nothing and is ignored; many clients send all the fields
    that they know.
    """

    model_config = ConfigDict(
        extra="forbid", strict=True, allow_inf_nan=False, validate_by_name=True
    )

    @model_validator(mode="before")
    @classmethod
    def _without_unknown_nulls(cls, fields: Any) -> Any:
        if not isinstance(fields, dict):
            return fields
        known = {*cls.model_fields, *(field.alias for field in cls.model_fields.values())}
        return {name: value for name, value in fields.items() if value is not None or name in known}


class ExpertsField(Body):
    """Experts that may fire (our extension): those in `arm`, without those in `deny`.

    `{"arm": {"code": 0.7, "zh": 1.0}}` scales what each of them adds.
    """

    arm: ArmedExperts = "auto"
    deny: Several[ExpertName] = []
    max_experts: Annotated[int, Field(ge=1, le=64)] | None = None

    @property
    def choice(self) -> ArmChoice:
        """The experts in `arm`, as `ExpertChoice` takes them."""
        return tuple(self.arm) if isinstance(self.arm, list) else self.arm


class SamplingFields(Body):
    """Sampling fields of every route that generates."""

    model: ShortText
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    top_k: Annotated[int, Field(ge=0, le=1 << 20)] | None = None
    min_p: Annotated[float, Field(ge=0, lt=1)] | None = None
    stream: bool | None = None
    user: ShortText | None = None
    metadata: dict[ShortText, ShortText] | None = None
    experts: ExpertsField = ExpertsField()


class HarmlessFields(Body):
    """Fields that many clients send and that change no answer here: nothing is stored, billed or
    reasoned about, and every prefix of a prompt is cached.
    """

    store: bool | None = None
    service_tier: ShortText | None = None
    safety_identifier: ShortText | None = None
    prompt_cache_key: ShortText | None = None
    prompt_cache_retention: ShortText | None = None


class StreamOptions(Body):
    """Whether a last chunk reports the usage; chunks are never padded."""

    include_usage: bool = False
    include_obfuscation: bool | None = None


class GenerationFields(SamplingFields):
    """Fields shared by chat and plain completions.

    `retrieve` (our extension) puts passages of the experts' training text into the prompt: true
    takes them from the indexes of all experts that may fire, a number sets how many passages, a
    name selects one expert's index. `stop_token_ids` and `ignore_eos` are vLLM's extensions.
    """

    n: Annotated[int, Field(ge=1, le=MAX_CHOICES)] | None = None
    seed: Annotated[int, Field(ge=-(1 << 63), lt=1 << 63)] | None = None
    stop: StopText | Annotated[Several[StopText], Field(max_length=16)] | None = None
    stop_token_ids: Annotated[Several[TokenId], Field(max_length=64)] | None = None
    ignore_eos: bool | None = None
    presence_penalty: Penalty | None = None
    frequency_penalty: Penalty | None = None
    repetition_penalty: Annotated[float, Field(ge=0.01, le=10)] | None = None
    logit_bias: dict[BiasKey, Annotated[float, Field(ge=-100, le=100)]] | None = None
    stream_options: StreamOptions | None = None
    retrieve: bool | Annotated[int, Field(ge=1, le=16)] | ExpertName | None = None


class TextPart(Body):
    """A text part of a message; images and audio are not supported."""

    type: Literal["text", "input_text", "output_text"]
    text: str
    annotations: Several[Any] = []
    logprobs: Several[Any] = []


class CalledFunction(Body):
    """Name of a called function, and its arguments as JSON text."""

    name: ToolName
    arguments: str


class ToolCall(Body):
    """A call that the assistant made earlier."""

    id: ShortText
    type: Literal["function"] = "function"
    function: CalledFunction


class ChatMessage(Body):
    """One turn of a conversation."""

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str | Several[TextPart] | None = None
    name: ShortText | None = None
    tool_calls: Several[ToolCall] | None = None
    tool_call_id: ShortText | None = None
    refusal: str | None = None

    @property
    def text(self) -> str:
        """The content as one string."""
        return (
            "".join(p.text for p in self.content)
            if isinstance(self.content, list)
            else self.content or ""
        )


class Function(Body):
    """A function that may be called; `parameters` is a JSON schema."""

    name: ToolName
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class Tool(Body):
    """A tool, always a function; in `tool_choice`, only its name is read."""

    type: Literal["function"]
    function: Function


class AllowedTools(Body):
    """The tools that an answer may call, or has to call one of."""

    class Choice(Body):
        """The tools, of which only the names are read."""

        mode: Literal["auto", "required"]
        tools: Annotated[Several[Tool], Field(min_length=1, max_length=128)]

    type: Literal["allowed_tools"]
    allowed_tools: Choice

    @classmethod
    def of(cls, mode: Literal["auto", "required"], tools: list[Tool]) -> "AllowedTools":
        """Return the choice among some tools."""
        return cls(type="allowed_tools", allowed_tools=cls.Choice(mode=mode, tools=tools))


class JsonSchema(Body):
    """The schema that an answer must follow."""

    name: ToolName = "answer"
    description: str | None = None
    schema_: Annotated[dict[str, Any] | None, Field(alias="schema")] = None
    strict: bool | None = None


class ResponseFormat(Body):
    """Free text, any JSON object, or JSON that follows a schema."""

    type: FormatKind
    json_schema: JsonSchema = JsonSchema()


class ChatRequest(GenerationFields, HarmlessFields):
    """`POST /v1/chat/completions`.

    `continue_final_message` (vLLM's extension) continues the assistant's last message in place of
    opening a new turn.
    """

    messages: Annotated[Several[ChatMessage], Field(min_length=1, max_length=2048)]
    max_tokens: TokenCount | None = None
    max_completion_tokens: TokenCount | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    response_format: ResponseFormat | None = None
    tools: Annotated[Several[Tool], Field(max_length=128)] | None = None
    tool_choice: Literal["none", "auto", "required"] | Tool | AllowedTools | None = None
    parallel_tool_calls: bool | None = None
    continue_final_message: bool | None = None

    # Without effect: the model does not reason, and its length is that of its training.
    reasoning_effort: ShortText | None = None
    verbosity: Literal["low", "medium", "high"] | None = None
    prediction: dict[str, Any] | None = None
    modalities: Several[Literal["text"]] | None = None


class CompletionRequest(GenerationFields):
    """`POST /v1/completions`; `max_tokens` 0 with `echo` scores a text.

    `json_schema` (our extension) constrains the text; `suffix` is what follows it.
    """

    prompt: (
        str
        | Ids
        | Annotated[Several[str] | Several[Ids], Field(min_length=1, max_length=MAX_CHOICES)]
    )
    max_tokens: Annotated[int, Field(ge=0, le=1 << 20)] | None = None
    echo: bool | None = None
    best_of: Literal[1] | None = None
    suffix: str | None = None
    json_schema: dict[str, Any] | None = None
    logprobs: Annotated[int, Field(ge=0, le=20)] | None = None


class EmbeddingsRequest(Body):
    """`POST /v1/embeddings`."""

    model: ShortText
    input: str | Ids | Annotated[Several[str] | Several[Ids], Field(min_length=1, max_length=256)]
    encoding_format: Literal["float", "base64"] | None = None
    user: ShortText | None = None


class PlugRequest(Body):
    """`POST /v1/experts`: name of a pack in the experts folder."""

    name: ExpertName


class ArmRequest(Body):
    """`POST /v1/experts/arm`: experts that may fire in requests that do not select any."""

    arm: ArmedExperts


class TeachText(Body):
    """`POST /v1/teach`: an expert to train on text below the server's teach root."""

    name: ExpertName
    kind: Literal["folder", "git"]
    path: Annotated[str, StringConstraints(max_length=4096, pattern=r"^[^\x00]*$")] = "."


TAUGHT = (
    "minutes",
    "layers",
    "width",
    "tokens",
    "epochs",
    "split",
    "questions",
    "infill",
    "held_out",
    "held_out_tokens",
    "row_length",
    "batch_rows",
    "learning_rate",
    "licence",
    "domain",
    "seed",
    "device",
    "dtype",
)
"""Arguments of `deepseek.train_expert` that a client may set. Arguments that name files, the base
or the output are left out.
"""

if TYPE_CHECKING:
    TeachRequest = TeachText
else:
    declared = {name: arguments_of(ExpertArguments)[name].declared for name in TAUGHT}
    TeachRequest = create_model(
        "TeachRequest",
        __base__=TeachText,
        __doc__=TeachText.__doc__,
        **{name: (field.annotation, copy(field)) for name, field in declared.items()},
    )


class PreferenceRequest(Body):
    """`POST /v1/preferences`: a prompt with a chosen and a rejected answer."""

    prompt: Annotated[Several[ChatMessage], Field(min_length=1, max_length=2048)]
    chosen: str
    rejected: str
    reviewer: ShortText = "page"


class ReviewRequest(Body):
    """`POST /v1/preferences/{id}`: index of the better one of the two shown answers."""

    choice: Literal[0, 1]
    reviewer: ShortText = "page"
