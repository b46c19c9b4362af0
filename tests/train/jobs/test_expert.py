"""One call from text to pack: it learns, does not change the base, resumes to the same bytes, and
reports errors.
"""

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from new_home import new_home

from deepseek.checkpoint.store import read_json
from deepseek.data import TokenShards
from deepseek.errors import ConfigError, DataError, TrainError, UserError
from deepseek.model import stored
from deepseek.model.transformer import DeepSeekModel
from deepseek.packs.pack import read_pack
from deepseek.train.gates.replay import Replay
from deepseek.train.jobs import text_run
from deepseek.train.jobs.arguments import ExpertArguments
from deepseek.train.jobs.expert import train_expert
from deepseek.train.jobs.expert_request import expert_request
from deepseek.train.jobs.plan import TrainingPlan
from deepseek.train.loop.layers import parse_layers

DIALS: dict[str, Any] = {
    "name": "words",
    "layers": "last:2",
    "width": 24,
    "tokens": 3000,
    "epochs": 6,
    "row_length": 32,
    "batch_rows": 4,
    "learning_rate": 1e-2,
    "held_out_tokens": 400,
    "quiet": True,
}


def run(base: Path, text: Path, folder: Path, **dials: Any) -> Path:
    return train_expert(
        str(base),
        from_folder=text,
        out=folder / "words.safetensors",
        run_folder=folder / "run",
        **{**DIALS, **dials},
    )


@pytest.mark.slow
def test_the_expert_learns_its_text_and_the_pack_says_so(
    tiny_base: Path, text_folder: Path, tmp_path: Path
) -> None:
    pack = read_pack(run(tiny_base, text_folder, tmp_path))
    metric = pack.manifest.metrics["held-out"]
    assert metric.after < 0.95 * metric.before
    assert pack.manifest.layers == (2, 3) and pack.manifest.width == 24
    result = read_json(tmp_path / "run" / "result.json")
    assert result["after"] == metric.after and result["peak_memory"] > 1 << 20
    assert not (tmp_path / "run" / "trunk").exists(), "the trunk cache is deleted at the end"


def test_reported_losses_are_those_of_base_and_plugged_model(
    tiny_base: Path, text_folder: Path, tmp_path: Path
) -> None:
    from deepseek.data import RowLoader
    from deepseek.model.experts import ExpertModule
    from deepseek.train.loop.losses import held_out_loss

    pack = read_pack(run(tiny_base, text_folder, tmp_path))
    model = DeepSeekModel.from_pretrained(tiny_base)
    loader = RowLoader(TokenShards(tmp_path / "run" / "corpus" / "held-out"), 4, 32, seed=0)
    rows = loader.order(0, read_json(tmp_path / "run" / "plan.json")["plan"]["held_out_rows"])
    metric = pack.manifest.metrics["held-out"]
    assert held_out_loss(model, [loader.rows(rows)]).loss == pytest.approx(metric.before, abs=1e-5)
    with model.experts.forced(ExpertModule.from_pack(pack, torch.float32)):
        assert held_out_loss(model, [loader.rows(rows)]).loss == pytest.approx(
            metric.after, abs=5e-3
        )


