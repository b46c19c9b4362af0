"""A job in its run folder: it is the one that was begun there, what is done is not done again, a stop loses nothing."""

import json
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Protocol

from deepseek.checkpoint.store import read_json, write_json
from deepseek.errors import TrainError
from deepseek.train.progress import ProgressBar


class Job(Protocol):
    """A request in a folder."""

    def run(self) -> dict[str, Any] | None:
        """Do it, and return the record to keep; None in a process that only helps.

        `request.json` is written as soon as it is known that the request is possible.
        """
        ...

    def estimate(self) -> str:
        """Check the request and say what it would take; what is written goes to the folder."""
        ...


def run_once(
    job: Callable[[Path], Job], folder: Path, made: Path, request: dict[str, Any], progress: ProgressBar, dry_run: bool
) -> Path:
    """Return `made` once `job` has made it in `folder`, at once if it did before; a `dry_run` only estimates.

    Raises:
        TrainError: the run in `folder` is of another request.
        KeyboardInterrupt: after Ctrl-C, saying that the same call goes on.
    """
    if dry_run:
        with TemporaryDirectory() as empty:
            progress.say(job(Path(empty)).estimate())
        return made
    check_config(folder / "request.json", request)
    if (folder / "result.json").is_file() and made.exists():
        progress.say(f"{made} is finished")
        return made
    try:
        record = job(folder).run()
    except KeyboardInterrupt as stop:
        raise KeyboardInterrupt(*stop.args or ["stopped, what is done is kept; the same call goes on"]) from None
    if record is not None:
        write_json(folder / "result.json", record)
    return made


def check_config(path: Path, config: dict[str, Any]) -> None:
    """Raise `TrainError` naming the first field in which a configuration differs from the one stored in `path`."""
    if not path.is_file():
        return
    before, now = _leaves(read_json(path)), _leaves(json.loads(json.dumps(config)))
    changed = [name for name in sorted({*before, *now}) if before.get(name) != now.get(name)]
    if changed:
        name = changed[0]
        raise TrainError(
            f"{path.parent} holds a run with another {name} ({before.get(name)}, now {now.get(name)}); give the old "
            "value to resume it, or another name to start a new run."
        )


def _leaves(config: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return nested fields as `outer.inner`."""
    flat: dict[str, Any] = {}
    for name, value in config.items():
        flat |= _leaves(value, f"{prefix}{name}.") if isinstance(value, dict) else {f"{prefix}{name}": value}
    return flat
