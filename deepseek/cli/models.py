"""`deepseek models`: list and remove the models in the library's home."""

from typing import Annotated

import typer

from deepseek.cli.confirm import confirm
from deepseek.cli.options import Json, Yes, usable_home
from deepseek.cli.output import echo
from deepseek.cli.units import size

app = typer.Typer(add_completion=False, help="List and remove the models in the library's home.")


@app.command("list")
def list_models(as_json: Json = False) -> None:
    """List pulled bases, converted GGUF files and models trained here. Models from the Hugging Face
    hub are in its own cache, which `hf cache` lists.
    """
    from deepseek.checkpoint.models import models_folder, stored_models
    from deepseek.cli.shapes import ModelList, ModelRow, print_json

    usable_home()
    experts = _experts_by_base()
    rows = [
        ModelRow(
            name=model.name,
            path=str(model.folder),
            bytes=model.num_bytes,
            architecture=model.architecture,
            licence=model.licence,
            experts=experts.get(model.name, []),
        )
        for model in stored_models()
    ]
    if as_json:
        print_json(ModelList(folder=str(models_folder()), models=rows))
        return
    if not rows:
        echo(f"no models in {models_folder()}; fetch one with `deepseek pull`")
    for row in rows:
        expert_note = f"  for {', '.join(row.experts)}" if row.experts else ""
        echo(
            f"{row.name:32}  {size(row.bytes):>9}  {row.architecture:24}  "
            f"{row.licence or 'licence not stated'}{expert_note}"
        )


@app.command()
def rm(
    name: Annotated[str, typer.Argument(help="Name of the model, as `models list` shows it.")],
    yes: Yes = False,
) -> None:
    """Remove a model from the library's home, after a question that says what uses it."""
    from deepseek.checkpoint.models import remove_model, stored_model

    model = stored_model(name)
    uses = _uses(name)
    warning = f" It is in use: {'; '.join(uses)}." if uses else ""
    confirm(f"Remove {model.folder} ({size(model.num_bytes)})?{warning}", yes)
    if uses and yes:  # else the question has said it
        echo(f"warning: {name} was in use: {'; '.join(uses)}", error=True)
    remove_model(model)
    echo(f"removed {model.folder}")


def _uses(name: str) -> list[str]:
    """Return what uses a model, in words: experts, unfinished runs, processes."""
    from deepseek.checkpoint.models import models_folder
    from deepseek.cli.processes import processes_at
    from deepseek.train.loop.past_runs import unfinished_on

    uses = [f"the expert {expert} needs it" for expert in _experts_by_base().get(name, [])]
    uses += [f"the run {run} is unfinished" for run in unfinished_on(name)]
    uses += [f"process {process} has it open" for process in processes_at(models_folder() / name)]
    return uses


def _experts_by_base() -> dict[str, list[str]]:
    """Return the names of the readable experts by the name of their base."""
    from deepseek.errors import PackError
    from deepseek.packs.library import installed
    from deepseek.packs.listing import read_manifest

    experts: dict[str, list[str]] = {}
    for name, path in installed().items():
        try:
            base = read_manifest(path).base.name
        except (PackError, OSError):
            continue
        experts.setdefault(base, []).append(name)
    return experts
