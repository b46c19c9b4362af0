"""Reward model from pairs: a Bradley-Terry model (1952) on hidden states of a frozen base."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid, softplus

from deepseek.checkpoint import store
from deepseek.model.transformer import DeepSeekModel
from deepseek.train.rl.policy import below
from deepseek.train.rl.rollout import Responses, given

RIDGES = (1e-4, 1e-3, 1e-2, 1e-1)
"""Candidates for the L2 penalty on weights of standardised features. Without a penalty, separable
pairs would drive the weights to infinity.
"""

FOLD = 4
"""One prompt in this many is held out to choose the penalty."""

BINS = 10
"""Bins of equal width for the calibration error."""


@dataclass(frozen=True)
class RewardQuality:
    """Quality of a reward model on held-out pairs.

    Attributes:
        pairs: number of pairs.
        accuracy: share of pairs whose preferred answer scores higher.
        loss: mean -log P(preferred), in nats; chance level is 0.693.
        calibration_error: expected calibration error: mean distance over bins between the predicted
            probability of the better answer and its accuracy.
    """

    pairs: int
    accuracy: float
    loss: float
    calibration_error: float


class RewardModel:
    """Linear reward `r(answer) = w . f(answer)` on features of a frozen base.

    The features are the mean, over the answer's tokens, of the RMS-normalised residual stream that
    enters a layer. P(a is preferred to b) = sigmoid(r(a) - r(b)). The layers below must not change
    while the model is used; a policy that trains later layers may share them.
    """

    def __init__(self, base: DeepSeekModel, layer: int, weight_D: Tensor) -> None:
        """Create the reward from weights `[D]` on the residual stream that enters block `layer` of
        `base`.
        """
        self.base = base
        self.layer = layer
        self.weight_D = weight_D

    def __call__(self, responses: Responses) -> Tensor:
        """Return the rewards `[B]`."""
        return features(self.base, self.layer, responses) @ self.weight_D

    @classmethod
    def choose(
        cls,
        base: DeepSeekModel,
        layer: int,
        chosen_PD: Tensor,
        rejected_PD: Tensor,
        prompts: Sequence[int],
    ) -> "RewardModel":
        """Return a model fitted to all pairs, with the penalty that generalises best to held-out
        prompts.

        Args:
            base: frozen base model.
            layer: block whose input is read.
            chosen_PD: features of the preferred answers.
            rejected_PD: features of the rejected answers.
            prompts: index of each pair's prompt; pairs of a prompt stay on one side of the split.
        """
        held_P = torch.tensor([prompt % FOLD == 0 for prompt in prompts], device=chosen_PD.device)
        if held_P.all() or not held_P.any():
            return cls.fit(base, layer, chosen_PD, rejected_PD)
        losses = {}
        for ridge in RIDGES:
            fitted = cls.fit(base, layer, chosen_PD[~held_P], rejected_PD[~held_P], ridge)
            losses[ridge] = fitted.quality(chosen_PD[held_P], rejected_PD[held_P]).loss
        return cls.fit(
            base, layer, chosen_PD, rejected_PD, min(losses, key=lambda ridge: losses[ridge])
        )

    @classmethod
    def fit(
        cls,
        base: DeepSeekModel,
        layer: int,
        chosen_PD: Tensor,
        rejected_PD: Tensor,
        ridge: float = 1e-3,
    ) -> "RewardModel":
        """Return the maximum-likelihood model of P pairs with an L2 penalty of `ridge`."""
        difference_PD = (chosen_PD - rejected_PD).cpu().double()  # Apple's GPUs have no fp64
        scale_D = difference_PD.square().mean(0).sqrt().clamp(min=1e-6)
        standard_PD = difference_PD / scale_D
        weight_D = torch.zeros_like(scale_D, requires_grad=True)
        optimizer = torch.optim.LBFGS([weight_D], max_iter=200, line_search_fn="strong_wolfe")

        def closure() -> Tensor:
            optimizer.zero_grad()
            loss = softplus(-(standard_PD @ weight_D)).mean() + ridge * weight_D.square().sum()
            loss.backward()
            return loss

        optimizer.step(closure)
        return cls(base, layer, (weight_D.detach() / scale_D).float().to(chosen_PD.device))

    def quality(self, chosen_PD: Tensor, rejected_PD: Tensor) -> RewardQuality:
        """Return the quality on held-out pairs, given their features `[P, D]`."""
        margin_P = (chosen_PD - rejected_PD) @ self.weight_D
        stated_P = torch.sigmoid(margin_P.abs())
        right_P = (margin_P > 0).float()
        bin_P = (stated_P * BINS).long().clamp(max=BINS - 1)
        gaps = [(stated_P - right_P)[bin_P == b].sum().abs() for b in range(BINS)]
        pairs = len(margin_P)
        error = float(sum(gaps, torch.zeros(()))) / pairs
        return RewardQuality(
            pairs, float(right_P.mean()), float(-logsigmoid(margin_P).mean()), error
        )

    def save(self, folder: Path) -> None:
        """Write the weights to a folder."""
        store.save_state(folder, {"weight": self.weight_D}, {"layer": self.layer})

    @classmethod
    def load(cls, base: DeepSeekModel, folder: Path) -> "RewardModel":
        """Read the weights that `save` wrote."""
        tensors, meta = store.load_state(folder)
        return cls(base, meta["layer"], tensors["weight"].to(base.device))


def features(base: DeepSeekModel, layer: int, responses: Responses) -> Tensor:
    """Return the features `[B, D]` of responses: RMS-normalised residual streams, averaged over
    tokens.
    """
    stream_BSD = below(base, layer, responses.input_ids_BS, responses.real_BS, {}).float()
    stream_BTD = stream_BSD[:, -responses.mask_BT.shape[1] :]
    unit_BTD = stream_BTD * torch.rsqrt(stream_BTD.square().mean(-1, keepdim=True) + 1e-6)
    return (unit_BTD * responses.mask_BT[..., None]).sum(1) / responses.mask_BT.sum(
        1, keepdim=True
    ).clamp(min=1.0)


def features_of(
    base: DeepSeekModel,
    layer: int,
    prompts: Sequence[Sequence[int]],
    answers: Sequence[Sequence[int]],
    rows: int = 32,
) -> Tensor:
    """Return the features `[N, D]` of given answers.

    Args:
        base: frozen base model.
        layer: block whose input is read.
        prompts: token ids of each prompt.
        answers: token ids of each answer.
        rows: maximum answers per batch, default 32; those of similar length share a batch, so that
            little of it is padding.
    """
    order = sorted(range(len(prompts)), key=lambda row: len(prompts[row]) + len(answers[row]))
    features_ND = torch.empty(len(order), base.config.hidden_size, device=base.device)
    for start in range(0, len(order), rows):
        part = order[start : start + rows]
        asked = [prompts[row] for row in part]
        answered = [answers[row] for row in part]
        features_ND[part] = features(base, layer, given(base, asked, answered))
    return features_ND
