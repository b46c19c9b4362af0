"""Choose, by rule, a held-out line that shows what an expert knows."""

from collections.abc import Sequence
from dataclasses import dataclass

from deepseek.data import Progress, TokenShards
from deepseek.data.text.decode import decode_documents
from deepseek.data.text.document import silent
from deepseek.engine.engine import Engine
from deepseek.engine.request import ExpertChoice
from deepseek.errors import DataError
from deepseek.evaluate.cases import WHAT_IS_ASKED, Case, next_line_cases
from deepseek.evaluate.completion import Completion, Dials, Writer
from deepseek.evaluate.quality import held_out_folder
from deepseek.evaluate.scores import is_exact

CASES = 48
"""Number of lines to compare."""


@dataclass(frozen=True)
class Showcase:
    """One line, completed without and with the expert.

    Attributes:
        case: the line, and the text before it.
        before: completion of the base.
        after: completion of the expert.
        compared: number of lines that it was chosen from.
    """

    case: Case
    before: Completion
    after: Completion
    compared: int


def showcase(
    engine: Engine,
    expert: str,
    cases: int = CASES,
    dials: Dials | None = None,
    progress: Progress = silent,
) -> Showcase:
    """Return the held-out line on which a plugged expert gains most over its base.

    Lines that only the expert completes exactly take precedence. Among these, or among all lines if
    there are none, the gain is that of the true line's log-probability.

    Args:
        engine: engine with the expert plugged.
        expert: name of a trained expert that still has its run folder.
        cases: held-out lines to compare.
        dials: settings of the prompts; default: `Dials()`.
        progress: shows the progress.

    Raises:
        DataError: no held-out document has a suitable line.
    """
    documents = decode_documents(TokenShards(held_out_folder(expert)), engine.tokenizer)
    dials = dials or Dials()
    lines = next_line_cases(documents, cases)
    if not lines:
        raise DataError(
            f"The held-out text of {expert} has no line to ask for, which is {WHAT_IS_ASKED}; give "
            "the expert longer documents."
        )
    before = list(
        Writer(engine, ExpertChoice(()), None, dials).answers(lines, progress, "without the expert")
    )
    after = list(
        Writer(engine, ExpertChoice((expert,)), None, dials).answers(
            lines, progress, "with the expert"
        )
    )
    place = largest_gain(lines, before, after)
    return Showcase(lines[place], before[place], after[place], len(lines))


def largest_gain(
    cases: Sequence[Case], before: Sequence[Completion], after: Sequence[Completion]
) -> int:
    """Return the index of the case with the largest gain (see `showcase`)."""

    def rank(place: int) -> tuple[bool, float]:
        target = cases[place].target
        only_expert = is_exact(after[place].written, target) and not is_exact(
            before[place].written, target
        )
        return only_expert, before[place].nats - after[place].nats

    return max(range(len(cases)), key=rank)
