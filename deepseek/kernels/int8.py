"""8-bit quantisation: how matrices are quantised, and how they lie in memory.

Weights and activations are quantised in groups of 64 along the input, after a Hadamard rotation of
the group (QuaRot, arXiv:2404.00456). The rotation spreads the few outlier activations of language
models over their group. It cancels in the product, because the matrix H is orthogonal and
symmetric: (H w) . (H x) = w . x. A weight is q * s, with q in -127..127 and a bf16 scale s for each
group; activations get their scales when they are quantised.
"""

import math
from dataclasses import dataclass
from functools import cache

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import pad

GROUP = 64
# Fraction of the mean square of the inputs that is added to the diagonal of the Gram matrix;
# regularises the second-moment estimate.
DAMPING = 0.01
LANES = 16
TILES = 2
COLUMNS = LANES * TILES  # outputs in a panel
GROUP_BYTES = COLUMNS * GROUP + COLUMNS * 2  # of a panel: a group's weights, then its bf16 scales


@dataclass(frozen=True)
class Int8Matrix:
    """A quantised matrix `[F, D]`.

    Attributes:
        values: int8 `[F, D']`, where D' is D rounded up to a multiple of 64.
        scales: bf16 `[F, D'/64]`.
        width: D.
    """

    values: Tensor
    scales: Tensor
    width: int

    @property
    def nbytes(self) -> int:
        """Bytes of values and scales."""
        return self.values.nbytes + self.scales.nbytes

    def float(self) -> Tensor:
        """Return the dequantised matrix `[F, D]` in fp32."""
        groups = self.values.unflatten(-1, (-1, GROUP)).float() * self.scales.float()[..., None]
        return rotate(groups).flatten(-2)[..., : self.width]


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


def quantize(weight_FD: Tensor, gram_DD: Tensor | None = None) -> Int8Matrix:
    """Quantise a matrix to 8 bits, with one scale for each group of 64.

    Args:
        weight_FD: the matrix.
        gram_DD: sum of x x^T over calibration activations x. Later columns then compensate for the
            quantisation error of earlier ones (GPTQ, arXiv:2210.17323). None (default) rounds each
            weight to the nearest value.

    Returns:
        The quantised matrix.
    """
    groups = _grouped(weight_FD)
    largest = groups.abs().amax(-1)
    # The scale is rounded to bf16 first, and upwards: the values then use the stored scale, and
    # none is clipped.
    scales = (largest * (1 + 2**-7) / 127).clamp(min=1e-30).bfloat16()
    steps = scales.float()[..., None].expand_as(groups)
    if gram_DD is None:
        values = _nearest(groups, steps).flatten(-2)
    else:
        rotated_DD = _grouped(_grouped(gram_DD).flatten(-2).T).flatten(-2)
        values = _compensated(
            groups.flatten(-2).T.contiguous(), steps.flatten(-2).T.contiguous(), rotated_DD
        ).T
    return Int8Matrix(values.to(torch.int8).contiguous(), scales, weight_FD.shape[-1])


def _nearest(weights: Tensor, steps: Tensor) -> Tensor:
    """Round weights to the nearest multiple of their scale."""
    return (weights / steps).round().clamp(-127, 127)


def _compensated(weight_DF: Tensor, steps_DF: Tensor, gram_DD: Tensor) -> Tensor:
    """Quantise one input column after the other and compensate its error in the later ones (GPTQ,
    arXiv:2210.17323).

    `weight_DF` is overwritten.
    """
    gram = gram_DD.double()
    identity = torch.eye(len(gram), dtype=gram.dtype, device=gram.device)
    gram += (DAMPING * gram.diagonal().mean() + 1e-30) * identity
    upper = torch.linalg.cholesky(
        torch.cholesky_inverse(torch.linalg.cholesky(gram)), upper=True
    ).float()
    values_DF = torch.empty_like(weight_DF)
    for start in range(0, len(gram), GROUP):
        stop = start + GROUP
        errors = torch.empty(GROUP, weight_DF.shape[1], device=weight_DF.device)
        for d in range(start, stop):
            values_DF[d] = _nearest(weight_DF[d], steps_DF[d])
            errors[d - start] = (weight_DF[d] - values_DF[d] * steps_DF[d]) / upper[d, d]
            weight_DF[d + 1 : stop].addr_(upper[d, d + 1 : stop], errors[d - start], alpha=-1)
        weight_DF[stop:].addmm_(upper[start:stop, stop:].T, errors, alpha=-1)
    return values_DF


