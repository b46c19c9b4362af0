"""The table of `deepseek eval --against` in words and as a picture."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from deepseek.checkpoint.store import atomic_write
from deepseek.evaluate.completion import CompletionScores
from deepseek.evaluate.scores import Interval, paired_difference, wilson


@dataclass(frozen=True)
class Compared:
    """A row beside the base and beside retrieval.

    Attributes:
        exact: share of lines written exactly.
        over_base, over_retrieval: difference of that share, paired by case; None for the row itself
            or where there is no such row.
        similarity: mean edit similarity.
        infilled: share of lines written exactly between the text on both sides; None: not supported
            by the model.
    """

    exact: Interval
    over_base: Interval | None
    over_retrieval: Interval | None
    similarity: float
    infilled: Interval | None


def compared(rows: Mapping[str, CompletionScores]) -> dict[str, Compared]:
    """Return every row with its intervals and differences."""
    return {
        name: Compared(
            exact=_share(scores.exact),
            over_base=_over(rows, name, "base"),
            over_retrieval=_over(rows, name, "retrieval"),
            similarity=sum(scores.similarity) / len(scores.similarity),
            infilled=None if scores.infilled is None else _share(scores.infilled),
        )
        for name, scores in rows.items()
    }


def verdicts(rows: Mapping[str, CompletionScores]) -> list[str]:
    """Return what the table says, a sentence for each question that it can answer."""
    asked = (("expert", "base"), ("expert", "retrieval"), ("expert + retrieval", "retrieval"))
    rivals = tuple(("expert", name) for name in ("LoRA", "full fine-tuning"))
    return [
        f"{mine} against {other}: {_in_words(paired_difference(rows[mine].exact, rows[other].exact))}"
        for mine, other in (*asked, *rivals)
        if mine in rows and other in rows
    ]


def draw(rows: Mapping[str, CompletionScores], title: str, path: Path) -> None:
    """Draw the share of exact lines of every row, with its interval, as a PNG."""
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


def _share(exact: list[float]) -> Interval:
    return wilson(round(sum(exact)), len(exact))


def _over(rows: Mapping[str, CompletionScores], name: str, other: str) -> Interval | None:
    if name == other or other not in rows:
        return None
    return paired_difference(rows[name].exact, rows[other].exact)


def _in_words(difference: Interval) -> str:
    """Return a difference of shares as better, worse or not told apart."""
    points = f"{100 * difference.mean:+.1f} points ({100 * difference.low:+.1f} to {100 * difference.high:+.1f})"
    if not difference.excludes_zero:
        return f"not told apart, {points}"
    return f"{'better' if difference.mean > 0 else 'worse'}, {points}"
