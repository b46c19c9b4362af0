"""Linear recurrences along the sequence, for running sums of gate scores and of evidence."""

import torch
from torch import Tensor


def scan(keep: Tensor, terms: Tensor) -> Tensor:
    """Return s_t = keep_t s_{t-1} + terms_t along dimension 1 by a parallel scan in log2(T) steps.

    Source: Hillis and Steele, 1986. The factors must lie in [0, 1]. The scan never divides, so the
    error does not grow with T.
    """
    # A graph with a symbolic T cannot contain a number of steps that depends on T.
    if torch.compiler.is_exporting():
        return scan_at_once(keep, terms)
    step = 1
    length = terms.shape[1]
    while step < length:
        terms = torch.cat(
            [terms[:, :step], terms[:, step:] + keep[:, step:] * terms[:, :-step]], dim=1
        )
        keep = torch.cat([keep[:, :step], keep[:, step:] * keep[:, :-step]], dim=1)
        step *= 2
    return terms


def scan_at_once(keep: Tensor, terms: Tensor) -> Tensor:
    """Return the result of `scan` without a loop, in memory quadratic in T.

    It computes s_t as the sum over u <= t of keep_{u+1} ... keep_t terms_u. The factors must be
    above 0.
    """
    logs_BTRM = keep.log().cumsum(1)
    past_TT = torch.ones(keep.shape[1], keep.shape[1], dtype=torch.bool, device=keep.device).tril()[
        ..., None, None
    ]
    decay_BTTRM = (
        (logs_BTRM[:, :, None] - logs_BTRM[:, None]).masked_fill(~past_TT, -torch.inf).exp()
    )
    return (decay_BTTRM * terms[:, None]).sum(2)
