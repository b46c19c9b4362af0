"""Resolved arguments of an expert's training, with all defaults filled in."""

from dataclasses import dataclass
from typing import ClassVar

from pydantic.dataclasses import dataclass as declaration

from deepseek.checkpoint.hub import resolve
from deepseek.model.language_model import layers_in
from deepseek.train.jobs.arguments import ExpertArguments
from deepseek.train.jobs.declaration import DECLARED
from deepseek.train.jobs.text_request import TextRequest, row_length_for
from deepseek.train.loop.layers import parse_layers

DEFAULT_MINUTES = 5.0
"""Time budget if neither `minutes` nor `tokens` is given."""


@dataclass(frozen=True)
class Recipe:
    """Hyperparameters with measured defaults; see docs/log/experts.md.

    Attributes:
        width: width of the expert's feed-forward networks.
        shortest: minimum number of passes; if the minutes don't suffice for these over all the
            text, less text is used.
        batch_rows: rows per step; small, since the number of steps is the bottleneck.
        learning_rate: peak learning rate.
        little_text_rate: the same for little text (see `TextRequest`).
    """

    width: int
    shortest: float
    batch_rows: int
    learning_rate: float
    little_text_rate: float


CACHED = Recipe(width=512, shortest=3, batch_rows=4, learning_rate=4e-3, little_text_rate=2e-3)
"""For experts on a trunk cache, where further passes are cheap."""

WHOLE = Recipe(width=256, shortest=1, batch_rows=2, learning_rate=3e-3, little_text_rate=3e-3)
"""For experts that begin at layer 0. Every pass costs the same, so each one takes new text. Other
rates were not tried with little text.
"""


@declaration(kw_only=True, frozen=True, config=DECLARED)
class ExpertRequest(TextRequest, ExpertArguments):
    """Resolved arguments of an expert, stored as `request.json`."""

    little_text_passes: ClassVar[float] = 4.0
    """In the three passes of a run that the time limits, the lower rate learns too little
    (docs/log/experts.md, 2026-11-29).
    """

    width: int


def expert_request(arguments: ExpertArguments) -> ExpertRequest:
    """Return the arguments with the defaults that depend on the layers, and a time budget, filled
    in.
    """
    possible = layers_in(resolve(arguments.base))
    recipe = recipe_from(parse_layers(arguments.layers, possible)[0])
    minutes = arguments.minutes
    if minutes is None and arguments.tokens is None:
        minutes = DEFAULT_MINUTES
    resolved = {
        "name": arguments.named(),
        "width": arguments.width or recipe.width,
        "minutes": minutes,
        "row_length": row_length_for(arguments),
        "batch_rows": arguments.batch_rows or recipe.batch_rows,
        "learning_rate": arguments.learning_rate or recipe.learning_rate,
        "little_text_rate": arguments.learning_rate or recipe.little_text_rate,
    }
    return ExpertRequest(**{**vars(arguments), **resolved})


def recipe_from(first: int) -> Recipe:
    """Return the recipe for an expert whose lowest layer is `first`."""
    return CACHED if first > 0 else WHOLE
