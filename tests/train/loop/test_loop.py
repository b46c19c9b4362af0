"""The training loop: exact resumption after any interruption, skipped steps, clear errors."""

import errno
import json
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from train.loop.tiny_run import Numbers, Regression, config

from deepseek.checkpoint import store
from deepseek.errors import TrainError
from deepseek.train.loop import loop
from deepseek.train.loop.loop import LossOutput, TrainResult, train
from deepseek.train.loop.metrics import read_metrics
from deepseek.train.loop.position import MAX_SPIKES_IN_A_ROW
from deepseek.train.loop.progress import ProgressBar

STEPS = 24
SCRIPT = Path(__file__).with_name("tiny_run.py")


def run(folder: Path, steps: int = STEPS, task: Regression | None = None) -> TrainResult:
    return train(
        task or Regression(), Numbers(), config(steps), folder, progress=ProgressBar(quiet=True)
    )


def start(folder: Path, pause: float) -> "subprocess.Popen[str]":
    return subprocess.Popen(
        [sys.executable, str(SCRIPT), str(folder), str(STEPS), str(pause)],
        stdout=subprocess.PIPE,
        text=True,
    )


def wait_for_checkpoint(folder: Path, process: "subprocess.Popen[str]", limit: float = 120) -> None:
    deadline = time.monotonic() + limit
    while not list((folder / "checkpoints").glob("step-*")):
        assert process.poll() is None and time.monotonic() < deadline, (
            "the run ended before it wrote a checkpoint"
        )
        time.sleep(0.02)


def assert_same_end(folder: Path, other: Path) -> None:
    """The last states are bit for bit equal: weights, moments, random state, data position."""
    (tensors, meta), (other_tensors, other_meta) = (
        store.load_state(f / "checkpoints" / f"step-{STEPS:08d}") for f in (folder, other)
    )
    assert meta == other_meta
    assert tensors.keys() == other_tensors.keys()
    assert all(torch.equal(tensors[name], other_tensors[name]) for name in tensors)
    assert any(name.endswith("exp_avg_sq") for name in tensors) and "random.cpu" in tensors
    quiet = [
        [
            {k: v for k, v in record.items() if k != "tokens_per_second"}
            for record in read_metrics(f / "metrics.jsonl")
        ]
        for f in (folder, other)
    ]
    assert quiet[0] == quiet[1]


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("whole")
    process = start(folder, 0)
    assert process.wait() == 0
    process.communicate()
    return folder


def test_killed_and_started_again_ends_with_the_same_bits(
    uninterrupted: Path, tmp_path: Path
) -> None:
    process = start(tmp_path, 0.05)
    wait_for_checkpoint(tmp_path, process)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert process.returncode == -signal.SIGKILL
    again = start(tmp_path, 0)
    again.communicate()
    assert again.returncode == 0
    assert_same_end(tmp_path, uninterrupted)


def test_ctrl_c_finishes_the_step_and_says_how_to_go_on(
    uninterrupted: Path, tmp_path: Path
) -> None:
    process = start(tmp_path, 0.05)
    wait_for_checkpoint(tmp_path, process)
    process.send_signal(signal.SIGINT)
    message, _ = process.communicate()
    assert process.returncode == 130
    assert "nothing is lost; the same call resumes the run" in message
    stopped_at = int(message.split("step ")[1].split()[0])
    assert (tmp_path / "checkpoints" / f"step-{stopped_at:08d}").is_dir()
    again = start(tmp_path, 0)
    again.communicate()
    assert_same_end(tmp_path, uninterrupted)


def test_damaged_newest_checkpoint_gives_way_to_the_one_before(
    uninterrupted: Path, tmp_path: Path
) -> None:
    run(tmp_path)
    newest = tmp_path / "checkpoints" / f"step-{STEPS:08d}" / "state.safetensors"
    newest.write_bytes(newest.read_bytes()[:-8])
    run(tmp_path)
    assert_same_end(tmp_path, uninterrupted)


def test_training_reduces_the_loss_and_leaves_a_readable_folder(tmp_path: Path) -> None:
    result = run(tmp_path, 60)
    records = read_metrics(tmp_path / "metrics.jsonl")
    held_out = [record["held_out_loss"] for record in records if "held_out_loss" in record]
    assert held_out[-1] == result.metrics["held_out_loss"] < 0.2 * held_out[0]
    assert result.position.tokens == 60 * 2 * 8
    assert (tmp_path / "loss.png").read_bytes().startswith(b"\x89PNG")
    assert len(list((tmp_path / "checkpoints").iterdir())) == 2
    assert json.loads((tmp_path / "config.json").read_text())["steps"] == 60


