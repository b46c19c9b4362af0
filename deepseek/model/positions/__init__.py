"""How a model knows the order of its tokens. One protocol, one table; a new kind is one file and
one row.

A kind may act in three places: on the embeddings (learned), on queries and keys (rope), on the
scores (alibi, dpe).
"""

from collections.abc import Callable
from typing import NamedTuple

from deepseek.model.config import ModelConfig
from deepseek.model.positions.alibi import AlibiBias
from deepseek.model.positions.dynamic import DynamicBias
from deepseek.model.positions.learned import LearnedPositions
from deepseek.model.positions.protocol import Positions, PreparedPositions, ScoreBiasSource
from deepseek.model.positions.rope import Rope


class Encoding(NamedTuple):
    """A kind of encoding: what the model owns of it and, where it acts on scores, what each layer
    owns.
    """

    positions: Callable[[ModelConfig], Positions]
    score_bias: Callable[[ModelConfig], ScoreBiasSource] | None = None


POSITIONS: dict[str, Encoding] = {
    "alibi": Encoding(Positions, AlibiBias),
    "dpe": Encoding(Rope, DynamicBias),
    "learned": Encoding(LearnedPositions),
    "none": Encoding(Positions),
    "rope": Encoding(Rope),
}

__all__ = ["POSITIONS", "Encoding", "Positions", "PreparedPositions", "ScoreBiasSource"]
