"""Find and summarise past runs. Imports nothing heavy, for the command line."""

from contextlib import suppress
from pathlib import Path
from typing import Any

from deepseek.checkpoint.files import stored_model_name
from deepseek.checkpoint.store import RUN_STARTED, home, read_object
from deepseek.errors import CheckpointError, DataError
from deepseek.packs.library import installed
from deepseek.registry import nearest


def all_runs() -> dict[str, Path]:
    """Return the run folders in the library's home by name."""
    root = home() / "runs"
    return (
        {path.name: path for path in sorted(root.iterdir()) if path.is_dir()}
        if root.is_dir()
        else {}
    )


def find_run(name: str) -> Path:
    """Return the folder of a run, given its name or path.

    A name takes precedence over a path: an expert is named after the folder that it learns from,
    which is often in the working folder.

    Raises:
        DataError: there is no such run, or the folder is not that of a run.
    """
    runs = all_runs()
    if name not in runs and _is_run(Path(name)):
        return Path(name)
    if name not in runs and name in installed():
        raise DataError(
            f"The expert {name} has no run folder, as it was merged or imported, or its run was "
            "deleted; name one that was trained here."
        )
    if name not in runs and Path(name).is_dir():
        raise DataError(f"{name} holds no run; see `deepseek runs list`.")
    if name not in runs:
        raise DataError(
            f"There is no run {name!r}; {nearest(name, runs) if runs else 'none has been started'}."
        )
    return runs[name]


def _is_run(folder: Path) -> bool:
    """Return whether a folder holds a record of a run; recipes and evaluations write only
    `result.json`.
    """
    return any((folder / name).is_file() for name in (RUN_STARTED, "request.json", "result.json"))


def finished_runs(folder: Path) -> list[Path]:
    """Return the folders of a training and of its finished updates, in the order of their ends."""
    updates = list(folder.glob("updates/*/result.json"))
    # Updates of earlier versions have no number.
    updates.sort(key=lambda path: (read_object(path).get("update", 0), path.stat().st_mtime_ns))
    return [folder, *(path.parent for path in updates)]


def latest_run(folder: Path) -> Path:
    """Return the folder of the last finished update of a training, or its own if there is none.

    Use its held-out text: with a split by time, an update trains on commits that the training held
    out.
    """
    return finished_runs(folder)[-1]


def summary(folder: Path) -> dict[str, Any]:
    """Return stage, state and figures of a run, or of its last finished update, as a flat
    mapping.
    """
    if not (folder / "result.json").is_file():
        return {"state": "unfinished"}
    first = read_object(folder / "result.json")
    # After a renaming, only the first record has the path of the pack.
    renamed = {"pack": first["pack"]} if "pack" in first else {}
    result = {**read_object(latest_run(folder) / "result.json"), **renamed}
    nested = result.get("figures")
    figures = {**result, **(nested if isinstance(nested, dict) else {})}
    return {
        "state": "finished",
        **{k: v for k, v in figures.items() if isinstance(v, str | int | float) and k != "state"},
    }


def unfinished_on(base: str) -> list[str]:
    """Return the names of the unfinished runs in the library's home that use a base.

    Args:
        base: name of the base; runs may have been given its folder instead.
    """
    path = stored_model_name(str(home() / "models" / base))
    names = []
    for name, folder in all_runs().items():
        request = folder / "request.json"
        if (folder / "result.json").is_file() or not request.is_file():
            continue
        with suppress(CheckpointError):
            if read_object(request).get("base") in (base, path):
                names.append(name)
    return names
