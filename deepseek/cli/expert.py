"""`deepseek expert`: train, import, list, rename, remove, inspect, verify and sign packs."""

from pathlib import Path
from typing import Annotated, Literal

import typer

from deepseek.cli.expert_live import plug, unplug
from deepseek.cli.expert_sets import bundle, diff, install, lock, merge
from deepseek.cli.job_command import job_command
from deepseek.cli.options import DryRun, Json, Key, Yes, private_key, usable_home
from deepseek.cli.output import echo
from deepseek.train.jobs.arguments import ExpertArguments

app = typer.Typer(
    add_completion=False,
    help="Train, import, list, rename, remove, check, sign, plug and bundle packs.",
)

Pack = Annotated[
    str, typer.Argument(metavar="PACK", help="A pack file, or the name of a trained expert.")
]


train = job_command(
    "signed_expert:train_signed",
    ExpertArguments,
    "Train an expert on your text with the base frozen. "
    "If interrupted, the same command resumes it.",
    extra_options={"key": Key},
)
app.command("train")(train)


@app.command()
def train_all(
    experts: Annotated[
        Path, typer.Argument(help="YAML or TOML file with `base` and a mapping `experts` by name.")
    ],
    dry_run: DryRun = False,
) -> None:
    """Train many experts in parallel as Ray tasks, and print each pack when it is finished."""
    from deepseek.errors import TrainError
    from deepseek.packs.pack import read_pack
    from deepseek.train.jobs.many import estimate_all
    from deepseek.train.jobs.many import train_all as run

    if dry_run:
        estimate_all(experts)
        return
    failed_names = []
    for expert, result in run(experts):
        verdict = (
            "" if isinstance(result, Exception) else f" ({read_pack(result).manifest.verdict})"
        )
        echo(f"{expert}: {result}{verdict}")
        failed_names += [expert] if isinstance(result, Exception) else []
    if failed_names:
        raise TrainError(
            f"Of the experts {', '.join(failed_names)} failed; fix them and run the same command."
        )


@app.command()
def index(name: Annotated[str, typer.Argument(help="Name of a trained expert.")]) -> None:
    """Build the retrieval index of an expert's training text, for `retrieve` in requests, and
    store it beside the pack.

    The held-out set of the run is never indexed.
    """
    from deepseek.train.jobs.expert_index import index_expert

    echo(index_expert(name))


@app.command("import")
def import_folder(
    folder: Annotated[
        Path, typer.Argument(help="Folder with adapter_config.json and adapter_model.safetensors.")
    ],
    name: Annotated[
        str | None, typer.Option(help="Name of the expert; default: that of the folder.")
    ] = None,
    base: Annotated[
        str, typer.Option(help="Base model that it is for: a known name, a folder or a hub id.")
    ] = "smollm2-135m",
    licence: Annotated[
        str, typer.Option(help="SPDX expression of the adapter's licence.")
    ] = "LicenseRef-Unknown",
    domain: Annotated[str, typer.Option(help="Short description of what it is for.")] = "",
    auto: Annotated[
        bool,
        typer.Option("--auto", help="Arm it in every request that does not choose its experts."),
    ] = False,
    key: Key = None,
) -> None:
    """Import a LoRA adapter that PEFT saved, as a pack that is plugged and armed by name."""
    from deepseek.engine.adapters import import_adapter, other_base
    from deepseek.packs.lora import LoraManifest
    from deepseek.packs.pack import read_pack

    path = import_adapter(
        folder, name=name, base=base, licence=licence, domain=domain, auto=auto, key=key
    )
    manifest = read_pack(path).manifest
    assert isinstance(manifest, LoraManifest)
    trained_base = other_base(manifest)
    if trained_base is not None:
        echo(
            f"note: the adapter was trained on {trained_base}; its layers fit {base}, for which "
            "it is imported",
            error=True,
        )
    echo(f"{path}: {len(manifest.sites)} linear layers, rank {manifest.rank}, {manifest.licence}")


@app.command("list")
def list_experts(as_json: Json = False) -> None:
    """List the trained experts of this user. Headers are checked; `verify` checks the content."""
    from deepseek.cli.expert_rows import expert_line, expert_row
    from deepseek.cli.shapes import ExpertList, print_json
    from deepseek.packs.library import experts_folder, installed

    usable_home()
    rows = [expert_row(name, path) for name, path in installed().items()]
    if as_json:
        print_json(ExpertList(folder=str(experts_folder()), experts=rows))
        return
    if not rows:
        echo(f"no experts in {experts_folder()}; train one with `deepseek expert train`")
    for row in rows:
        echo(expert_line(row))


