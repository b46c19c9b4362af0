"""Run folders: start or resume a job, and write the page of a run."""

import json
from base64 import b64encode
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Protocol

from jinja2 import Environment

from deepseek.checkpoint.files import located, writable_file, writable_folder
from deepseek.checkpoint.store import (
    RUN_STARTED,
    atomic_write,
    disk_full_explained,
    home,
    read_object,
    write_json,
)
from deepseek.device.memory import out_of_memory_explained
from deepseek.errors import CheckpointError, ConfigError, DataError, TrainError, UserError
from deepseek.train.loop.progress import ProgressBar
from deepseek.train.loop.run_folder import (
    begin,
    is_begun,
    refuse_other_files,
    refuse_other_result,
    with_absolute_models,
    withdraw,
)
from deepseek.train.loop.run_lock import run_lock


class RunJob(Protocol):
    """A job in its run folder."""

    def run(self) -> dict[str, Any] | None:
        """Run the job and return its record to store; None in a process that is not the main one.

        Implementations write `request.json` as soon as the request has proven possible.
        """

    def estimate(self) -> str:
        """Check the request and return its estimated cost; writes only to its folder."""


class RunRequest(Protocol):
    """Resolved arguments of a job that writes a run folder."""

    @property
    def command(self) -> str: ...

    @property
    def name(self) -> str: ...

    @property
    def out(self) -> str | Path | None: ...

    @property
    def run_folder(self) -> str | Path | None: ...

    @property
    def quiet(self) -> bool: ...

    @property
    def dry_run(self) -> bool: ...

    @property
    def makes_file(self) -> bool: ...

    def as_json(self) -> dict[str, Any]: ...


@dataclass(frozen=True)
class Run:
    """What determines a run, and where it is written.

    Attributes:
        stored: the request as JSON values, compared with `request.json` of an earlier run.
        inputs: returns a digest of everything that the run reads, by name ("text", "base");
            default: none.
        made: path of the result.
        folder: run folder.
        quiet: show no progress.
        dry_run: only print the estimate.
        makes_file: whether the result is a file; default: the folder of a model.
        command: command that runs the job, such as "expert train"; "": not compared.
        main: whether this process writes; of several, one does.
        guarded: refuse a run folder or a result's path that holds what this run did not make.
            False: the caller has prepared them, as an update does, which replaces a pack.
    """

    stored: dict[str, Any]
    made: Path
    folder: Path
    quiet: bool
    dry_run: bool
    inputs: Callable[[], dict[str, str]] = dict
    makes_file: bool = False
    command: str = ""
    main: bool = True
    guarded: bool = False

    @classmethod
    def of(
        cls, request: RunRequest, default: Path, inputs: Callable[[Sequence[Path]], dict[str, str]]
    ) -> "Run":
        """Return the run of a request, whose folder and result must be new or its own.

        Args:
            request: resolved arguments of a job.
            default: path of the result, if the request has none.
            inputs: returns the digests of everything that the run reads; takes the files and
                folders that the run itself writes.
        """
        made = located(request.out or default)
        folder = located(request.run_folder or home() / "runs" / request.name)
        return cls(
            request.as_json(),
            made,
            folder,
            request.quiet,
            request.dry_run,
            lambda: inputs((folder, made)),
            request.makes_file,
            request.command,
            guarded=True,
        )

    def check_places(self) -> None:
        """Raise `ConfigError` if result or run folder cannot be written, or the run folder holds
        other files.
        """
        writable_folder(self.folder)
        if self.guarded:
            refuse_other_files(self.folder)
        if self.makes_file:
            writable_file(self.made)
        else:
            writable_folder(self.made, mark="config.json")


def run_once(job: Callable[..., RunJob], request: Any, run: Run) -> Path:
    """Run a job in its folder, resuming or skipping what is finished, and return the result's path.

    A folder has one writer at a time. A run that was begun with another request or on other inputs
    is refused; stages that were stored before a run had begun are rebuilt.

    Args:
        job: takes the request, the folder, `out` (the path of the result) and `progress`.
        request: resolved arguments, passed to `job`; its `lighter` says what needs less memory.
        run: what determines the run, and where it is written.

    Raises:
        TrainError: the run in the folder belongs to another request or other inputs, or another
            process is writing to it.
        ConfigError: result or run folder cannot be written, or holds what this run did not make.
        DeviceError: the device has too little memory; what is finished stays stored.
        KeyboardInterrupt: after Ctrl-C; the message says that the same call resumes.
    """
    run.check_places()
    with ProgressBar(quiet=run.quiet) as progress:
        if run.dry_run:
            _check_begun(run)
            with TemporaryDirectory() as empty:
                with out_of_memory_explained(f"take {request.lighter}."):
                    estimate = job(request, Path(empty), out=run.made, progress=progress).estimate()
                progress.say(estimate)
            return run.made
        with run_lock(run.folder) if run.main else nullcontext():
            _run(job, request, run, progress)
        return run.made


