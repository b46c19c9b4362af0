"""Rename and remove a trained expert: pack, prompts, retrieval index and run folder."""

import shutil
from contextlib import nullcontext, suppress
from pathlib import Path
from typing import TYPE_CHECKING

from pydantic import ValidationError

from deepseek.checkpoint.store import RUN_STARTED, home, read_object, write_json
from deepseek.errors import CheckpointError, ConfigError, PackError
from deepseek.packs.library import (
    check_free,
    experts_folder,
    find_pack,
    index_folder,
    installed,
    prompts_file,
)
from deepseek.packs.manifest import explain
from deepseek.train.loop.run_lock import run_lock

if TYPE_CHECKING:
    from deepseek.packs.pack import ExpertPack


def remove_expert(name: str) -> list[Path]:
    """Delete an expert's pack, prompts and index, and return their paths; the run folder stays.

    Args:
        name: name of a trained expert.

    Raises:
        PackError: there is no such expert.
    """
    removed = [_own_pack(name)]
    removed[0].unlink()
    prompts = prompts_file(name)
    if prompts.is_file():
        prompts.unlink()
        removed.append(prompts)
    index = index_folder(name)
    if index.is_dir():
        shutil.rmtree(index)
        removed.append(index)
    return removed


def rename_expert(old: str, new: str, key: Path | None = None) -> Path:
    """Give a trained expert another name and return the path of its pack.

    Digest and signature cover the name, so the pack is sealed again. Its prompts, its index and its
    run folder are renamed too. The same call completes an interrupted one.

    Args:
        old: name of a trained expert.
        new: the new name.
        key: private key to sign with again; None: only for packs without a signature.

    Raises:
        ConfigError: the new name is taken or invalid, or the pack is signed and no key is given.
        PackError: there is no such expert, or its pack is damaged.
        TrainError: its run is being written.
    """
    from deepseek.packs.pack import read_pack, write_pack
    from deepseek.packs.signature import load_key

    before = _own_pack(old)
    pack = read_pack(before)
    sealed = _renamed(pack, new)
    after = experts_folder() / f"{new}{before.suffix}"
    digest = sealed.manifest.digest
    resumed = new != old and after.is_file() and read_pack(after).manifest.digest == digest
    runs = home() / "runs"
    moves = {runs / old: runs / new, index_folder(old): index_folder(new)}
    if not resumed:
        check_free(new)
    if pack.manifest.signature is not None and key is None:
        raise ConfigError(
            f"{old} is signed, and the signature covers its name; give --key to sign it again."
        )
    run = runs / old
    with run_lock(run) if run.is_dir() else nullcontext():
        if not resumed:
            write_pack(after, sealed, load_key(key) if key else None)
        if run.is_dir():
            _rename_in(run, old, new, after)
        for source, target in moves.items():
            if source.is_dir():
                source.rename(target)
    _move_prompts(prompts_file(old), prompts_file(new), pack, sealed)
    before.unlink()
    return after


def _renamed(pack: "ExpertPack", name: str) -> "ExpertPack":
    """Return a pack with another name, sealed and without a signature."""
    fields = pack.manifest.model_dump() | {"name": name, "digest": "", "signature": None}
    try:
        manifest = type(pack.manifest).model_validate(fields)
    except ValidationError as error:
        raise ConfigError(f"{name!r} is no name for an expert: {explain(error)}.") from None
    return type(pack).seal(manifest, pack.tensors)


def run_of(name: str) -> Path | None:
    """Return the run folder of a trained expert, None if it is gone."""
    path = home() / "runs" / name
    return path if path.exists() else None


def _own_pack(name: str) -> Path:
    """Return the pack of a trained expert by its name."""
    if name in installed():
        return installed()[name]
    path = find_pack(name)
    raise PackError(
        f"{path} is not in {experts_folder()}; name a trained expert, or change the file itself."
    )


def _move_prompts(old: Path, new: Path, before: "ExpertPack", after: "ExpertPack") -> None:
    """Move a pack's prompts and update their digest; prompts of another content are dropped.

    Args:
        old, new: files of the prompts; the first one may be missing.
        before, after: the pack before and after the renaming.
    """
    with suppress(CheckpointError):
        stored = read_object(old)
        if stored.get("digest") == before.manifest.digest:
            write_json(new, stored | {"digest": after.manifest.digest})
    old.unlink(missing_ok=True)


def _rename_in(run: Path, old: str, new: str, pack: Path) -> None:
    """Write the new name into the records of a run, so that the same command resumes it."""
    for name in ("request.json", RUN_STARTED):
        path = run / name
        if not path.is_file():
            continue
        record = read_object(path)
        request = record.get("request", record)
        if isinstance(request, dict) and request.get("name") == old:
            request["name"] = new
            write_json(path, record)
    result = run / "result.json"
    if result.is_file():
        write_json(result, read_object(result) | {"pack": str(pack)})
