"""Request bodies: the supported subset of OpenAI's fields; any other field is refused by name."""

from copy import copy
from typing import TYPE_CHECKING, Annotated, Any, Literal, Self

from pydantic import (
    AfterValidator,
    BeforeValidator,
    Field,
    StringConstraints,
    create_model,
    model_validator,
)

from deepseek.engine.request import ArmChoice
from deepseek.server.body import (
    ArmedExperts,
    BiasKey,
    Body,
    ExpertName,
    Ids,
    Penalty,
    RetrieveField,
    Several,
    ShortText,
    StopText,
    TokenCount,
    TokenId,
    ToolName,
    TopK,
    TopP,
    text_only,
)
from deepseek.server.constraints import ConstraintFields
from deepseek.server.dialects.harmless_fields import CacheBreakpoint, HarmlessFields
from deepseek.server.dialects.llama_cpp_fields import LlamaCppFields
from deepseek.server.dialects.tool_types import no_server_tool
from deepseek.train.jobs.arguments import ExpertArguments
from deepseek.train.jobs.declaration import arguments_of

MAX_CHOICES = 16

DEFAULT_TOKENS = 16
"""Most tokens of a completion that states no limit, as in OpenAI's API."""

TemplateVariables = Annotated[dict[ShortText, Any], Field(max_length=64)]


def stated_limit(limit: int | None) -> int | None:
    """Return a limit of tokens; None for -1, with which some clients say that they set none."""
    return None if limit == -1 else limit


class ExpertsField(Body):
    """Experts that may fire (our extension): those in `arm`, without those in `deny`.

    `{"arm": {"code": 0.7, "zh": 1.0}}` scales what each of them adds. `deny` may name experts that
    are not plugged, so that a policy can exclude an expert before it is there.
    """

    arm: ArmedExperts = "auto"
    deny: Several[ExpertName] = Field(default_factory=list)
    max_experts: Annotated[int, Field(ge=1, le=64)] | None = None

    @property
    def choice(self) -> ArmChoice:
        """The experts in `arm`, as `ExpertChoice` takes them."""
        return tuple(self.arm) if isinstance(self.arm, list) else self.arm


class SamplingFields(Body):
    """Sampling fields of every route that generates."""

    model: ShortText
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: TopP | None = None
    top_k: TopK | None = None
    min_p: Annotated[float, Field(ge=0, lt=1)] | None = None
    stream: bool | None = None
    user: ShortText | None = None
    metadata: dict[ShortText, ShortText] | None = None
    experts: ExpertsField = ExpertsField()


class StreamOptions(Body):
    """Whether a last chunk reports the usage; chunks are never padded."""

    include_usage: bool = False
    include_obfuscation: bool | None = None


