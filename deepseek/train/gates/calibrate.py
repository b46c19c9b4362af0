"""Calibrate the gates of an expert module in closed form, independently of other modules.

Let x~ = [x; 1] be a layer's gate input, and A, s, n the sums of x~ x~^T, of x~ and the count over a
text, with index i for the module's own text and 0 for public text. The gate's detector at that
layer is a ridge regression on the targets +1 and -1,

    w = (A_i/n_i + rho A_0/n_0 + lambda I)^-1 (s_i/n_i - rho s_0/n_0),

shifted so that a share alpha of the public scores is positive, and scaled so that the median of the
own text is 1. The gate also stores moments of the own text: its mean, and its covariance as 8
factors and the residual variances. With these, the router distinguishes modules that are candidates
for the same token (`model/experts/gate.py`), although none has seen the other's text. Scores are
compared after a running mean, so the sums are over running means.
"""

import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from deepseek.data.text.document import Progress, silent
from deepseek.data.text.loader import Batch
from deepseek.errors import TrainError
from deepseek.model.experts import ExpertModule
from deepseek.model.experts.gate import RIDGE
from deepseek.model.experts.relevance import Relevance
from deepseek.model.language_model import LanguageModel
from deepseek.packs.manifest import MOMENTS, GateSettings
from deepseek.train.gates.inputs import HALF_LIFE, Moments, blend, gate_inputs
from deepseek.train.gates.public_text import PublicStatistics
from deepseek.train.gates.relevance import Background, fit_relevance
from deepseek.train.text.trunk_cache import Stream

ALPHA = 0.05
"""Default false-positive rate of the gates on public text."""
RHO = 1.0
"""Weight of public text relative to own text in the regression."""

FEWEST_TOKENS = 256
"""Minimum tokens of own text to fit a gate, and to check it."""


@dataclass(frozen=True)
class GateCalibration:
    """Result of a calibration, measured on text that was not fitted.

    Attributes:
        recall: share of the own held-out tokens at which the gates fire, averaged over layers.
        false_positives: the same share of public tokens.
        tokens: own tokens that the gates were fitted on.
        seconds: duration of the calibration.
        admitted_chats, admitted_own: error rates of the relevance table (see `RelevanceFit`); None
            without a background.
    """

    recall: float
    false_positives: float
    tokens: int
    seconds: float
    admitted_chats: float | None = None
    admitted_own: float | None = None


@dataclass(frozen=True)
class OwnText:
    """Gate inputs of one layer on the module's own text.

    Attributes:
        moments: moments over the calibration set.
        held_out: smoothed gate inputs `[N, D]` of other text of the same domain.
    """

    moments: Moments
    held_out: Tensor


@dataclass(frozen=True)
class LayerGate:
    """Gate of one layer: score = (weight . x~ - threshold) / scale.

    Attributes:
        weight: detector `[D+1]`.
        threshold: value of weight . x~ above which the gate fires.
        scale: divisor of the score.
        moments: moments of the own text, see `factored`.
        recall: share of own held-out tokens at which the gate fires.
        false_positives: share of public tokens at which it fires, cross-validated.
    """

    weight: Tensor
    threshold: float
    scale: float
    moments: Tensor
    recall: float
    false_positives: float


def calibrate(
    model: LanguageModel,
    module: ExpertModule,
    own: Iterable[Batch],
    held_out: Iterable[Batch],
    public: PublicStatistics,
    alpha: float = ALPHA,
    streams: tuple[Stream | None, Stream | None] = (None, None),
    words: Background | None = None,
    own_kinds: Sequence[Tensor] = (),
    progress: Progress = silent,
) -> GateCalibration:
    """Set the gates and gate settings of `module`, a trained expert of the frozen `model`.

    Args:
        model: frozen base model.
        module: trained expert.
        own: packed rows of the module's own text; about 20,000 tokens are enough.
        held_out: rows of the same domain that are not in `own`.
        public: public statistics of the same model, for at least the module's layers.
        alpha: false-positive rate on public tokens, in (0, 0.5).
        streams: functions that give the residual stream of `own` and of `held_out` below the
            module; None: compute it.
        words: background for the relevance table; None: every text counts as relevant.
        own_kinds: token ids `[N]` of each kind of own text for the relevance table, the more the
            better; default: those of `own`.
        progress: shows the progress.

    Returns:
        The error rates on held-out text.

    Raises:
        TrainError: too little text, or an `alpha` outside (0, 0.5).
        DataError: the public statistics lack a layer.
    """
    if not 0.0 < alpha < 0.5:
        raise TrainError(
            f"alpha is the share of public tokens that may fire, between 0 and 0.5; got {alpha}."
        )
    public.require(module.layers)
    started = time.monotonic()
    own = list(own)
    held_out = list(held_out)
    texts = own_text(model, module, own, held_out, streams, progress)
    gates: dict[int, LayerGate] = {}
    for layer, text in texts.items():
        progress(len(gates), len(texts), "solving the gates")
        gates[layer] = solve_gate(text, public.moments[layer], public.sample[layer], alpha)
    for layer, gate in gates.items():
        module.set_gate(layer, gate.weight, gate.threshold, gate.scale, gate.moments)
    fit = (
        None
        if words is None
        else fit_relevance(own_kinds or (tokens_of(own),), tokens_of(held_out), words)
    )
    calibration = GateCalibration(
        recall=sum(gate.recall for gate in gates.values()) / len(gates),
        false_positives=sum(gate.false_positives for gate in gates.values()) / len(gates),
        tokens=int(texts[module.layers[0]].moments.count),
        seconds=time.monotonic() - started,
        admitted_chats=None if fit is None else fit.admitted_chats,
        admitted_own=None if fit is None else fit.admitted_own,
    )
    module.relevance = None if fit is None else fit.relevance
    module.settings = settings_of(calibration, alpha, module.relevance)
    return calibration


