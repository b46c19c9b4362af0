"""A run folder is resumed only by the same request on the same inputs."""

import json
import os
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from threading import Thread
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from train.loop.fake_job import FakeJob, FakeRequest, KilledError, PoorJob, asked, guarded

from deepseek.checkpoint.store import home, read_json, write_json
from deepseek.errors import ConfigError, DataError, TrainError, UserError
from deepseek.train.loop.past_runs import summary
from deepseek.train.loop.run_lock import run_lock
from deepseek.train.loop.runs import Run, check_config, run_once


def call(folder: Path, text: str, seed: int = 0, killed: str = "", dry_run: bool = False) -> Any:
    """Run the fake job and return the texts in its result."""
    request = FakeRequest({"text": text, "seed": seed, "killed": killed})
    out = folder / "out.json"
    inputs = {"text": text}
    run = Run({"seed": seed}, out, folder / "run", True, dry_run, lambda: inputs, makes_file=True)
    run_once(FakeJob, request, run)
    return read_json(out) if out.is_file() else None


def test_a_text_that_was_not_enough_is_read_again(tmp_path: Path) -> None:
    out = tmp_path / "out.json"
    inputs = {"text": "of a git history whatever it holds"}
    run = Run({"seed": 0}, out, tmp_path / "run", True, False, lambda: inputs, makes_file=True)
    asked = {"seed": 0, "killed": ""}
    with pytest.raises(DataError, match="too little"):
        run_once(PoorJob, FakeRequest({**asked, "text": "short"}), run)
    assert not run.folder.exists(), "a refused run is listed"
    run_once(PoorJob, FakeRequest({**asked, "text": "long enough"}), run)
    assert read_json(out) == ["long enough", "long enough"]


def test_a_refused_run_leaves_what_is_not_its_own(tmp_path: Path) -> None:
    run = Run({"seed": 0}, tmp_path / "out.json", tmp_path / "run", True, False, makes_file=True)
    run.folder.mkdir()
    (run.folder / "notes.txt").touch()
    with pytest.raises(DataError, match="too little"):
        run_once(PoorJob, FakeRequest({"seed": 0, "killed": "", "text": "short"}), run)
    assert [path.name for path in run.folder.iterdir()] == ["notes.txt"]


@pytest.mark.parametrize("killed", ["training", ""])
def test_a_run_of_another_command_is_named_whatever_else_differs(
    tmp_path: Path, killed: str
) -> None:
    def start(command: str, stored: dict[str, Any], killed: str = "", dry_run: bool = False) -> Any:
        request = FakeRequest({"text": "one", "seed": 0, "killed": killed})
        out = tmp_path / "out.json"
        run = Run(stored, out, tmp_path / "run", True, dry_run, makes_file=True, command=command)
        return run_once(FakeJob, request, run)

    with suppress(KilledError):
        start("expert train", {"seed": 0}, killed)
    for dry_run in (False, True):
        with pytest.raises(TrainError, match="a run of `deepseek expert train`; give another --na"):
            start("adapt", {"domain": "", "seed": 0}, dry_run=dry_run)
    assert start("expert train", {"seed": 0}) == tmp_path / "out.json"


def test_a_run_of_an_older_version_states_no_command(tmp_path: Path) -> None:
    with pytest.raises(KilledError):
        call(tmp_path, "one", killed="training")
    started = tmp_path / "run" / "start.json"
    write_json(started, {k: v for k, v in read_json(started).items() if k != "command"})
    inputs = {"text": "one"}
    out = tmp_path / "out.json"
    run = Run({"seed": 0}, out, started.parent, True, False, lambda: inputs, True, "adapt")
    run_once(FakeJob, FakeRequest({"text": "one", "seed": 0, "killed": ""}), run)
    assert read_json(started)["command"] == "adapt"


def test_an_expert_whose_text_has_changed_is_to_be_updated(tmp_path: Path) -> None:
    folder = home() / "runs" / "poems"
    for killed, mend in (
        ("training", "restore it to resume"),
        ("", "expert train --update poems`"),
    ):
        with suppress(KilledError):
            run_once(FakeJob, asked(killed=killed), guarded(folder, tmp_path / "x", "expert train"))
        with pytest.raises(TrainError, match=mend):
            run_once(FakeJob, asked(), guarded(folder, tmp_path / "x", "expert train", "two"))
    elsewhere = guarded(tmp_path / "run", tmp_path / "y", "expert train")
    run_once(FakeJob, asked(), elsewhere)
    with pytest.raises(TrainError, match="restore it to resume"):  # no name, so no update
        run_once(FakeJob, asked(), replace(elsewhere, inputs=lambda: {"text": "two"}))


