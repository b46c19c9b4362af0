"""`deepseek data`: make training text: documented functions, questions about a source, and
synthetic problems.
"""

from collections.abc import Iterable
from pathlib import Path
from typing import Annotated

import typer

from deepseek.checkpoint.files import located, writable_file
from deepseek.cli.output import echo
from deepseek.errors import ConfigError

app = typer.Typer(add_completion=False, help="Make training text, as JSONL for --from-jsonl.")

Out = Annotated[Path, typer.Argument(help="JSONL file to write.")]
PANEL = "Text (at least one source)"
"""Heading of the sources in the help text."""


@app.command()
def code(
    folder: Annotated[Path, typer.Argument(help="Folder with Python files.")], out: Out
) -> None:
    """Write the documented functions of a folder, each with the tests that call it."""
    from deepseek.data import clean, read_folder
    from deepseek.data.builders.functions import documented_functions
    from deepseek.errors import DataError

    out = _checked_output(out)
    functions = documented_functions(clean(read_folder(folder))[0])
    if not functions:
        raise DataError(
            f"{folder} holds no documented Python functions; "
            "give other code, or train on it as it is."
        )
    _write(out, ({"text": function.text} for function in functions))


@app.command()
def questions(
    out: Annotated[Path, typer.Option(help="JSONL file to write.")],
    from_git: Annotated[
        Path | None,
        typer.Option(help="Git repository, or folder of one, to ask about.", rich_help_panel=PANEL),
    ] = None,
    from_folder: Annotated[
        Path | None, typer.Option(help="Folder of text files to ask about.", rich_help_panel=PANEL)
    ] = None,
    from_jsonl: Annotated[
        Path | None, typer.Option(help="JSONL file to ask about.", rich_help_panel=PANEL)
    ] = None,
    from_parquet: Annotated[
        Path | None, typer.Option(help="Parquet file to ask about.", rich_help_panel=PANEL)
    ] = None,
) -> None:
    """Write questions that a source answers in its own words, each with the facts of a correct
    answer.
    """
    from deepseek.cli.repository import refuse_address
    from deepseek.data import clean
    from deepseek.data.builders.questions import all_questions
    from deepseek.data.text.filters import Skipped
    from deepseek.errors import DataError
    from deepseek.train.text.corpus import Source as TextSource
    from deepseek.train.text.corpus import read_source

    out = _checked_output(out)
    refuse_address(from_git)
    source = TextSource.at(from_git, from_folder, from_jsonl, from_parquet, held_out=0.1, seed=0)
    file = from_jsonl or from_parquet
    if file and located(file) == located(out):
        raise ConfigError(f"--out {out} is the file to read; choose another name.")
    skipped = Skipped()
    documents, _ = clean(read_source(source, skipped), skipped)
    found_questions = all_questions(documents)
    if not found_questions:
        raise DataError(
            f"Nothing is documented in {len(documents)} documents; "
            "give code with docstrings or texts with headings."
        )
    _write(out, (question.record() for question in found_questions))


@app.command()
def mathematics(
    out: Out,
    count: Annotated[int, typer.Option(min=1, help="Number of problems.")] = 10_000,
    seed: Annotated[int, typer.Option(help="Seed; the same seed gives the same problems.")] = 0,
) -> None:
    """Write problems with worked answers, each checked by a second computation."""
    from deepseek.data.builders.mathematics import problems

    out = _checked_output(out)
    _write(out, ({"messages": problem.messages()} for problem in problems(count, seed)))


def _checked_output(out: Path) -> Path:
    """Return a path that can be written, with `~` replaced. One that may be a source file and no
    JSONL is refused.

    Raises:
        ConfigError: it is one.
    """
    if out.suffix != ".jsonl":
        raise ConfigError(f"{out} does not end with .jsonl; name a file that does.")
    return writable_file(out)


def _write(out: Path, records: Iterable[object]) -> None:
    import json

    from deepseek.checkpoint.store import atomic_write

    with atomic_write(out) as temporary, temporary.open("w", encoding="utf-8") as file:
        count = sum(
            1 for record in records if file.write(json.dumps(record, ensure_ascii=False) + "\n")
        )
    echo(f"{count} records in {out}")
