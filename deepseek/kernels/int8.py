"""Quantisation of matrices to 8 or 4 bits, and packing into panels (`kernels/int8_layout.py`).

Weights and activations are quantised in groups of 64 along the input, after a Hadamard rotation of
the group (QuaRot, arXiv:2404.00456). The rotation spreads the few outlier activations of language
models over their group. It cancels in the product, because the matrix H is orthogonal and
symmetric: (H w) . (H x) = w . x. A weight is q * s, with q in -127..127 or -8..7 and a bf16 scale s
for each group; activations have 8 bits, and get their scales when they are quantised.
"""

import math
from dataclasses import dataclass
from functools import cache

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import pad

from deepseek.kernels.int8_layout import COLUMNS, GROUP, LANES, TILES, group_bytes

# Fraction of the mean square of the inputs that is added to the diagonal of the Gram matrix;
# regularises the second-moment estimate.
DAMPING = 0.01
LEVELS = {8: (-127, 127), 4: (-8, 7)}
"""Number of bits -> smallest and largest value."""
BLOCK_ELEMENTS = 1 << 23
"""Maximum number of weights to process at once, so that temporary copies stay small."""


@dataclass(frozen=True)
class Int8Matrix:
    """A quantised matrix `[F, D]`.

    Attributes:
        values: int8 `[F, D']`, where D' is D rounded up to a multiple of 64.
        scales: bf16 `[F, D'/64]`.
        width: D.
        bits: 8, or 4 if all values lie in -8..7 and files and kernels hold two in a byte.
    """

    values: Tensor
    scales: Tensor
    width: int
    bits: int = 8

    @property
    def nbytes(self) -> int:
        """Bytes of values and scales in a file."""
        return self.values.nbytes * self.bits // 8 + self.scales.nbytes

    def rows(self, first: int, last: int) -> "Int8Matrix":
        """Return rows `first` to `last - 1`."""
        return Int8Matrix(self.values[first:last], self.scales[first:last], self.width, self.bits)

    def float(self) -> Tensor:
        """Return the dequantised matrix `[F, D]` in fp32."""
        groups = self.values.unflatten(-1, (-1, GROUP)).float() * self.scales.float()[..., None]
        return rotate(groups).flatten(-2)[..., : self.width]


def to_nibbles(values: Tensor) -> Tensor:
    """Return int8 values in -8..7, `[..., D]`, packed two per byte, uint8 `[..., D/2]`.

    The lower half of a byte is value + 8 at the even index, the upper half that at the odd one.
    """
    unsigned = (values + 8).view(torch.uint8)
    return unsigned[..., 0::2] | (unsigned[..., 1::2] << 4)


def from_nibbles(nibbles: Tensor) -> Tensor:
    """Return the int8 values `[..., D]` that `to_nibbles` packed."""
    unsigned = nibbles.view(torch.uint8)
    pairs = torch.stack((unsigned & 15, unsigned >> 4), -1)
    return pairs.flatten(-2).view(torch.int8) - 8


@cache
def hadamard() -> Tensor:
    """Return the orthogonal Hadamard matrix `[64, 64]` (Sylvester's construction)."""
    h = torch.ones(1, 1)
    while len(h) < GROUP:
        h = torch.cat((torch.cat((h, h), 1), torch.cat((h, -h), 1)))
    return h / math.sqrt(GROUP)


def rotate(groups: Tensor) -> Tensor:
    """Multiply vectors `[..., 64]` by the Hadamard matrix, which is its own inverse."""
    return groups.float() @ hadamard().to(groups.device)


def _grouped(x: Tensor) -> Tensor:
    """Split `[..., D]` into rotated groups `[..., D'/64, 64]`, padded with zeros."""
    return rotate(pad(x.float(), (0, -x.shape[-1] % GROUP)).unflatten(-1, (-1, GROUP)))


