"""Tests of a small model on rows longer than those it was trained on (`position_length.py`).

By position: the next token, and whole lines; a line is completed if the model would generate all of
it greedily from what precedes it. By distance: needles, pieces of training text that are planted in
a row and again at its end. The model sees the first tokens of the second copy and predicts the
rest; the effect of the first copy is the difference from the same row without it. A small model
copies hardly anything, so the loss is more informative than the accuracy.
"""

from itertools import pairwise
from statistics import mean
from typing import Any

import torch
from code_rows import SHORT, UNKNOWN
from torch import Tensor
from torch.nn.functional import cross_entropy

from deepseek import DeepSeekModel

BIN = 256  # neighbouring positions that are averaged
NEEDLE = 32  # tokens per needle
CUE = 8  # tokens of the second copy that are not scored


def targets_of(rows: Tensor) -> Tensor:
    """Return the next token at each position, -100 where it is unknown."""
    return torch.where(rows[:, 1:] == UNKNOWN, -100, rows[:, 1:])


@torch.no_grad()
def score(model: DeepSeekModel, rows: Tensor, ends_line: Tensor) -> dict[str, list[float]]:
    """Return the mean loss in nats, top-1 accuracy in per cent, and numbers of lines and of
    completed lines, by bin of positions.
    """
    losses, hits, known, lines, completed = torch.zeros(5, rows.shape[1] // BIN)
    for row in rows.split(1):
        logits, targets = model(row[:, :-1]).logits[0].float(), targets_of(row)[0]
        loss = cross_entropy(logits, targets, ignore_index=-100, reduction="none")
        right = logits.argmax(-1) == targets
        losses += binned(loss)
        hits += binned(right)
        known += binned(targets >= 0)
        for start, end in lines_of(row[0], ends_line):
            lines[start // BIN] += 1
            completed[start // BIN] += right[start:end].all()
    return {
        "loss": (losses / known).tolist(),
        "top1": (100 * hits / known).tolist(),
        "lines": lines.tolist(),
        "completed": completed.tolist(),
    }


def binned(values: Tensor) -> Tensor:
    """Return the sums over bins of positions."""
    return values.float().unflatten(0, (-1, BIN)).sum(-1)


def lines_of(row: Tensor, ends_line: Tensor) -> list[tuple[int, int]]:
    """Return the range `[start, end)` of predictions for each line of a row, line end included;
    only lines of at least three tokens, all known.
    """
    ends = ends_line[row].nonzero().flatten().tolist()
    unknown = (row == UNKNOWN).tolist()
    return [
        (before, end)
        for before, end in pairwise(ends)
        if end - before >= 3 and not any(unknown[before + 1 : end + 1])
    ]


@torch.no_grad()
def needles(model: DeepSeekModel, rows: Tensor, stream: Tensor) -> dict[str, dict[str, float]]:
    """Return how much a needle's first copy improves the predictions of the second, by row length.

    The first copy is a quarter into the row, the second at its end. Needles are pieces of `stream`,
    the same for every model.

    Returns:
        For each length from 1,024 up to that of the rows, in doublings: "top1", accuracy in the
        second copy after the cue, in per cent; "points", the part of it due to the first copy;
        "nats", by how much the first copy lowers the loss.
    """
    found = {}
    length = SHORT
    while length < rows.shape[1]:
        generator = torch.Generator().manual_seed(length)
        right, loss, known = torch.zeros(2), torch.zeros(2), 0
        for row in rows:
            at = int(torch.randint(len(stream) - NEEDLE, (), generator=generator))
            pair = with_and_without(row[:length], stream[at : at + NEEDLE])
            logits = model(pair[:, :-1]).logits[:, CUE - NEEDLE :].float()
            targets = targets_of(pair)[:, CUE - NEEDLE :]
            right += (logits.argmax(-1) == targets).sum(-1)
            loss += cross_entropy(logits.mT, targets, ignore_index=-100, reduction="none").sum(-1)
            known += int((targets[0] >= 0).sum())
        top1, top1_without = (100 * right / known).tolist()
        gain = float(loss[1] - loss[0]) / known
        found[str(length)] = {"top1": top1, "points": top1 - top1_without, "nats": gain}
        length *= 2
    return found


def with_and_without(row: Tensor, needle: Tensor) -> Tensor:
    """Return `[2, T]`: the row with both copies of a needle, and with only the second."""
    pair = row.repeat(2, 1)
    pair[:, -len(needle) :] = needle
    start = len(row) // 4
    pair[0, start : start + len(needle)] = needle
    return pair


def summary(record: dict[str, Any]) -> dict[str, float]:
    """Return the table's figures, one span for each doubling of the trained length."""
    top1, loss = record["top1"], record["loss"]
    figures = {}
    first, last = 0, SHORT // BIN
    while last <= len(top1):
        span = f"{first * BIN}_{last * BIN}" if first else f"to_{SHORT}"
        figures[f"top1_{span}"] = mean(top1[first:last])
        figures[f"lines_{span}"] = completed_share(record, first, last)
        figures[f"loss_at_{last * BIN}"] = loss[last - 1]
        first, last = last, 2 * last
    for length, needle in record.get("needles", {}).items():
        figures[f"needle_{length}"] = needle["points"]
        figures[f"needle_nats_{length}"] = needle["nats"]
    if "score_factor" in record:
        figures["score_factor"] = record["score_factor"]
    return figures


def completed_share(record: dict[str, Any], first: int, last: int) -> float:
    """Return the share of the lines in bins `[first, last)` that are completed, in per cent."""
    lines = sum(record["lines"][first:last])
    return 100 * sum(record["completed"][first:last]) / max(1, lines)
