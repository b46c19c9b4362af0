"""Memory layout of quantised weights and activations.

Separate from `kernels/int8.py`, because the compiled step depends on this file: editing the
quantisation itself does not recompile the step.
"""

GROUP = 64  # inputs with one scale
LANES = 16
TILES = 2
COLUMNS = LANES * TILES  # outputs in a panel
GROUP_BYTES = COLUMNS * GROUP + COLUMNS * 2  # of a panel: a group's weights, then its bf16 scales
GROUP_BYTES_4 = GROUP_BYTES - COLUMNS * GROUP // 2  # the same with two weights in a byte


def group_bytes(bits: int) -> int:
    """Return the bytes of a group in a panel whose weights have 8 or 4 bits."""
    return GROUP_BYTES if bits == 8 else GROUP_BYTES_4


def row_bytes(groups: int) -> int:
    """Return the distance in bytes between two quantised rows of activations (see
    `compiled/rows.py`).

    Args:
        groups: number of groups of 64 in a row.
    """
    return ((GROUP + 8) * groups + 63) // 64 * 64
