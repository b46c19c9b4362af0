"""Run folders: start or resume a job, and summarise finished runs."""

import json
from base64 import b64encode
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Protocol

from jinja2 import Environment

from deepseek.checkpoint.store import atomic_write, disk_full_explained, home, read_json, write_json
from deepseek.errors import DataError, TrainError
from deepseek.registry import nearest
from deepseek.train.loop.progress import ProgressBar


class RunJob(Protocol):
    """A job in its run folder."""

    def run(self) -> dict[str, Any] | None:
        """Run the job and return its record to store; None in a process that is not the main one.

        Implementations write `request.json` as soon as the request has proven possible.
        """

    def estimate(self) -> str:
        """Check the request and return its estimated cost; writes only to its folder."""


def run_once(
    job: Callable[..., RunJob],
    request: Any,
    stored: dict[str, Any],
    made: Path,
    folder: Path,
    quiet: bool,
    dry_run: bool,
) -> Path:
    """Run a job in its folder, resuming or skipping what is finished, and return the result's path.

    Args:
        job: takes the request, the folder, `out` (the path `made`) and `progress`.
        request: resolved arguments, passed to `job`.
        stored: the request as JSON values, compared with `request.json` of an earlier run.
        made: path of the result.
        folder: run folder.
        quiet: show no progress.
        dry_run: only print the estimate.

    Raises:
        TrainError: the run in `folder` belongs to another request.
        KeyboardInterrupt: after Ctrl-C; the message says that the same call resumes.
    """
    with ProgressBar(quiet=quiet) as progress:
        if dry_run:
            with TemporaryDirectory() as empty:
                progress.say(job(request, Path(empty), out=made, progress=progress).estimate())
            return made
        check_config(folder / "request.json", stored)
        if (folder / "result.json").is_file() and made.exists():
            progress.say(f"{made} is finished")
            return made
        try:
            with disk_full_explained(
                f"The disk of {folder} is full; free some space and run the same command."
            ):
                record = job(request, folder, out=made, progress=progress).run()
        except KeyboardInterrupt as stop:
            raise KeyboardInterrupt(
                *stop.args or ["stopped, finished work is stored; the same call resumes the run"]
            ) from None
        if record is not None:
            write_json(folder / "result.json", record)
        return made


def check_config(path: Path, config: dict[str, Any]) -> None:
    """Compare a configuration with the one stored at `path`, if there is one.

    Raises:
        TrainError: they differ; the message names the first such field.
    """
    if not path.is_file():
        return
    before = _leaves(read_json(path))
    now = _leaves(json.loads(json.dumps(config)))
    changed = [name for name in sorted({*before, *now}) if before.get(name) != now.get(name)]
    if changed:
        name = changed[0]
        raise TrainError(
            f"{path.parent} holds a run with another {name} ({before.get(name)}, now "
            f"{now.get(name)}); give the old value to resume it, or another name to start a new "
            "run."
        )


def _leaves(config: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Flatten nested fields to `outer.inner`."""
    flat: dict[str, Any] = {}
    for name, value in config.items():
        flat |= (
            _leaves(value, f"{prefix}{name}.")
            if isinstance(value, dict)
            else {f"{prefix}{name}": value}
        )
    return flat


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

    Raises:
        DataError: there is no such run.
    """
    if Path(name).is_dir():
        return Path(name)
    runs = all_runs()
    if name not in runs:
        raise DataError(
            f"There is no run {name!r}; {nearest(name, runs) if runs else 'none has been started'}."
        )
    return runs[name]


def summary(folder: Path) -> dict[str, Any]:
    """Return stage, state and figures of a run as a flat mapping."""
    if not (folder / "result.json").is_file():
        return {"state": "unfinished"}
    result = read_json(folder / "result.json")
    figures = {**result, **result.get("figures", {})}
    return {
        "state": "finished",
        **{k: v for k, v in figures.items() if isinstance(v, str | int | float)},
    }


PAGE = Environment(autoescape=True).from_string(
    """<!doctype html><html lang="en"><meta charset="utf-8"><title>{{ title }}</title><style>
body{font:16px sans-serif;max-width:60rem;margin:2rem auto}td,th{text-align:left;padding:.2rem 1rem .2rem 0}
img{max-width:100%}</style><h1>{{ title }}</h1>
{% for name, values in sections.items() %}<h2>{{ name }}</h2><table>
{% for key, value in values.items() %}<tr><th>{{ key }}</th><td>{{ spoken(value) }}</td></tr>{% endfor %}
</table>{% endfor %}
{% for plot in plots %}<img alt="{{ plot.parent.name }}" src="data:image/png;base64,{{ encoded(plot) }}">{% endfor %}
</html>
"""
)


def write_page(folder: Path, title: str, sections: dict[str, Any], plots: list[Path]) -> Path:
    """Write `index.html` with tables and plots to `folder`; it has no scripts or external links."""
    path = folder / "index.html"
    with atomic_write(path) as temporary:
        text = PAGE.render(
            title=title, sections=sections, plots=plots, spoken=_formatted, encoded=_base64
        )
        temporary.write_text(text, encoding="utf-8")
    return path


def _base64(plot: Path) -> str:
    return b64encode(plot.read_bytes()).decode()


def _formatted(value: Any) -> str:
    return (
        f"{value:,.4g}"
        if isinstance(value, float)
        else f"{value:,}"
        if isinstance(value, int)
        else str(value)
    )
