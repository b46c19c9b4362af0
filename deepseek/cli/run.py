"""`deepseek run` (and `make run`): serve a model and train an expert on a git history meanwhile."""

import re
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, TypedDict

import typer

from deepseek.cli.options import Base, Device, Precision
from deepseek.cli.output import echo, plain, print_table
from deepseek.device.names import Dtype
from deepseek.errors import ConfigError, DataError

if TYPE_CHECKING:
    from rich.console import Console

    from deepseek.engine.engine import Engine

LONGEST_NAME = 64
"""Most characters of an expert's name."""

SHOWN_LINES = 8
"""Lines of context to show before the line to be completed."""

EVALUATION_TOKENS = 4096


def run(
    from_git: Annotated[
        Path | None,
        typer.Option(help="Git repository to train on; default: that of the current folder."),
    ] = None,
    base: Base = "smollm2-135m",
    minutes: Annotated[
        float, typer.Option(min=0.1, max=1e5, help="Minutes to train the expert.")
    ] = 3.0,
    serve: Annotated[
        bool, typer.Option(help="Otherwise train, print the gain and one example line, and exit.")
    ] = True,
    device: Device = "auto",
    dtype: Precision = "auto",
) -> None:
    """Fetch the base and serve it with its web page. If there is no expert for the git repository
    yet, train one meanwhile.
    """
    from rich.console import Console

    from deepseek.cli.pull import fetch
    from deepseek.device.choose import choose_device, choose_dtype

    repository = _repository(from_git, is_required=not serve)
    choose_dtype(dtype, choose_device(device))
    console = Console()
    placement: Placement = {"device": device, "dtype": dtype}
    folder = fetch(base)
    if repository is None:
        _serve(base, None, console, placement)
        return
    name, is_new = expert_for(repository, base, folder)
    lesson = RepositoryExpert(name, repository, minutes if is_new else None)
    if serve:
        _serve(base, lesson, console, placement)
    else:
        _demonstrate(base, lesson, console, placement)


@dataclass(frozen=True)
class RepositoryExpert:
    """An expert for a git repository.

    Attributes:
        name: name of the expert.
        repository: what it is trained on.
        minutes: time to train it; None: it is there already.
    """

    name: str
    repository: Path
    minutes: float | None


def _repository(path: Path | None, is_required: bool) -> Path | None:
    """Return the repository to train on; None without one, which standard error says.

    Args:
        path: value of `--from-git`.
        is_required: whether there has to be one.

    Raises:
        ConfigError, DataError: the one given or needed cannot be trained on.
    """
    from deepseek.cli.repository import check_repository, current_root

    repository = path or current_root()
    try:
        check_repository(repository)
    except DataError:
        if path or is_required:
            raise
        echo(
            f"note: {repository.resolve()} has no git history to train an expert on; --from-git "
            "names one.",
            error=True,
        )
        return None
    return repository


def expert_for(repository: Path, base: str, folder: Path) -> tuple[str, bool]:
    """Return the name of a base's expert for a repository, and whether it has yet to be trained.

    The expert has the name of the repository, or the base's name behind that where the expert of
    another base or repository has it already.

    Args:
        repository: the git repository.
        base: the base model as the user names it.
        folder: folder of the base.

    Raises:
        ConfigError: experts of other bases or repositories have both names.
        PackError: an expert of one of the names is damaged.
    """
    from deepseek.checkpoint.fingerprint import fingerprint
    from deepseek.packs.library import installed, is_made_for
    from deepseek.packs.listing import read_manifest
    from deepseek.train.jobs.arguments import source_name

    short_name = source_name(repository)
    suffix = re.sub(r"[^A-Za-z0-9._-]+", "-", f"-{Path(base).name}")
    full_name = f"{short_name[: max(1, LONGEST_NAME - len(suffix))]}{suffix}"[:LONGEST_NAME]
    packs = installed()
    for name in (short_name, full_name):
        if name not in packs:
            return name, True
        is_of_base = is_made_for(read_manifest(packs[name]), fingerprint(folder))
        if is_of_base and _may_be_of(repository, name):
            return name, False
    raise ConfigError(
        f"The experts {short_name} and {full_name} were made for other bases than {base}, or "
        "of other repositories; rename one with `deepseek expert rename`."
    )