class GenerationFields(SamplingFields, ConstraintFields, LlamaCppFields):
    """Fields shared by chat and plain completions.

    `retrieve` (our extension) puts passages of the experts' training text into the prompt.
    `stop_token_ids` and `ignore_eos` are vLLM's extensions.
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
    retrieve: RetrieveField | None = None

    # Values that change nothing; llama.cpp's own routes take others too.
    n_indent: Literal[0] | None = None
    t_max_predict_ms: Annotated[int, Field(ge=-1, le=0)] | None = None

    @model_validator(mode="after")
    def _with_llama_cpp_penalties(self) -> Self:
        if self.repetition_penalty is None:
            self.repetition_penalty = self.repeat_penalty
        if self.repeat_last_n == 0:
            # Neutral values, as None would take those that the model recommends.
            self.repetition_penalty = 1.0
            self.presence_penalty = 0.0
            self.frequency_penalty = 0.0
        return self


class TextPart(Body):
    """A text part of a message; images and audio are not supported."""

    type: Literal["text", "input_text", "output_text"]
    text: str
    annotations: Several[Any] = Field(default_factory=list)
    logprobs: Several[Any] = Field(default_factory=list)
    prompt_cache_breakpoint: CacheBreakpoint | None = None


class RefusalPart(Body):
    """The text by which a model refused to answer."""

    type: Literal["refusal"]
    refusal: str

    @property
    def text(self) -> str:
        """The text."""
        return self.refusal


MessagePart = Annotated[TextPart | RefusalPart, Field(discriminator="type")]


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
    """One turn of a conversation. Reasoning of an earlier turn is left out of the prompt."""

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: Annotated[str | Several[MessagePart] | None, BeforeValidator(text_only)] = None
    name: ShortText | None = None
    tool_calls: Several[ToolCall] | None = None
    tool_call_id: ShortText | None = None
    refusal: str | None = None
    annotations: Several[Any] | None = None

    # Not dumped, as a chat template would write them into the prompt.
    reasoning_content: Annotated[str | None, Field(exclude=True)] = None
    reasoning: Annotated[str | None, Field(exclude=True)] = None

    @model_validator(mode="after")
    def _complete(self) -> Self:
        if self.content is None and self.role != "assistant":
            raise ValueError(f"a message of role {self.role} needs content; send it")
        if self.tool_call_id is None and self.role == "tool":
            raise ValueError(
                "a message of role tool needs tool_call_id; send the id of the call that it answers"
            )
        return self

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

    type: Annotated[Literal["function"], BeforeValidator(no_server_tool)]
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


ChatLimit = Annotated[Literal[-1] | TokenCount | None, AfterValidator(stated_limit)]


class ChatRequest(GenerationFields, HarmlessFields):
    """`POST /v1/chat/completions`.

    Without `max_tokens` or `max_completion_tokens`, or with -1, an answer ends after
    `Settings.answer_tokens` tokens (512 unless the server was started with another limit).

    `continue_final_message` (vLLM's extension) continues the assistant's last message in place of
    opening a new turn; `chat_template_kwargs` (vLLM's and llama.cpp's) are variables of the model's
    chat template.
    """

    messages: Annotated[Several[ChatMessage], Field(min_length=1, max_length=2048)]
    max_tokens: ChatLimit = None
    max_completion_tokens: ChatLimit = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    tools: Annotated[Several[Tool], Field(max_length=128)] | None = None
    tool_choice: Literal["none", "auto", "required"] | Tool | AllowedTools | None = None
    parallel_tool_calls: bool | None = None
    continue_final_message: bool | None = None
    chat_template_kwargs: TemplateVariables | None = None

    # Without effect: the model does not reason, and its length is that of its training.
    reasoning_effort: ShortText | None = None
    verbosity: Literal["low", "medium", "high"] | None = None
    prediction: dict[str, Any] | None = None
    modalities: Several[Literal["text"]] | None = None

    @property
    def limit(self) -> int | None:
        """Most tokens of the answer; None: not set.

        A client that sends `n_predict` 0 wants the prompt to be cached; it gets one token.
        """
        limit = self.max_completion_tokens or self.max_tokens
        if limit is None and self.n_predict is not None and self.n_predict >= 0:
            return max(1, self.n_predict)
        return limit


class CompletionRequest(GenerationFields):
    """`POST /v1/completions`; `max_tokens` 0 with `echo` scores a text, `suffix` is what follows
    it.

    Without `max_tokens`, an answer ends after 16 tokens, OpenAI's default here; with -1 after
    `Settings.answer_tokens` tokens.
    """

    prompt: (
        str
        | Ids
        | Annotated[Several[str] | Several[Ids], Field(min_length=1, max_length=MAX_CHOICES)]
    )
    max_tokens: Annotated[int, Field(ge=-1, le=1 << 20)] | None = None
    echo: bool | None = None
    best_of: Literal[1] | None = None
    suffix: str | None = None
    logprobs: Annotated[int, Field(ge=0, le=20)] | None = None

    @model_validator(mode="after")
    def _with_llama_cpp_limit(self) -> Self:
        if self.max_tokens is None:
            self.max_tokens = self.n_predict
        return self

    def limit(self, unlimited: int) -> int:
        """Return the most tokens of the answer.

        Args:
            unlimited: those of an answer for which no limit is wanted.
        """
        if self.max_tokens is None:
            return DEFAULT_TOKENS
        return unlimited if self.max_tokens == -1 else max(1, self.max_tokens)


class EmbeddingsRequest(Body):
    """`POST /v1/embeddings`; `dimensions` shortens the vectors."""

    model: ShortText
    input: str | Ids | Annotated[Several[str] | Several[Ids], Field(min_length=1, max_length=2048)]
    encoding_format: Literal["float", "base64"] | None = None
    dimensions: Annotated[int, Field(ge=1, le=1 << 20)] | None = None
    user: ShortText | None = None


class PlugRequest(Body):
    """`POST /v1/experts`: name of a pack in the experts folder, and whether to replace the plugged
    expert of that name.
    """

    name: ExpertName
    replace: bool = False


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
