"""A training run that takes a second, as a script that tests can kill:
`python tiny_run.py FOLDER STEPS [PAUSE]`.
"""

import sys
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from deepseek.train.loop.loop import LoopConfig, LossOutput, train
from deepseek.train.loop.optim import OptimConfig
from deepseek.train.loop.progress import ProgressBar


class Numbers:
    """Batches that depend only on their position."""

    def __init__(self) -> None:
        self.place = 0

    def next(self) -> Tensor:
        generator = torch.Generator().manual_seed(self.place)
        self.place += 1
        return torch.randn(8, 6, generator=generator)

    def state(self) -> dict[str, int]:
        return {"place": self.place}

    def load(self, state: dict[str, int]) -> None:
        self.place = state["place"]


class Regression:
    """Learn to sum, with dropout so that the random state matters; `spoil` makes chosen steps
    non-finite.
    """

    def __init__(self, pause: float = 0.0, spoil: frozenset[int] = frozenset()) -> None:
        torch.manual_seed(1)
        self.net = nn.Sequential(nn.Linear(6, 16), nn.Tanh(), nn.Dropout(0.2), nn.Linear(16, 1))
        self.parameters = dict(self.net.named_parameters())
        self.pause, self.spoil = pause, spoil

    def loss(self, batch: Tensor, step: int) -> LossOutput:
        time.sleep(self.pause)
        factor = float("nan") if step in self.spoil else 1.0
        return LossOutput(
            (self.net(batch)[:, 0] - batch.sum(-1)).square().mean() * factor, len(batch)
        )

    def evaluate(self) -> dict[str, float]:
        self.net.eval()
        batch = torch.eye(6)
        with torch.no_grad():
            loss = float((self.net(batch)[:, 0] - batch.sum(-1)).square().mean())
        self.net.train()
        return {"held_out_loss": loss}


class Overfitting(Regression):
    """The same task; its held-out loss is lowest at a point on the way to the optimum."""

    def evaluate(self) -> dict[str, float]:
        with torch.no_grad():
            return {"held_out_loss": float((self.parameters["3.bias"] - 0.45).abs().sum()) + 1.0}

    def loss(self, batch: Tensor, step: int) -> LossOutput:
        return LossOutput((self.net(batch)[:, 0] - 3.0).square().mean(), len(batch))


def config(steps: int, **changes: Any) -> LoopConfig:
    return LoopConfig(
        OptimConfig(learning_rate=0.05),
        steps=steps,
        accumulate=2,
        **{"evaluate_every": 7, "checkpoint_every": 5, "seed": 4, **changes},
    )


if __name__ == "__main__":
    folder, steps, pause = Path(sys.argv[1]), int(sys.argv[2]), float(sys.argv[3])
    with ProgressBar(quiet=True) as bar:
        try:
            train(Regression(pause), Numbers(), config(steps), folder, progress=bar)
        except KeyboardInterrupt as stop:
            print(stop)
            sys.exit(130)
