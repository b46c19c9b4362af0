"""`deepseek train`: a recipe runs stages in order; each goes on where it was, and what is finished
is not done again.

stages -> their results -> a model card beside the last model, and a page of the whole run
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import Field

from deepseek.checkpoint.store import atomic_write, home, read_json, write_json
from deepseek.errors import ConfigError
from deepseek.registry import pick
from deepseek.train.jobs.adapt import adapt
from deepseek.train.jobs.align import align
from deepseek.train.jobs.arguments import AdaptArguments, AlignArguments, ExpertArguments
from deepseek.train.jobs.declaration import Declaration, selected
from deepseek.train.jobs.expert import train_expert
from deepseek.train.jobs.pretrain import pretrain
from deepseek.train.jobs.pretrain_arguments import PretrainArguments
from deepseek.train.jobs.settings import JobSettings
from deepseek.train.loop.runs import write_page


@dataclass(frozen=True)
class Stage:
    """What a stage of a recipe takes, and the function that does it.

    Attributes:
        arguments: the declaration of the arguments that `with` may hold.
        run: takes them and returns the path of what it made, if anything.
    """

    arguments: type[Declaration]
    run: Callable[..., Path | None]


class StageSettings(JobSettings):
    """One stage: what it does, its name, and the arguments of the function behind it.

    Attributes:
        stage: pretrain, adapt, align, expert or eval.
        name: of its run folder; default: recipe, number and stage.
        with_: arguments of that stage (`with` in the file), as `arguments.py` declares them. `base`
            is the model that the stage before made, unless it is given.
    """

    stage: str
    name: str | None = None
    with_: dict[str, Any] = Field(default_factory=dict, alias="with")


class RecipeSettings(JobSettings):
    """What `deepseek train` reads.

    Attributes:
        name: of the run folder and in the card.
        base: model that the first stage starts from, if it does not start from scratch.
        licence: SPDX expression of the results.
        stages: in order.
    """

    name: str
    base: str = "smollm2-135m"
    licence: str = "LicenseRef-Unknown"
    stages: list[StageSettings] = Field(min_length=1)


def train_recipe(
    config: str | Path | Mapping[str, Any],
    extra: Mapping[str, Stage] | None = None,
    *,
    quiet: bool = False,
) -> Path:
    """Run the stages of a recipe and return its run folder; the same call goes on after an
    interruption.

    Args:
        extra: further stages; those that live on higher floors come from the command line.
    """
    recipe = RecipeSettings.read(config)
    table = {**STAGES, **(extra or {})}
    for number, step in enumerate(recipe.stages, 1):  # all of them before the first runs for hours
        stage = pick(table, step.stage, "stage")
        try:
            stage.arguments.read(**given_to(stage, recipe, number, recipe.base, quiet))
        except ConfigError as error:
            raise ConfigError(f"stage {number} ({step.stage}): {error}") from None
    folder = home() / "runs" / recipe.name
    model = recipe.base
    results = []
    for number, step in enumerate(recipe.stages, 1):
        stage = table[step.stage]
        given = given_to(stage, recipe, number, model, quiet)
        made = stage.run(**given)
        model = str(made) if made is not None and Path(made).is_dir() else model
        run = Path(given["run_folder"])
        results.append(
            {"stage": step.stage, "run": str(run), "made": str(made or ""), **_result(run)}
        )
    write_json(folder / "result.json", {"stage": "recipe", "model": model, "results": results})
    _report(recipe, folder, results, model)
    return folder


def given_to(
    stage: Stage, recipe: RecipeSettings, number: int, model: str, quiet: bool
) -> dict[str, Any]:
    """Return the arguments of a stage by name: what its `with` says, and what every recipe
    gives.
    """
    step = recipe.stages[number - 1]
    name = step.name or f"{recipe.name}-{number}-{step.stage}"
    shared = {"base": model, "name": name, "run_folder": home() / "runs" / name, "quiet": quiet}
    return {**selected(shared, stage.arguments), **step.with_}


STAGES = {
    "pretrain": Stage(PretrainArguments, pretrain),
    "adapt": Stage(AdaptArguments, adapt),
    "align": Stage(AlignArguments, align),
    "expert": Stage(ExpertArguments, train_expert),
}


def _result(run: Path) -> dict[str, Any]:
    """Return data and figures of a stage's run, as it left them."""
    if not (run / "result.json").is_file():
        return {"figures": {}, "data": {}}
    result = read_json(run / "result.json")
    figures = result.get("figures") or {
        k: v for k, v in result.items() if isinstance(v, int | float)
    }
    return {"figures": figures, "data": result.get("data", {})}


def _report(
    recipe: RecipeSettings, folder: Path, results: list[dict[str, Any]], model: str
) -> None:
    """Write the page of the run, and a model card into the run folder and beside the last model."""
    plots = [plot for result in results for plot in sorted(Path(result["run"]).glob("*/loss.png"))]
    sections = {
        f"{number}. {result['stage']}": result["figures"]
        for number, result in enumerate(results, 1)
    }
    write_page(folder, recipe.name, sections, plots)
    card = model_card(recipe, results)
    places = [
        folder,
        *({Path(model)} if Path(model).is_dir() and Path(model) != Path(recipe.base) else ()),
    ]
    for place in places:
        with atomic_write(place / "README.md") as temporary:
            temporary.write_text(card, encoding="utf-8")
        for plot in plots:
            with atomic_write(place / f"loss-{plot.parent.parent.name}.png") as temporary:
                temporary.write_bytes(plot.read_bytes())


def model_card(recipe: RecipeSettings, results: list[dict[str, Any]]) -> str:
    """Return a model card as the Hugging Face hub has them: licence and base in front, then data,
    figures and plots.
    """
    lines = [
        "---",
        f"license: {recipe.licence}",
        f"base_model: {recipe.base}",
        "library_name: transformers",
        "---",
    ]
    lines += [f"# {recipe.name}", "", f"Made by `deepseek train` in {len(results)} stages."]
    for number, result in enumerate(results, 1):
        lines += [
            "",
            f"## {number}. {result['stage']}",
            f"Result: `{Path(result['made']).name}`",
            "",
        ]
        lines += [
            f"- {name}: {value:.4g}"
            for name, value in result["figures"].items()
            if isinstance(value, int | float)
        ]
        lines += [
            f"- data {name}: sha256 `{entry['digest']}`" for name, entry in result["data"].items()
        ]
        if any(Path(result["run"]).glob("*/loss.png")):
            lines.append(f"\n![loss](loss-{Path(result['run']).name}.png)")
    return "\n".join(lines) + "\n"