@dataclass(frozen=True)
class Compensation:
    """Error compensation: later columns compensate the quantisation errors of earlier ones (GPTQ,
    arXiv:2210.17323).

    Columns with large inputs come first, so that more columns can compensate their errors.

    Attributes:
        upper_DD: upper Cholesky factor of the inverse of the inputs' second moments, in that order.
        order_D: the columns in that order.
    """

    upper_DD: Tensor
    order_D: Tensor

    @staticmethod
    def of(gram_DD: Tensor) -> "Compensation":
        """Return the compensation for a sum of x x^T over calibration activations x."""
        gram = _grouped(_grouped(gram_DD).flatten(-2).T).flatten(-2).double()
        gram.diagonal().add_(DAMPING * gram.diagonal().mean() + 1e-30)
        order_D = gram.diagonal().argsort(descending=True, stable=True)
        # A lower factor of the reversed matrix, reversed, is an upper one U with gram = U U^T. Its
        # inverse is the factor of gram's inverse, for half the operations of inverting gram first.
        reverse_D = order_D.flip(0)
        upper_DD = torch.linalg.cholesky(gram[reverse_D][:, reverse_D]).flip(0, 1)
        one_DD = torch.eye(len(gram), dtype=gram.dtype, device=gram.device)
        inverse_DD = torch.linalg.solve_triangular(upper_DD, one_DD, upper=True)
        return Compensation(inverse_DD.float(), order_D)


def quantize(
    weight_FD: Tensor, compensation: Compensation | None = None, bits: int = 8
) -> Int8Matrix:
    """Quantise a matrix to 8 or 4 bits, with one scale for each group of 64.

    Args:
        weight_FD: the matrix.
        compensation: error compensation from calibration activations; None (default) rounds each
            weight to the nearest value.
        bits: bits of a weight, 8 or 4.

    Returns:
        The quantised matrix.
    """
    groups = _grouped(weight_FD)
    scales = _scales(groups, bits)
    steps = scales.float()[..., None].expand_as(groups)
    if compensation is None:
        values = _nearest(groups, steps, bits).flatten(-2)
    else:
        order_D = compensation.order_D
        values = torch.empty_like(groups.flatten(-2))
        values[:, order_D] = _compensated(
            groups.flatten(-2).T[order_D], steps.flatten(-2).T[order_D], compensation.upper_DD, bits
        ).T
    return Int8Matrix(values.to(torch.int8).contiguous(), scales, weight_FD.shape[-1], bits)


def _scales(groups: Tensor, bits: int) -> Tensor:
    """Return the bf16 scales of groups `[..., 64]`.

    With 8 bits no value is clipped: the scale is rounded upwards.
    """
    largest = groups.abs().amax(-1)
    if bits == 8:
        return (largest * (1 + 2**-7) / 127).clamp(min=1e-30).bfloat16()
    parts = [_searched_scales(part) for part in groups.flatten(0, -2).split(SEARCHED)]
    return torch.cat(parts).view(largest.shape)


SEARCHED = 1024
"""Groups whose scales are searched at once: their temporary copies stay in the processor's cache,
which is ten times as fast as a whole matrix at once.
"""

SEARCH = (0.8, 0.85, 0.9, 0.95, 1.0, 1.1, 1.2)
"""Candidates of a 4-bit scale, relative to the one that maps the largest weight to -8."""


def _searched_scales(groups: Tensor) -> Tensor:
    """Return the bf16 scales, of either sign, with the least squared error of 4-bit values.

    The largest weight of a group is mapped near -8, which has no positive counterpart.
    """
    place = groups.abs().argmax(-1, keepdim=True)
    base = (groups.gather(-1, place).squeeze(-1) / LEVELS[4][0]).bfloat16()
    base = torch.where(base == 0, torch.full_like(base, 1e-30), base)
    best = base
    least = torch.full_like(base, math.inf, dtype=torch.float32)
    for factor in SEARCH:
        for sign in (1, -1):
            scale = (base.float() * factor * sign).bfloat16()
            steps = scale.float()[..., None]
            error = (_nearest(groups, steps, 4) * steps - groups).square().sum(-1)
            best = torch.where(error < least, scale, best)
            least = torch.minimum(error, least)
    return best


def _nearest(weights: Tensor, steps: Tensor, bits: int) -> Tensor:
    """Round weights to the nearest multiple of their scale."""
    return (weights / steps).round().clamp(*LEVELS[bits])


def _compensated(weight_DF: Tensor, steps_DF: Tensor, upper_DD: Tensor, bits: int) -> Tensor:
    """Quantise one input column after another and compensate its error in the later ones.

    `weight_DF` is overwritten.
    """
    values_DF = torch.empty_like(weight_DF)
    for start in range(0, len(upper_DD), GROUP):
        stop = start + GROUP
        errors = torch.empty(GROUP, weight_DF.shape[1], device=weight_DF.device)
        for d in range(start, stop):
            values_DF[d] = _nearest(weight_DF[d], steps_DF[d], bits)
            errors[d - start] = (weight_DF[d] - values_DF[d] * steps_DF[d]) / upper_DD[d, d]
            weight_DF[d + 1 : stop].addr_(upper_DD[d, d + 1 : stop], errors[d - start], alpha=-1)
        weight_DF[stop:].addmm_(upper_DD[start:stop, stop:].T, errors, alpha=-1)
    return values_DF


