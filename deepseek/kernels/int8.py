"""Matrices of 8-bit integers: how they are rounded and how they lie in memory.

Numbers are rounded in groups of 64 along the input, weights and activations alike, after a Hadamard
rotation of the group (QuaRot, arXiv:2404.00456): it spreads the few large activations that language
models have over their group, and the product does not see it, because the matrix H is orthogonal
and symmetric: (H w) . (H x) = w . x. A weight is q * s with q in -127..127 and s in bf16; an
activation has its own scale, found when it is rounded.
"""

import math
from dataclasses import dataclass
from functools import cache

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import pad

GROUP = 64
DAMPING = 0.01  # of the mean square of inputs, added to every one: so much is not trusted to what was seen of them
LANES = 16
TILES = 2
COLUMNS = LANES * TILES  # outputs of one panel
GROUP_BYTES = COLUMNS * GROUP + COLUMNS * 2  # of a panel: the weights of a group, then their scales


@dataclass(frozen=True)
class Int8Matrix:
    """A rounded matrix `[F, D]`.

    values: int8 `[F, D']`, D' the next multiple of 64. scales: bf16 `[F, D'/64]`. width: D.
    """

    values: Tensor
    scales: Tensor
    width: int

    @property
    def nbytes(self) -> int:
        return self.values.nbytes + self.scales.nbytes

    def float(self) -> Tensor:
        """Return the matrix `[F, D]` in fp32."""
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
    """Turn vectors `[..., 64]` by the Hadamard matrix; twice gives them back."""
    return groups.float() @ hadamard().to(groups.device)


def _grouped(x: Tensor) -> Tensor:
    """Return `[..., D]` as rotated groups `[..., D'/64, 64]`."""
    return rotate(pad(x.float(), (0, -x.shape[-1] % GROUP)).unflatten(-1, (-1, GROUP)))


def quantize(weight_FD: Tensor, gram_DD: Tensor | None = None) -> Int8Matrix:
    """Round a matrix to 8-bit integers, each group of 64 with a scale of its own.

    Args:
        gram_DD: sum of x x^T over inputs x that the matrix meets. What the rounding of a column
            changes in their products is then made up for by the columns after it. None rounds every
            number to the nearest.
    """
    groups = _grouped(weight_FD)
    largest = groups.abs().amax(-1)
    # The scale is rounded first, and upwards, so that the values are rounded to what it is and none
    # is cut off.
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
    return (weights / steps).round().clamp(-127, 127)


def _compensated(weight_DF: Tensor, steps_DF: Tensor, gram_DD: Tensor) -> Tensor:
    """Round one input's weights after the other, and take from the rest what makes up for it (GPTQ,
    arXiv:2210.17323).

    `weight_DF` is used up.
    """
    gram = gram_DD.double()
    gram += (DAMPING * gram.diagonal().mean() + 1e-30) * torch.eye(len(gram), dtype=gram.dtype)
    upper = torch.linalg.cholesky(
        torch.cholesky_inverse(torch.linalg.cholesky(gram)), upper=True
    ).float()
    values_DF = torch.empty_like(weight_DF)
    for start in range(0, len(gram), GROUP):
        stop = start + GROUP
        errors = torch.empty(GROUP, weight_DF.shape[1])
        for d in range(start, stop):
            values_DF[d] = _nearest(weight_DF[d], steps_DF[d])
            errors[d - start] = (weight_DF[d] - values_DF[d] * steps_DF[d]) / upper[d, d]
            weight_DF[d + 1 : stop].addr_(upper[d, d + 1 : stop], errors[d - start], alpha=-1)
        weight_DF[stop:].addmm_(upper[start:stop, stop:].T, errors, alpha=-1)
    return values_DF


def product_reference(x_ND: Tensor, matrix: Int8Matrix) -> Tensor:
    """Return `x W^T`, `[N, F]` in fp32, with x rounded as the kernel rounds it."""
    groups_NGK = _grouped(x_ND)
    scales_NG = groups_NGK.abs().amax(-1).clamp(min=1e-30) / 127
    rounded_NGK = (groups_NGK / scales_NG[..., None]).round()
    weights_FGK = matrix.values.unflatten(-1, (-1, GROUP)).float()
    sums_NGF = torch.einsum("ngk,fgk->ngf", rounded_NGK, weights_FGK)  # exact: below 2^24
    return (sums_NGF * scales_NG[..., None] * matrix.scales.float().T).sum(1)


def row_bytes(groups: int) -> int:
    """Return the distance in memory between two rounded rows of `groups` groups (see
    `compiled/rows.py`).
    """
    return ((GROUP + 8) * groups + 63) // 64 * 64


def pack(matrices: list[Int8Matrix]) -> np.ndarray:
    """Return the panels of matrices, whose tiles of 16 outputs take turns, in the order in which a
    kernel reads them.

    A panel holds 32 outputs. For each group of 64 inputs come 16 steps of two tiles, each 16
    outputs by 4 inputs, as unsigned bytes q + 128, then the 32 scales. Outputs are filled up with
    zeros to whole panels. One matrix lies there in order; gate and up projection alternate, so that
    a panel has both numbers of 16 hidden values, and are filled up to whole groups of those.
    """
    unit = COLUMNS if len(matrices) == 1 else GROUP
    blocks = [_padded(matrix, -matrix.values.shape[0] % unit) for matrix in matrices]
    steps = GROUP // 4
    groups = blocks[0][1].shape[1]
    panels = sum(len(scales) for _, scales in blocks) // COLUMNS
    words = np.empty(
        (panels, groups, GROUP_BYTES // 4), np.uint32
    )  # a word is four inputs of one output
    weights = words[:, :, : COLUMNS * steps].reshape(panels, groups, steps, TILES, LANES)
    scales = words[:, :, COLUMNS * steps :].view(np.uint16).reshape(panels, groups, TILES, LANES)
    tiles = TILES // len(blocks)  # of each matrix in a panel
    for i, (values_FW, scales_FG) in enumerate(blocks):
        own = slice(i * tiles, (i + 1) * tiles)
        weights[:, :, :, own] = values_FW.reshape(panels, tiles, LANES, groups, steps).transpose(
            0, 3, 4, 1, 2
        )
        scales[:, :, own] = scales_FG.reshape(panels, tiles, LANES, groups).transpose(0, 3, 1, 2)
    return words.view(np.uint8)


def _padded(matrix: Int8Matrix, missing: int) -> tuple[np.ndarray, np.ndarray]:
    """Return the values as words of four unsigned bytes and the bits of the scales, with `missing`
    more outputs.
    """
    values = pad(matrix.values, (0, 0, 0, missing)).contiguous().numpy().view(np.uint8) ^ 128
    return values.view(np.uint32), pad(
        matrix.scales.view(torch.int16), (0, 0, 0, missing)
    ).numpy().view(np.uint16)
