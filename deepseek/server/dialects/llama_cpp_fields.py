"""Fields that llama.cpp's clients send to its own routes and to OpenAI's."""

from typing import Annotated, Any, Literal

from pydantic import Field

from deepseek.server.body import Body, Several, ShortText

Milliseconds = Annotated[int, Field(ge=-1, le=1 << 31)]


class LlamaCppFields(Body):
    """Fields that llama.cpp's clients send to its own routes and to OpenAI's.

    `n_predict` and `repeat_penalty` are llama.cpp's names of `max_tokens` and `repetition_penalty`;
    an `n_predict` of -1 sets no limit.
    """

    n_predict: Annotated[int, Field(ge=-1, le=1 << 20)] | None = None
    repeat_penalty: Annotated[float, Field(ge=0.01, le=10)] | None = None
    repeat_last_n: int | None = None
    """0 turns the penalties off; else they look at the whole text, whatever it says"""
    response_fields: Annotated[Several[ShortText], Field(max_length=64)] | None = None
    """fields of the reply to send; on OpenAI's routes, a reply has all its fields"""

    # Settings that change no answer here.
    n_keep: int | None = None
    id_slot: int | None = None
    cache_prompt: bool | None = None
    n_cache_reuse: int | None = None
    t_max_prompt_ms: Milliseconds | None = None
    min_keep: int | None = None
    mirostat_tau: float | None = None
    mirostat_eta: float | None = None
    dynatemp_exponent: float | None = None
    dry_base: float | None = None
    dry_allowed_length: int | None = None
    dry_penalty_last_n: int | None = None
    dry_sequence_breakers: Several[ShortText] | None = None
    xtc_threshold: float | None = None
    timings_per_token: bool | None = None
    samplers: Several[ShortText] | None = None

    # Values that change nothing; any other value is refused.
    typical_p: Literal[1] | Annotated[float, Field(ge=1, le=1)] | None = None
    mirostat: Literal[0] | None = None
    dynatemp_range: Literal[0] | Annotated[float, Field(ge=0, le=0)] | None = None
    dry_multiplier: Literal[0] | Annotated[float, Field(ge=0, le=0)] | None = None
    xtc_probability: Literal[0] | Annotated[float, Field(ge=0, le=0)] | None = None
    top_n_sigma: Annotated[float, Field(le=0)] | None = None
    n_probs: Literal[0] | None = None
    return_tokens: Literal[False] | None = None
    lora: Annotated[Several[Any], Field(max_length=0)] | None = None
