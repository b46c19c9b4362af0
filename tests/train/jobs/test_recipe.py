"""Recipes: stages run in order, each once, with a card and a page at the end; runs can be
inspected.
"""

import json
from pathlib import Path
from typing import Any

import pytest
from train.loop.tiny_pretrain import settings

from deepseek.checkpoint.licence import read_licence, write_card
from deepseek.checkpoint.store import home, write_json
from deepseek.errors import ConfigError, DataError, TrainError
from deepseek.evaluate.stage import STAGE, evaluate_stage
from deepseek.train.jobs.recipe import RecipeSettings, train_recipe
from deepseek.train.loop.past_runs import find_run, summary


def recipe(domains: Path, folder: Path) -> dict[str, Any]:
    """Return a recipe: pretraining from scratch, then adaptation to the words."""
    given = settings(domains, folder, steps=3)
    for key in ("name", "out", "run_folder"):
        del given[key]
    out = {"out": str(folder / "adapted")}
    adapt = {"from_folder": str(domains / "words"), "last": 1, "epochs": 1, "row_length": 32, **out}
    stages = [{"stage": "pretrain", "with": given}, {"stage": "adapt", "with": adapt}]
    return {"name": "two-stages", "licence": "Apache-2.0", "stages": stages}


def test_a_recipe_runs_its_stages_and_writes_a_card(domains: Path, tmp_path: Path) -> None:
    folder = train_recipe(recipe(domains, tmp_path), quiet=True)
    card = (tmp_path / "adapted" / "README.md").read_text()
    result = json.loads((folder / "result.json").read_text())
    assert [stage["stage"] for stage in result["results"]] == ["pretrain", "adapt"]
    assert result["model"] == str(tmp_path / "adapted")
    digest = result["results"][1]["data"]["text"]["digest"]
    assert "license: Apache-2.0" in card and digest in card and "held_out_loss: " in card
    assert (
        (tmp_path / "adapted" / "loss-two-stages-2-adapt.png").read_bytes().startswith(b"\x89PNG")
    )
    page = (folder / "index.html").read_text()
    assert page.count("data:image/png;base64,") == 2 and "<script" not in page
    before = (tmp_path / "adapted" / "model.safetensors").stat().st_mtime_ns
    train_recipe(recipe(domains, tmp_path), quiet=True)
    assert (tmp_path / "adapted" / "model.safetensors").stat().st_mtime_ns == before
    assert summary(find_run("two-stages-2-adapt"))["state"] == "finished"


def test_a_recipe_keeps_the_terms_of_its_base(domains: Path, tmp_path: Path) -> None:
    first = recipe(domains, tmp_path / "first")
    base = tmp_path / "first" / "adapted"
    train_recipe(first, quiet=True)
    write_card(base, "llama3.2", "https://example.org/terms", "A base.")
    adapt = first["stages"][1]["with"] | {"out": str(tmp_path / "second")}
    train_recipe(
        {"name": "second", "base": str(base), "stages": [{"stage": "adapt", "with": adapt}]},
        quiet=True,
    )
    terms = read_licence(tmp_path / "second")
    assert (terms.name, terms.link) == ("LicenseRef-Llama3.2", "https://example.org/terms")
    assert terms.restricted


def test_mistakes_are_found_before_anything_runs(domains: Path, tmp_path: Path) -> None:
    wrong = recipe(domains, tmp_path)
    wrong["stages"][1]["stage"] = "adept"
    with pytest.raises(ConfigError, match="stage 'adept' is unknown; perhaps 'adapt'"):
        train_recipe(wrong, quiet=True)
    assert not (tmp_path / "adapted").exists()
    with pytest.raises(
        ConfigError, match=r"stage 1 \(adapt\): 'epoch' is no field here; perhaps 'epochs'"
    ):
        train_recipe(
            {"name": "x", "base": "nowhere", "stages": [{"stage": "adapt", "with": {"epoch": 1}}]},
            quiet=True,
        )


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("name: x\nbse: tiny\n", "'bse' is no field here; perhaps 'base' is meant (valid: "),
        ("name: x\n", "stages is missing; give it."),
        ("name: x\nstages: [{name: y}]\n", "stages.0.stage is missing; give it."),
    ],
)
def test_a_mistake_in_the_keys_of_a_file_is_blamed_on_the_file(
    text: str, message: str, tmp_path: Path
) -> None:
    path = tmp_path / "e1.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError) as refusal:
        RecipeSettings.read(path)
    assert str(refusal.value).startswith(f"{path}: {message}")


