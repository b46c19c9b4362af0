"""Fit the layers of a merged expert to those of two (`train/jobs/merge.py`).

Each merged layer has the hidden units of both and one output matrix, fitted by ridge regression.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import linear, silu

from deepseek.data import Batch
from deepseek.data.text.document import Progress, silent
from deepseek.model.experts import ExpertModule
from deepseek.model.experts.layer import ExpertLayer
from deepseek.model.language_model import LanguageModel
from deepseek.train.gates.inputs import gate_inputs

RIDGE = 1e-4
"""Ridge of the regression, as a share of the mean second moment of the hidden units."""


@dataclass
class Units:
    """Hidden units of some expert layers, and the moments that the regression needs.

    Attributes:
        gate_UD, up_UD: gate and up projections of the units.
        gram_UU: sum over the texts of the mean of h h^T over the hidden values h.
        cross_UD: the same of h y^T, where y is the output of the text's own expert.
    """

    gate_UD: Tensor
    up_UD: Tensor
    gram_UU: Tensor
    cross_UD: Tensor

    @staticmethod
    def of(layers: Sequence[ExpertLayer]) -> "Units":
        """Return the units of some layers, with moments of zero."""
        halves = [layer.gate_up_proj.chunk(2) for layer in layers]
        gate_UD = torch.cat([gate for gate, _ in halves])
        up_UD = torch.cat([up for _, up in halves])
        count = len(gate_UD)
        zeros = gate_UD.new_zeros
        gram_UU = zeros(count, count, dtype=torch.float64)
        return Units(gate_UD, up_UD, gram_UU, zeros(gate_UD.shape, dtype=torch.float64))

    def add(self, x_ND: Tensor, y_ND: Tensor, share: float) -> None:
        """Add inputs and target outputs to the moments, each token with weight `share`."""
        h_NU = silu(linear(x_ND, self.gate_UD)) * linear(x_ND, self.up_UD)
        self.gram_UU += share * (h_NU.mT @ h_NU).double()
        self.cross_UD += share * (h_NU.mT @ y_ND).double()

    @torch.no_grad()
    def fit(self, width: int) -> ExpertLayer:
        """Return the layer of this width that best fits the target outputs in least squares.

        If there are more units, those that contribute most to the output are kept; if there are
        fewer, the rest of the layer is zero.
        """
        kept_U = torch.arange(len(self.gate_UD), device=self.gate_UD.device)
        if width < len(kept_U):
            down_UD = self._solve(kept_U)
            contribution_U = down_UD.square().sum(1) * self.gram_UU.diagonal()
            kept_U = contribution_U.topk(width).indices.sort().values
        down_UD = self._solve(kept_U).float()
        layer = ExpertLayer(self.gate_UD.shape[1], width).to(self.gate_UD.device)
        layer.gate_up_proj.zero_()
        layer.gate_up_proj[: len(kept_U)] = self.gate_UD[kept_U]
        layer.gate_up_proj[width : width + len(kept_U)] = self.up_UD[kept_U]
        layer.down_proj[:, : len(kept_U)] = down_UD.mT
        return layer

    def _solve(self, kept_U: Tensor) -> Tensor:
        """Return the output weights `[U, D]` of some units by ridge regression."""
        gram_UU = self.gram_UU[kept_U][:, kept_U]
        ridge = RIDGE * gram_UU.diagonal().mean() + torch.finfo(torch.float64).tiny
        identity = torch.eye(len(kept_U), dtype=torch.float64, device=gram_UU.device)
        solution: Tensor = torch.linalg.solve(gram_UU + ridge * identity, self.cross_UD[kept_U])
        return solution


@torch.no_grad()
def fitted(
    model: LanguageModel,
    texts: Sequence[tuple[ExpertModule, list[Batch]]],
    name: str,
    width: int,
    progress: Progress = silent,
) -> ExpertModule:
    """Return the merged module, without gates.

    Args:
        model: the base.
        texts: the experts, each with rows of its training text.
        name: name of the module.
        width: its width.
        progress: called before each batch, with the numbers of batches done and in all.
    """
    owners: dict[int, list[ExpertLayer]] = {}
    for expert, _ in texts:
        for layer in expert.layers:
            owners.setdefault(layer, []).append(expert.at(layer))
    units = {layer: Units.of(layers) for layer, layers in sorted(owners.items())}
    done, total = 0, sum(len(batches) for _, batches in texts)
    for expert, batches in texts:
        with model.experts.forced(expert):
            for inputs in gate_inputs(model, batches, tuple(units)):
                progress(done, total, "fitting the outputs")
                done += 1
                for layer, found in inputs.items():
                    x_ND = found.x_BTD[found.real_BT]
                    has_layer = layer in expert.layers
                    y_ND = expert(layer, x_ND) if has_layer else torch.zeros_like(x_ND)
                    units[layer].add(x_ND, y_ND, 1 / len(batches) / max(1, len(x_ND)))
    module = ExpertModule(name, tuple(units), model.config.hidden_size, width).to(model.device)
    for layer, layer_units in units.items():
        module.ffn[str(layer)] = layer_units.fit(width)
    return module.requires_grad_(False).eval()
