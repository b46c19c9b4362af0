"""`deepseek run` (and `make run`): from nothing to a chat with an expert trained on a git history."""

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from deepseek.cli.options import Base

if TYPE_CHECKING:
    from rich.console import Console

    from deepseek.evaluate.quality import Comparison
    from deepseek.infer.load import Loaded

app = typer.Typer(add_completion=False)

PROMPT_TOKENS = 96
ANSWER_TOKENS = 40
EVALUATION_TOKENS = 4096


@app.command()
def run(
    from_git: Annotated[Path, typer.Option(help="The repository to learn from.")] = Path(),
    base: Base = "smollm2-135m",
    minutes: Annotated[float, typer.Option(min=0.1, help="Time to train the expert.")] = 3.0,
) -> None:
    """Fetch the base, train an expert from a git history if there is none, show what it gained, and open the chat.

    Without a terminal, complete one prompt with and without the expert, and end.
    """
    from rich.console import Console

    from deepseek.cli.pull import fetch
    from deepseek.infer.load import load
    from deepseek.packs.library import installed
    from deepseek.train.expert import train_expert

    console = Console()
    fetch(base)
    name = _expert_name(from_git)
    fresh = name not in installed()
    if fresh:
        console.print(
            f"Training the expert [bold]{name}[/] from the git history of {from_git.resolve()}", soft_wrap=True
        )
        train_expert(base, name=name, from_git=from_git, minutes=minutes, resume="make run")
    loaded = load(base, experts=[name])
    if fresh:
        _show_gain(loaded, name, console)
    if sys.stdin.isatty() and console.is_terminal:
        _converse(loaded, console)
    else:
        _demonstrate(loaded, name, console)


def _expert_name(repository: Path) -> str:
    """Return a valid expert name made of the repository's folder name."""
    words = "".join(c if c.isascii() and c.isalnum() else "-" for c in repository.resolve().name.lower()).strip("-")
    return words or "repository"


def _show_gain(loaded: "Loaded", name: str, console: "Console") -> None:
    from deepseek.cli.table import comparison_table
    from deepseek.evaluate.quality import compare
    from deepseek.evaluate.texts import collected, expert_texts
    from deepseek.train.progress import ProgressBar

    with collected(loaded.tokenizer, [], expert_texts([name], [name])) as texts, ProgressBar() as progress:
        rows: list[Comparison] = list(compare(loaded.model, texts, EVALUATION_TOKENS, progress))
    console.print(comparison_table(rows))


def _converse(loaded: "Loaded", console: "Console") -> None:
    from deepseek.cli.session import ChatSession
    from deepseek.infer.sampler import Sampling

    ChatSession(*loaded, Sampling(temperature=0.6, top_p=0.9), console).run()


def _demonstrate(loaded: "Loaded", name: str, console: "Console") -> None:
    """Complete the head of a held-out document without and with the expert."""
    from deepseek.cli.palette import Palette
    from deepseek.cli.speak import legend, speak
    from deepseek.evaluate.texts import held_out_opening
    from deepseek.infer.sampler import Sampling
    from deepseek.infer.stream import stream

    model, tokenizer = loaded
    prompt = held_out_opening(name, PROMPT_TOKENS)
    palette = Palette([name])
    console.rule("the prompt, a text that the expert has not seen")
    console.print(tokenizer.decode(prompt), markup=False, highlight=False, soft_wrap=True)
    for title, arming in (("without the expert", None), (f"with the expert {name}", "auto")):
        console.rule(title)
        with model.experts.arming(arming):
            _, shares = speak(stream(model, tokenizer, prompt, Sampling(ANSWER_TOKENS)), console, palette)
        console.print(legend(shares, palette))