def test_a_base_means_the_same_from_any_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Earlier versions stored relative paths unchanged."""
    (tmp_path / "m").mkdir()
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "request.json"
    write_json(path, {"base": "m"})
    check_config(path, {"base": os.fspath(tmp_path / "m")})
    with pytest.raises(TrainError, match="another base"):
        check_config(path, {"base": "gpt2"})
    write_json(path, {"base": "gpt2"})
    check_config(path, {"base": "gpt2"})


STARTS = st.lists(
    st.tuples(
        st.sampled_from(["one", "two"]),
        st.integers(0, 1),
        st.sampled_from(["", "corpus", "request", "training", "end"]),
    ),
    min_size=1,
    max_size=6,
)


@settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(starts=STARTS)
def test_whatever_is_killed_and_started_texts_are_never_mixed(
    starts: list[tuple[str, int, str]], tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = tmp_path_factory.mktemp("runs")
    for text, seed, killed in starts:
        try:
            assert call(folder, text, seed, killed) == [text, text]
        except (KilledError, TrainError):
            continue


def test_a_begun_run_refuses_other_text_and_a_finished_one_too(tmp_path: Path) -> None:
    with pytest.raises(KilledError):
        call(tmp_path, "one", killed="training")
    for dry_run in (False, True):
        with pytest.raises(TrainError, match="a run on another text, whose content has changed"):
            call(tmp_path, "two", dry_run=dry_run)
    assert call(tmp_path, "one") == ["one", "one"]
    with pytest.raises(TrainError, match="give another name"):
        call(tmp_path, "two")
    assert call(tmp_path, "one") == ["one", "one"]


def test_a_run_that_never_began_leaves_no_early_stage_to_another(tmp_path: Path) -> None:
    with pytest.raises(KilledError):
        call(tmp_path, "one", killed="request")
    assert call(tmp_path, "two") == ["two", "two"]


def test_a_finished_run_outlives_its_text(tmp_path: Path) -> None:
    call(tmp_path, "one")

    def gone() -> dict[str, str]:
        raise DataError("it does not exist.")

    run = Run({"seed": 0}, tmp_path / "out.json", tmp_path / "run", True, False, gone, True)
    assert run_once(FakeJob, {}, run) == tmp_path / "out.json"


def test_while_another_writes_nothing_is_touched(tmp_path: Path) -> None:
    with pytest.raises(KilledError):
        call(tmp_path, "one", killed="training")
    before = {path: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()}
    refusals: list[UserError] = []

    def second() -> None:
        try:
            call(tmp_path, "two", killed="corpus")
        except UserError as error:
            refusals.append(error)

    with run_lock(tmp_path / "run"):
        thread = Thread(target=second)
        thread.start()
        thread.join()
    assert len(refusals) == 1 and "is in use by process" in str(refusals[0])
    after = {path: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()}
    assert after == before


@pytest.mark.parametrize("dry_run", [False, True])
def test_a_result_that_cannot_be_written_is_found_at_the_start(
    tmp_path: Path, dry_run: bool
) -> None:
    (tmp_path / "file").touch()
    for made in (tmp_path, tmp_path / "file" / "x", Path("/proc/x"), tmp_path / ("x" * 300)):
        run = Run({}, made, tmp_path / "run", True, dry_run, makes_file=True)
        with pytest.raises(ConfigError, match="cannot be written"):
            run_once(FakeJob, {}, run)
        with pytest.raises(ConfigError, match="cannot be written"):
            run_once(FakeJob, {}, Run({}, tmp_path / "out", tmp_path / "file", True, dry_run))
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


JSON = st.recursive(
    st.none() | st.booleans() | st.floats() | st.text(max_size=5),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3)
    ),
    max_leaves=8,
)


@settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    name=st.sampled_from(["start.json", "request.json", "result.json"]),
    content=JSON.map(json.dumps) | st.text(max_size=9),
)
def test_a_spoilt_record_is_a_user_error_or_ignored(
    name: str, content: str, tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = tmp_path_factory.mktemp("runs")
    (folder / "run").mkdir()
    (folder / "run" / name).write_text(content)
    try:
        call(folder, "one")
    except UserError as error:
        assert str(folder) in str(error)
    try:
        assert summary(folder / "run")["state"] in ("finished", "unfinished")
    except UserError as error:
        assert name in str(error)


def test_progress_says_that_a_run_is_finished(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    call(tmp_path, "one")
    run = Run({"seed": 0}, tmp_path / "out.json", tmp_path / "run", False, False, makes_file=True)
    run_once(FakeJob, {}, run)
    assert "is finished" in capsys.readouterr().err
