"""The claims with their figures: what `deepseek claims` and `docs/claims.md` show."""

import math
import operator
from collections.abc import Callable, Mapping
from itertools import chain
from pathlib import Path
from statistics import median
from typing import Literal

from pydantic import BaseModel, ConfigDict

from deepseek.checkpoint.store import read_object
from deepseek.claims.declaration import (
    YES_OR_NO,
    Claim,
    DeclaredClaims,
    Figure,
    Measurement,
    read_declaration,
)
from deepseek.claims.history import History
from deepseek.claims.paths import Json, numbers, paired
from deepseek.errors import ConfigError, shown

State = Literal["reached", "partly", "missed", "not run"]

COMPARISONS: dict[str, Callable[[float, float], bool]] = {
    ">=": operator.ge,
    "<=": operator.le,
    ">": operator.gt,
    "<": operator.lt,
    "=": operator.eq,
}

TWO_SIDED_VALUES: dict[str, Callable[[float, float], float]] = {
    "ratio": operator.truediv,
    "speedup": lambda ours, theirs: theirs / ours,
    "change": lambda ours, theirs: ours / theirs - 1,
    "difference": operator.sub,
}
"""What a figure with two sides shows."""

STATISTICS: dict[str, Callable[[list[float]], float]] = {
    "median": median,
    "least": min,
    "largest": max,
}
"""What a figure with several values shows."""


class Shown(BaseModel):
    """Base of what is printed: `deepseek claims --json` prints it as it is."""

    model_config = ConfigDict(extra="forbid", use_attribute_docstrings=True)


class Provenance(Shown):
    """Where a figure comes from."""

    result: str
    """Name of the file in `benchmarks/results/`"""

    machine: str
    """Processor"""

    commit: str
    """Commit of the checkout that measured it; `-dirty` behind it: with uncommitted changes"""

    date: str
    """Day"""

    command: str
    """Command that wrote the file"""

    changed: list[str] | None
    """What it measures and has changed since, or since the commit of a part that an interrupted run
    had kept: the result is stale; null: unknown without git, or because the commit is not in this
    clone"""


class MeasuredFigure(Shown):
    """One figure of a claim."""

    what: str
    """What is measured"""

    text: str
    """The figure as the table shows it; empty: not measured"""

    value: float | None = None
    """The figure; null: not measured, or not finite"""

    interval: list[float | None] | None = None
    """Lower and upper bound; a bound that is null is not finite"""

    spread: str = ""
    """What the interval is over, such as `3 seeds`"""

    ours: str = ""
    """Our side, where there are two"""

    theirs: str = ""
    """The other side"""

    rival: str = ""
    """What the other side is"""

    goal: str = ""
    """What is wanted, such as `>= 1.50x`; empty: shown for comparison"""

    bound: float | None = None
    """Its number"""

    met: bool | None = None
    """Whether the bound holds; null: no bound, or not measured"""

    test: str = ""
    """Test that shows it in every run of the suite"""

    unmeasured: str = ""
    """Why there is no figure"""

    source: Provenance | None = None
    """Where it comes from, or the result that lacks it; null: there is no result"""


class ClaimRow(Shown):
    """One claim."""

    name: str
    """Its name for `deepseek claims show` and `run`"""

    says: str
    """What the article says"""

    protocol: str
    """How it is measured"""

    reached_when: str
    """What must hold"""

    state: State
    """`reached`: every bound holds; `partly`: some do, others do not or are not measured; `missed`:
    none does; `not run`: nothing is measured"""

    stale: bool | None
    """Whether a figure is older than the code that it measures; null: unknown"""

    figures: list[MeasuredFigure]
    """Its figures"""

    why: str
    """Why it is not reached, or what the figures do not show"""

    log: str
    """Page of the docs with the experiments"""

    attempts: tuple[str, ...]
    """Log entries about attempts to meet the goals: PAGE#ANCHOR, the page without `.md`"""

    picture: str
    """Picture in `benchmarks/results/`"""


