"""The held-out losses before and after plugging experts, as a table and as JSON."""

from collections.abc import Iterable, Sequence

from rich.table import Table

from deepseek.cli.output import figures_table, plain
from deepseek.cli.shapes import Evaluation, EvaluationRow, PassRates
from deepseek.evaluate.quality import Comparison


def comparison_table(rows: Iterable[Comparison]) -> Table:
    """Return a table of held-out losses: the base, all plugged experts, and each text's own expert
    alone.
    """
    table = figures_table(
        "text",
        ("tokens", "base", "plugged", "change", "own expert alone", "gain kept"),
        "held-out loss in nats per token (lower is better)",
    )
    for row in rows:
        table.add_row(
            plain(row.text),
            f"{row.tokens:,}",
            f"{row.before:.4f}",
            f"{row.after:.4f}",
            f"{row.change:+.2%}",
            "" if row.alone is None else f"{row.alone:.4f}",
            "" if row.gain_kept is None else f"{row.gain_kept:.1%}",
            style="" if row.alone is None else "bold",
        )
    return table


def evaluation(
    base: str,
    plugged_names: list[str],
    rows: Iterable[Comparison],
    pass_rates: Sequence[float],
    problems: int,
) -> Evaluation:
    """Return what `deepseek eval --json` prints.

    Args:
        base: name of the base.
        plugged_names: names of the plugged experts.
        rows: the losses.
        pass_rates: HumanEval of the base, and with the experts; empty: not measured.
        problems: number of HumanEval problems.
    """
    texts = [
        EvaluationRow(
            text=row.text, tokens=row.tokens, base=row.before, plugged=row.after, alone=row.alone
        )
        for row in rows
    ]
    rates = None
    if pass_rates:
        rates = PassRates(problems=problems, base=pass_rates[0], plugged=pass_rates[1])
    return Evaluation(base=base, experts=plugged_names, texts=texts, human_eval=rates)
