"""A line that shows what an expert knows: chosen by rule, from text that it was not trained on."""

from collections.abc import Sequence
from dataclasses import dataclass

from deepseek.data import Progress, TokenShards
from deepseek.data.text.decode import decode_documents
from deepseek.data.text.document import silent
from deepseek.engine.engine import Engine
from deepseek.engine.request import ExpertChoice
from deepseek.errors import DataError
from deepseek.evaluate.cases import Case, next_line_cases
from deepseek.evaluate.completion import Completion, Dials, Writer
from deepseek.evaluate.quality import held_out_folder
from deepseek.evaluate.scores import is_exact

CASES = 48
"""Lines that are compared."""


@dataclass(frozen=True)
class Showcase:
    """One line, written again without and with the expert.

    Attributes:
        case: the line, and the text before it.
        before, after: what the base and what the expert make of it.
        compared: lines that it was chosen from.
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
    """Return the held-out line of a plugged expert at which it gains most over its base.

    Lines that the expert writes exactly and the base does not come first; among these, or all if
    there are none, the one whose true text the expert finds likelier by most.

    Args:
        engine: with the expert plugged.
        expert: name of a trained expert whose run is there.
        cases: held-out lines to compare.
        dials: how much text stands before a line; None: `Dials()`.

    Raises:
        DataError: no held-out document has a line worth asking for.
    """
    documents = decode_documents(TokenShards(held_out_folder(expert)), engine.tokenizer)
    dials = dials or Dials()
    lines = next_line_cases(documents, cases)
    if not lines:
        raise DataError(
            f"The held-out text of {expert} has no line to ask for; give the expert more text."
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
    """Return the place of the case that shows most (see `showcase`)."""

    def rank(place: int) -> tuple[bool, float]:
        target = cases[place].target
        only_expert = is_exact(after[place].written, target) and not is_exact(
            before[place].written, target
        )
        return only_expert, before[place].nats - after[place].nats

    return max(range(len(cases)), key=rank)
