"""A run writes and deletes only its own files, whatever its folder and its result are called."""

from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from train.loop.fake_job import FakeJob, KilledError, PoorJob, asked, guarded

from deepseek.checkpoint.store import read_json, write_json
from deepseek.errors import ConfigError, DataError
from deepseek.train.loop.runs import Run, run_once


def files_in(folder: Path) -> dict[Path, bytes]:
    """Return the content of all files except locks."""
    files = [path for path in folder.rglob("*") if path.is_file()]
    return {path: path.read_bytes() for path in files if path.suffix != ".lock"}


@pytest.mark.parametrize("dry_run", [False, True])
@pytest.mark.parametrize("own", ["corpus/a.txt", "start.json", "notes.txt"])
def test_a_folder_of_other_files_is_no_run_folder(tmp_path: Path, own: str, dry_run: bool) -> None:
    """Regression: a project's `corpus` was deleted as that of a run with too little text."""
    (tmp_path / own).parent.mkdir(exist_ok=True)
    (tmp_path / own).write_text("{}")
    before = files_in(tmp_path)
    run = guarded(tmp_path, tmp_path / "new" / "out.json", dry_run=dry_run)
    for text in ("short", "long enough"):
        with pytest.raises(ConfigError, match="holds other files and no run; choose a new or empt"):
            run_once(PoorJob, asked(text), run)
    assert files_in(tmp_path) == before


def test_a_refused_run_leaves_an_empty_folder_that_was_there_before(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / ".DS_Store").touch()
    with pytest.raises(DataError, match="too little"):
        run_once(PoorJob, asked("short"), guarded(folder, tmp_path / "out.json"))
    assert [path.name for path in folder.iterdir()] == [".DS_Store"]


def test_early_stages_from_before_a_run_are_not_deleted(tmp_path: Path) -> None:
    """`equal_time` copies the corpus of an expert's run into the folder before its run starts."""
    run = Run({"seed": 0}, tmp_path / "out.json", tmp_path / "run", True, False, makes_file=True)
    write_json(run.folder / "corpus" / "text.json", "short")
    for inputs in ({"text": "short"}, {"text": "other"}):
        with pytest.raises(KilledError):
            run_once(FakeJob, asked(killed="request"), replace(run, inputs=lambda now=inputs: now))
    with pytest.raises(DataError, match="too little"):
        run_once(PoorJob, asked(), run)
    assert [path.name for path in run.folder.rglob("*")] == ["corpus", "text.json"]


class RefusedJob(FakeJob):
    """Refuses its request at once, or after it has stored a corpus."""

    def run(self) -> dict[str, Any]:
        if self.request["text"] != "one":
            self.stage("corpus")
        raise ConfigError("layers='last:6' is impossible.")


@pytest.mark.parametrize("text", ["one", "two"])
def test_a_run_refused_for_any_reason_leaves_no_trace(tmp_path: Path, text: str) -> None:
    run = guarded(tmp_path / "run", tmp_path / "out.json")
    with pytest.raises(ConfigError, match="impossible"):
        run_once(RefusedJob, asked(text), run)
    assert not run.folder.exists(), "a refused run is listed as unfinished"


def test_what_an_earlier_call_has_stored_outlives_a_refusal(tmp_path: Path) -> None:
    run = guarded(tmp_path / "run", tmp_path / "out.json")
    with pytest.raises(KilledError):
        run_once(FakeJob, asked(killed="request"), run)
    with pytest.raises(ConfigError, match="impossible"):
        run_once(RefusedJob, asked(), run)
    assert (run.folder / "corpus" / "text.json").is_file()


class FolderJob(FakeJob):
    """Writes a folder, as jobs that create a model do, and may be killed before the record."""

    def run(self) -> dict[str, Any]:
        write_json(self.folder / "request.json", {"seed": 0})
        if self.request["killed"] == "training":
            raise KilledError
        write_json(self.out / "config.json", {"by": "this run"})
        if self.request["killed"] == "end":
            raise KilledError
        return {"model": str(self.out)}


@pytest.mark.parametrize("dry_run", [False, True])
def test_a_result_that_another_made_is_never_replaced(tmp_path: Path, dry_run: bool) -> None:
    """Regression: any folder with a `config.json` was, such as a web application's or the base."""
    made = tmp_path / "webapp"
    write_json(made / "config.json", {"by": "its author"})
    (made / "main.c").write_text("int main;")
    before = files_in(tmp_path)
    run = replace(guarded(tmp_path / "run", made, dry_run=dry_run), makes_file=False)
    with pytest.raises(ConfigError, match="webapp exists already; give another --name or --out"):
        run_once(FolderJob, asked(), run)
    assert files_in(tmp_path) == before and not run.folder.exists()


@pytest.mark.parametrize("killed", ["training", "end", ""])
def test_a_run_goes_on_to_its_own_result(tmp_path: Path, killed: str) -> None:
    made = tmp_path / "model"
    made.mkdir()  # an empty folder holds nothing to lose
    run = replace(guarded(tmp_path / "run", made), makes_file=False)
    with suppress(KilledError):
        run_once(FolderJob, asked(killed=killed), run)
    for again in (run, replace(run, dry_run=True)):
        assert run_once(FolderJob, asked(), again) == made
    assert read_json(made / "config.json") == {"by": "this run"}
    other = tmp_path / "other"
    write_json(other / "config.json", {})
    with pytest.raises(ConfigError, match="other exists already"):
        run_once(FolderJob, asked(), replace(run, made=other))
    assert run_once(FolderJob, asked(), replace(run, made=tmp_path / "copy")).is_dir()


def test_a_result_that_appears_before_a_run_has_begun_is_anothers(tmp_path: Path) -> None:
    run = guarded(tmp_path / "run", tmp_path / "out.json")
    with pytest.raises(KilledError):
        run_once(FakeJob, asked(killed="request"), run)
    run.made.write_text("imported")
    with pytest.raises(ConfigError, match="exists already"):
        run_once(FakeJob, asked(), run)
    assert run.made.read_text() == "imported"


def test_a_finished_run_moves_with_its_home(tmp_path: Path) -> None:
    old = tmp_path / "old"
    run = replace(guarded(old / "run", old / "model"), makes_file=False)
    run_once(FolderJob, asked(), run)
    old.rename(tmp_path / "new")
    moved = replace(run, folder=tmp_path / "new" / "run", made=tmp_path / "new" / "model")
    assert run_once(FolderJob, asked(), moved) == moved.made