def _may_be_of(repository: Path, name: str) -> bool:
    """Return whether an expert can be that of a repository: its run here, if there is one, has
    read no other source.
    """
    from deepseek.checkpoint.store import home, read_object

    request = home() / "runs" / name / "request.json"
    if not request.is_file():
        return True
    source = read_object(request).get("source", {}).get("git")
    return bool(source) and Path(source).resolve() == repository.resolve()


class Placement(TypedDict):
    """The options `--device` and `--dtype`."""

    device: str
    dtype: Dtype


def _serve(
    base: str, lesson: RepositoryExpert | None, console: "Console", placement: Placement
) -> None:
    """Serve with the expert, or train it while serving; take a free port if the default one is in
    use.
    """
    import socket

    from deepseek.cli.waiting import Waiting
    from deepseek.server.run import serve
    from deepseek.server.schema import TeachRequest
    from deepseek.server.settings import Settings

    settings = Settings(teach_root=lesson.repository.resolve()) if lesson else Settings()
    with socket.socket() as probe:
        if probe.connect_ex((settings.host, settings.port)) == 0:
            settings = replace(settings, port=0)
    request = None
    if lesson and lesson.minutes is not None:
        fields = {"name": lesson.name, "kind": "git", "minutes": lesson.minutes}
        request = TeachRequest.model_validate(fields | {"dtype": placement["dtype"]})

    def announce(address: str) -> None:
        console.print(
            plain(f"Serving {base} at {address} (open it in a browser; Ctrl-C ends)"),
            soft_wrap=True,
        )
        if request is not None and lesson is not None:
            console.print(
                plain(
                    f"Meanwhile the expert {lesson.name} trains on {lesson.repository.resolve()}; "
                    "the page shows its progress."
                ),
                soft_wrap=True,
            )

    serve(
        base,
        experts=[lesson.name] if lesson and request is None else [],
        settings=settings,
        lesson=request,
        announce=announce,
        progress=Waiting(),
        **placement,
    )


def _demonstrate(
    base: str, lesson: RepositoryExpert, console: "Console", placement: Placement
) -> None:
    from deepseek.engine.start import start_engine
    from deepseek.train.jobs.expert import train_expert

    name, repository, minutes = lesson.name, lesson.repository, lesson.minutes
    if minutes is not None:
        console.print(
            plain(f"Training the expert {name} from the git history of {repository.resolve()}"),
            soft_wrap=True,
        )
        train_expert(base, name=name, from_git=repository, minutes=minutes, **placement)
    with start_engine(base, experts=[name], **placement) as engine:
        if minutes is not None:
            _show_gain(engine, name)
        _answer(engine, name, console)


def _show_gain(engine: "Engine", name: str) -> None:
    from deepseek.cli.table import comparison_table
    from deepseek.evaluate.quality import collected, compare, expert_texts
    from deepseek.train.loop.progress import ProgressBar

    with (
        collected(engine.tokenizer, [], expert_texts([name], [name])) as texts,
        ProgressBar() as progress,
    ):
        rows = [*compare(engine.model, texts, EVALUATION_TOKENS, progress)]
    print_table(comparison_table(rows))


def _answer(engine: "Engine", name: str, console: "Console") -> None:
    """Complete one held-out line without and with the expert: the line with the largest gain."""
    from deepseek.evaluate.showcase import showcase
    from deepseek.train.loop.progress import ProgressBar

    with ProgressBar() as progress:
        example = showcase(engine, name, progress=progress)
    case = example.case
    lines = case.before.splitlines()
    console.rule(plain(f"{case.name}, held out from the expert's training"))
    console.print(plain("\n".join(lines[-SHOWN_LINES:])), soft_wrap=True)
    console.rule("its next line")
    rows = [
        ("original", case.target),
        ("the base", example.before.written),
        (f"with {name}", example.after.written),
    ]
    for title, line in rows:
        console.print(plain(f"{title:>16}  {line.strip()}"), soft_wrap=True)
    gain = example.before.nats - example.after.nats
    selection_note = (
        f"Chosen by rule: the line with the largest gain ({gain:.1f} nats) of {example.compared} "
        f"held-out lines. `deepseek eval {name} --against rag` measures the average gain."
    )
    console.print(plain(selection_note, "dim"), soft_wrap=True)
