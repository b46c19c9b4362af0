"""The widths of experts that torch's `grouped_mm` supports, and padding of other widths."""

from torch import Tensor
from torch.nn.functional import pad

ALIGNMENT = 16
"""`grouped_mm` requires that rows of its operands are a multiple of this many bytes."""


def is_aligned(*weights: Tensor) -> bool:
    """Return whether `grouped_mm` supports weights `[E, ..., width]` without padding."""
    return all(part.shape[-1] * part.element_size() % ALIGNMENT == 0 for part in weights)


def aligned(x_ND: Tensor, gate_up_E2FD: Tensor, down_EDF: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return tokens and both projections, padded with zeros to widths that are aligned.

    Args:
        x_ND: tokens.
        gate_up_E2FD, down_EDF: see `mix_experts`.
    """
    step = ALIGNMENT // gate_up_E2FD.element_size()
    more_D, more_F = (-width % step for width in down_EDF.shape[1:])
    gate_up = pad(gate_up_E2FD.unflatten(1, (2, -1)), (0, more_D, 0, more_F)).flatten(1, 2)
    return pad(x_ND, (0, more_D)), gate_up, pad(down_EDF, (0, more_F, 0, more_D))
