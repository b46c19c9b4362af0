"""The gates of an expert module in closed form: no gradient, and no other module is looked at.

With A, s, n the sums of x~ x~^T, of x~ and the count over a text, x~ = [x; 1] a layer's gate input,
i the module's own text and 0 the public one, the gate at that layer *detects* by ridge regression
on +1 and -1,

    w = (A_i/n_i + rho A_0/n_0 + lambda I)^-1 (s_i/n_i - rho s_0/n_0),

shifted and scaled so that a share alpha of public scores is positive and the own text's median is
1. Beside it goes what the own text looks like: its mean, and its covariance in 8 factors and the
variances that they leave. By that, modules that are candidates together are told apart
(`model/experts/gate.py`), though none has seen the other's text. Scores are compared after a
running mean, so the sums are over running means.
"""

import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from deepseek.data.text.loader import Batch
from deepseek.errors import TrainError
from deepseek.model.experts import ExpertModule
from deepseek.model.experts.gate import RIDGE
from deepseek.model.experts.relevance import Relevance
from deepseek.model.transformer import DeepSeekModel
from deepseek.packs.manifest import MOMENTS, GateSettings
from deepseek.train.gates.inputs import HALF_LIFE, Moments, blend, gate_inputs
from deepseek.train.gates.public_text import PublicStatistics
from deepseek.train.gates.relevance import Background, fit_relevance
from deepseek.train.text.trunk_cache import Stream

ALPHA = 0.05
RHO = 1.0

FEWEST_TOKENS = 256


@dataclass(frozen=True)
class GateCalibration:
    """What calibration found, on text that it did not fit.

    Attributes:
        recall: share of the own held-out tokens at which the gates fire, mean over the layers.
        false_positives: the same of public tokens.
        tokens: own tokens that the gates were fitted on.
        seconds: how long it took.
        admitted_chats, admitted_own: errors of the table of words (see `RelevanceFit`); None
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

    moments: over the text to fit on. held_out: smoothed gate inputs `[N, D]` of other text of the
    same domain.
    """

    moments: Moments
    held_out: Tensor


@dataclass(frozen=True)
class LayerGate:
    """A gate and its errors: detect = (weight . x~ - threshold) / scale, `weight` `[D+1]`; moments
    of the own text.
    """

    weight: Tensor
    threshold: float
    scale: float
    moments: Tensor
    recall: float
    false_positives: float


