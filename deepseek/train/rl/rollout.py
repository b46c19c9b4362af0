"""Rollouts: responses sampled in batches, with their routing decisions."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields, replace
from typing import Self

import torch
from torch import Tensor

from deepseek.errors import ConfigError
from deepseek.model.kv_cache import KVCache
from deepseek.model.moe.stats import RoutingDecision
from deepseek.model.precision import autocast
from deepseek.model.transformer import DeepSeekModel


@dataclass(frozen=True)
class RowTensors:
    """Tensors that share their first axis of B rows."""

    def rows(self, start: int, stop: int) -> Self:
        """Return the rows `start` to `stop - 1`."""
        return type(self)(**{name: tensor[start:stop] for name, tensor in self.tensors().items()})

    def tensors(self) -> dict[str, Tensor]:
        """Return the tensors by name."""
        return {field.name: getattr(self, field.name) for field in fields(self)}


@dataclass(frozen=True)
class Responses(RowTensors):
    """Prompts, left-padded to P columns, and T columns of responses; S = P + T.

    Attributes:
        input_ids_BS: token ids, 0 at padding.
        real_BS: False at padding.
        mask_BT: 1.0 at response tokens, including the one that ends a response.
        choices_BLSC: routing decisions of all tokens but the last in the L mixture-of-experts
            layers, as in `RoutingDecision.ids_NC`, `[B, L, S - 1, C]`; empty for a dense model.
        active_BLS: number of chosen experts that were used, `[B, L, S - 1]`.
    """

    input_ids_BS: Tensor
    real_BS: Tensor
    mask_BT: Tensor
    choices_BLSC: Tensor
    active_BLS: Tensor

    @property
    def targets_BT(self) -> Tensor:
        """Token ids `[B, T]` of the responses."""
        return self.input_ids_BS[:, -self.mask_BT.shape[1] :]

    def trimmed(self) -> Self:
        """Return the responses without the leading columns that are padding in every row."""
        first = int(self.real_BS.any(0).int().argmax())
        return replace(
            self,
            input_ids_BS=self.input_ids_BS[:, first:],
            real_BS=self.real_BS[:, first:],
            choices_BLSC=self.choices_BLSC[:, :, first:],
            active_BLS=self.active_BLS[:, :, first:],
        )

    def routing(self, model: DeepSeekModel) -> dict[int, RoutingDecision]:
        """Return the routing decisions to replay by layer, without the last token.

        Empty if none were recorded: the routers then choose anew.
        """
        if not self.choices_BLSC.shape[1]:
            return {}
        return {
            layer: RoutingDecision(
                self.choices_BLSC[:, place].flatten(0, 1), self.active_BLS[:, place].flatten()
            )
            for place, layer in enumerate(model.sparse_layers)
        }

    def answers(self) -> list[list[int]]:
        """Return the ids of each response without padding."""
        return [
            ids[mask > 0].tolist() for ids, mask in zip(self.targets_BT, self.mask_BT, strict=True)
        ]

    def prompts(self) -> list[list[int]]:
        """Return the ids of each prompt without padding."""
        width = self.input_ids_BS.shape[1] - self.mask_BT.shape[1]
        pairs = zip(self.input_ids_BS[:, :width], self.real_BS[:, :width], strict=True)
        return [ids[real].tolist() for ids, real in pairs]


def empty_responses(
    model: DeepSeekModel, rows: int, prompt_width: int, new_tokens: int
) -> Responses:
    """Return padding only, in the shapes that `generate` fills."""
    width = prompt_width + new_tokens
    layers = model.sparse_layers
    device = model.device
    candidates = model.routing_width()
    # Route padding to experts 0, 1, ..., since the experts of a token must be distinct.
    choices = (
        torch.arange(candidates, device=device)
        .expand(rows, len(layers), width - 1, candidates)
        .clone()
    )
    return Responses(
        torch.zeros(rows, width, dtype=torch.long, device=device),
        torch.zeros(rows, width, dtype=torch.bool, device=device),
        torch.zeros(rows, new_tokens, device=device),
        choices,
        torch.ones(rows, len(layers), width - 1, dtype=torch.long, device=device),
    )


def given(
    model: DeepSeekModel, prompts: Sequence[Sequence[int]], answers: Sequence[Sequence[int]]
) -> Responses:
    """Return responses from given answers, without routing decisions.

    Args:
        model: model that will read them.
        prompts: token ids of each prompt.
        answers: token ids of each answer.

    Raises:
        ConfigError: a prompt is empty, or too long for the model's context with its answer.
    """
    width = max(map(len, prompts))
    length = max(1, *map(len, answers))  # a column even where all answers are empty
    check_prompts(prompts, model.config.max_position_embeddings - length)
    responses = empty_responses(model, len(prompts), width, length)
    for row, (prompt, answer) in enumerate(zip(prompts, answers, strict=True)):
        columns = slice(width - len(prompt), width + len(answer))
        responses.input_ids_BS[row, columns] = torch.tensor([*prompt, *answer], device=model.device)
        responses.real_BS[row, columns] = True
    responses.mask_BT.copy_(responses.real_BS[:, width:])
    return replace(
        responses,
        choices_BLSC=responses.choices_BLSC[:, :0],
        active_BLS=responses.active_BLS[:, :0],
    )


def generate(
    model: DeepSeekModel,
    prompts: Sequence[Sequence[int]],
    new_tokens: int,
    ends: Iterable[int],
    generator: torch.Generator,
    *,
    temperature: float = 1.0,
    prompt_width: int | None = None,
) -> Responses:
    """Sample one response per prompt from the full distribution at `temperature`.

    Args:
        model: model to sample from.
        prompts: token ids of each prompt.
        new_tokens: maximum tokens per response.
        ends: ids of the tokens that end a response.
        generator: random generator of the sampling.
        temperature: sampling temperature.
        prompt_width: columns of the prompts; None: those of the longest prompt.

    Raises:
        ConfigError: a prompt is empty, or longer than `prompt_width` or the model's context allow.
    """
    width = max(map(len, prompts), default=0) if prompt_width is None else prompt_width
    check_prompts(prompts, min(width, model.config.max_position_embeddings - new_tokens))
    responses = empty_responses(model, len(prompts), width, new_tokens)
    ids_BS = responses.input_ids_BS
    real_BS = responses.real_BS
    for row, prompt in enumerate(prompts):
        ids_BS[row, width - len(prompt) : width] = torch.tensor(prompt)
        real_BS[row, width - len(prompt) : width] = True
    ends_E = torch.tensor(sorted(ends), device=model.device, dtype=torch.long)
    cache = KVCache()
    alive_B = torch.ones(len(prompts), dtype=torch.bool, device=model.device)
    done = first = width - max(map(len, prompts))  # columns before are padding in every row
    with torch.no_grad(), autocast(model, cached=False):
        for column in range(width, width + new_tokens):
            output = model(
                ids_BS[:, done:column],
                attention_mask=real_BS[:, first:column],
                cache=cache,
                logits_to_keep=1,
            )
            for place, stats in enumerate(output.router_stats or ()):
                record(responses, place, stats.dispatch.choice, done, column)
            probabilities_BV = torch.softmax(output.logits[:, -1].float() / temperature, dim=-1)
            token_B = torch.multinomial(probabilities_BV, 1, generator=generator)[:, 0]
            ids_BS[:, column] = torch.where(alive_B, token_B, 0)
            real_BS[:, column] = alive_B
            alive_B = alive_B & ~torch.isin(token_B, ends_E)
            done = column
            if not alive_B.any():
                break
    responses.mask_BT.copy_(real_BS[:, width:])
    return responses


def record(
    responses: Responses, place: int, choice: RoutingDecision, start: int, stop: int
) -> None:
    """Record the experts to which one layer routed the tokens of columns `start` to `stop - 1`."""
    shape = (len(responses.real_BS), stop - start, -1)
    responses.choices_BLSC[:, place, start:stop] = choice.ids_NC.view(shape)
    if choice.active_N is not None:
        responses.active_BLS[:, place, start:stop] = choice.active_N.view(shape[:2])


def check_prompts(prompts: Sequence[Sequence[int]], most: int) -> None:
    """Raise `ConfigError` unless there are prompts and each has 1 to `most` tokens."""
    lengths = [len(prompt) for prompt in prompts]
    if not lengths or min(lengths) < 1 or max(lengths) > most:
        raise ConfigError(
            f"Prompts must have 1 to {most} tokens; these have {min(lengths, default=0)} to "
            f"{max(lengths, default=0)}."
        )
