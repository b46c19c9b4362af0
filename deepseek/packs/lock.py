"""`deepseek.lock`: digests of the packs in a set of experts, so that a server's set is
reproducible.
"""

import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Literal

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from pydantic import Field, ValidationError

from deepseek.checkpoint.files import is_special
from deepseek.checkpoint.fingerprint import fingerprint
from deepseek.checkpoint.hub import resolve
from deepseek.checkpoint.store import canonical_json, write_json
from deepseek.errors import ConfigError, PackError
from deepseek.packs.archive import is_archive, open_archive
from deepseek.packs.library import SUFFIX, experts_folder, is_made_for
from deepseek.packs.manifest import (
    Name,
    Sha256,
    Signature,
    Strict,
    explain,
    later_format,
    parse_json,
)
from deepseek.packs.pack import read_pack
from deepseek.packs.signature import is_valid, sign, trusted_keys

LOCK_FILE = "deepseek.lock"
"""Usual name of a lock file, and its name in a bundle."""

FORMAT = 1
"""Version of the format of lock files that is read and written (`Lock.format`)."""

MAX_LOCK_BYTES = 1 << 20
"""Maximum bytes of a lock file; one of 1,024 experts takes 150 kB."""


class LockedExpert(Strict):
    """One expert of a set.

    Attributes:
        name: its name; the file is `NAME.safetensors`.
        digest: content digest of its pack.
    """

    name: Name
    digest: Sha256


class Lock(Strict):
    """A set of experts.

    Attributes:
        format: version of the format.
        base: digest of the weights of the base model.
        experts: the experts, sorted by name.
        signature: signature of the rest; None: not signed.
    """

    format: Literal[1] = 1
    base: Sha256
    experts: Annotated[tuple[LockedExpert, ...], Field(max_length=4096)]
    signature: Signature | None = None

    @property
    def digest(self) -> str:
        """SHA-256 of all but the signature, in hexadecimal."""
        content = canonical_json(self.model_dump(mode="json", exclude={"signature"}))
        return hashlib.sha256(b"deepseek lock 1\0" + content).hexdigest()


def lock_packs(paths: Sequence[Path], base: str | None = None) -> Lock:
    """Return the lock of some packs.

    Args:
        paths: the pack files.
        base: the base model that they must be for: a known name, a folder, a GGUF file or a hub
            id; None: any one.

    Raises:
        CheckpointError, HubError: the base is not a model, or cannot be fetched.
        PackError: there are no packs, one cannot be read or has another file name than its expert,
            two have the same name, or they were made for different bases or another than `base`.
    """
    manifests = [read_pack(path).manifest for path in paths]
    for path, manifest in zip(paths, manifests, strict=True):
        if path.stem != manifest.name:
            raise PackError(
                f"{path} holds an expert named {manifest.name}, which a server with the lock would "
                f"look for in {manifest.name}{SUFFIX}; rename the file to that."
            )
    manifests.sort(key=lambda manifest: manifest.name)
    names = [manifest.name for manifest in manifests]
    bases = {manifest.base.weights for manifest in manifests}
    if len(set(names)) != len(names):
        raise PackError("Two of these packs have the same name; lock one of them.")
    if len(bases) != 1:
        raise PackError(
            "There is no expert to lock; train one."
            if not bases
            else "These packs were made for different bases; lock those of one base."
        )
    if base is not None:
        digests = fingerprint(resolve(base))
        for manifest in manifests:
            if not is_made_for(manifest, digests):
                made_for = f"{manifest.base.name or 'unnamed'}, {manifest.base.weights[:16]}"
                raise PackError(
                    f"{manifest.name} was made for another base ({made_for}) than {base} "
                    f"({digests.weights[:16]}); give --base the model it was made for, or lock "
                    "other experts."
                )
    experts = [LockedExpert(name=manifest.name, digest=manifest.digest) for manifest in manifests]
    return Lock(base=bases.pop(), experts=tuple(experts))


