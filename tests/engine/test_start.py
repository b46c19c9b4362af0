"""An engine starts with the fastest runner that supports the model, with experts plugged."""

from pathlib import Path

import pytest
import torch
from tiny_expert import save_base, save_expert

from deepseek.compiled.runner import CompiledRunner
from deepseek.engine.load import load
from deepseek.engine.request import Request
from deepseek.engine.sampler import Sampling
from deepseek.engine.start import start_engine
from deepseek.engine.torch_runner import TorchRunner
from deepseek.errors import PackError

PROMPT = tuple(range(10, 41))


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model whose head width the compiled runner supports."""
    return save_base(tmp_path_factory.mktemp("wide"), head_dim=64)


@pytest.mark.parametrize("int8", [True, False])
def test_weights_are_rounded_only_where_that_is_wanted_and_possible(
    wide: Path, base_folder: Path, int8: bool
) -> None:
    for folder, runner in (
        (wide, CompiledRunner if int8 else TorchRunner),
        (base_folder, TorchRunner),
    ):
        with start_engine(folder, int8=int8) as engine:
            assert type(engine.runner) is runner
            # A warm-up request has compiled everything.
            assert engine.stats().finished == {"length": 1}


@pytest.mark.parametrize("int8", [True, False])
def test_only_steps_that_are_taken_are_reported(wide: Path, base_folder: Path, int8: bool) -> None:
    for folder, compiled in ((wide, int8), (base_folder, False)):
        steps: list[str] = []
        start_engine(
            folder, int8=int8, progress=lambda done, total, step, steps=steps: steps.append(step)
        ).close()
        assert any("loading" in step for step in steps)
        assert any("packing" in step for step in steps) == compiled
        assert any("compiling" in step for step in steps) == compiled


def test_unrounded_weights_write_what_generate_writes(wide: Path) -> None:
    with start_engine(wide, int8=False, max_running=2) as engine:
        written = [
            event.token_id for event in engine.submit(Request(PROMPT, Sampling(8), ignore_end=True))
        ]
        row = engine.model.generate(
            torch.tensor([PROMPT]), max_new_tokens=8, do_sample=False, eos_token_id=-1
        )[0]
    assert written == row[len(PROMPT) :].tolist()


def test_experts_speak_from_the_first_answer_on(wide: Path, tmp_path: Path) -> None:
    pack = save_expert(load(wide, dtype="float32"), "always", tmp_path)
    with start_engine(wide, experts=[pack]) as engine:
        assert {
            event.expert for event in engine.submit(Request(PROMPT, Sampling(5), ignore_end=True))
        } == {"always"}
    with pytest.raises(PackError, match="nowhere"):
        start_engine(wide, experts=["nowhere"])
