"""Translate the fields of an HTTP request into an engine request."""

from collections.abc import Sequence
from typing import Any

from deepseek.engine.request import Grammar, Request
from deepseek.engine.sampler import Sampling
from deepseek.server.errors import ApiError
from deepseek.server.schema import SamplingFields
from deepseek.server.service import Service

DIALS = (
    "temperature",
    "top_p",
    "top_k",
    "min_p",
    "presence_penalty",
    "frequency_penalty",
    "repetition_penalty",
    "seed",
    "logit_bias",
)

RECOMMENDED = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty")
"""Parameters that a model's own generation config may recommend."""


def ask(
    service: Service,
    body: SamplingFields,
    prompt_ids: Sequence[int],
    max_tokens: int | None,
    *,
    choice: int = 0,
    grammar: Grammar | None = None,
    logprobs: int | None = None,
    prompt_logprobs: bool = False,
    user_ids: tuple[int, ...] | None = None,
    document_ids: tuple[int, ...] | None = None,
    heal: bool = False,
) -> Request:
    """Return the engine's request for one answer.

    Args:
        service: the server's state.
        body: sampling fields of the HTTP request.
        prompt_ids: token ids of the prompt.
        max_tokens: most tokens of the answer, capped at the free context; None takes
            `Settings.answer_tokens`.
        choice: index among the answers to one prompt, added to the seed so that they differ.
        grammar, logprobs, prompt_logprobs, user_ids, document_ids, heal: see `Request`.

    Raises:
        ApiError, UserError: the request is invalid.
    """
    check_bias(service, body)
    free_tokens = service.writer.context - len(prompt_ids)
    stop = getattr(body, "stop", None) or ()
    return Request(
        tuple(prompt_ids),
        sampling(
            {**usual_sampling(service), **sent(body)},
            min(max_tokens or service.settings.answer_tokens, free_tokens),
            choice,
        ),
        experts=service.experts(body.model, body.experts),
        user_ids=user_ids,
        document_ids=document_ids,
        stop=(stop,) if isinstance(stop, str) else tuple(stop),
        stop_token_ids=tuple(getattr(body, "stop_token_ids", None) or ()),
        ignore_end=bool(getattr(body, "ignore_eos", None)),
        logprobs=logprobs,
        prompt_logprobs=prompt_logprobs,
        grammar=grammar,
        heal=heal,
    )


def check_bias(service: Service, body: SamplingFields) -> None:
    """Raise `ApiError` if `logit_bias` has a token that the model does not have."""
    size = service.engine.model.config.get_text_config(decoder=True).vocab_size
    for token in map(int, getattr(body, "logit_bias", None) or ()):
        if token >= size:
            raise ApiError(
                400,
                f"logit_bias has the token id {token}, but the model's end with {size - 1}; use "
                "its own tokenizer.",
                param="logit_bias",
            )


def sent(body: SamplingFields) -> dict[str, Any]:
    """Return the sampling parameters that a request sets."""
    return {name: value for name in DIALS if (value := getattr(body, name, None)) is not None}


def usual_sampling(service: Service) -> dict[str, Any]:
    """Return the parameters for a request that sets none: those of the model's
    `generation_config.json`, else OpenAI's defaults.
    """
    usual: dict[str, Any] = {"temperature": 1.0}
    recommended = service.engine.model.generation_config
    if recommended is not None and recommended.do_sample:
        values = {name: getattr(recommended, name, None) for name in RECOMMENDED}
        usual |= {name: value for name, value in values.items() if value is not None}
    return usual


def sampling(fields: dict[str, Any], max_tokens: int, choice: int) -> Sampling:
    """Return the sampling parameters of one answer.

    Args:
        fields: the parameters, with the names of `DIALS`.
        max_tokens: most tokens of the answer.
        choice: index among the answers to one prompt.
    """
    if "seed" in fields:
        fields["seed"] = (fields["seed"] + choice) % (1 << 63)
    if "logit_bias" in fields:
        fields["logit_bias"] = {int(token): bias for token, bias in fields["logit_bias"].items()}
    return Sampling(**{**fields, "max_new_tokens": max_tokens})