class Parts(Regression):
    """Rows in two parts of very different size: the result must not depend on the split."""

    def __init__(self, sizes: list[int]) -> None:
        super().__init__()
        self.net.eval()  # no dropout, whose mask would depend on the parts' shapes
        rows = Numbers().next()
        self.parts = rows.split(sizes)

    def loss(self, batch: torch.Tensor, step: int) -> LossOutput:
        return super().loss(self.parts[step % len(self.parts)], step)


@pytest.mark.parametrize("sizes", [[8], [7, 1], [1, 3, 4]])
def test_each_target_counts_the_same_in_whichever_part_it_is(
    sizes: list[int], tmp_path: Path
) -> None:
    whole, cut = Parts([8]), Parts(sizes)
    for task in (whole, cut):
        loop_config = replace(config(3), accumulate=len(task.parts), evaluate_every=100)
        folder = tmp_path / str(len(task.parts)) / str(task is whole)
        train(task, Numbers(), loop_config, folder, progress=ProgressBar(quiet=True))
    for name, parameter in whole.parameters.items():
        assert torch.allclose(parameter, cut.parameters[name], rtol=1e-4, atol=1e-6)


def test_non_finite_steps_are_skipped_and_counted(tmp_path: Path) -> None:
    clean, spoiled = Regression(), Regression(spoil=frozenset({0, 1}))
    result = run(tmp_path / "spoiled", 1, spoiled)
    assert (result.position.step, result.position.skipped) == (1, 1)
    for name, parameter in clean.parameters.items():
        assert torch.equal(parameter, spoiled.parameters[name]), (
            "a skipped step moved the parameters"
        )
    half = run(tmp_path / "half", 20, Regression(spoil=frozenset({10})))
    assert half.position.skipped == 1
    assert all(parameter.isfinite().all() for parameter in spoiled.parameters.values())


def test_divergence_is_reported_not_endured(tmp_path: Path) -> None:
    with pytest.raises(TrainError, match=r"lower learning rate than 0\.05"):
        run(tmp_path, 100, Regression(spoil=frozenset(range(30, 300))))


def test_another_configuration_in_the_same_folder_is_refused(tmp_path: Path) -> None:
    run(tmp_path, 5)
    with pytest.raises(TrainError, match=r"another steps \(5, now 6\)"):
        run(tmp_path, 6)


def test_full_disk_is_one_sentence_and_the_old_checkpoint_stays(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = store.save_state

    def full(folder: Path, *arguments: object) -> None:
        if folder.name == "step-00000010":
            raise OSError(errno.ENOSPC, "No space left on device")
        original(folder, *arguments)

    monkeypatch.setattr(store, "save_state", full)
    with pytest.raises(TrainError, match=r"is full, the checkpoint step-00000010 was not written"):
        run(tmp_path)
    kept = store.latest_state(tmp_path / "checkpoints")
    assert kept is not None and kept.name == "step-00000005"


class Jump(Regression):
    """Losses that jump at chosen steps."""

    def __init__(self, factors: dict[int, float]) -> None:
        super().__init__()
        self.factors = factors

    def loss(self, batch: torch.Tensor, step: int) -> loop.LossOutput:
        found = super().loss(batch, step)
        return loop.LossOutput(found.loss * self.factors.get(step // 2, 1.0), found.tokens)


def test_a_spike_is_skipped_and_a_new_level_is_learned_from(tmp_path: Path) -> None:
    spike = run(tmp_path / "spike", 100, Jump({90: 1e3}))
    assert spike.position.skipped == 1
    level = run(tmp_path / "level", 100, Jump(dict.fromkeys(range(80, 100), 1e3)))
    assert level.position.skipped == MAX_SPIKES_IN_A_ROW
    assert run(tmp_path / "usual", 100).position.skipped == 0


def test_buffers_and_hooks_belong_to_the_run(tmp_path: Path) -> None:
    task, count, seen = Regression(), torch.zeros(1), []

    def stepped(_: float) -> dict[str, float]:
        count.add_(1)
        return {"count": float(count)}

    hooks = loop.Hooks({"count": count}, stepped, seen.append)
    quiet = ProgressBar(quiet=True)
    train(task, Numbers(), config(10), tmp_path, progress=quiet, hooks=hooks)
    assert [
        record["count"] for record in read_metrics(tmp_path / "metrics.jsonl") if "count" in record
    ] == [*range(1, 11)]
    assert seen == [0, 7, 10]
    count.zero_()
    train(task, Numbers(), config(10), tmp_path, progress=quiet, hooks=hooks)
    assert count == 10, "a resumed run has its buffers again"
