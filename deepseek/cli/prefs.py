"""`deepseek prefs`: the preference database."""

from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from deepseek.checkpoint.files import expanded
from deepseek.checks import MAX_SEED
from deepseek.cli.options import Base, Device, DryRun, Json, Precision
from deepseek.cli.output import echo
from deepseek.errors import ConfigError, DataError

if TYPE_CHECKING:
    from deepseek.data.preferences.database import PreferenceDatabase

app = typer.Typer(
    add_completion=False,
    help="The preference database: import, add, generate, search, stats, split, export.",
)

Database = Annotated[
    Path | None,
    typer.Option("--database", help="Database file; default: preferences.db in the home folder."),
]

MOST_ROWS = 20
"""Most sources, and most labels, that `stats` prints: those of the most pairs."""


@app.command("import")
def import_file(
    file: Annotated[
        Path, typer.Argument(help="JSONL or Parquet with prompt, chosen and rejected.")
    ],
    source: Annotated[
        str | None, typer.Option(help="Source to record for the pairs; default: the file's name.")
    ] = None,
    database: Database = None,
) -> None:
    """Add the pairs of a file. Pairs already in the database are skipped, so that an interrupted
    import can be repeated.

    An invalid line stops the import; the pairs before it stay. Fix it and import the file again.
    """
    from deepseek.data.preferences.files import read_preferences
    from deepseek.train.loop.progress import ProgressBar

    with open_database(database) as store, ProgressBar() as bar:
        counts = store.add_all(read_preferences(file, source), bar)
    if not counts.new + counts.duplicates:
        raise DataError(f"{file} holds no pairs; give a file with some.")
    echo(f"{counts.new:,} pairs added, {counts.duplicates:,} already in the database")


@app.command()
def add(
    prompt: Annotated[str, typer.Option(help="The user's message.")],
    chosen: Annotated[str, typer.Option(help="The better answer.")],
    rejected: Annotated[str, typer.Option(help="The worse answer.")],
    source: Annotated[str, typer.Option(help="Source of the preference.")] = "by hand",
    label: Annotated[list[str] | None, typer.Option(help="A topic or flag; repeatable.")] = None,
    database: Database = None,
) -> None:
    """Add one pair."""
    from deepseek.data.preferences.files import preference

    for option, text in {"prompt": prompt, "chosen": chosen, "rejected": rejected}.items():
        if not text.strip():
            raise ConfigError(f"--{option} is empty; give a text.")
    labels = label or []
    if not all(text.strip() for text in labels):
        raise ConfigError("--label is empty; give a topic or flag, or leave it out.")
    record = {"prompt": prompt, "chosen": chosen, "rejected": rejected, "labels": labels}
    with open_database(database) as store:
        number = store.add(preference(record, "the pair", source))
    echo(f"preference {number}" if number else "this pair is already in the database")


@app.command()
def generate(
    file: Annotated[
        Path, typer.Argument(help="JSONL with one prompt per line: a text or a list of messages.")
    ],
    base: Base = "smollm2-135m",
    judges: Annotated[
        str, typer.Option(help="Judges, comma-separated: clean, willing, varied.")
    ] = "clean,willing,varied",
    answers: Annotated[int, typer.Option(min=2, max=64, help="Answers per prompt.")] = 4,
    max_tokens: Annotated[
        int, typer.Option("--max-tokens", min=1, help="Maximum tokens per answer.")
    ] = 32,
    temperature: Annotated[
        float, typer.Option(min=0.1, max=10, help="Sampling temperature of the answers.")
    ] = 0.8,
    seed: Annotated[int, typer.Option(min=0, max=MAX_SEED, help="Seed of the sampling.")] = 0,
    refusals: Annotated[
        bool,
        typer.Option(
            "--refusals",
            help="Set each good answer against a refusal too, so that the model does not learn to"
            " refuse; for prompts that should be answered.",
        ),
    ] = False,
    database: Database = None,
    device: Device = "auto",
    dtype: Precision = "auto",
    dry_run: DryRun = False,
) -> None:
    """Sample several answers to each prompt, let judges pick the better and the worse one, and add
    the pairs.
    """
    from deepseek.cli.options import names
    from deepseek.data.text.source import records
    from deepseek.engine.load import load
    from deepseek.model.language_model import own_model
    from deepseek.registry import pick
    from deepseek.train.jobs.estimate import of_pairs
    from deepseek.train.loop.progress import ProgressBar
    from deepseek.train.rl.judge import JUDGES, generate_pairs, prompt_of

    selected_judges = {name: pick(JUDGES, name, "judge") for name in names(judges)}
    if not selected_judges:
        raise ConfigError(f"--judges {judges!r} names no judge; give {' or '.join(JUDGES)}.")
    numbered = records(file, ("prompt",))
    prompts = [prompt_of(record, f"{file.name} line {number}") for number, record in numbered]
    if not prompts:
        raise DataError(f"{file} holds no prompts; give a file with some.")
    loaded_model, tokenizer = load(base, device=device, dtype=dtype)
    model = own_model(loaded_model, "Sampling of pairs")
    sampling: dict[str, Any] = {
        "answers": answers,
        "new_tokens": max_tokens,
        "temperature": temperature,
        "seed": seed,
        "refusals": refusals,
    }
    if dry_run:
        echo(f"{of_pairs(model, tokenizer, prompts, selected_judges, **sampling)}")
        return
    with open_database(database) as store, ProgressBar() as bar:
        pairs = generate_pairs(
            model,
            tokenizer,
            prompts,
            selected_judges,
            source=f"sampled from {base}",
            progress=bar,
            **sampling,
        )
        counts = store.add_all(pairs, batch=1)
    echo(f"{counts.new:,} pairs added, {counts.duplicates:,} already in the database")


