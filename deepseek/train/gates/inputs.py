"""Gate inputs of chosen layers, their running mean, and their second moments."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from deepseek.data.text.loader import Batch
from deepseek.device.transfer import to_device
from deepseek.model.context import document_ids
from deepseek.model.experts.gate import running_mean
from deepseek.model.language_model import LanguageModel
from deepseek.model.precision import autocast
from deepseek.train.loop.packed import resume_rows
from deepseek.train.text.trunk_cache import Stream, run_trunk

HALF_LIFE = 16.0
"""Half-life of the running mean of scores, in tokens. A longer one is steadier within a text, a
shorter one reacts sooner to a change.
"""

TOKEN_SHARE = 0.1
"""Weight of single-token moments in `blend`."""


@dataclass(frozen=True)
class Moments:
    """Sums over gate inputs x~ = [x; 1].

    Attributes:
        second: `sum x~ x~^T`, `[D+1, D+1]` in double precision on the CPU. The last column is `sum
            x~`, and its last entry the count.
    """

    second: Tensor

    @property
    def count(self) -> float:
        """Number of gate inputs."""
        return float(self.second[-1, -1])

    @property
    def mean(self) -> Tensor:
        """Mean of x~, `[D+1]`."""
        return self.second[:, -1] / self.count

    @property
    def mean_second(self) -> Tensor:
        """Mean of `x~ x~^T`."""
        return self.second / self.count

    @staticmethod
    def none(hidden_size: int) -> "Moments":
        """Return the moments of an empty set of inputs of width `hidden_size`."""
        return Moments(
            torch.zeros(hidden_size + 1, hidden_size + 1, dtype=torch.float64, device="cpu")
        )

    def __add__(self, other: "Moments") -> "Moments":
        return Moments(self.second + other.second)

    @staticmethod
    def of(x_BTD: Tensor, keep_BT: Tensor) -> "Moments":
        """Return the moments of the inputs `[B, T, D]` selected by `keep_BT`."""
        x_ND = torch.cat([x_BTD[keep_BT], x_BTD.new_ones(int(keep_BT.sum()), 1)], dim=1)
        return Moments((x_ND.mT @ x_ND).cpu().double())


@dataclass(frozen=True)
class GateInputs:
    """Gate inputs of one layer on packed rows, on the model's device.

    Attributes:
        x_BTD: inputs.
        smooth_BTD: running mean of the inputs; a gate's smoothed score is an affine function of it.
        real_BT: whether a token has a predecessor in its document; the first token carries no
            information.
    """

    x_BTD: Tensor
    smooth_BTD: Tensor
    real_BT: Tensor


def blend(inputs: GateInputs) -> Moments:
    """Return moments of the smoothed inputs, mixed with a share `TOKEN_SHARE` of single-token ones.

    The gate decides on smoothed scores, so their spread separates domains best. But neighbouring
    means are correlated, and single-token moments stabilise the estimate.
    """
    single, smooth = (
        Moments.of(x_BTD, inputs.real_BT) for x_BTD in (inputs.x_BTD, inputs.smooth_BTD)
    )
    return Moments(TOKEN_SHARE * single.second + (1.0 - TOKEN_SHARE) * smooth.second)


def gate_inputs(
    model: LanguageModel,
    batches: Iterable[Batch],
    layers: Sequence[int],
    stream: Stream | None = None,
) -> Iterator[dict[int, GateInputs]]:
    """Yield for each batch the gate inputs at `layers`; armed or forced experts take part.

    Args:
        model: model to run.
        batches: packed rows.
        layers: layers whose gate inputs are needed.
        stream: gives the residual stream below the first of `layers`; None: compute it.
    """
    for batch in batches:
        with torch.no_grad(), autocast(model):
            stream_BTD = run_trunk(model, min(layers), batch) if stream is None else stream(batch)
            step = resume_rows(
                model, batch, to_device(stream_BTD, model.device, model.dtype), min(layers)
            )
            recorded = {}
            for layer in sorted(layers):
                if layer > step.layer:
                    step.run_to(layer)
                recorded[layer] = step.gate_input()
        yield {layer: smoothed(recorded[layer], batch.position_ids) for layer in layers}


def smoothed(x_BTD: Tensor, position_ids_BT: Tensor) -> GateInputs:
    """Return the inputs and their causal running mean within each document."""
    x_BTD = x_BTD.float()
    position_ids_BT = to_device(position_ids_BT, x_BTD.device)
    decay_D = torch.full((x_BTD.shape[-1],), 0.5 ** (1.0 / HALF_LIFE), device=x_BTD.device)
    means_BTRD, _ = running_mean(
        x_BTD[:, :, None],
        decay_D,
        counted_BT=position_ids_BT > 0,
        document_ids_BT=document_ids(position_ids_BT),
    )
    return GateInputs(x_BTD, means_BTRD[:, :, 0], position_ids_BT > 0)
