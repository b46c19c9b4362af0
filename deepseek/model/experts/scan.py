"""Linear recurrences over the tokens of a row, for running sums of scores and of evidence."""

import torch
from torch import Tensor


def scan(keep: Tensor, terms: Tensor) -> Tensor:
    """Return s_t = keep_t s_{t-1} + terms_t along dimension 1, in log2(T) steps (Hillis and Steele,
    1986).

    Every factor lies in [0, 1] and nothing is divided, so that the error does not grow with T.
    """
    if (
        torch.compiler.is_exporting()
    ):  # steps whose number depends on T cannot be in a graph for any T
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
    """The same for factors above 0, in memory that grows with T squared: s_t = sum_u<=t keep_u+1 ..
    keep_t terms_u.
    """
    logs_BTRM = keep.log().cumsum(1)
    past_TT = torch.ones(keep.shape[1], keep.shape[1], dtype=torch.bool, device=keep.device).tril()[
        ..., None, None
    ]
    decay_BTTRM = (
        (logs_BTRM[:, :, None] - logs_BTRM[:, None]).masked_fill(~past_TT, -torch.inf).exp()
    )
    return (decay_BTTRM * terms[:, None]).sum(2)
