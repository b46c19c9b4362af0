"""`deepseek run` (and `make run`): serve a model and train an expert on a git history meanwhile."""

import sys
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, TypedDict

import typer

from deepseek.cli.options import Base, Device, Precision
from deepseek.cli.output import plain
from deepseek.device.names import Dtype

if TYPE_CHECKING:
    from rich.console import Console

    from deepseek.engine.engine import Engine

SHOWN_LINES = 8
"""Lines of context to show before the line to be completed."""

EVALUATION_TOKENS = 4096


def run(
    from_git: Annotated[Path, typer.Option(help="Git repository to train on.")] = Path(),
    base: Base = "smollm2-135m",
    minutes: Annotated[
        float, typer.Option(min=0.1, max=1e5, help="Minutes to train the expert.")
    ] = 3.0,
    device: Device = "auto",
    dtype: Precision = "auto",
) -> None:
    """Fetch the base and serve it with its web page. If there is no expert for the git repository
    yet, train one meanwhile.

    Without a terminal: train first, print the expert's gain and one example line, and exit.
    """
    from rich.console import Console

    from deepseek.cli.pull import fetch
    from deepseek.device.choose import choose_device, choose_dtype
    from deepseek.packs.library import installed
    from deepseek.train.jobs.arguments import source_name

    choose_dtype(dtype, choose_device(device))
    console = Console()
    fetch(base)
    name = source_name(from_git)
    fresh = name not in installed()
    where: Where = {"device": device, "dtype": dtype}
    if sys.stdin.isatty() and console.is_terminal:
        _serve(base, name, from_git, minutes if fresh else None, console, where)
    else:
        _demonstrate(base, name, from_git, minutes if fresh else None, console, where)


class Where(TypedDict):
    """The options `--device` and `--dtype`."""

    device: str
    dtype: Dtype


def _serve(
    base: str, name: str, repository: Path, minutes: float | None, console: "Console", where: Where
) -> None:
    """Serve with the expert, or train it for `minutes` while serving; take a free port if the
    default one is in use.
    """
    import socket

    from deepseek.cli.waiting import Waiting
    from deepseek.server.run import serve
    from deepseek.server.schema import TeachRequest
    from deepseek.server.service import Settings

    settings = Settings(teach_root=repository.resolve())
    with socket.socket() as probe:
        if probe.connect_ex((settings.host, settings.port)) == 0:
            settings = replace(settings, port=0)
    lesson = None
    if minutes is not None:
        fields = {"name": name, "kind": "git", "minutes": minutes, "dtype": where["dtype"]}
        lesson = TeachRequest.model_validate(fields)

    def announce(address: str) -> None:
        console.print(
            plain(f"Serving {base} at {address} (open it in a browser; Ctrl-C ends)"),
            soft_wrap=True,
        )
        if lesson is not None:
            console.print(
                plain(
                    f"Meanwhile the expert {name} trains on {repository.resolve()}; "
                    "the page shows its progress."
                )
            )

    serve(
        base,
        experts=[] if lesson else [name],
        settings=settings,
        lesson=lesson,
        announce=announce,
        progress=Waiting(),
        **where,
    )


def _demonstrate(
    base: str, name: str, repository: Path, minutes: float | None, console: "Console", where: Where
) -> None:
    from deepseek.engine.start import start_engine
    from deepseek.train.jobs.expert import train_expert

    if minutes is not None:
        console.print(
            plain(f"Training the expert {name} from the git history of {repository.resolve()}"),
            soft_wrap=True,
        )
        train_expert(base, name=name, from_git=repository, minutes=minutes, **where)
    with start_engine(base, experts=[name], **where) as engine:
        if minutes is not None:
            _show_gain(engine, name, console)
        _answer(engine, name, console)


def _show_gain(engine: "Engine", name: str, console: "Console") -> None:
    from deepseek.cli.table import comparison_table
    from deepseek.evaluate.quality import collected, compare, expert_texts
    from deepseek.train.loop.progress import ProgressBar

    with (
        collected(engine.tokenizer, [], expert_texts([name], [name])) as texts,
        ProgressBar() as progress,
    ):
        console.print(comparison_table(compare(engine.model, texts, EVALUATION_TOKENS, progress)))


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
    chosen = (
        f"Chosen by rule: the line with the largest gain ({gain:.1f} nats) of {example.compared} "
        f"held-out lines. `deepseek eval {name} --against rag` measures the average gain."
    )
    console.print(plain(chosen, "dim"), soft_wrap=True)
