"""Positional encodings. To add one, write it in its own file and add a row to the table.

An encoding can act on the embeddings (learned), on queries and keys (rope), or on the attention
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
    """A kind of positional encoding.

    Attributes:
        positions: makes the part that the model owns.
        score_bias: makes the part that each layer owns; None: the encoding has no score bias.
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
