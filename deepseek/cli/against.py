"""The table of `deepseek eval --against`."""

from rich.console import Console
from rich.table import Table

from deepseek.cli.options import names
from deepseek.cli.output import echo, figures_table, plain, print_table
from deepseek.device.names import Dtype
from deepseek.errors import ConfigError
from deepseek.evaluate.against import RETRIEVAL, RIVALS, Against, Result, rows_against
from deepseek.evaluate.completion import CompletionScores
from deepseek.evaluate.scores import Interval
from deepseek.evaluate.verdict import Compared, compared, draw, verdicts


def print_against(
    experts: str,
    rivals: str,
    cases: int,
    device: str = "auto",
    dtype: Dtype = "auto",
    dry_run: bool = False,
) -> None:
    """Compare one expert with rival methods; print the tables, the conclusions and the result's
    files.

    Args:
        experts: name of the expert.
        rivals: comma-separated methods: rag, lora, full.
        cases: number of held-out lines to write.
        device: where the rows are computed and the rivals trained.
        dtype: precision of both.
        dry_run: only print what would be compared, and how long the rivals would train.

    Raises:
        ConfigError: `experts` is not the name of one expert, or `rivals` names no method.
    """
    expert_names = names(experts)
    if len(expert_names) != 1 or expert_names == ["all"]:
        raise ConfigError(
            "--against compares one expert at a time; name it, as in "
            "`deepseek eval NAME --against rag`."
        )
    methods = names(rivals)
    if not methods:
        raise ConfigError(f"--against {rivals!r} names no method; give {' or '.join(RIVALS)}.")
    against = Against(expert_names[0], cases, device=device, dtype=dtype)
    if dry_run:
        rows = rows_against(methods)
        minutes = against.record["seconds"] / 60
        trained = sum(row.model != "base" for row in rows)
        echo(
            f"{len(against.cases)} lines, each written by {', '.join(row.name for row in rows)} on "
            f"{against.device}; {trained * minutes:.1f} minutes of training, for each method as "
            "many as the expert took; writing the lines is not counted"
        )
        return
    result = against.compare(methods)
    picture = against.folder / "against.png"
    draw(result.scores, f"{result.name}, {len(result.cases)} cases", picture)
    console = Console()
    for table in against_tables(result):
        print_table(table)
    for line in (*verdicts(result.scores, result.sources), *result.notes):
        console.print(plain(line), soft_wrap=True)
    console.print(plain(f"{against.folder / 'result.json'}, {picture}"), soft_wrap=True)


def against_tables(result: Result) -> list[Table]:
    """Return two tables with one line per row: quality, then differences and cost.

    Shares are in per cent and differences in percentage points, both with 95 % intervals.
    """
    rows = compared(result.scores, result.sources)
    title = (
        f"{result.name}: {len(result.cases)} lines of {result.documents} held-out documents, "
        "greedy, as served"
    )
    quality = [_quality(name, row, result.scores[name]) for name, row in rows.items()]
    cost = [_cost(name, row, result) for name, row in rows.items()]
    return [_table(title, quality), _table("differences in exact lines, and cost of a reply", cost)]


def _table(title: str, lines: list[dict[str, str]]) -> Table:
    """Return a table of lines, each a mapping from heading to cell."""
    first, *figures = lines[0]
    table = figures_table(first, figures, title)
    for line in lines:
        table.add_row(*line.values())
    return table


def _quality(name: str, row: Compared, scores: CompletionScores) -> dict[str, str]:
    return {
        "row": name,
        "loss": f"{scores.loss:.3f}",
        "exact line %": _share(row.exact),
        "edit similarity": f"{row.similarity:.3f}",
        "infilled %": "not supported" if row.infilled is None else _share(row.infilled),
        "chrF": "-" if scores.chrf is None else f"{scores.chrf:.1f}",
    }


def _cost(name: str, row: Compared, result: Result) -> dict[str, str]:
    scores = result.scores[name]
    training_seconds = result.training_seconds.get(name.removesuffix(f" + {RETRIEVAL.name}"))
    return {
        "row": name,
        "over base": _difference(row.over_base),
        "over retrieval": _difference(row.over_retrieval),
        "tokens": f"{scores.prompt_tokens:.0f} + {scores.reply_tokens:.0f}",
        "seconds": f"{scores.seconds:.2f}",
        "trained": "-" if training_seconds is None else f"{training_seconds:.0f} s",
    }


def _share(share: Interval) -> str:
    return f"{100 * share.mean:.1f} ({100 * share.low:.1f}-{100 * share.high:.1f})"


def _difference(difference: Interval | None) -> str:
    if difference is None:
        return "-"
    bounds = f"{100 * difference.low:+.1f} to {100 * difference.high:+.1f}"
    return f"{100 * difference.mean:+.1f} ({bounds})"
