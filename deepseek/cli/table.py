"""The table of held-out losses before and after plugging experts."""

from collections.abc import Iterable

from rich.table import Table

from deepseek.cli.output import plain
from deepseek.evaluate.quality import Comparison


def comparison_table(rows: Iterable[Comparison]) -> Table:
    """Return a table of held-out losses: the base, all plugged experts, and each text's own expert
    alone.
    """
    table = Table(title="held-out loss in nats per token (lower is better)", title_justify="left")
    for heading in ("text", "tokens", "base", "plugged", "change", "own expert alone", "gain kept"):
        table.add_column(heading, justify="left" if heading == "text" else "right")
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
