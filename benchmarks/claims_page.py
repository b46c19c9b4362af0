"""Write `docs/claims.md` and its picture from `benchmarks/claims.yaml` and the result files.

    python benchmarks/claims_page.py    # --check: fail if the page is out of date; write nothing

Staleness changes with every commit, so the page names the commit it refers to, and `--check`
ignores these marks. `deepseek claims` shows the current state.
"""

import argparse
import re
import sys
from textwrap import fill

from entry import run_main
from matplotlib.figure import Figure
from report import ANCHOR, PROCESSORS, PROVENANCE, RESULTS, ROOT, head, line, provenance

from deepseek.claims.evaluation import ClaimRow, ClaimTable, MeasuredFigure, claim_table

PAGE = ROOT / "docs" / "claims.md"
LOG = ROOT / "docs" / "log"
PICTURE = "claims.png"
LEAST, MOST = 0.1, 20.0  # ends of the picture's axis

INTRODUCTION = """\
# Claims

<!-- Written by `python benchmarks/claims_page.py`. Do not edit. -->

What the article claims, how it is measured here, and what came out. A claim that is missed, or was never run, stands
here like any other. Claims, protocols and bounds are declared in `benchmarks/claims.yaml`; every figure comes from a
file in `benchmarks/results/`, which a command of this repository wrote.

```bash
deepseek claims                   # this table, in a clone; --json for programs
deepseek claims show dpe          # protocol, both sides, machine, commit and command
deepseek claims run dpe           # measure again; all: what is missing or stale
deepseek claims run all --quick   # tiny models: do the commands work? No figure is kept
```

A claim is *reached* if every bound holds, *partly* reached if some do and others do not or are not measured, *missed*
if none does. Below those that are not reached stand the entries of the log about what was tried, failures included. An
interval in brackets is the range over seeds, rounds or texts where a result has several, or the one that is named. A
result is *stale* once the code that it measures has changed after its commit.
"""

OLDER = "## Older than the code"
MARK = re.compile(r", stale(ness unknown)?")


def states(table: ClaimTable) -> list[str]:
    """Return the table of all claims."""
    lines = head(["claim", "the article says", "state", "bounds met"])
    for row in table.claims:
        wanted = [figure for figure in row.figures if figure.goal]
        met = sum(figure.met is True for figure in wanted)
        link = f"[{row.name}](#{row.name})"
        lines.append(line([link, row.says, state(row), f"{met} of {len(wanted)}"]))
    return lines


def state(row: ClaimRow) -> str:
    """Return the state of a claim, with a mark if it is stale."""
    marks = {True: ", stale", False: "", None: ", staleness unknown"}
    return f"{row.state}{marks[row.stale]}"


def figure_line(figure: MeasuredFigure) -> str:
    """Return a figure's row in the table of its claim."""
    measured = figure.text or f"not run: {figure.unmeasured}"
    verdict = {True: "yes", False: "**no**", None: ""}[figure.met]
    place = f"`{figure.test}`" if figure.test else ""
    processor = ""
    if figure.source:
        place = f"[{figure.source.result}]({ANCHOR})"
        processor = PROCESSORS.get(figure.source.machine, figure.source.machine)
    over = f", {figure.spread}" if figure.spread else ""
    cells = [figure.what, f"{measured}{over}", figure.goal, verdict]
    other = f"{figure.rival} {figure.theirs}".strip()
    return line([*cells, figure.ours, other, processor, place])


def wrapped(text: str) -> str:
    """Return a paragraph wrapped to the line length of the other pages."""
    return fill(text, 120, break_long_words=False, break_on_hyphens=False)


def entry_link(entry: str) -> str:
    """Return a list item that links to an entry of the log, PAGE#ANCHOR, with its title."""
    page, _, wanted = entry.partition("#")
    headings = re.findall(r"^## (.*)$", (LOG / f"{page}.md").read_text(), re.MULTILINE)
    titles = {anchor(title): title for title in headings}
    return f"- [{titles[wanted]}](log/{page}.md#{wanted})"


def anchor(title: str) -> str:
    """Return the anchor that GitHub gives a heading."""
    return re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-")