def calibrate(
    model: DeepSeekModel,
    module: ExpertModule,
    own: Iterable[Batch],
    held_out: Iterable[Batch],
    public: PublicStatistics,
    alpha: float = ALPHA,
    streams: tuple[Stream | None, Stream | None] = (None, None),
    words: Background | None = None,
    own_kinds: Sequence[Tensor] = (),
) -> GateCalibration:
    """Set the gates and settings of `module`, a trained expert beside the frozen `model`.

    Args:
        own: packed rows of the module's own text; about 20,000 tokens are enough.
        held_out: rows of the same domain that are not among `own`.
        public: of the same model, at least at the module's layers.
        alpha: share of public tokens at which the module may fire.
        streams: where the streams of `own` and of `held_out` below the module come from, if
            computed before.
        words: what the domain is told from by its words; None: every text counts as relevant to the
            module.
        own_kinds: tokens `[N]` of each kind of own text to learn the domain's words from, the more
            the better; none: those of `own`.

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
    texts = own_text(model, module, own, held_out, streams)
    gates = {
        layer: solve_gate(texts[layer], public.moments[layer], public.sample[layer], alpha)
        for layer in texts
    }
    for layer, gate in gates.items():
        module.set_gate(layer, gate.weight, gate.threshold, gate.scale, gate.moments)
    fit = (
        None
        if words is None
        else fit_relevance(own_kinds or (tokens_of(own),), tokens_of(held_out), words)
    )
    found = GateCalibration(
        recall=sum(gate.recall for gate in gates.values()) / len(gates),
        false_positives=sum(gate.false_positives for gate in gates.values()) / len(gates),
        tokens=int(texts[module.layers[0]].moments.count),
        seconds=time.monotonic() - started,
        admitted_chats=None if fit is None else fit.admitted_chats,
        admitted_own=None if fit is None else fit.admitted_own,
    )
    module.relevance = None if fit is None else fit.relevance
    module.settings = settings_of(found, alpha, module.relevance)
    return found


def settings_of(found: GateCalibration, alpha: float, relevance: Relevance | None) -> GateSettings:
    """Return what the pack says about its gates and its table of words."""
    return GateSettings(
        half_life=HALF_LIFE,
        alpha=alpha,
        ridge=RIDGE,
        rho=RHO,
        tokens=found.tokens,
        false_positives=found.false_positives,
        recall=found.recall,
        relevance_threshold=0.0 if relevance is None else relevance.threshold,
        relevance_offset=0.0 if relevance is None else relevance.offset,
        admitted_chats=found.admitted_chats,
        admitted_own=found.admitted_own,
    )


def tokens_of(batches: Iterable[Batch]) -> Tensor:
    """Return the ids `[N]` of packed rows, one after another."""
    return torch.cat([batch.input_ids.flatten() for batch in batches])


def own_text(
    model: DeepSeekModel,
    module: ExpertModule,
    own: Iterable[Batch],
    held_out: Iterable[Batch],
    streams: tuple[Stream | None, Stream | None],
) -> dict[int, OwnText]:
    """Run the module's own text through the model with the module on; raises `TrainError` if there
    is too little.
    """
    moments = {layer: Moments.none(model.config.hidden_size) for layer in module.layers}
    unseen: dict[int, list[Tensor]] = {layer: [] for layer in module.layers}
    with model.experts.forced(module):
        for inputs in gate_inputs(model, own, module.layers, streams[0]):
            for layer, found in inputs.items():
                moments[layer] += blend(found)
        for inputs in gate_inputs(model, held_out, module.layers, streams[1]):
            for layer, found in inputs.items():
                unseen[layer].append(found.smooth_BTD[found.real_BT])
    for layer in module.layers:
        fewest = min(moments[layer].count, sum(map(len, unseen[layer])))
        if fewest < FEWEST_TOKENS:
            raise TrainError(
                f"The gates need at least {FEWEST_TOKENS} tokens of the expert's own text to fit and as many to check; "
                f"there are {fewest:.0f}. Give it more text."
            )
    return {layer: OwnText(moments[layer], torch.cat(unseen[layer])) for layer in module.layers}


def solve_gate(own: OwnText, public: Moments, sample_RSD: Tensor, alpha: float) -> LayerGate:
    """Return the gate of one layer from own text, public moments and public sample `[R, S, D]`.

    Where most of the own text cannot be told from public text, the scale is that of the public
    scores: the gate then seldom fires, and its recall says so.
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
    """Return w, `[D+1]`, in double precision."""
    matrix = own.mean_second + RHO * public.mean_second
    row: Tensor = torch.linalg.solve(_ridged(matrix), own.mean - RHO * public.mean)
    return row


def factored(own: Moments) -> Tensor:
    """Return mean, left variances and factors `[MOMENTS, D]`: the covariance's largest
    eigenvectors, scaled.
    """
    mean = own.mean[:-1]
    covariance = own.mean_second[:-1, :-1] - torch.outer(mean, mean)
    values, vectors = torch.linalg.eigh(covariance)
    kept = min(MOMENTS - 2, len(values))
    factors = torch.zeros(MOMENTS - 2, len(values), dtype=torch.float64)
    factors[:kept] = (vectors[:, -kept:] * values[-kept:].clamp(min=0.0).sqrt()).mT
    left = (covariance.diagonal() - factors.square().sum(0)).clamp(min=0.0)
    return torch.cat([torch.stack([mean, left]), factors])


def scores(x: Tensor, row: Tensor) -> Tensor:
    """Return `row . [x; 1]` for inputs `[..., D]`."""
    return x @ row[:-1].float() + row[-1].float()


def crossed(scores_RS: Tensor, alpha: float) -> float:
    """Return the false positives of thresholds that each half of the rows `[R, S]` sets for the
    other.
    """
    halves = scores_RS[0::2], scores_RS[1::2]
    thresholds = [torch.quantile(half.flatten(), 1.0 - alpha) for half in halves]
    fired = [
        (half > threshold).float().mean()
        for half, threshold in zip(halves, reversed(thresholds), strict=True)
    ]
    return float(sum(fired)) / 2


def _ridged(matrix: Tensor) -> Tensor:
    """Return the matrix with lambda on its diagonal, which also makes it invertible."""
    size = matrix.shape[0]
    return matrix + RIDGE * matrix.diagonal().mean() * torch.eye(
        size, dtype=matrix.dtype, device=matrix.device
    )