def product_reference(x_ND: Tensor, matrix: Int8Matrix) -> Tensor:
    """Return `x W^T`, fp32 `[N, F]`, with x quantised as in the kernel."""
    groups_NGK = _grouped(x_ND)
    scales_NG = groups_NGK.abs().amax(-1).clamp(min=1e-30) / 127
    rounded_NGK = (groups_NGK / scales_NG[..., None]).round()
    weights_FGK = matrix.values.unflatten(-1, (-1, GROUP)).float()
    sums_NGF = torch.einsum("ngk,fgk->ngf", rounded_NGK, weights_FGK)  # exact: below 2^24
    return (sums_NGF * scales_NG[..., None] * matrix.scales.float().T).sum(1)


def row_bytes(groups: int) -> int:
    """Return the distance in bytes between two quantised rows of activations (see
    `compiled/rows.py`).

    Args:
        groups: number of groups of 64 in a row.
    """
    return ((GROUP + 8) * groups + 63) // 64 * 64


def pack(matrices: list[Int8Matrix]) -> np.ndarray:
    """Return the panels of one or two matrices in the order in which a kernel reads them.

    A panel holds 32 outputs. For each group of 64 inputs it has 16 steps of two tiles, then 32
    scales; a tile is 16 outputs by 4 inputs, as unsigned bytes q + 128. Outputs are padded with
    zeros to whole panels. A single matrix lies in order. Gate and up projections alternate by tile,
    so that a panel holds both numbers of 16 hidden values; they are padded to whole groups of
    hidden values.

    Args:
        matrices: one matrix, or a gate projection and an up projection.
    """
    unit = COLUMNS if len(matrices) == 1 else GROUP
    blocks = [_padded(matrix, -matrix.values.shape[0] % unit) for matrix in matrices]
    steps = GROUP // 4
    groups = blocks[0][1].shape[1]
    panels = sum(len(scales) for _, scales in blocks) // COLUMNS
    # A word holds four inputs of one output.
    words = np.empty((panels, groups, GROUP_BYTES // 4), np.uint32)
    weights = words[:, :, : COLUMNS * steps].reshape(panels, groups, steps, TILES, LANES)
    scales = words[:, :, COLUMNS * steps :].view(np.uint16).reshape(panels, groups, TILES, LANES)
    tiles = TILES // len(blocks)  # tiles of each matrix in a panel
    for i, (values_FW, scales_FG) in enumerate(blocks):
        matrix_tiles = slice(i * tiles, (i + 1) * tiles)
        weights[:, :, :, matrix_tiles] = values_FW.reshape(
            panels, tiles, LANES, groups, steps
        ).transpose(0, 3, 4, 1, 2)
        scales[:, :, matrix_tiles] = scales_FG.reshape(panels, tiles, LANES, groups).transpose(
            0, 3, 1, 2
        )
    return words.view(np.uint8)


def _padded(matrix: Int8Matrix, missing: int) -> tuple[np.ndarray, np.ndarray]:
    """Return the values as words of four unsigned bytes and the bits of the scales, padded with
    `missing` outputs.
    """
    values = pad(matrix.values, (0, 0, 0, missing)).contiguous().numpy().view(np.uint8) ^ 128
    return values.view(np.uint32), pad(
        matrix.scales.view(torch.int16), (0, 0, 0, missing)
    ).numpy().view(np.uint16)
