"""`deepseek expert`: train, list, inspect, verify and sign expert packs."""

import sys
from pathlib import Path
from typing import Annotated, Literal

import typer

from deepseek.cli.job_command import job_command
from deepseek.train.jobs.arguments import ExpertArguments

app = typer.Typer(add_completion=False, help="Train, list, inspect, verify and sign expert packs.")

Pack = Annotated[
    str, typer.Argument(metavar="PACK", help="A pack file, or the name of a trained expert.")
]


train = job_command(
    "expert:train_expert",
    ExpertArguments,
    "Train an expert on your text with the base frozen; interrupted, the same command goes on where it was.",
)
app.command("train")(train)


@app.command()
def train_all(
    experts: Annotated[
        Path, typer.Argument(help="YAML or TOML file: `base` and, by name, `experts`.")
    ],
) -> None:
    """Train many experts side by side as Ray tasks, and print each pack as it comes."""
    from deepseek.errors import TrainError
    from deepseek.packs.pack import read_pack
    from deepseek.train.jobs.many import train_all as run

    failed = []
    for expert, result in run(experts):
        verdict = (
            "" if isinstance(result, Exception) else f" ({read_pack(result).manifest.verdict})"
        )
        print(f"{expert}: {result}{verdict}", flush=True)
        failed += [expert] if isinstance(result, Exception) else []
    if failed:
        raise TrainError(
            f"Of the experts {', '.join(failed)} failed; mend them and run the same command."
        )


@app.command()
def index(name: Annotated[str, typer.Argument(help="Name of a trained expert.")]) -> None:
    """Build the retrieval index of the text that an expert was trained on, beside its pack, for
    `retrieve` in requests.

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
            losses = [
                f"{what} {metric.before:.3f} -> {metric.after:.3f}"
                for what, metric in manifest.metrics.items()
            ]
            said = "  ".join(
                [f"{len(manifest.layers)} layers", manifest.verdict, *losses, manifest.domain]
            ).rstrip()
        except (PackError, OSError) as error:
            said = str(error)
        print(f"{name:24}  {path.lstat().st_size / 1e6:6.1f} MB  {said}")


@app.command()
def inspect(pack: Pack) -> None:
    """Print the manifest of a pack as JSON, after checking the pack, and its verdict on standard
    error.
    """
    from deepseek.packs.library import find_pack
    from deepseek.packs.pack import read_pack

    manifest = read_pack(find_pack(pack)).manifest
    print(manifest.model_dump_json(indent=2))
    armed = "" if manifest.helps else "; it is armed only where it is named"
    print(f"{manifest.name}: {manifest.verdict}{armed}", file=sys.stderr)


@app.command()
def verify(
    pack: Pack,
    base: Annotated[
        str | None, typer.Option(help="Also check that the pack was made for this model.")
    ] = None,
    signature: Annotated[
        Literal["any", "signed", "trusted"], typer.Option(help="What its signature must be.")
    ] = "any",
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
    signer = (
        f"signed by {manifest.signature.public_key[:16]}" if manifest.signature else "not signed"
    )
    fits = f", fits {base}" if base else ""
    print(f"ok: {manifest.name}, {manifest.licence}, digest {manifest.digest[:16]}, {signer}{fits}")


@app.command()
def sign(
    pack: Pack,
    key: Annotated[Path, typer.Option(help="A private key that `deepseek expert keygen` made.")],
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
    folder: Annotated[
        Path | None, typer.Option(help="Where to write; default: the folder of trusted keys.")
    ] = None,
) -> None:
    """Make a key pair for signing packs: NAME.pem, which stays with you, and NAME.pub, which others
    trust.
    """
    from deepseek.packs.signature import keygen as make_keys

    private, public = make_keys(name, folder)
    print(f"private key (keep it): {private}\npublic key (give it away): {public}")