class ClaimTable(Shown):
    """`deepseek claims --json`"""

    commit: str | None
    """Commit that results are compared with; null: no git repository, so nothing is known to be
    stale"""

    claims: list[ClaimRow]
    """The claims"""


class Evaluator:
    """Computes the figures of claims from the results of a checkout."""

    def __init__(self, checkout: Path, declaration: DeclaredClaims) -> None:
        """Read results below `checkout` on demand, each once."""
        self.checkout = checkout
        self.declaration = declaration
        self.history = History(checkout)
        self._records: dict[str, Mapping[str, Json] | None] = {}

    def table(self) -> ClaimTable:
        """Return all claims."""
        rows = [self.row(name, claim) for name, claim in self.declaration.claims.items()]
        return ClaimTable(commit=self.history.head(), claims=rows)

    def row(self, name: str, claim: Claim) -> ClaimRow:
        """Return one claim with its figures, one for each result of a declared figure."""
        figures = [
            self.measured(figure, result)
            for figure in claim.figures
            for result in figure.results or ("",)
        ]
        return ClaimRow(
            name=name,
            says=claim.says,
            protocol=claim.protocol,
            reached_when=claim.reached_when,
            state=state_of(figures),
            stale=any_stale(figures),
            figures=figures,
            why=claim.why,
            log=claim.log,
            attempts=claim.attempts,
            picture=claim.picture,
        )

    def measured(self, figure: Figure, result: str) -> MeasuredFigure:
        """Return a figure from a result, or the reason why there is none."""
        goal = goal_text(figure)
        if figure.test:
            return MeasuredFigure(
                what=figure.what, text="tested", goal=goal, met=True, test=figure.test
            )
        record = self.record(result) if result and not figure.unmeasured else None
        if record is None:
            reason = figure.unmeasured or "no result yet"
            return MeasuredFigure(what=figure.what, text="", goal=goal, unmeasured=reason)
        source = self.source(result, record)
        try:
            return compute(figure, record, source)
        except KeyError as missing:
            # Measured without one of the rivals, such as on a machine that lacks it.
            reason = f"results/{result}.json has no {shown(str(missing))}; measure it again"
            return MeasuredFigure(
                what=figure.what, text="", goal=goal, unmeasured=reason, source=source
            )
        except (ValueError, ZeroDivisionError) as error:
            raise ConfigError(
                f"results/{result}.json has {shown(str(error))} for the figure "
                f"{figure.what!r}; correct claims.yaml, or measure it again."
            ) from None

    def record(self, result: str) -> Mapping[str, Json] | None:
        """Return the content of a result file; None: there is no such file.

        Raises:
            CheckpointError: the file cannot be read, or holds no JSON object.
        """
        if result not in self._records:
            path = results_folder(self.checkout) / f"{result}.json"
            self._records[result] = read_object(path) if path.exists() else None
        return self._records[result]

    def source(self, result: str, record: Mapping[str, Json]) -> Provenance:
        """Return where a result comes from, and what has changed since."""
        measurement: Measurement = self.declaration.results[result]
        commit = str(record.get("commit", "unknown"))
        earlier = record.get("earlier_commits")
        earlier_commits = map(str, earlier if isinstance(earlier, list) else ())
        kept = measurement.kept or measurement.measures
        changes = [
            self.history.changed(commit, measurement.measures),
            *(self.history.changed(earlier_commit, kept) for earlier_commit in earlier_commits),
        ]
        return Provenance(
            result=result,
            machine=str(record.get("machine", "unknown")),
            commit=commit,
            date=str(record.get("date", "unknown")),
            command=str(record.get("command", "unknown")),
            changed=_joined(changes),
        )


def _joined(changes: list[list[str] | None]) -> list[str] | None:
    """Return what has changed since any of several commits; None: unknown for one, and nothing is
    known to have changed.
    """
    known = [paths for paths in changes if paths is not None]
    changed_paths = [*dict.fromkeys(chain.from_iterable(known))]
    return None if None in changes and not changed_paths else changed_paths


