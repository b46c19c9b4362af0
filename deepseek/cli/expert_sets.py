"""`deepseek expert bundle`, `diff`, `install`, `lock` and `merge`: sets of experts."""

from pathlib import Path
from typing import Annotated

import typer

from deepseek.cli.options import Device, DryRun, Key, Precision, existing_folder, names
from deepseek.cli.output import echo
from deepseek.errors import PackError

BASE = "smollm2-135m"
"""Base of all experts that are locked unless --base says otherwise."""

Pack = Annotated[str, typer.Argument(help="A pack file, or the name of a trained expert.")]


def diff(first: Pack, second: Pack) -> None:
    """Print what two packs differ in: fields of their manifests, and weights.

    Exits with 1 if they differ, as `diff` does.
    """
    from deepseek.packs.difference import difference
    from deepseek.packs.library import find_pack
    from deepseek.packs.pack import read_pack

    changes = difference(read_pack(find_pack(first)), read_pack(find_pack(second)))
    for name, (before, after) in changes.fields.items():
        echo(f"{name}: {before} -> {after}")
    for tensor in changes.tensors:
        if tensor.relative is None:
            echo(f"{tensor.name}: only in one of them, or of another shape")
        else:
            echo(f"{tensor.name}: changed by {tensor.relative:.1%}, cosine {tensor.cosine:.4f}")
    echo(f"{changes.equal_tensors} tensors are equal, {len(changes.tensors)} differ", error=True)
    if changes.fields or changes.tensors:
        raise typer.Exit(1)


Experts = Annotated[
    str, typer.Option(help="Experts of the set: names, comma-separated; 'all': every one.")
]
Base = Annotated[
    str | None,
    typer.Option(
        help=f"Base model of the experts; default: that of the named ones, with 'all' {BASE}."
    ),
]
ExpertsFolder = Annotated[
    Path | None, typer.Option(help="Folder of the packs; default: that of trained experts.")
]


def lock(
    experts: Experts = "all",
    base: Base = None,
    experts_folder: ExpertsFolder = None,
    out: Annotated[Path, typer.Option(help="File to write.")] = Path("deepseek.lock"),
    key: Key = None,
) -> None:
    """Write the digests of a set of experts, for `deepseek serve --lock`."""
    from deepseek.checkpoint.files import writable_file
    from deepseek.packs.lock import lock_packs, write_lock
    from deepseek.packs.signature import load_key

    out = writable_file(out)
    paths = _packs_of_set(experts, base, experts_folder)
    content = write_lock(out, lock_packs(paths, base), load_key(key) if key else None)
    echo(f"{out}: {', '.join(expert.name for expert in content.experts)}; {content.digest[:16]}")


def bundle(
    out: Annotated[Path, typer.Argument(help="File to write; it must not exist yet.")],
    experts: Experts = "all",
    base: Base = None,
    experts_folder: ExpertsFolder = None,
    key: Key = None,
) -> None:
    """Write a set of experts into one file, for `deepseek expert install` on another machine.

    The file is a tar archive of the packs and of their lock, which --key signs.
    """
    from deepseek.checkpoint.files import new_path
    from deepseek.packs.bundle import write_bundle
    from deepseek.packs.lock import lock_packs
    from deepseek.packs.signature import load_key

    out = new_path(out)
    signing_key = load_key(key) if key else None
    paths = _packs_of_set(experts, base, experts_folder)
    content = write_bundle(out, lock_packs(paths, base), paths, signing_key)
    names_of_set = ", ".join(expert.name for expert in content.experts)
    echo(f"{out}: {names_of_set}; {out.stat().st_size / 1e6:.1f} MB; {content.digest[:16]}")


def install(
    bundle: Annotated[Path, typer.Argument(help="A file of `deepseek expert bundle`.")],
    experts_folder: ExpertsFolder = None,
    trusted: Annotated[
        bool, typer.Option("--trusted", help="The set must be signed by a key in the trust folder.")
    ] = False,
    replace: Annotated[
        bool, typer.Option("--replace", help="Replace other packs under the same names.")
    ] = False,
) -> None:
    """Install the packs of a bundle, all or none, after checking them against its lock.

    `deepseek serve --lock BUNDLE` then plugs exactly these packs.
    """
    from deepseek.checkpoint.files import expanded, writable_folder
    from deepseek.packs.bundle import install_bundle

    folder = experts_folder and writable_folder(experts_folder)
    installation = install_bundle(expanded(bundle), folder, trusted=trusted, replace=replace)
    for expert in installation.lock.experts:
        state = "installed" if expert.name in installation.written else "was there already"
        echo(f"{expert.name} {state}; {expert.digest[:16]}")


def _packs_of_set(experts: str, base: str | None, experts_folder: Path | None) -> list[Path]:
    """Return the pack files that the options of `lock` and `bundle` name.

    Raises:
        ConfigError: the folder does not exist.
        PackError: there are none.
    """
    from deepseek.packs.library import experts_folder as usual_folder
    from deepseek.packs.library import find_pack, packs_for

    folder = existing_folder("--experts-folder", experts_folder)
    if experts.strip() != "all":
        if not names(experts):
            raise PackError(f"--experts {experts!r} names no expert; give names, or all.")
        return [find_pack(name, folder) for name in names(experts)]
    model = base or BASE
    packs, problems = packs_for(model, folder)
    for problem in problems:
        echo(f"warning: {problem}", error=True)
    if not packs:
        raise PackError(
            f"There is no expert for the base {model} in {folder or usual_folder()}; "
            "give --base the base of the others, or train one."
        )
    return [*packs.values()]


def merge(
    first: Annotated[str, typer.Argument(help="Name of a trained expert.")],
    second: Annotated[str, typer.Argument(help="Name of another one of the same base.")],
    out: Annotated[str, typer.Option(help="Name of the merged expert.")],
    width: Annotated[
        int | None,
        typer.Option(min=1, help="Width of its expert layers; default: that of both together."),
    ] = None,
    device: Device = "auto",
    dtype: Precision = "auto",
    dry_run: DryRun = False,
) -> None:
    """Make one expert that does what two do, and say what it does for both held-out texts.

    Their run folders must still be there, as it is fitted to their text.
    """
    from deepseek.train.jobs.merge import estimate_merge, merge_experts

    if dry_run:
        estimate = estimate_merge(first, second, out, width, device=device, dtype=dtype)
        echo(f"{estimate}; public text of the base not counted")
        return
    merged = merge_experts(first, second, out, width, quiet=False, device=device, dtype=dtype)
    echo(str(merged.pack))
    for line in merged.report():
        echo(line)
