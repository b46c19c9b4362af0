"""The base that a command uses is that of the experts it names; experts of other bases are left
out.
"""

import json
from pathlib import Path

import pytest
import torch
from git_history import History
from safetensors.torch import save_file

from deepseek.checkpoint.store import write_json
from deepseek.cli.expert_base import base_of
from deepseek.cli.job_command import job_command
from deepseek.cli.main import main
from deepseek.cli.run import expert_for
from deepseek.errors import ConfigError, PackError
from deepseek.packs.library import experts_folder
from deepseek.packs.manifest import BaseDescription, Manifest
from deepseek.packs.pack import ExpertPack, write_pack
from deepseek.packs.tensors import DTYPES
from deepseek.server.schema import TeachRequest
from deepseek.server.settings import Settings
from deepseek.train.jobs import adapt as adapt_job
from deepseek.train.jobs.arguments import AdaptArguments


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty library home."""
    home = tmp_path / "home"
    monkeypatch.setenv("DEEPSEEK_HOME", str(home))
    return home


def save_base(folder: Path, value: float) -> Path:
    """Save files in `folder` that look like a base of width 8 with two layers, and return it."""
    folder.mkdir(parents=True)
    save_file({"a": torch.full((2,), value)}, folder / "model.safetensors")
    (folder / "config.json").write_text('{"hidden_size": 8, "num_hidden_layers": 2}')
    return folder


def save_pack(name: str, base: Path) -> None:
    """Write the pack of a trained expert of a base."""
    manifest = Manifest(
        name=name,
        base=BaseDescription.of(base, base.name),
        layers=(1,),
        width=4,
        dtype="float32",
        licence="MIT",
        metrics={},
    )
    tensors = {
        name: torch.zeros(spec.shape, dtype=DTYPES[spec.dtype])
        for name, spec in manifest.tensors().items()
    }
    write_pack(experts_folder() / f"{name}.safetensors", ExpertPack.seal(manifest, tensors))


def test_eval_takes_the_base_of_the_named_experts(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_pack("shop", save_base(home / "models" / "shop-base", 1.0))
    loaded: list[object] = []

    def load(base: str, **_: object) -> None:
        loaded.append(base)
        raise ConfigError("enough.")

    monkeypatch.setattr("deepseek.engine.load.load", load)
    for words in (["shop"], ["shop", "--base", "tiny"], ["none"]):
        with pytest.raises(SystemExit):
            main(["eval", *words])
    assert loaded == ["shop-base", "tiny", "smollm2-135m"]


def test_a_base_elsewhere_is_known_by_the_experts_run(home: Path, tmp_path: Path) -> None:
    base = save_base(tmp_path / "elsewhere", 1.0)
    save_pack("shop", base)
    with pytest.raises(ConfigError, match=r"base elsewhere, which is not on .* with --base\."):
        base_of("shop")
    run = home / "runs" / "shop"
    run.mkdir(parents=True)
    (run / "request.json").write_text(json.dumps({"base": str(base)}))
    assert base_of("shop=0.5") == str(base)
    assert base_of("all") is base_of("none") is base_of("") is base_of(",") is None
    with pytest.raises(PackError, match="no expert named 'shp'"):
        base_of("shp")


def test_experts_of_different_bases_have_none(home: Path) -> None:
    for name, value in (("one", 1.0), ("two", 2.0)):
        save_pack(name, save_base(home / "models" / f"base-{name}", value))
    with pytest.raises(ConfigError, match=r"one was made for the base base-one and two for base-t"):
        base_of("one,two")


def test_run_trains_an_expert_beside_that_of_another_base(home: Path, tmp_path: Path) -> None:
    """Both repositories and bases can be used in turn."""
    repository = tmp_path / "git" / "demo"
    first = save_base(tmp_path / "first", 1.0)
    second = save_base(tmp_path / "second", 2.0)
    third = save_base(tmp_path / "x" / "second", 3.0)
    assert expert_for(repository, "first", first) == ("demo", True)
    save_pack("demo", first)
    assert expert_for(repository, "first", first) == ("demo", False)
    assert expert_for(repository, "owner/second", second) == ("demo-second", True)
    save_pack("demo-second", second)
    assert expert_for(repository, "owner/second", second) == ("demo-second", False)
    assert expert_for(repository, "first", first) == ("demo", False)
    with pytest.raises(ConfigError, match="demo and demo-second were made for other bases"):
        expert_for(repository, str(third), third)
    for name, source in (("demo", repository), ("demo-second", tmp_path / "other" / "demo")):
        (home / "runs" / name).mkdir(parents=True)
        write_json(home / "runs" / name / "request.json", {"source": {"git": str(source)}})
    assert expert_for(repository, "first", first) == ("demo", False)
    assert expert_for(tmp_path / "other" / "demo", "first", first) == ("demo-first", True)
    with pytest.raises(ConfigError, match="or of other repositories"):
        expert_for(repository, "owner/second", second)
    long = "n" * 64
    save_pack(long, first)
    name, fresh = expert_for(tmp_path / long, "second", second)
    assert (name, len(name), fresh) == (f"{'n' * 57}-second", 64, True)


def test_run_checks_the_repository_before_the_base_is_fetched(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("deepseek.cli.pull.fetch", lambda *_: pytest.fail("it is fetched"))
    history = History(tmp_path / "empty")
    with pytest.raises(SystemExit) as stop:
        main(["run", "--from-git", str(history.path)])
    assert stop.value.code == 2
    assert "has no commits; commit something first." in capsys.readouterr().err


@pytest.fixture
def served(home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[dict[str, object]]:
    """The arguments with which `deepseek run` serves, without a terminal, on an existing base."""
    calls: list[dict[str, object]] = []
    folder = save_base(home / "models" / "tiny", 1.0)
    monkeypatch.setattr("deepseek.cli.pull.fetch", lambda *_: folder)
    monkeypatch.setattr("deepseek.server.run.serve", lambda base, **kw: calls.append(kw))
    monkeypatch.chdir(tmp_path)
    return calls


def test_run_serves_without_a_terminal(served: list[dict[str, object]], tmp_path: Path) -> None:
    history = History(tmp_path)
    history.commit({"part.py": "x = 1\n"})
    with pytest.raises(SystemExit, match=r"^0$"):
        main(["run", "--base", "tiny"])
    lesson = served[0]["lesson"]
    assert isinstance(lesson, TeachRequest)
    assert (lesson.name, lesson.kind) == (tmp_path.name, "git")
    assert served[0]["experts"] == []


def test_run_in_a_folder_of_a_repository_is_about_all_of_it(
    served: list[dict[str, object]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    History(tmp_path).commit({"part.py": "x = 1\n"})
    (tmp_path / "below").mkdir()
    monkeypatch.chdir(tmp_path / "below")
    with pytest.raises(SystemExit, match=r"^0$"):
        main(["run", "--base", "tiny"])
    lesson, settings = served[0]["lesson"], served[0]["settings"]
    assert isinstance(lesson, TeachRequest) and isinstance(settings, Settings)
    assert (lesson.name, settings.teach_root) == (tmp_path.name, tmp_path)


def test_run_serves_the_base_where_there_is_no_history(
    served: list[dict[str, object]], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit, match=r"^0$"):
        main(["run", "--base", "tiny"])
    assert (served[0]["lesson"], served[0]["experts"]) == (None, [])
    assert "has no git history to train an expert on; --from-git" in capsys.readouterr().err
    for words in (["--no-serve"], ["--from-git", "."]):
        with pytest.raises(SystemExit, match=r"^2$"):
            main(["run", "--base", "tiny", *words])
        assert "error: . is not inside a git repository" in capsys.readouterr().err
    assert len(served) == 1


def test_paths_are_checked_before_a_base_is_downloaded(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    fetched: list[str] = []

    def fetch(base: str) -> None:
        fetched.append(base)
        raise ConfigError("enough.")

    monkeypatch.setattr("deepseek.cli.job_command.fetch", fetch)
    missing = str(tmp_path / "missing.db")
    for base in ("smollm2-135m", "owner/model"):
        with pytest.raises(SystemExit) as stop:
            main(["align", base, "--prefs", missing])
        assert stop.value.code == 2
        assert "missing.db" in capsys.readouterr().err
    assert fetched == []
    save_base(home / "models" / "smollm2-135m", 1.0)  # a finished run no longer needs its text
    with pytest.raises(SystemExit):
        main(["align", "smollm2-135m", "--prefs", missing])
    assert fetched == ["smollm2-135m"]


@pytest.mark.parametrize("words", [["tiny"], ["--base", "tiny"], []])
def test_the_base_of_a_job_may_be_given_by_its_option(
    words: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given: list[dict[str, object]] = []
    monkeypatch.setattr("deepseek.cli.job_command.fetch", lambda _: None)
    monkeypatch.setattr(adapt_job, "adapt", lambda **values: given.append(values))
    with pytest.raises(SystemExit) as stop:
        main(["adapt", *words, "--from-folder", str(tmp_path)])
    assert stop.value.code == 0
    assert given == [{"from_folder": tmp_path} | ({"base": "tiny"} if words else {})]


def test_a_job_without_a_positional_argument_has_one_option_for_each() -> None:
    command = job_command("adapt:adapt", AdaptArguments, "Adapt.")
    assert "by_option" not in command.__annotations__