@app.command()
def search(
    words: Annotated[
        str, typer.Argument(help="Words that must all occur; default: show all pairs.")
    ] = "",
    limit: Annotated[int, typer.Option(min=1, help="Maximum number of pairs.")] = 10,
    database: Database = None,
    as_json: Json = False,
) -> None:
    """Show pairs, newest first."""
    from deepseek.cli.shapes import PreferenceList, PreferenceRow, print_json

    with open_existing(database) as store:
        pairs = store.search(words, limit)
    if as_json:
        rows = [PreferenceRow.model_validate(pair, from_attributes=True) for pair in pairs]
        print_json(PreferenceList(pairs=rows))
        return
    if not pairs:
        echo("no pair has these words" if words else "there are no pairs", error=True)
    for pair in pairs:
        echo(f"{pair.id}  {pair.source}  {' '.join(pair.labels)}".rstrip())
        turns = [(message["role"], message["content"]) for message in pair.prompt]
        for name, text in (*turns, ("chosen", pair.chosen), ("rejected", pair.rejected)):
            echo(f"  {name:9} {' '.join(text.split())[:200]}")


@app.command()
def stats(database: Database = None, as_json: Json = False) -> None:
    """Count pairs by split, source and label, and how often each judge agrees."""
    from deepseek.cli.shapes import PreferenceCounts, print_json

    with open_existing(database) as store:
        store.check()
        totals = store.statistics()
    if as_json:
        print_json(PreferenceCounts.model_validate(totals, from_attributes=True))
        return
    echo(f"{totals.pairs:,} pairs of {totals.prompts:,} prompts, {totals.revisions:,} revisions")
    for title, counts in (
        ("split", totals.splits),
        ("source", totals.sources),
        ("label", totals.labels),
    ):
        for name, count in list(counts.items())[:MOST_ROWS]:
            echo(f"  {title:7} {name or '(none)':32} {count:10,}")
        if len(counts) > MOST_ROWS:
            echo(f"  {title:7} and {len(counts) - MOST_ROWS:,} more, which --json lists")
    for judge, share in totals.agreement.items():
        echo(f"  judge   {judge:32} prefers the chosen answer in {share:.1%}")


@app.command()
def split(
    share: Annotated[
        float,
        typer.Argument(
            help="Share of the prompts to hold out for evaluation, at least 0 and less than 1."
        ),
    ],
    database: Database = None,
) -> None:
    """Set the share of held-out prompts. All pairs of a prompt are in the same split, and the
    assignment is deterministic.
    """
    if not 0 <= share < 1:  # NaN too
        raise ConfigError(f"SHARE {share:g} must be at least 0 and less than 1.")
    with open_existing(database) as store:
        store.set_eval_share(share)
        splits = store.statistics().splits
    echo(f"train {splits['train']:,}, eval {splits['eval']:,}")


@app.command()
def export(
    file: Annotated[Path, typer.Argument(help="A .jsonl or .parquet file to write.")],
    split: Annotated[Literal["train", "eval"] | None, typer.Option(help="Only this split.")] = None,
    database: Database = None,
) -> None:
    """Write pairs in TRL's conversational format. If there is no pair, nothing is written."""
    from deepseek.checkpoint.files import writable_file
    from deepseek.data.preferences.files import write_preferences

    if file.suffix not in (".jsonl", ".parquet"):
        raise ConfigError(f"{file} ends neither with .jsonl nor with .parquet; name one that does.")
    file = writable_file(file)
    with open_existing(database) as store:
        if next(store.pairs(split), None) is None:
            pair_kind = f"pairs in the split {split}" if split else "pairs"
            raise DataError(
                f"{store.path} holds no {pair_kind}, so {file} is left as it is; give another "
                "--database, or add pairs with `deepseek prefs import FILE`."
            )
        echo(f"{write_preferences(store, file, split):,} pairs in {file}")


def open_existing(path: Path | None) -> "closing[PreferenceDatabase]":
    """Return what `open_database` does, for commands that a mistyped file must not
    make a database of.

    Args:
        path: database file; None: `preferences.db` in the library's home folder, made if need be.

    Raises:
        DataError: the file does not exist, or is empty.
    """
    path = path and expanded(path)
    if path is not None and not (path.is_file() and path.stat().st_size):
        problem = "is empty" if path.is_file() else "is not a file"
        raise DataError(
            f"{path} {problem}; check --database, or make one with `deepseek prefs import FILE`."
        )
    return open_database(path)


def open_database(path: Path | None) -> "closing[PreferenceDatabase]":
    """Return a context manager that opens the database and closes it after the block.

    Args:
        path: database file; None: `preferences.db` in the library's home folder.
    """
    from deepseek.checkpoint.store import home
    from deepseek.data.preferences.database import PreferenceDatabase

    return closing(PreferenceDatabase(expanded(path or home() / "preferences.db")))