def results_folder(checkout: Path) -> Path:
    """Return the folder of the results."""
    return checkout / "benchmarks" / "results"


def claim_table(checkout: Path) -> ClaimTable:
    """Return the claims of a checkout with their figures.

    Raises:
        CheckpointError: a result cannot be read.
        ConfigError: there is no checkout, or its declaration does not fit its results.
    """
    return Evaluator(checkout, read_declaration(checkout)).table()


def compute(figure: Figure, record: Mapping[str, Json], source: Provenance) -> MeasuredFigure:
    """Compute a figure from a result.

    Raises:
        KeyError: the result does not hold it.
    """
    record_values = dict(record)
    ours = numbers(record_values, figure.ours)
    theirs = numbers(record_values, figure.theirs) if figure.theirs else []
    values = ours if figure.show == "value" else paired(TWO_SIDED_VALUES[figure.show], ours, theirs)
    scaled_values = [figure.scale * value for value in values]
    value = STATISTICS[figure.statistic](scaled_values)
    bounds, spread = _bounds(figure, record_values, scaled_values)
    unit = figure.form.rpartition("}")[2]
    texts = [_text(figure, bound) for bound in bounds]
    interval = f" ({texts[0].removesuffix(unit)} to {texts[1]})" if texts else ""
    return MeasuredFigure(
        what=figure.what,
        text=f"{_text(figure, value)}{interval}",
        value=_finite(value),
        interval=[_finite(bound) for bound in bounds] if bounds else None,
        spread=spread,
        ours=figure.sides.format(median(ours)) if theirs else "",
        theirs=figure.sides.format(median(theirs)) if theirs else "",
        rival=figure.rival,
        goal=goal_text(figure),
        bound=figure.goal and figure.goal[1],
        met=meets(figure, value, bounds),
        source=source,
    )


def meets(figure: Figure, value: float, bounds: list[float]) -> bool | None:
    """Return whether a figure meets its goal, None: it has none.

    A strict goal (`>`, `<`) claims that one side is better. An interval that includes the bound
    does not show that, so the whole interval must be beyond the bound.
    """
    if figure.goal is None:
        return None
    sign, bound = figure.goal
    tested_values = [value, *bounds] if sign in (">", "<") else [value]
    return all(COMPARISONS[sign](tested_value, bound) for tested_value in tested_values)


def _bounds(figure: Figure, record: Json, scaled_values: list[float]) -> tuple[list[float], str]:
    """Return the bounds of a figure's interval (empty: none), and what the interval is over."""
    if figure.interval:
        bounds = [figure.scale * numbers(record, path)[0] for path in figure.interval]
        return bounds, figure.spread
    if len(scaled_values) > 1:
        return [min(scaled_values), max(scaled_values)], f"{len(scaled_values)} {figure.spread}"
    return [], ""


def _text(figure: Figure, value: float) -> str:
    if figure.form == YES_OR_NO:
        return "yes" if value else "no"
    return figure.form.format(value) if math.isfinite(value) else "never"


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


def goal_text(figure: Figure) -> str:
    """Return the bound of a figure as the table shows it."""
    if figure.goal is None:
        return "shown" if figure.test else ""
    sign, bound = figure.goal
    return f"{sign} {_text(figure, bound)}"


def state_of(figures: list[MeasuredFigure]) -> State:
    """Return the state of a claim with these figures."""
    met_goals = [figure.met for figure in figures if figure.goal]
    if not any(figure.text for figure in figures):
        return "not run"
    if met_goals and all(met_goals):
        return "reached"
    return "partly" if any(met_goals) else "missed"


def any_stale(figures: list[MeasuredFigure]) -> bool | None:
    """Return whether one of the figures is stale; None: unknown for one, and no other is."""
    changes = [figure.source.changed for figure in figures if figure.source]
    if any(changes):
        return True
    return None if None in changes else False