@pytest.mark.slow
def test_a_base_whose_weights_stay_in_its_files_gives_the_same_pack(
    tiny_base: Path, text_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pack = run(tiny_base, text_folder, tmp_path / "loaded", epochs=1, tokens=1000)
    monkeypatch.setattr(text_run, "LOADED_SHARE", 0.0)
    monkeypatch.setattr(stored, "KEPT_SHARE", 0.0)
    with monkeypatch.context() as patched:
        patched.setattr(text_run, "load_language_model", lambda *_, **__: pytest.fail("loaded"))
        again = run(tiny_base, text_folder, tmp_path / "stored", epochs=1, tokens=1000)
    assert again.read_bytes() == pack.read_bytes()


@pytest.mark.parametrize("layers", ["all", "0,2"])
def test_without_a_frozen_trunk_nothing_is_cached(
    tiny_base: Path, text_folder: Path, tmp_path: Path, layers: str
) -> None:
    pack = read_pack(run(tiny_base, text_folder, tmp_path, layers=layers, epochs=1, tokens=1000))
    assert pack.manifest.layers == ((0, 1, 2, 3) if layers == "all" else (0, 2))
    assert pack.manifest.metrics["held-out"].after < pack.manifest.metrics["held-out"].before


@pytest.mark.slow
def test_killed_twice_and_called_again_gives_the_same_pack(
    tiny_base: Path, text_folder: Path, tmp_path: Path
) -> None:
    whole = run(tiny_base, text_folder, tmp_path / "whole").read_bytes()
    folder = tmp_path / "killed"
    script = (
        "import sys, pathlib; sys.path.insert(0, sys.argv[1]); from train.jobs.test_expert import run; "
        "run(*map(pathlib.Path, sys.argv[2:5]))"
    )
    arguments = [str(Path(__file__).parents[2]), str(tiny_base), str(text_folder), str(folder)]
    for mark in ("trunk/train/done.bin", "training/checkpoints/step-*"):
        process = subprocess.Popen([sys.executable, "-c", script, *arguments])
        while process.poll() is None and not list((folder / "run").glob(mark)):
            time.sleep(0.005)
        process.send_signal(signal.SIGKILL)
        process.wait()
    assert run(tiny_base, text_folder, folder).read_bytes() == whole


def test_a_resumed_run_goes_on_with_its_paces_and_counts_its_time(
    tiny_base: Path, text_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On another device the paces would differ in the last bits."""
    measured = iter([0.5, 0.5000001])

    def paces(_model: object, layers: tuple[int, ...], *_: object) -> dict[str, float]:
        return dict.fromkeys((f"ffn.{layer}.down_proj" for layer in layers), next(measured))

    def stop(*_: object) -> None:
        time.sleep(0.5)
        raise KeyboardInterrupt

    monkeypatch.setattr("deepseek.train.jobs.expert.output_paces", paces)
    with monkeypatch.context() as patch:
        patch.setattr("deepseek.train.jobs.expert.ExpertRun.calibrate", stop)
        with pytest.raises(KeyboardInterrupt):
            run(tiny_base, text_folder, tmp_path)
    kept = read_json(tmp_path / "run" / "elapsed.json")["seconds"]
    assert kept > 0
    run(tiny_base, text_folder, tmp_path)
    assert read_json(tmp_path / "run" / "result.json")["seconds"] > kept


def test_rows_may_be_longer_than_the_text_that_checks_the_gates(
    tiny_base: Path, text_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("deepseek.train.jobs.expert.UNSEEN_TOKENS", 200)
    assert run(tiny_base, text_folder, tmp_path, tokens=600, epochs=1, row_length=256).is_file()


def test_what_stops_a_run_is_not_what_is_reported(
    tiny_base: Path, text_folder: Path, tmp_path: Path
) -> None:
    run(tiny_base, text_folder, tmp_path, epochs=1)
    documents = {}
    for part in ("train", "validation", "held-out"):
        shards = TokenShards(tmp_path / "run" / "corpus" / part)
        bounds = zip(shards.offsets[:-1].tolist(), shards.offsets[1:].tolist(), strict=True)
        documents[part] = {tuple(shards.ids_N[first:last].tolist()) for first, last in bounds}
    assert all(documents.values())
    assert not documents["validation"] & documents["held-out"]
    assert not documents["train"] & (documents["validation"] | documents["held-out"])


def test_a_base_that_cannot_gain_gets_an_expert_that_changes_nothing(
    tiny_base: Path, text_folder: Path, tmp_path: Path
) -> None:
    pack = read_pack(run(tiny_base, text_folder, tmp_path, learning_rate=1e-9, epochs=1))
    metric = pack.manifest.metrics["held-out"]
    assert metric.after <= metric.before and not pack.manifest.helps
    assert pack.manifest.verdict == "no better than the base"


def test_a_finished_run_is_not_done_again(
    tiny_base: Path, text_folder: Path, tmp_path: Path
) -> None:
    pack = run(tiny_base, text_folder, tmp_path, epochs=1)
    before = pack.stat().st_mtime_ns
    assert run(tiny_base, text_folder, tmp_path, epochs=1).stat().st_mtime_ns == before


@pytest.fixture
def no_public_text(monkeypatch: pytest.MonkeyPatch) -> None:
    """It takes long to create for a new base."""
    monkeypatch.setattr(Replay, "beside", lambda *_: pytest.fail("public text was asked for"))


@pytest.mark.usefixtures("no_public_text")
@pytest.mark.parametrize("layers", ["all", "last:2"])
def test_dry_run_measures_and_changes_nothing(
    tiny_base: Path,
    text_folder: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    layers: str,
) -> None:
    run(tiny_base, text_folder, tmp_path, layers=layers, dry_run=True, quiet=False)
    assert "steps, about" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("dials", "error", "words"),
    [
        ({"layers": "last:9"}, ConfigError, "the model has 4 layers"),
        ({"layers": "top"}, ConfigError, "write all, last:3"),
        ({"name": "no/slash"}, UserError, "name"),
        ({"licence": "my own"}, UserError, "licence"),
        ({"tokens": 64}, TrainError, "plan has 64 tokens .* give more tokens"),
    ],
)
@pytest.mark.usefixtures("no_public_text")
def test_bad_dials_are_one_sentence(
    tiny_base: Path,
    text_folder: Path,
    tmp_path: Path,
    dials: dict[str, Any],
    error: type[Exception],
    words: str,
) -> None:
    with pytest.raises(error, match=words):
        run(tiny_base, text_folder, tmp_path, **dials)


def test_too_little_time_is_refused_in_one_sentence(
    tiny_base: Path, text_folder: Path, tmp_path: Path
) -> None:
    with pytest.raises(TrainError, match=r"^0 seconds .* give more minutes"):
        run(tiny_base, text_folder, tmp_path, tokens=None, minutes=1e-5)


def test_a_refused_call_leaves_the_name_free(
    tiny_base: Path, text_folder: Path, tmp_path: Path
) -> None:
    with pytest.raises(DataError, match="No text is given"):
        train_expert(str(tiny_base), run_folder=tmp_path / "run", **DIALS)
    with pytest.raises(DataError, match="does not exist"):
        run(tiny_base, tmp_path / "nowhere", tmp_path)
    assert run(tiny_base, text_folder, tmp_path, epochs=1).is_file()


def test_too_little_text_is_refused_before_training(
    tiny_base: Path, text_folder: Path, tmp_path: Path
) -> None:
    few = tmp_path / "few"
    few.mkdir()
    for file in sorted(text_folder.iterdir())[:3]:
        (few / file.name).write_text(file.read_text()[:200])
    with pytest.raises(DataError, match="at least 256 of each"):
        run(tiny_base, few, tmp_path)


@pytest.mark.parametrize(
    ("passes", "asked", "used"), [(5, None, 2e-3), (3, None, 4e-3), (5, 4e-3, 4e-3)]
)
def test_many_passes_over_little_text_have_a_lower_rate_unless_one_is_asked_for(
    tiny_base: Path,
    text_folder: Path,
    tmp_path: Path,
    passes: int,
    asked: float | None,
    used: float,
) -> None:
    run(tiny_base, text_folder, tmp_path, epochs=passes, learning_rate=asked)
    folder = tmp_path / "run"
    assert read_json(folder / "training" / "config.json")["optim"]["learning_rate"] == used
    stored = read_json(folder / "request.json")
    assert stored["learning_rate"] == 4e-3, "that of enough text, as in runs of earlier versions"


@pytest.mark.parametrize(
    ("asked", "little", "enough"),
    [({}, 2e-3, 4e-3), ({"layers": "all"}, 3e-3, 3e-3), ({"learning_rate": 0.1}, 0.1, 0.1)],
)
def test_the_rate_follows_from_the_text_unless_it_is_asked_for(
    tiny_base: Path, asked: dict[str, Any], little: float, enough: float
) -> None:
    arguments = {"base": str(tiny_base), "name": "words", "from_folder": ".", "row_length": 100}
    request = expert_request(ExpertArguments(**arguments, **asked))
    plans = [TrainingPlan(rows, 1, 1, 5 * rows, 2, 1.0) for rows in (2, 399, 400)]
    assert [request.peak_rate(plan) for plan in plans] == [little, little, enough]


def test_another_setting_in_the_same_run_folder_is_refused(
    tiny_base: Path, text_folder: Path, tmp_path: Path
) -> None:
    run(tiny_base, text_folder, tmp_path, epochs=1)
    with pytest.raises(TrainError, match=r"another learning_rate \(0.01, now 0.02\)"):
        run(tiny_base, text_folder, tmp_path, epochs=1, learning_rate=0.02)


def start(base: Path, text: Path, home: Path) -> subprocess.Popen[str]:
    """Start `deepseek expert train --name words` in a process with this home, long enough for
    another process to compete.
    """
    longer = {**DIALS, "epochs": 40, "learning_rate": 1e-3}
    dials = {name: value for name, value in longer.items() if name != "quiet"}
    options = [f"--{name.replace('_', '-')}={value}" for name, value in dials.items()]
    words = ["expert", "train", f"--base={base}", f"--from-folder={text}", *options]
    return subprocess.Popen(
        [sys.executable, "-m", "deepseek", *words],
        env={**os.environ, "DEEPSEEK_HOME": str(home)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


@pytest.mark.slow
def test_two_trainings_of_one_name_on_different_text_at_once(
    tiny_base: Path, text_folder: Path, tmp_path: Path
) -> None:
    other_text = tmp_path / "other"
    other_text.mkdir()
    for file in text_folder.iterdir():
        (other_text / file.name).write_text(file.read_text().upper())
    texts = {"first": text_folder, "second": other_text}
    home = new_home(tmp_path / "home")
    processes = {name: start(tiny_base, text, home) for name, text in texts.items()}
    outputs = {name: process.communicate(timeout=600) for name, process in processes.items()}
    codes = {name: process.returncode for name, process in processes.items()}
    assert sorted(codes.values()) == [0, 2], outputs
    winner, loser = sorted(codes, key=codes.__getitem__)
    error = outputs[loser][1].splitlines()[-1]
    assert f"is in use by process {processes[winner].pid} on " in error
    assert "Traceback" not in outputs[loser][1]
    corpus = home / "runs" / "words" / "corpus"
    pack = read_pack(home / "experts" / "words.safetensors")
    assert pack.manifest.data == (TokenShards(corpus / "train").digest,)
    request = read_json(home / "runs" / "words" / "request.json")
    assert request["source"]["folder"] == str(texts[winner])
    metric = pack.manifest.metrics["held-out"]
    assert metric.after < metric.before


def test_changed_text_under_the_same_name_is_refused(
    tiny_base: Path, text_folder: Path, tmp_path: Path
) -> None:
    text = tmp_path / "text"
    shutil.copytree(text_folder, text)
    pack = run(tiny_base, text, tmp_path, epochs=1, layers="last:1")
    before = pack.read_bytes()
    (text / "00.txt").write_text("other words\n")
    with pytest.raises(TrainError, match="a run on another text, whose content has changed"):
        run(tiny_base, text, tmp_path, epochs=1, layers="last:1")
    assert pack.read_bytes() == before


def test_layer_lists() -> None:
    assert parse_layers("all", 4) == (0, 1, 2, 3)
    assert parse_layers("last:3", 30) == (27, 28, 29)
    assert parse_layers("0-2, 7,7", 8) == (0, 1, 2, 7)
    for wrong in ("last:0", "5-3", "8", "", "a-b"):
        with pytest.raises(ConfigError):
            parse_layers(wrong, 8)


def test_eval_names_the_loss_of_the_base_that_the_training_named(
    tiny_base: Path, text_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from deepseek.evaluate.quality import ReportedRows, compare, expert_texts

    monkeypatch.setenv("DEEPSEEK_HOME", str(new_home(tmp_path / "home")))
    folder = tmp_path / "home" / "runs" / "words"
    dials = {**DIALS, "epochs": 1, "tokens": 1000, "seed": 3}
    pack = train_expert(str(tiny_base), from_folder=text_folder, **dials)
    assert ReportedRows.of(folder) is not None
    assert ReportedRows.of(folder / "training") is None
    model = DeepSeekModel.from_pretrained(tiny_base)
    model.experts.plug(pack)
    metric = read_pack(pack).manifest.metrics["held-out"]
    (row,) = compare(model, expert_texts(["words"], ["words"]), max_tokens=64)
    assert row.before == pytest.approx(metric.before, rel=1e-5)
    assert row.alone == pytest.approx(metric.after, rel=5e-3)
    (other,) = compare(model, expert_texts(["words"], ["words"]), max_tokens=512, as_reported=False)
    assert other.before != pytest.approx(metric.before, rel=1e-5)


def test_a_pack_from_elsewhere_is_not_taken_for_its_namesake(
    tiny_base: Path, text_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from deepseek.evaluate.quality import trained_here

    dials = {**DIALS, "epochs": 1, "tokens": 1000}
    monkeypatch.setenv("DEEPSEEK_HOME", str(new_home(tmp_path / "home")))
    own = read_pack(train_expert(str(tiny_base), from_folder=text_folder, **dials)).manifest
    assert trained_here(own)
    assert not trained_here(own.model_copy(update={"data": ("0" * 64,)}))
    monkeypatch.setenv("DEEPSEEK_HOME", str(new_home(tmp_path / "other")))
    assert trained_here(own)
