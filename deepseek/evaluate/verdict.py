"""Summarise the table of `deepseek eval --against` in words and as a plot."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from deepseek.checkpoint.store import atomic_write
from deepseek.evaluate.completion import CompletionScores
from deepseek.evaluate.scores import Interval, paired_difference, sign_flip_p, wilson

LEVEL = 0.05
"""p-value from which on two rows are not told apart."""


@dataclass(frozen=True)
class Compared:
    """Scores of a row, and its differences from the base and from retrieval.

    Attributes:
        exact: share of lines completed exactly; its interval assumes independent lines.
        over_base: difference of this share from the base, paired by case; None for the base itself
            or without it.
        over_retrieval: difference of this share from retrieval, likewise.
        similarity: mean edit similarity.
        infilled: share of lines infilled exactly between the text on both sides; None: the model
            doesn't support infilling.
    """

    exact: Interval
    over_base: Interval | None
    over_retrieval: Interval | None
    similarity: float
    infilled: Interval | None


def compared(rows: Mapping[str, CompletionScores], documents: Sequence[str]) -> dict[str, Compared]:
    """Return every row with its confidence intervals and differences.

    Args:
        rows: scores of each row.
        documents: document that each case comes from.
    """
    return {
        name: Compared(
            exact=_share(scores.exact),
            over_base=_difference_to(rows, name, "base", documents),
            over_retrieval=_difference_to(rows, name, "retrieval", documents),
            similarity=sum(scores.similarity) / len(scores.similarity),
            infilled=None if scores.infilled is None else _share(scores.infilled),
        )
        for name, scores in rows.items()
    }


def verdicts(rows: Mapping[str, CompletionScores], documents: Sequence[str]) -> list[str]:
    """Return one sentence for each pair of rows that can be compared.

    Args:
        rows: scores of each row.
        documents: document that each case comes from.
    """
    pairs = (("expert", "base"), ("expert", "retrieval"), ("expert + retrieval", "retrieval"))
    rivals = tuple(("expert", name) for name in ("LoRA", "full fine-tuning"))
    return [
        f"{name} against {other}: {_description(rows[name].exact, rows[other].exact, documents)}"
        for name, other in (*pairs, *rivals)
        if name in rows and other in rows
    ]


def draw(rows: Mapping[str, CompletionScores], title: str, path: Path) -> None:
    """Plot the share of exact lines of every row, with confidence intervals, to a PNG file."""
    from matplotlib.figure import Figure

    names = list(rows)[::-1]
    shares = [_share(rows[name].exact) for name in names]
    figure = Figure(figsize=(7, 0.6 + 0.5 * len(names)), layout="constrained")
    axes = figure.add_subplot(
        xlabel="next lines written exactly (%), with 95 % intervals", title=title
    )
    low = [100 * (share.mean - share.low) for share in shares]
    high = [100 * (share.high - share.mean) for share in shares]
    axes.barh(
        names,
        [100 * share.mean for share in shares],
        xerr=[low, high],
        color="#6b8fb3",
        ecolor="#333",
        capsize=3,
    )
    with atomic_write(path) as temporary:
        figure.savefig(temporary, format="png", dpi=120)


def _share(exact_shares: list[float]) -> Interval:
    return wilson(round(sum(exact_shares)), len(exact_shares))


def _difference_to(
    rows: Mapping[str, CompletionScores], name: str, other_name: str, documents: Sequence[str]
) -> Interval | None:
    if name == other_name or other_name not in rows:
        return None
    return paired_difference(rows[name].exact, rows[other_name].exact, documents=documents)


def _description(
    row_scores: Sequence[float], other_scores: Sequence[float], documents: Sequence[str]
) -> str:
    """Describe a difference of exact lines: better, worse, or not significant.

    Better and worse need both the interval, which is too narrow with few documents, and the
    p-value, which is not.
    """
    if list(row_scores) == list(other_scores):
        return "no line differs"
    difference = paired_difference(row_scores, other_scores, documents=documents)
    p = sign_flip_p(row_scores, other_scores, documents)
    bounds = f"{100 * difference.low:+.1f} to {100 * difference.high:+.1f}"
    gain_text = f"{100 * difference.mean:+.1f} points ({bounds}; p = {p:.2g})"
    if not difference.excludes_zero or p >= LEVEL:
        return f"not told apart, {gain_text}"
    return f"{'better' if difference.mean > 0 else 'worse'}, {gain_text}"
