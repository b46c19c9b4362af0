"""`deepseek train`: run the stages of a recipe in order.

Running the same recipe again skips finished stages and resumes an interrupted one. The results are
a model card beside the last model and a page of the whole run.
"""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from pydantic import AfterValidator, Field

from deepseek.checkpoint.files import located, writable_folder
from deepseek.checkpoint.licence import Licence, read_licence
from deepseek.checkpoint.store import atomic_write, home, read_object, write_json
from deepseek.errors import ConfigError, UserError
from deepseek.packs.names import valid_name
from deepseek.registry import pick
from deepseek.train.jobs.adapt import adapt
from deepseek.train.jobs.align import align
from deepseek.train.jobs.arguments import AdaptArguments, AlignArguments, ExpertArguments
from deepseek.train.jobs.declaration import Declaration, arguments_of, selected
from deepseek.train.jobs.expert import train_expert
from deepseek.train.jobs.limits import UNKNOWN_LICENCE, ResultName, SpdxLicence
from deepseek.train.jobs.pretrain import pretrain
from deepseek.train.jobs.pretrain_arguments import PretrainArguments
from deepseek.train.jobs.settings import JobSettings
from deepseek.train.loop.progress import say
from deepseek.train.loop.run_lock import run_lock
from deepseek.train.loop.runs import write_page

RecipeName = Annotated[str, AfterValidator(valid_name)]


@dataclass(frozen=True)
class Stage:
    """Declaration and function behind a stage of a recipe.

    Attributes:
        arguments: declaration of the arguments that `with` may hold.
        run: takes these arguments and returns the path of its result, if it has one.
    """

    arguments: type[Declaration]
    run: Callable[..., Path | None]


class StageSettings(JobSettings):
    """One stage of a recipe.

    Attributes:
        stage: pretrain, adapt, align, expert or eval.
        name: name of its run folder; default: recipe, number and stage.
        with_: arguments of the stage (`with` in the file), as declared in `arguments.py`. `base`
            defaults to the model of the previous stage.
    """

    stage: str
    name: ResultName | None = None
    with_: dict[str, Any] = Field(default_factory=dict, alias="with")


class RecipeSettings(JobSettings):
    """Contents of a recipe file.

    Attributes:
        name: name of the run folder, and title of the model card.
        base: model that the first stage starts from, unless it starts from scratch.
        licence: SPDX expression of the results; default: that of the base.
        stages: the stages in order.
    """

    name: RecipeName
    base: str = "smollm2-135m"
    licence: SpdxLicence = UNKNOWN_LICENCE
    stages: list[StageSettings] = Field(min_length=1)


def train_recipe(
    config: str | Path | Mapping[str, Any],
    extra: Mapping[str, Stage] | None = None,
    *,
    quiet: bool = False,
    dry_run: bool = False,
) -> Path:
    """Run the stages of a recipe and return its run folder. The same call resumes a run.

    Args:
        config: YAML or TOML file, or mapping.
        extra: further stages by name. The command line adds those of packages that may not be
            imported here.
        quiet: show no progress.
        dry_run: only print the estimate of each stage whose model exists already.

    Raises:
        ConfigError: the recipe or an argument of any stage is wrong; raised before the first stage.
        TrainError: another process runs the same recipe.
    """
    recipe = RecipeSettings.read(config)
    table = {**STAGES, **(extra or {})}
    _check_stages(recipe, table, quiet)
    folder = writable_folder(home() / "runs" / recipe.name)
    if dry_run:
        _estimate_stages(recipe, table, quiet)
        return folder
    with run_lock(folder):
        _run_stages(recipe, table, folder, quiet)
    return folder


def _check_stages(recipe: RecipeSettings, table: Mapping[str, Stage], quiet: bool) -> None:
    """Check arguments and paths of all stages before the first one runs for hours.

    Raises:
        ConfigError: an argument of a stage is wrong, or two run folders are the same.
        UserError: a text of a stage is missing, or its result cannot be written.
    """
    folders = {home() / "runs" / recipe.name}
    for number, step in enumerate(recipe.stages, 1):
        stage = pick(table, step.stage, "stage")
        given = given_to(stage, recipe, number, recipe.base, quiet)
        try:
            arguments = stage.arguments.read(**given)
            arguments.check_paths()
        except UserError as error:
            raise type(error)(f"stage {number} ({step.stage}): {error}") from None
        run = Path(given["run_folder"])
        if run in folders:
            raise ConfigError(
                f"stage {number} ({step.stage}): its run folder {run} is that of another stage or "
                "of the recipe; give the stage another name."
            )
        folders.add(run)