def _run(job: Callable[..., RunJob], request: Any, run: Run, progress: ProgressBar) -> None:
    """Run a job unless it is finished."""
    inputs = _check_begun(run)
    if (run.folder / "result.json").is_file() and run.made.exists():
        progress.say(f"{run.made} is finished")
        return
    is_first = not (run.folder / RUN_STARTED).is_file()
    if run.main:
        request_values = json.loads(json.dumps(run.stored))
        start = {"command": run.command, "request": request_values, "inputs": inputs}
        begin(run.folder, start, run.made)
    try:
        with (
            disk_full_explained(
                f"The disk of {run.folder} is full; free some space and run the same command."
            ),
            out_of_memory_explained(
                "finished work is stored: free some memory and run the same command, or give "
                f"another --name and {request.lighter}."
            ),
        ):
            record = _record(job, request, run, progress, is_first)
    except KeyboardInterrupt as stop:
        raise KeyboardInterrupt(
            *stop.args or ["stopped, finished work is stored; the same call resumes the run"]
        ) from None
    if record is not None:
        write_json(run.folder / "result.json", record)


def _record(
    job: Callable[..., RunJob], request: Any, run: Run, progress: ProgressBar, is_first: bool
) -> dict[str, Any] | None:
    """Run a job and return its record; a run that is refused before it has begun leaves no trace.

    Args:
        job, request, run: as for `run_once`.
        progress: shows what is running.
        is_first: whether no earlier call has worked on this run.
    """
    try:
        return job(request, run.folder, out=run.made, progress=progress).run()
    except UserError as error:
        # Too little text is read again by the next call: a git history that has grown since has the
        # same digest. Other errors do not delete what an earlier call has stored.
        may_withdraw = run.main and not is_begun(run.folder)
        was_mistaken = is_first and isinstance(error, ConfigError)
        if may_withdraw and (was_mistaken or isinstance(error, DataError)):
            withdraw(run.folder)
        raise


def _check_begun(run: Run) -> dict[str, str]:
    """Return the digests of the inputs.

    Raises:
        TrainError: the folder holds a run of another command, with another request or on other
            inputs.
        ConfigError: the result's path holds what this run did not make.
    """
    started = run.folder / RUN_STARTED
    begun = is_begun(run.folder) and started.is_file()
    if begun:
        _check_command(started, run.command)
    check_config(run.folder / "request.json", run.stored)
    if run.guarded:
        refuse_other_result(run.folder, run.made)
    before = _digests(started) if begun else {}
    try:
        inputs = run.inputs()
    except DataError:
        # The text of a finished run may have been deleted since.
        if before and (run.folder / "result.json").is_file():
            return before
        raise
    changed = [name for name in inputs if name in before and before[name] != inputs[name]]
    if changed:
        raise TrainError(
            f"{run.folder} holds a run on another {changed[0]}, whose content has changed since; "
            f"{_mend(run, changed[0])}."
        )
    return inputs


def _mend(run: Run, changed: str) -> str:
    """Return what to do if an input of a run has changed since.

    Args:
        run: the run.
        changed: name of the input.
    """
    is_expert = run.command == "expert train" and run.folder.parent == located(home() / "runs")
    if changed == "text" and is_expert and (run.folder / "result.json").is_file():
        return (
            f"continue it with `deepseek expert train --update {run.folder.name}`, or give "
            "another name to start a new run"
        )
    if changed == "tokenizer":
        return (
            "restore it to resume; if it is the same, this version encodes text with it in another "
            "way, so give another name to start a new run"
        )
    return "restore it to resume, or give another name to start a new run"


def _check_command(started: Path, command: str) -> None:
    """Compare the command of a run with the one in `start.json`; older versions stored none.

    Raises:
        TrainError: they differ, so that comparing arguments would be pointless.
    """
    before = read_object(started).get("command") or command
    if command and before != command:
        raise TrainError(
            f"{started.parent} holds a run of `deepseek {before}`; give another --name."
        )


def _digests(started: Path) -> dict[str, str]:
    """Return the digests of the inputs in `start.json`; older versions stored none."""
    inputs = read_object(started).get("inputs", {})
    if not isinstance(inputs, dict):
        raise CheckpointError(f"{started} holds no digests of inputs; restore it or delete it.")
    return inputs


def check_config(path: Path, config: dict[str, Any]) -> None:
    """Compare a configuration with the one stored at `path`, if there is one.

    Raises:
        TrainError: they differ; the message names the first such field.
    """
    if not path.is_file():
        return
    before = _leaves(with_absolute_models(read_object(path)))
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
    if isinstance(value, float):
        return f"{value:,.4g}"
    if isinstance(value, int) and not isinstance(value, bool):
        return f"{value:,}"
    return str(value)