@app.command()
def rm(
    name: Annotated[str, typer.Argument(help="Name of a trained expert.")], yes: Yes = False
) -> None:
    """Remove a trained expert: its pack, its prompts and its retrieval index. Its run folder stays.
    A server that has it plugged keeps it in memory until it is unplugged there.
    """
    from deepseek.cli.confirm import confirm
    from deepseek.packs.library import find_pack
    from deepseek.train.jobs.rename import remove_expert, run_of

    confirm(f"Remove the expert {name} ({find_pack(name)})?", yes)
    for path in remove_expert(name):
        echo(f"removed {path}")
    run = run_of(name)
    if run is not None:
        echo(f"its run stays in {run}; `deepseek runs rm {name}` removes it", error=True)


@app.command()
def rename(
    name: Annotated[str, typer.Argument(help="Name of a trained expert.")],
    new_name: Annotated[str, typer.Argument(help="Its new name.")],
    key: Annotated[
        Path | None,
        typer.Option(callback=private_key, help="Private key to sign a signed pack again with."),
    ] = None,
) -> None:
    """Rename a trained expert with its prompts, its retrieval index and its run folder. The pack is
    sealed again, as its digest covers the name.
    """
    from deepseek.errors import ConfigError
    from deepseek.packs.names import valid_name
    from deepseek.train.jobs.rename import rename_expert

    try:
        valid_name(new_name)
    except ValueError as error:
        raise ConfigError(f"{error}.") from None
    echo(rename_expert(name, new_name, key))


app.command()(bundle)
app.command()(diff)
app.command()(install)
app.command()(lock)
app.command()(merge)
app.command()(plug)
app.command()(unplug)


@app.command()
def inspect(pack: Pack) -> None:
    """Check a pack, print its manifest as JSON, and its verdict on standard error."""
    from deepseek.packs.library import find_pack
    from deepseek.packs.pack import read_pack

    manifest = read_pack(find_pack(pack)).manifest
    echo(manifest.model_dump_json(indent=2), lines=True)
    arming_note = "" if manifest.helps else "; it is armed only if named"
    echo(f"{manifest.name}: {manifest.verdict}{arming_note}", error=True)


@app.command()
def verify(
    pack: Pack,
    base: Annotated[
        str | None, typer.Option(help="Also check that the pack was trained on this model.")
    ] = None,
    signature: Annotated[
        Literal["any", "signed", "trusted"], typer.Option(help="The required kind of signature.")
    ] = "any",
) -> None:
    """Check a pack: structure, digest, values, signature, and the base if --base is given."""
    from deepseek.checkpoint.hub import resolve
    from deepseek.checkpoint.models import model_name
    from deepseek.packs.library import find_pack
    from deepseek.packs.manifest import BaseDescription
    from deepseek.packs.pack import read_pack
    from deepseek.packs.policy import PackPolicy

    folder = resolve(base) if base is not None else None
    description = BaseDescription.of(folder, model_name(folder)) if folder else None
    manifest = read_pack(find_pack(pack), PackPolicy(signature=signature), description).manifest
    signer = (
        f"signed by {manifest.signature.public_key[:16]}" if manifest.signature else "not signed"
    )
    base_note = f", fits {base}" if folder else ""
    terms = f"{manifest.licence} (base: {manifest.base.licence or 'not stated'})"
    echo(f"ok: {manifest.name}, {terms}, digest {manifest.digest[:16]}, {signer}{base_note}")


@app.command()
def sign(
    pack: Pack,
    key: Annotated[
        Path,
        typer.Option(callback=private_key, help="A private key from `deepseek expert keygen`."),
    ],
) -> None:
    """Sign a pack in place."""
    from deepseek.packs.library import find_pack
    from deepseek.packs.pack import read_pack, write_pack
    from deepseek.packs.signature import load_key

    path = find_pack(pack)
    signature = write_pack(path, read_pack(path), load_key(key)).manifest.signature
    assert signature is not None  # a key was given
    echo(f"{path} is signed by {signature.public_key[:16]}")


@app.command()
def keygen(
    name: Annotated[str, typer.Argument(help="Name of the key, such as your name.")],
    folder: Annotated[
        Path | None, typer.Option(help="Where to write; default: the folder of trusted keys.")
    ] = None,
) -> None:
    """Make a key pair for signing packs: NAME.pem, the private key, and NAME.pub, the public key
    for others to trust.
    """
    from deepseek.checkpoint.files import expanded, writable_folder
    from deepseek.packs.signature import keygen as make_keys

    if folder is not None:
        writable_folder(expanded(folder))
    private, public = make_keys(name, folder)
    echo(f"private key (keep it): {private}")
    echo(f"public key (give it away): {public}")