def settings_of(
    calibration: GateCalibration, alpha: float, relevance: Relevance | None
) -> GateSettings:
    """Return the gate settings for the pack's manifest."""
    return GateSettings(
        half_life=HALF_LIFE,
        alpha=alpha,
        ridge=RIDGE,
        rho=RHO,
        tokens=calibration.tokens,
        false_positives=calibration.false_positives,
        recall=calibration.recall,
        relevance_threshold=0.0 if relevance is None else relevance.threshold,
        relevance_offset=0.0 if relevance is None else relevance.offset,
        admitted_chats=calibration.admitted_chats,
        admitted_own=calibration.admitted_own,
    )


def tokens_of(batches: Iterable[Batch]) -> Tensor:
    """Return the concatenated ids `[N]` of packed rows."""
    return torch.cat([batch.input_ids.flatten() for batch in batches])


def own_text(
    model: LanguageModel,
    module: ExpertModule,
    own: Sequence[Batch],
    held_out: Sequence[Batch],
    streams: tuple[Stream | None, Stream | None],
    progress: Progress = silent,
) -> dict[int, OwnText]:
    """Return gate inputs of the module's own text, with the module forced on.

    Raises:
        TrainError: there is too little text.
    """
    moments = {layer: Moments.none(model.config.hidden_size) for layer in module.layers}
    unseen: dict[int, list[Tensor]] = {layer: [] for layer in module.layers}
    total = len(own) + len(held_out)
    with model.experts.forced(module):
        for done, inputs in enumerate(gate_inputs(model, own, module.layers, streams[0])):
            progress(done, total, "gate inputs")
            for layer, layer_inputs in inputs.items():
                moments[layer] += blend(layer_inputs)
        for done, inputs in enumerate(gate_inputs(model, held_out, module.layers, streams[1])):
            progress(len(own) + done, total, "gate inputs")
            for layer, layer_inputs in inputs.items():
                unseen[layer].append(layer_inputs.smooth_BTD[layer_inputs.real_BT].cpu())
    for layer in module.layers:
        fewest = min(moments[layer].count, sum(map(len, unseen[layer])))
        if fewest < FEWEST_TOKENS:
            raise TrainError(
                f"The gates need at least {FEWEST_TOKENS} tokens of the expert's own text to fit "
                f"and as many to check; there are {fewest:.0f}. Give it more text."
            )
    return {layer: OwnText(moments[layer], torch.cat(unseen[layer])) for layer in module.layers}


def solve_gate(own: OwnText, public: Moments, sample_RSD: Tensor, alpha: float) -> LayerGate:
    """Return the gate of one layer.

    If most of the own text scores below the threshold, the scale is the spread of the public
    scores. The gate then seldom fires, which shows in its recall.

    Args:
        own: gate inputs of the own text.
        public: moments of public text.
        sample_RSD: smoothed gate inputs `[R, S, D]` of other public text.
        alpha: false-positive rate on public tokens.
    """
    weight = detecting_row(own.moments, public)
    public_RS = scores(sample_RSD, weight)
    own_N = scores(own.held_out, weight)
    threshold = float(torch.quantile(public_RS.flatten(), 1.0 - alpha))
    spread = max(threshold - float(public_RS.median()), torch.finfo(torch.float32).tiny)
    above = float(own_N.median()) - threshold
    return LayerGate(
        weight=weight,
        threshold=threshold,
        scale=above if above > 0.0 else spread,
        moments=factored(own.moments),
        recall=float((own_N > threshold).float().mean()),
        false_positives=crossed(public_RS, alpha),
    )


def detecting_row(own: Moments, public: Moments) -> Tensor:
    """Return the detector w `[D+1]` in double precision."""
    matrix = own.mean_second + RHO * public.mean_second
    row: Tensor = torch.linalg.solve(_ridged(matrix), own.mean - RHO * public.mean)
    return row


def factored(own: Moments) -> Tensor:
    """Return `[MOMENTS, D]`: mean, residual variances, and scaled leading covariance
    eigenvectors.
    """
    mean = own.mean[:-1]
    covariance = own.mean_second[:-1, :-1] - torch.outer(mean, mean)
    values, vectors = torch.linalg.eigh(covariance)
    rank = min(MOMENTS - 2, len(values))
    factors = torch.zeros(MOMENTS - 2, len(values), dtype=torch.float64, device=values.device)
    factors[:rank] = (vectors[:, -rank:] * values[-rank:].clamp(min=0.0).sqrt()).mT
    residual_D = (covariance.diagonal() - factors.square().sum(0)).clamp(min=0.0)
    return torch.cat([torch.stack([mean, residual_D]), factors])


def scores(x: Tensor, row: Tensor) -> Tensor:
    """Return `row . [x; 1]` for inputs `[..., D]`."""
    return x @ row[:-1].float() + row[-1].float()


def crossed(scores_RS: Tensor, alpha: float) -> float:
    """Return the false-positive rate by two-fold cross-validation over the rows `[R, S]`."""
    halves = scores_RS[0::2], scores_RS[1::2]
    thresholds = [torch.quantile(half.flatten(), 1.0 - alpha) for half in halves]
    fired = [
        (half > threshold).float().mean()
        for half, threshold in zip(halves, reversed(thresholds), strict=True)
    ]
    return float(sum(fired)) / 2


def _ridged(matrix: Tensor) -> Tensor:
    """Return the matrix with lambda added to its diagonal, which also makes it invertible."""
    size = matrix.shape[0]
    return matrix + RIDGE * matrix.diagonal().mean() * torch.eye(
        size, dtype=matrix.dtype, device=matrix.device
    )