def product_reference(x_ND: Tensor, matrix: Int8Matrix) -> Tensor:
    """Return `x W^T`, fp32 `[N, F]`, with x quantised as in the kernel."""
    groups_NGK = _grouped(x_ND)
    scales_NG = groups_NGK.abs().amax(-1).clamp(min=1e-30) / 127
    rounded_NGK = (groups_NGK / scales_NG[..., None]).round()
    weights_FGK = matrix.values.unflatten(-1, (-1, GROUP)).float()
    sums_NGF = torch.einsum("ngk,fgk->ngf", rounded_NGK, weights_FGK)  # exact: below 2^24
    return (sums_NGF * scales_NG[..., None] * matrix.scales.float().T).sum(1)


def packed_bytes(outputs: list[int], width: int, bits: int = 8) -> int:
    """Return the bytes of the panels that `pack` makes.

    Args:
        outputs: outputs of the matrix, or of the gate projection and the up projection.
        width: inputs of each.
        bits: bits of a weight, 8 or 4.
    """
    unit = COLUMNS if len(outputs) == 1 else GROUP
    panels = sum(-(-count // unit) * unit for count in outputs) // COLUMNS
    return panels * -(-width // GROUP) * group_bytes(bits)


def pack(matrices: list[Int8Matrix], bits: int = 8) -> np.ndarray:
    """Return the panels of one or two matrices in the order in which a kernel reads them.

    A panel holds 32 outputs. For each group of 64 inputs it has 16 steps of two tiles, then 32
    scales; a tile is 16 outputs by 4 inputs, as unsigned bytes q + 128. With 4 bits there are 8
    steps: the lower halves of the bytes hold q + 8 of an even step, the upper halves those of the
    step after it. Outputs are padded with zeros to whole panels. Those of a single matrix are in
    order. Gate and up projections alternate by tile, so that a panel holds both numbers of 16
    hidden values; they are padded to whole groups of hidden values.

    Args:
        matrices: one matrix, or a gate projection and an up projection.
        bits: bits of a weight: 8, or 4 if all values lie in -8..7.
    """
    unit = COLUMNS if len(matrices) == 1 else GROUP
    offset = 128 if bits == 8 else 8
    blocks = [_padded(matrix, -matrix.values.shape[0] % unit, offset) for matrix in matrices]
    steps = GROUP // 4
    groups = blocks[0][1].shape[1]
    panels = sum(len(scales) for _, scales in blocks) // COLUMNS
    # A word holds four inputs of one output.
    weights = np.empty((panels, groups, steps, TILES, LANES), np.uint32)
    scales = np.empty((panels, groups, TILES, LANES), np.uint16)
    tiles = TILES // len(blocks)  # tiles of each matrix in a panel
    for i, (values_FW, scales_FG) in enumerate(blocks):
        matrix_tiles = slice(i * tiles, (i + 1) * tiles)
        weights[:, :, :, matrix_tiles] = values_FW.reshape(
            panels, tiles, LANES, groups, steps
        ).transpose(0, 3, 4, 1, 2)
        scales[:, :, matrix_tiles] = scales_FG.reshape(panels, tiles, LANES, groups).transpose(
            0, 3, 1, 2
        )
    if bits == 4:
        weights = weights[:, :, 0::2] | (weights[:, :, 1::2] << np.uint32(4))
    parts = [part.reshape(panels, groups, -1).view(np.uint8) for part in (weights, scales)]
    return np.concatenate(parts, -1)


def _padded(matrix: Int8Matrix, missing: int, offset: int) -> tuple[np.ndarray, np.ndarray]:
    """Return the values plus `offset` as words of four unsigned bytes and the bits of the scales,
    padded with `missing` outputs.
    """
    unsigned = pad(matrix.values, (0, 0, 0, missing)).contiguous().numpy().view(np.uint8)
    values = unsigned + np.uint8(offset)  # modulo 256
    return values.view(np.uint32), pad(
        matrix.scales.view(torch.int16), (0, 0, 0, missing)
    ).numpy().view(np.uint16)