def write_lock(path: Path, lock: Lock, key: Ed25519PrivateKey | None = None) -> Lock:
    """Write a lock file atomically and return the lock as written.

    Args:
        path: the file.
        lock: the lock.
        key: private key to sign it with; None: leave it unsigned.

    Raises:
        ConfigError: another file than a lock is there.
    """
    if path.is_file() and not _is_lock_file(path):
        raise ConfigError(f"{path} exists already and is no lock file; choose another name.")
    if key is not None:
        lock = lock.model_copy(update={"signature": sign(lock.digest, key)})
    write_json(path, lock.model_dump(mode="json"))
    return lock


def _is_lock_file(path: Path) -> bool:
    try:
        return not is_archive(path) and bool(_parse(path, _content(path)))
    except (OSError, PackError):
        return False


def read_lock(path: Path, trusted: bool = False) -> Lock:
    """Read and check a lock.

    Args:
        path: a lock file, or a bundle (see `bundle.py`), whose lock is read.
        trusted: whether it must be signed by a key in the trust folder.

    Raises:
        PackError: it cannot be read, is malformed, or its signature is invalid or not trusted.
    """
    if is_special(path):
        raise PackError(f"{path} is a pipe or a device; give a file of `expert lock`.")
    content = _content(path)
    lock = _parse(path, content)
    signature = lock.signature
    if signature is not None and not is_valid(signature, lock.digest):
        raise PackError(f"{path} was changed after it was signed; get it anew from its signer.")
    if trusted and (signature is None or signature.public_key not in trusted_keys()):
        raise PackError(
            f"{path} is not signed by a trusted key; put the signer's .pub into the trust folder."
        )
    return lock


def _content(path: Path) -> bytes:
    """Return the content of a lock file, or of the lock in a bundle."""
    too_large = PackError(f"{path} is larger than any lock file; give one of `expert lock`.")
    try:
        if is_archive(path):
            with open_archive(path) as archive:
                lock_file, size = archive.next_file(LOCK_FILE)
                if size > MAX_LOCK_BYTES:
                    raise too_large
                return lock_file.read()
        if path.stat().st_size > MAX_LOCK_BYTES:
            raise too_large
        return path.read_bytes()
    except OSError as error:
        raise PackError(f"The lock file {path} cannot be read ({error.strerror}).") from None


def _parse(path: Path, content: bytes) -> Lock:
    """Return the lock that a file's content describes."""
    try:
        # It refuses what pydantic's reader accepts, such as repeated keys.
        newer_format = later_format(parse_json(content), FORMAT)
        if not newer_format:
            return Lock.model_validate_json(content)
    except (PackError, ValidationError) as error:
        fault = explain(error) if isinstance(error, ValidationError) else str(error)
        raise PackError(
            f"{path} is no lock file, {fault}; write one with `deepseek expert lock`."
        ) from None
    raise PackError(f"The lock file {path} is refused: {newer_format}.")


def locked_packs(lock: Lock, folder: Path | None = None) -> list[Path]:
    """Return the packs of a lock, each with the digest that it states.

    Args:
        lock: the lock.
        folder: folder of the packs; None: the folder of trained experts.

    Raises:
        PackError: a pack is missing, cannot be read, or has other content.
    """
    folder = folder or experts_folder()
    paths = []
    for expert in lock.experts:
        path = folder / f"{expert.name}{SUFFIX}"
        if not path.is_file():
            raise PackError(
                f"The lock names expert {expert.name}, and {path} is missing; restore it, or "
                "install the bundle of the set."
            )
        _check_digest(expert, str(path), read_pack(path).manifest.digest)
        paths.append(path)
    return paths


def check_digests(lock: Lock, digests: Mapping[str, str]) -> None:
    """Check that plugged packs are those of a lock.

    Args:
        lock: the lock.
        digests: name -> content digest of the plugged packs.

    Raises:
        PackError: one is missing, or has other content.
    """
    for expert in lock.experts:
        if expert.name not in digests:
            raise PackError(
                f"The lock names expert {expert.name}, and its pack has become another's; restore "
                "it, or lock the set again."
            )
        _check_digest(expert, f"Expert {expert.name}", digests[expert.name])


def _check_digest(expert: LockedExpert, description: str, digest: str) -> None:
    """Check the digest of a pack against its lock; `description` is its name in the message."""
    if digest != expert.digest:
        raise PackError(
            f"{description} has the digest {digest[:16]}, and the lock states "
            f"{expert.digest[:16]}; restore that pack, or lock the set again."
        )
