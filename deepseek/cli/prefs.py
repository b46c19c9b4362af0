"""`deepseek prefs`: the preference database."""

from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from deepseek.cli.options import Base

if TYPE_CHECKING:
    from deepseek.data.preferences.database import PreferenceDatabase

app = typer.Typer(
    add_completion=False,
    help="The preference database: import, add, generate, search, stats, split, export.",
)

Database = Annotated[
    Path | None,
    typer.Option("--database", help="The file; default: preferences.db in the library's home."),
]


@app.command("import")
def import_file(
    file: Annotated[
        Path, typer.Argument(help="JSONL or Parquet with prompt, chosen and rejected.")
    ],
    source: Annotated[
        str | None, typer.Option(help="What to put down as source; default: the file's name.")
    ] = None,
    database: Database = None,
) -> None:
    """Add the pairs of a file; those that are there already are left out, so that a cut import can
    be run again.

    If a line is no pair, those before it stay; mend it and import the file again.
    """
    from deepseek.data.preferences.files import read_preferences
    from deepseek.train.loop.progress import ProgressBar

    with opened(database) as store, ProgressBar() as bar:
        added = store.add_all(read_preferences(file, source), bar)
    print(f"{added.new:,} pairs added, {added.duplicates:,} were there already")


@app.command()
def add(
    prompt: Annotated[str, typer.Option(help="What the user said.")],
    chosen: Annotated[str, typer.Option(help="The better answer.")],
    rejected: Annotated[str, typer.Option(help="The worse answer.")],
    source: Annotated[str, typer.Option(help="Who says so.")] = "by hand",
    label: Annotated[
        list[str] | None, typer.Option(help="A topic or flag; may be repeated.")
    ] = None,
    database: Database = None,
) -> None:
    """Add one pair."""
    from deepseek.data.preferences.files import preference

    record = {"prompt": prompt, "chosen": chosen, "rejected": rejected, "labels": label or []}
    with opened(database) as store:
        number = store.add(preference(record, "the pair", source))
    print(f"preference {number}" if number else "this pair is there already")


@app.command()
def generate(
    file: Annotated[
        Path, typer.Argument(help="JSONL with a prompt a line: a text or a list of messages.")
    ],
    base: Base = "smollm2-135m",
    judges: Annotated[
        str, typer.Option(help="Who judges: clean, willing, varied.")
    ] = "clean,willing,varied",
    answers: Annotated[int, typer.Option(min=2, help="Answers to each prompt.")] = 4,
    max_tokens: Annotated[
        int, typer.Option("--max-tokens", min=1, help="Most tokens of an answer.")
    ] = 32,
    temperature: Annotated[
        float, typer.Option(min=0.1, help="At which answers are sampled.")
    ] = 0.8,
    seed: Annotated[int, typer.Option(help="Of the sampling.")] = 0,
    database: Database = None,
) -> None:
    """Let a model answer prompts several times and judges choose the better and the worse
    answer.
    """
    from deepseek.cli.options import names
    from deepseek.data.text.source import records
    from deepseek.engine.load import load
    from deepseek.registry import pick
    from deepseek.train.loop.progress import ProgressBar
    from deepseek.train.rl.judge import JUDGES, generate_pairs, prompt_of

    chosen = {name: pick(JUDGES, name, "judge") for name in names(judges)}
    prompts = [prompt_of(record, f"{file.name} line {number}") for number, record in records(file)]
    model, tokenizer = load(base)
    with opened(database) as store, ProgressBar() as bar:
        pairs = generate_pairs(
            model,
            tokenizer,
            prompts,
            chosen,
            answers=answers,
            new_tokens=max_tokens,
            temperature=temperature,
            source=f"sampled from {base}",
            seed=seed,
            progress=bar,
        )
        added = store.add_all(pairs)
    print(f"{added.new:,} pairs added, {added.duplicates:,} were there already")


@app.command()
def search(
    words: Annotated[
        str, typer.Argument(help="Words that all must occur; none: the first pairs.")
    ] = "",
    limit: Annotated[int, typer.Option(help="Most pairs to show.")] = 10,
    database: Database = None,
) -> None:
    """Show pairs, newest first."""
    with opened(database) as store:
        found = store.search(words, limit)
    for pair in found:
        print(f"{pair.id}  {pair.source}  {' '.join(pair.labels)}".rstrip())
        spoken = [(message["role"], message["content"]) for message in pair.prompt]
        for name, text in (*spoken, ("chosen", pair.chosen), ("rejected", pair.rejected)):
            print(f"  {name:9} {' '.join(text.split())[:200]}")


@app.command()
def stats(database: Database = None) -> None:
    """Count pairs by split, source and label, and how often each judge agrees."""
    with opened(database) as store:
        store.check()
        counted = store.statistics()
    print(
        f"{counted.pairs:,} pairs of {counted.prompts:,} prompts, {counted.revisions:,} revisions"
    )
    for title, counts in (
        ("split", counted.splits),
        ("source", counted.sources),
        ("label", counted.labels),
    ):
        for name, count in list(counts.items())[:20]:
            print(f"  {title:7} {name or '(none)':32} {count:10,}")
    for judge, share in counted.agreement.items():
        print(f"  judge   {judge:32} prefers the chosen answer in {share:.1%}")


@app.command()
def split(
    share: Annotated[
        float, typer.Argument(help="Share of the prompts that is held out for evaluation.")
    ],
    database: Database = None,
) -> None:
    """Set how much is held out; all pairs of a prompt are on the same side, and which one never
    changes by itself.
    """
    with opened(database) as store:
        store.set_eval_share(share)
        splits = store.statistics().splits
    print(f"train {splits['train']:,}, eval {splits['eval']:,}")


@app.command()
def export(
    file: Annotated[Path, typer.Argument(help="A .jsonl or .parquet file to write.")],
    split: Annotated[Literal["train", "eval"] | None, typer.Option(help="Only this split.")] = None,
    database: Database = None,
) -> None:
    """Write pairs in TRL's conversational form."""
    from deepseek.data.preferences.files import write_preferences

    with opened(database) as store:
        print(f"{write_preferences(store, file, split):,} pairs in {file}")


def opened(path: Path | None) -> "closing[PreferenceDatabase]":
    """Give the open database, to be closed after the block."""
    from deepseek.checkpoint.store import home
    from deepseek.data.preferences.database import PreferenceDatabase

    return closing(PreferenceDatabase(path or home() / "preferences.db"))
