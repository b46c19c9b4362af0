"""`deepseek expert`: train, list, inspect, verify and sign expert packs."""

import re
import sys
from pathlib import Path
from typing import Annotated, Literal

import typer

from deepseek.cli.pull import fetch
from deepseek.errors import ConfigError

app = typer.Typer(add_completion=False, help="Train, list, inspect, verify and sign expert packs.")

Source = Annotated[Path | None, typer.Option(rich_help_panel="Text (at least one)")]
Pack = Annotated[str, typer.Argument(metavar="PACK", help="A pack file, or the name of a trained expert.")]


@app.command()
def train(
    from_git: Source = None,
    from_folder: Source = None,
    from_jsonl: Source = None,
    from_parquet: Source = None,
    name: Annotated[str, typer.Option(help="Name of the expert; default: that of the source.")] = "",
    base: Annotated[str, typer.Option(help="Base model: a name, a folder or a hub id.")] = "smollm2-135m",
    layers: Annotated[str, typer.Option(help="last:3 is fast, all is strong; also last:N or 0-9,20.")] = "last:3",
    width: Annotated[int | None, typer.Option(min=1, help="Width of the expert; default: by layers.")] = None,
    minutes: Annotated[float | None, typer.Option(min=0.1, help="Training time; default: 5.")] = None,
    tokens: Annotated[int | None, typer.Option(min=0, help="Train on this many tokens instead; 0: all.")] = None,
    epochs: Annotated[int | None, typer.Option(min=1, help="Passes over the text; default: by its amount.")] = None,
    split: Annotated[
        Literal["file", "directory", "time"],
        typer.Option(help="How to hold text out; time: train on the past, test on what came later."),
    ] = "file",
    held_out: Annotated[float, typer.Option(min=0.01, max=0.9, help="Share of the text to hold out.")] = 0.1,
    questions: Annotated[
        float | None, typer.Option(min=0, max=0.9, help="Share of questions about the text, made from it; 0: none.")
    ] = None,
    licence: Annotated[str, typer.Option(help="SPDX expression for the pack.")] = "LicenseRef-Unknown",
    domain: Annotated[str, typer.Option(help="What the expert knows, in a few words.")] = "",
    seed: Annotated[int, typer.Option(help="Of initial values, order and split.")] = 0,
    out: Annotated[Path | None, typer.Option(help="Pack file; default: the folder of trained experts.")] = None,
    run_folder: Annotated[Path | None, typer.Option(help="Where the run keeps its state and metrics.")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Check everything, estimate, change nothing.")] = False,
) -> None:
    """Train an expert on your text with the base frozen; interrupted, the same command goes on where it was."""
    options = locals() | {"name": name or source_name(from_git, from_folder, from_jsonl, from_parquet)}
    from deepseek.train.jobs.expert import train_expert

    fetch(base)  # with a progress bar, where the library would fetch it in silence
    pack = train_expert(**options)
    if not dry_run:
        print(pack)


@app.command()
def train_all(
    experts: Annotated[Path, typer.Argument(help="YAML or TOML file: `base` and, by name, `experts`.")],
) -> None:
    """Train many experts side by side as Ray tasks, and print each pack as it comes."""
    from deepseek.errors import TrainError
    from deepseek.packs.pack import read_pack
    from deepseek.train.jobs.many import train_all as run

    failed = []
    for expert, result in run(experts):
        verdict = "" if isinstance(result, Exception) else f" ({read_pack(result).manifest.verdict})"
        print(f"{expert}: {result}{verdict}", flush=True)
        failed += [expert] if isinstance(result, Exception) else []
    if failed:
        raise TrainError(f"Of the experts {', '.join(failed)} failed; mend them and run the same command.")


@app.command()
def index(name: Annotated[str, typer.Argument(help="Name of a trained expert.")]) -> None:
    """Build the retrieval index of the text that an expert was trained on, beside its pack, for `retrieve` in requests.

    What the run held out is never in it."""
    from deepseek.train.jobs.expert_index import index_expert

    print(index_expert(name))


@app.command("list")
def list_experts() -> None:
    """List the trained experts of this user."""
    from deepseek.errors import PackError
    from deepseek.packs.library import experts_folder, installed
    from deepseek.packs.pack import read_pack

    packs = installed()
    if not packs:
        print(f"no experts in {experts_folder()}; train one with `deepseek expert train`")
    for name, path in packs.items():
        try:
            manifest = read_pack(path).manifest
            losses = [f"{what} {metric.before:.3f} -> {metric.after:.3f}" for what, metric in manifest.metrics.items()]
            said = "  ".join([f"{len(manifest.layers)} layers", manifest.verdict, *losses, manifest.domain]).rstrip()
        except (PackError, OSError) as error:
            said = str(error)
        print(f"{name:24}  {path.lstat().st_size / 1e6:6.1f} MB  {said}")


@app.command()
def inspect(pack: Pack) -> None:
    """Print the manifest of a pack as JSON, after checking the pack, and its verdict on standard error."""
    from deepseek.packs.library import find_pack
    from deepseek.packs.pack import read_pack

    manifest = read_pack(find_pack(pack)).manifest
    print(manifest.model_dump_json(indent=2))
    armed = "" if manifest.helps else "; it is armed only where it is named"
    print(f"{manifest.name}: {manifest.verdict}{armed}", file=sys.stderr)


@app.command()
def verify(
    pack: Pack,
    base: Annotated[str | None, typer.Option(help="Also check that the pack was made for this model.")] = None,
    signature: Annotated[Literal["any", "signed", "trusted"], typer.Option(help="What its signature must be.")] = "any",
) -> None:
    """Check a pack: structure, digest, values, signature, and its base if one is given."""
    from deepseek.checkpoint.hub import resolve
    from deepseek.packs.library import find_pack
    from deepseek.packs.manifest import BaseDescription
    from deepseek.packs.pack import read_pack
    from deepseek.packs.policy import PackPolicy

    folder = resolve(base) if base else None
    description = BaseDescription.of(folder, folder.name) if folder else None
    manifest = read_pack(find_pack(pack), PackPolicy(signature=signature), description).manifest
    signer = f"signed by {manifest.signature.public_key[:16]}" if manifest.signature else "not signed"
    fits = f", fits {base}" if base else ""
    print(f"ok: {manifest.name}, {manifest.licence}, digest {manifest.digest[:16]}, {signer}{fits}")


@app.command()
def sign(
    pack: Pack, key: Annotated[Path, typer.Option(help="A private key that `deepseek expert keygen` made.")]
) -> None:
    """Sign a pack in place."""
    from deepseek.packs.library import find_pack
    from deepseek.packs.pack import read_pack, write_pack
    from deepseek.packs.signature import load_key

    path = find_pack(pack)
    signature = write_pack(path, read_pack(path), load_key(key)).manifest.signature
    assert signature is not None  # a key was given
    print(f"{path} is signed by {signature.public_key[:16]}")


@app.command()
def keygen(
    name: Annotated[str, typer.Argument(help="Name of the key, such as your own.")],
    folder: Annotated[Path | None, typer.Option(help="Where to write; default: the folder of trusted keys.")] = None,
) -> None:
    """Make a key pair for signing packs: NAME.pem, which stays with you, and NAME.pub, which others trust."""
    from deepseek.packs.signature import keygen as make_keys

    private, public = make_keys(name, folder)
    print(f"private key (keep it): {private}\npublic key (give it away): {public}")


def source_name(*paths: Path | None) -> str:
    """Return a name for what is made from the first path given: `~/src/My Project` gives `My-Project`."""
    source = next((path for path in paths if path), None)
    if source is None:
        raise ConfigError("no text to learn from; give --from-git, --from-folder, --from-jsonl or --from-parquet.")
    return re.sub(r"[^A-Za-z0-9._-]+", "-", source.resolve().stem).strip("-._") or "expert"