def _estimate_stages(recipe: RecipeSettings, table: Mapping[str, Stage], quiet: bool) -> None:
    """Print the estimate of each stage, or why there is none."""
    model = recipe.base
    coming = None  # a model that an earlier stage has yet to make
    for number, step in enumerate(recipe.stages, 1):
        stage = table[step.stage]
        title = f"stage {number} ({step.stage})"
        arguments = given_to(stage, recipe, number, model, quiet)
        if "dry_run" not in arguments_of(stage.arguments):
            say(f"{title} has no estimate", quiet)
            continue
        if coming and "base" in arguments and "base" not in step.with_:
            say(f"{title} is estimated when its base {coming} exists", quiet)
            continue
        say(f"{title}:", quiet)
        result_path = stage.run(**{**arguments, "dry_run": True})
        if result_path is not None and Path(result_path).is_dir():
            model = str(result_path)
            coming = None
        elif not getattr(stage.arguments, "makes_file", False):
            coming = result_path


def _run_stages(
    recipe: RecipeSettings, table: Mapping[str, Stage], folder: Path, quiet: bool
) -> None:
    """Run the stages in order, and write the report to the run folder of the recipe."""
    model = recipe.base
    results = []
    for number, step in enumerate(recipe.stages, 1):
        stage = table[step.stage]
        arguments = given_to(stage, recipe, number, model, quiet)
        result_path = stage.run(**arguments)
        model = (
            str(result_path) if result_path is not None and Path(result_path).is_dir() else model
        )
        run = Path(arguments["run_folder"])
        results.append(
            {"stage": step.stage, "run": str(run), "made": str(result_path or ""), **_result(run)}
        )
    write_json(folder / "result.json", {"stage": "recipe", "model": model, "results": results})
    _report(recipe, folder, results, model)


def given_to(
    stage: Stage, recipe: RecipeSettings, number: int, model: str, quiet: bool
) -> dict[str, Any]:
    """Return the arguments of a stage by name: those of the recipe, overridden by its `with`."""
    shared = {
        "base": model,
        "name": _run_name(recipe, number),
        "run_folder": _run_folder(recipe, number),
        "without": tuple(_run_folder(recipe, earlier) for earlier in range(1, number)),
        "quiet": quiet,
    }
    return {**selected(shared, stage.arguments), **recipe.stages[number - 1].with_}


def _run_name(recipe: RecipeSettings, number: int) -> str:
    step = recipe.stages[number - 1]
    return step.name or f"{recipe.name}-{number}-{step.stage}"


def _run_folder(recipe: RecipeSettings, number: int) -> Path:
    given = recipe.stages[number - 1].with_.get("run_folder")
    if isinstance(given, str | Path):  # anything else is refused when the stage is read
        return located(given)
    return home() / "runs" / _run_name(recipe, number)


STAGES = {
    "pretrain": Stage(PretrainArguments, pretrain),
    "adapt": Stage(AdaptArguments, adapt),
    "align": Stage(AlignArguments, align),
    "expert": Stage(ExpertArguments, train_expert),
}


def _result(run: Path) -> dict[str, Any]:
    """Return figures and data digests of a stage from its run folder."""
    if not (run / "result.json").is_file():
        return {"figures": {}, "data": {}}
    result = read_object(run / "result.json")
    figures = result.get("figures") or {
        k: v for k, v in result.items() if isinstance(v, int | float)
    }
    return {"figures": figures, "data": result.get("data", {})}


def _report(
    recipe: RecipeSettings, folder: Path, results: list[dict[str, Any]], model: str
) -> None:
    """Write the page of the run, and the model card to the run folder and beside the last model."""
    plots = [plot for result in results for plot in sorted(Path(result["run"]).glob("*/loss.png"))]
    sections = {
        f"{number}. {result['stage']}": result["figures"]
        for number, result in enumerate(results, 1)
    }
    write_page(folder, recipe.name, sections, plots)
    card = model_card(recipe, results, read_licence(Path(model)))
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


def model_card(recipe: RecipeSettings, results: list[dict[str, Any]], terms: Licence) -> str:
    """Return a model card in the format of the Hugging Face hub, with data, figures and plots.

    Args:
        recipe: the recipe.
        results: what each stage has made.
        terms: the licence that the last model has from its base; that of the recipe, if it states
            one, takes its place.
    """
    inherits = recipe.licence == UNKNOWN_LICENCE and bool(terms.name)
    lines = [
        "---",
        f"license: {terms.name if inherits else recipe.licence}",
        *([f"license_link: {json.dumps(terms.link)}"] if inherits and terms.link else []),
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
