"""With mixed dtypes, decoding uses the reference instead of one kernel for many sequences."""

from typing import Any

import pytest
import torch
from tiny_model import tiny_model

from deepseek.engine.torch_runner import TorchRunner
from deepseek.model.transformer import DeepSeekModel
from deepseek.runner import Chunk

IDS = torch.randint(3, 90, (30,), generator=torch.Generator().manual_seed(1)).tolist()


def decoded(model: DeepSeekModel, prompt: bool, steps: bool) -> torch.Tensor:
    """Return the logits of two sequences that are decoded token by token.

    Args:
        model: the model.
        prompt: whether prompts are processed under autocast in bf16.
        steps: whether tokens are decoded under it.
    """
    runner = TorchRunner(model)
    states = [runner.start(None, 64) for _ in range(2)]
    with torch.autocast("cpu", torch.bfloat16, enabled=prompt):
        for state, length in zip(states, (20, 9), strict=True):
            runner.forward([Chunk(state, IDS[:length], 0)])
    with torch.autocast("cpu", torch.bfloat16, enabled=steps):
        logits = [
            runner.forward([Chunk(state, [token]) for state in states]).logits_RV
            for token in IDS[20:]
        ]
    return torch.cat(logits)


@pytest.mark.parametrize("mixed", [(True, True), (False, True)], ids=str)
@pytest.mark.parametrize(
    ("kind", "changes"),
    [("dense", {}), ("window", {}), ("dpe", {}), ("lsh", {"lsh_rounds": 1})],
    ids=["dense", "window", "dpe", "lsh"],
)
def test_autocast_leaves_keys_and_values_of_several_dtypes(
    kind: str, changes: dict[str, Any], mixed: tuple[bool, bool]
) -> None:
    model = tiny_model(kind, **changes).model
    exact = decoded(model, False, False)
    assert (decoded(model, *mixed) - exact).norm() < 0.05 * exact.norm()