def section(row: ClaimRow) -> list[str]:
    """Return the page's section about a claim."""
    lines = [
        f"## {row.name}",
        "",
        f"**{row.says}.** State: {state(row)}.",
        "",
        wrapped(f"{row.protocol} Reached when {row.reached_when}."),
        "",
        *head(
            ["figure", "measured", "wanted", "met", "ours", "the other side", "processor", "from"]
        ),
        *map(figure_line, row.figures),
        "",
    ]
    log = (
        f" Experiments: [{row.log.rpartition('/')[2].removesuffix('.md')}]({row.log})."
        if row.log
        else ""
    )
    if row.why or log:
        lines += [wrapped(f"{row.why}{log}"), ""]
    if row.attempts:
        lines += ["Attempts:", "", *map(entry_link, row.attempts), ""]
    if row.picture:
        lines += [f"![{row.name}](../benchmarks/results/{row.picture})", ""]
    return lines


def sources(table: ClaimTable) -> dict[str, MeasuredFigure]:
    """Return one figure for each result that the claims use, by the name of the result."""
    figures = [figure for row in table.claims for figure in row.figures]
    found = {figure.source.result: figure for figure in figures if figure.source}
    return dict(sorted(found.items()))


def older(table: ClaimTable) -> list[str]:
    """Return the section on stale results, as of the checked-out commit."""
    lines = [OLDER, "", f"Compared with commit `{table.commit}`.", ""]
    lines += head(["result", "measured at", "changed since"])
    for name, figure in sources(table).items():
        assert figure.source is not None
        changed = figure.source.changed
        if changed or changed is None:
            paths = ", ".join(f"`{path}`" for path in changed or ())
            unknown = "unknown: its commit is not in this repository"
            lines.append(line([name, f"`{figure.source.commit}`", paths or unknown]))
    return [*lines, ""]


def page(table: ClaimTable) -> str:
    """Return the page."""
    parts = [INTRODUCTION, *states(table), ""]
    parts += [f"![How far each figure reaches](../benchmarks/results/{PICTURE})", ""]
    parts += [
        "Each dot is a figure over its bound, or the bound over the figure where small is good: right of the line",
        "it holds. The bar is its interval.",
        "",
    ]
    for row in table.claims:
        parts += section(row)
    parts += [PROVENANCE, *provenance(sources(table)), "", *older(table)]
    return "\n".join(parts)


def without_staleness(text: str) -> str:
    """Return a page without the marks of staleness, which can change with every commit."""
    return MARK.sub("", text.partition(OLDER)[0])


def attained(figure: MeasuredFigure) -> list[float]:
    """Return the figure and the ends of its interval relative to its bound: divided by it, or the
    bound divided by them if smaller is better. Empty without a positive bound.
    """
    sign, bound = figure.goal.partition(" ")[0], figure.bound
    if figure.value is None or bound is None or bound <= 0 or sign == "=":
        return []
    values = [one or 0.0 for one in (figure.value, *(figure.interval or ()))]
    if sign in (">", ">="):
        shares = [one / bound for one in values]
    else:
        shares = [bound / one if one > 0 else MOST for one in values]
    return [min(max(one, LEAST), MOST) for one in shares]


def label(row: ClaimRow, figure: MeasuredFigure) -> str:
    """Return a figure's label in the picture."""
    return f"{row.name}: {figure.what}" + (f" ({figure.rival})" if figure.rival else "")


def draw(table: ClaimTable) -> None:
    """Draw how far each figure with a bound reaches."""
    rows = [
        (label(row, figure), attained(figure), bool(figure.met))
        for row in table.claims
        for figure in row.figures
    ]
    shown = [(name, found, met) for name, found, met in rows if found]
    picture = Figure(figsize=(10, 0.6 + 0.24 * len(shown)), layout="constrained")
    axes = picture.subplots()
    axes.axvline(1, color="black", linewidth=1)
    for place, (_, found, met) in enumerate(shown):
        colour = "#2e7d32" if met else "#c62828"
        axes.plot(found[0], place, "o", color=colour)
        axes.plot([min(found), max(found)], [place, place], color=colour, linewidth=2, alpha=0.5)
    axes.set_yticks(range(len(shown)), [name for name, _, _ in shown], fontsize=8)
    axes.set(xscale="log", xlim=(LEAST, MOST), xlabel="figure over bound")
    axes.invert_yaxis()
    axes.spines[["top", "right"]].set_visible(False)
    picture.savefig(RESULTS / PICTURE, dpi=100)


def write_or_check() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--check", action="store_true", help="fail where the page is out of date; write nothing"
    )
    table = claim_table(ROOT)
    if not parser.parse_args().check:
        PAGE.write_text(page(table))
        draw(table)
    elif without_staleness(PAGE.read_text()) != without_staleness(page(table)):
        sys.exit("error: docs/claims.md is out of date; run python benchmarks/claims_page.py.")


if __name__ == "__main__":
    run_main(write_or_check)
