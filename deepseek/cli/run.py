"""`deepseek run` (and `make run`): from nothing to a model that learns a git history while it serves."""

import sys
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from deepseek.cli.options import Base

if TYPE_CHECKING:
    from rich.console import Console

    from deepseek.infer.engine import Engine

PROMPT_TOKENS = 96
ANSWER_TOKENS = 40
EVALUATION_TOKENS = 4096


def run(
    from_git: Annotated[Path, typer.Option(help="The repository to learn from.")] = Path(),
    base: Base = "smollm2-135m",
    minutes: Annotated[float, typer.Option(min=0.1, help="Time to train the expert.")] = 3.0,
) -> None:
    """Fetch the base and serve it with its web page; an expert trains from a git history meanwhile, if there is none.

    Without a terminal, train first, show what the expert gained, complete one prompt with and without it, and end.
    """
    from rich.console import Console

    from deepseek.cli.expert import source_name
    from deepseek.cli.pull import fetch
    from deepseek.packs.library import installed

    console = Console()
    fetch(base)
    name = source_name(from_git)
    fresh = name not in installed()
    if sys.stdin.isatty() and console.is_terminal:
        _serve(base, name, from_git, minutes if fresh else None, console)
    else:
        _demonstrate(base, name, from_git, minutes if fresh else None, console)


def _serve(base: str, name: str, repository: Path, minutes: float | None, console: "Console") -> None:
    """Serve on the usual port, or any free one, with the expert, or training it in `minutes`."""
    import socket

    from deepseek.server.run import serve
    from deepseek.server.schema import TeachRequest
    from deepseek.server.service import Settings

    settings = Settings(teach_root=repository.resolve())
    with socket.socket() as probe:
        if probe.connect_ex((settings.host, settings.port)) == 0:
            settings = replace(settings, port=0)
    lesson = None if minutes is None else TeachRequest(name=name, kind="git", minutes=minutes)

    def announce(address: str) -> None:
        console.print(f"Serving {base} at [bold]{address}[/] (open it in a browser; Ctrl-C ends)", soft_wrap=True)
        if lesson is not None:
            console.print(
                f"Meanwhile the expert [bold]{name}[/] learns {repository.resolve()}; the page shows how far it is."
            )

    serve(base, experts=[] if lesson else [name], settings=settings, lesson=lesson, announce=announce)


def _demonstrate(base: str, name: str, repository: Path, minutes: float | None, console: "Console") -> None:
    from deepseek.infer.start import start_engine
    from deepseek.train.expert import train_expert

    if minutes is not None:
        console.print(
            f"Training the expert [bold]{name}[/] from the git history of {repository.resolve()}", soft_wrap=True
        )
        train_expert(base, name=name, from_git=repository, minutes=minutes)
    with start_engine(base, experts=[name]) as engine:
        if minutes is not None:
            _show_gain(engine, name, console)
        _answer(engine, name, console)


def _show_gain(engine: "Engine", name: str, console: "Console") -> None:
    from deepseek.cli.table import comparison_table
    from deepseek.evaluate.quality import collected, compare, expert_texts
    from deepseek.train.progress import ProgressBar

    with collected(engine.tokenizer, [], expert_texts([name], [name])) as texts, ProgressBar() as progress:
        console.print(comparison_table(compare(engine.model, texts, EVALUATION_TOKENS, progress)))


def _answer(engine: "Engine", name: str, console: "Console") -> None:
    """Complete the head of a held-out document without and with the expert."""
    from deepseek.cli.speak import Palette, legend, speak
    from deepseek.evaluate.quality import held_out_opening
    from deepseek.infer.request import ExpertChoice, Request
    from deepseek.infer.sampler import Sampling

    prompt = tuple(held_out_opening(name, PROMPT_TOKENS))
    palette = Palette([name])
    console.rule("the prompt, a text that the expert has not seen")
    console.print(engine.tokenizer.decode(list(prompt)), markup=False, highlight=False, soft_wrap=True)
    for title, names in (("without the expert", ()), (f"with the expert {name}", (name,))):
        console.rule(title)
        _, shares = speak(engine, Request(prompt, Sampling(ANSWER_TOKENS), ExpertChoice(names)), console, palette)
        console.print(legend(shares, palette))
