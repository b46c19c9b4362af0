"""Claims and results as `benchmarks/claims.yaml` declares them."""

from pathlib import Path
from typing import Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from deepseek.errors import ConfigError

CHECKOUT = Path(__file__).parents[2]
"""Folder of the checkout. The wheel holds neither benchmarks nor results."""

YES_OR_NO = "yes or no"
"""Format of a figure that is true or false."""

Goal = Literal[">=", "<=", ">", "<", "="]

Side = str | tuple[str, Literal["minus", "over", "or"], str]
"""Path of a figure in a result file: keys joined by "/"; "*" matches every key or list index. Or
two paths and an operation: subtract, divide, or use the second if the first is missing.
"""


class Declared(BaseModel):
    """Base of the parts of the file; a misspelt key is refused."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)


class Measurement(Declared):
    """One file of `benchmarks/results/`."""

    measures: tuple[str, ...]
    """Files and folders of the package; a result is stale once one of them has changed"""

    kept: tuple[str, ...] = ()
    """Files and folders that decide what a run keeps for the next one, such as trained experts. A
    result is stale once one of them has changed since an earlier commit that it has parts of.
    Empty: those of `measures`"""

    command: str = ""
    """Arguments of Python in the checkout; empty: made on another machine, or by hand. RESULT is
    the file, PLOT a picture beside it, CORPORA the folder of `benchmarks/corpora.py`, WORK a folder
    for what an interrupted run keeps"""

    quick: str = ""
    """The same with a tiny model and few steps, to see that it works"""


class Figure(Declared):
    """One figure of a claim, or one that nobody has measured yet."""

    what: str
    """What is measured"""

    results: tuple[str, ...] = Field(default=(), alias="in")
    """Names of result files, one for each machine"""

    ours: Side = ""
    """Our side"""

    theirs: Side = ""
    """The other side"""

    rival: str = ""
    """What the other side is"""

    show: Literal["value", "ratio", "speedup", "change", "difference"] = "value"
    """`value` is ours, `ratio` ours over theirs, `speedup` theirs over ours, `change` the ratio
    less one, `difference` ours less theirs"""

    scale: float = 1.0
    """Factor before it is shown; 100 turns shares into per cent"""

    form: str = "{:g}"
    """Format of the figure, with its unit; `yes or no` for one that is true or false"""

    sides: str = "{:,.4g}"
    """Format of either side"""

    spread: str = ""
    """What the values under "*" are, such as seeds"""

    statistic: Literal["median", "least", "largest"] = "median"
    """Which of the values under "*" the figure is; where each must hold, the worst"""

    interval: tuple[str, str] | None = None
    """Paths of the lower and the upper bound of our side"""

    goal: tuple[Goal, float] | None = None
    """Bound of the scaled figure, for `>` and `<` of its whole interval; None: shown for
    comparison"""

    test: str = ""
    """File and name of a test that shows it in every run of the suite, in place of a result"""

    unmeasured: str = ""
    """Why there is no figure"""

    @model_validator(mode="after")
    def _better_beyond_chance(self) -> "Figure":
        is_strict = self.goal is not None and self.goal[0] in (">", "<")
        if is_strict and not self.interval and "*" not in str(self.ours):
            raise ValueError(
                f"{self.what!r} claims to be better and has no interval; name one, or drop the goal"
            )
        return self

    @field_validator("results", mode="before")
    @classmethod
    def _one_or_several(cls, names: object) -> object:
        return (names,) if isinstance(names, str) else names


class Claim(Declared):
    """One claim of the article, or of this project."""

    says: str
    """What it claims"""

    protocol: str
    """How it is measured"""

    reached_when: str
    """What must hold, in words"""

    figures: tuple[Figure, ...]
    """The figures"""

    why: str = ""
    """Why it is not reached, or what the figures do not show"""

    log: str = ""
    """Page of the docs with the experiments"""

    attempts: tuple[str, ...] = ()
    """Log entries about attempts to meet the goals: PAGE#ANCHOR, the page without `.md`"""

    picture: str = ""
    """Picture beside the results"""


class DeclaredClaims(Declared):
    """The file."""

    results: dict[str, Measurement]
    """Result files by name"""

    claims: dict[str, Claim]
    """Claims by name, in the order of the table"""


def read_declaration(checkout: Path) -> DeclaredClaims:
    """Return the claims that a checkout declares.

    Args:
        checkout: root folder of the repository.

    Raises:
        ConfigError: there is no such file, or it is not well-formed.
    """
    path = checkout / "benchmarks" / "claims.yaml"
    if not path.is_file():
        raise ConfigError(
            "the claims and their results are not part of the installed package; "
            "run this in a clone of the repository."
        )
    loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)  # the former is ten times as fast
    try:
        text = path.read_text(encoding="utf-8")
        fields = yaml.load(text, Loader=loader)  # noqa: S506 - both are safe
        return DeclaredClaims.model_validate(fields)
    except (ValidationError, yaml.YAMLError) as error:
        raise ConfigError(f"{path} cannot be read ({error}); correct it.") from None