def test_a_result_of_another_is_found_before_anything_runs(domains: Path, tmp_path: Path) -> None:
    (tmp_path / "adapted").mkdir()
    write_json(tmp_path / "adapted" / "config.json", {})
    stages = {**recipe(domains, tmp_path), "name": "replacing"}
    with pytest.raises(ConfigError, match=r"stage 2 \(adapt\): .*adapted exists already; give an"):
        train_recipe(stages, quiet=True)
    assert not (home() / "runs" / "replacing-1-pretrain").exists()


def test_a_dry_run_estimates_what_it_can_and_leaves_no_trace(
    domains: Path,
    tiny_base: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("DEEPSEEK_HOME", str(tmp_path / "home"))
    stages = recipe(domains, tmp_path)["stages"]
    stages.append({"stage": "eval"})
    other = {**stages[1]["with"], "base": str(tiny_base), "out": str(tmp_path / "other")}
    stages.append({"stage": "adapt", "with": other})
    train_recipe({"name": "dry", "stages": stages}, {"eval": STAGE}, dry_run=True)
    lines = capsys.readouterr().err
    assert "stage 1 (pretrain):\n" in lines and " steps" in lines
    made = tmp_path / "home" / "models" / "dry-1-pretrain"
    assert f"stage 2 (adapt) is estimated when its base {made} exists" in lines
    assert "stage 3 (eval) has no estimate" in lines
    assert "minutes" in lines.partition("stage 4 (adapt):")[2]
    assert not any((tmp_path / name).exists() for name in ("adapted", "other"))
    assert not any((tmp_path / "home").glob("[mr]*/*"))


def test_evaluation_is_a_stage_of_its_own(
    tiny_base: Path, text_folder: Path, tmp_path: Path
) -> None:
    evaluate_stage(
        str(tiny_base), run_folder=tmp_path, data=[str(text_folder)], tokens=512, quiet=True
    )
    figures = json.loads((tmp_path / "result.json").read_text())["figures"]
    assert figures[f"loss.{text_folder}"] > 0 and "loss.public code" in figures


def test_finished_figures_are_those_of_the_same_texts(
    tiny_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("deepseek.evaluate.stage._evaluate", lambda _: {"figures": {}})
    text = tmp_path / "text.jsonl"
    text.write_text('{"text": "alpha"}\n')
    given = {"run_folder": tmp_path / "run", "data": [str(text)], "quiet": True}
    evaluate_stage(str(tiny_base), **given)
    evaluate_stage(str(tiny_base), **given)
    text.write_text('{"text": "beta"}\n')
    with pytest.raises(TrainError, match="of other texts"):
        evaluate_stage(str(tiny_base), **given)
    text.unlink()
    evaluate_stage(str(tiny_base), **given)


def test_runs_are_found_by_name() -> None:
    write_json(home() / "runs" / "done" / "result.json", {"figures": {"held_out_loss": 1.5}})
    assert summary(find_run("done")) == {"state": "finished", "held_out_loss": 1.5}
    with pytest.raises(DataError, match="no run 'dome'; perhaps 'done'"):
        find_run("dome")


def test_a_run_comes_before_a_folder_of_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "manual").mkdir()
    monkeypatch.chdir(tmp_path)
    for name in ("manual", "./manual"):
        with pytest.raises(DataError, match="manual holds no run; see `deepseek runs list`"):
            find_run(name)
    (tmp_path / "manual" / "start.json").touch()
    assert find_run("manual") == Path("manual")
    (home() / "runs" / "manual").mkdir(parents=True)
    assert find_run("manual") == home() / "runs" / "manual"
    assert find_run("./manual") == Path("manual")
