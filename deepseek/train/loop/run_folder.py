"""Contents of a run folder: whether it holds a run, and which files that run has made."""

import os
import shutil
from contextlib import suppress
from pathlib import Path
from typing import Any

from deepseek.checkpoint.files import stored_model_name
from deepseek.checkpoint.store import RUN_STARTED, read_object, write_json
from deepseek.errors import ConfigError

EARLY_STAGES = ("corpus", "tokenizer")
"""Folders that a job may fill before it writes `request.json`."""


MODELS = ("base", "tokenizer")
"""Arguments that name a model, which may be a local folder."""


def with_absolute_models(request: dict[str, Any]) -> dict[str, Any]:
    """Return a request with absolute paths for local models, so that they mean the same from any
    working folder; an earlier version stored relative ones.
    """
    models = {name: request[name] for name in MODELS if isinstance(request.get(name), str)}
    return request | {name: stored_model_name(model) for name, model in models.items()}


def refuse_other_files(folder: Path) -> None:
    """Raise `ConfigError` if a run folder holds files but no run."""
    if _is_occupied(folder) and not _holds_run(folder):
        raise ConfigError(
            f"{folder} holds other files and no run; choose a new or empty folder as --run-folder, "
            "or another --name."
        )


def refuse_other_result(folder: Path, made: Path) -> None:
    """Raise `ConfigError` if a run did not make what is at the path of its result.

    Args:
        folder: the run folder, which need not exist.
        made: path of the result.
    """
    if _is_occupied(made) and not _has_made(folder, made):
        raise ConfigError(f"{made} exists already; give another --name or --out, or remove it.")


def is_begun(folder: Path) -> bool:
    """Return whether the run in a folder has passed its checks, and may have made its result."""
    return (folder / "request.json").is_file()


def begin(folder: Path, start: dict[str, Any], made: Path) -> None:
    """Record the inputs of a run, the path of its result, and the early stages in its folder.

    Early stages are deleted if a run with other inputs left them and never began.

    Args:
        folder: the run folder, which need not exist.
        start: command, request and digests of the inputs, as JSON values.
        made: path of the result.
    """
    started = folder / RUN_STARTED
    before = read_object(started) if started.is_file() else {"found": _early_stages(folder)}
    if not is_begun(folder) and any(before.get(name) != value for name, value in start.items()):
        _drop_early_stages(folder, before)
    write_json(started, {**start, "made": str(made), "found": before.get("found")})


def withdraw(folder: Path) -> None:
    """Delete all traces of a run that was refused before it had begun."""
    started = folder / RUN_STARTED
    before = read_object(started)
    _drop_early_stages(folder, before)
    started.unlink()
    if before.get("found") is None:
        with suppress(OSError):  # it holds something else
            folder.rmdir()


def _early_stages(folder: Path) -> list[str] | None:
    """Return the early stages that a folder holds before a run; None: there is no such folder."""
    if not folder.is_dir():
        return None
    return [stage for stage in EARLY_STAGES if (folder / stage).exists()]


def _drop_early_stages(folder: Path, start: dict[str, Any]) -> None:
    """Delete the early stages that a run has made.

    Args:
        folder: the run folder.
        start: content of its `start.json`, which names what was there before.
    """
    for stage in EARLY_STAGES:
        if stage not in (start.get("found") or ()):
            shutil.rmtree(folder / stage, ignore_errors=True)


def _is_occupied(path: Path) -> bool:
    """Return whether there is a file at a path, or a folder that is not empty.

    Hidden files don't count: desktops leave them in any folder, and no run deletes them.
    """
    if not path.is_dir():
        return os.path.lexists(path)
    return any(not file.name.startswith(".") for file in path.iterdir())


def _holds_run(folder: Path) -> bool:
    """Return whether a folder holds a run; a project may have a `start.json` of its own."""
    started = folder / RUN_STARTED
    is_started = started.is_file() and "request" in read_object(started)
    return is_started or is_begun(folder)


def _has_made(folder: Path, made: Path) -> bool:
    """Return whether a run has itself written what exists at a path.

    Args:
        folder: the run folder.
        made: path of the run's result.
    """
    result = folder / "result.json"
    if result.is_file():
        record = read_object(result)
        path = record.get("pack") or record.get("model")
        # The library's home may have moved, with all results in it.
        return not isinstance(path, str) or Path(path) == made or not Path(path).exists()
    # The run may have been killed between writing its result and the record.
    started = folder / RUN_STARTED
    can_have_made = is_begun(folder) and started.is_file()
    return can_have_made and read_object(started).get("made") == str(made)
