"""The expert pack: one `.safetensors` file with an expert module or an adapter, and its manifest.

The file's metadata has one key, `deepseek.expert`, with the manifest as JSON. The digest in the
manifest is a SHA-256 over the rest of the manifest and the bytes of all tensors, and the signature
signs that digest. Writing is deterministic. Reading checks header, manifest, licence, base and
tensor table before it reads the tensors, and digest, signature and values before it returns them.
"""

import hashlib
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import BinaryIO

import torch
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from safetensors.torch import save
from torch import Tensor

from deepseek import checks
from deepseek.checkpoint.output import no_room
from deepseek.checkpoint.store import atomic_write, canonical_json, disk_full_explained
from deepseek.errors import PackError
from deepseek.packs.container import DAMAGED, MAX_HEADER, check_names, open_regular, read_header
from deepseek.packs.kinds import KEY, AnyManifest, manifest_in
from deepseek.packs.manifest import BaseDescription, PackManifest, printable
from deepseek.packs.policy import PackPolicy, check_base, check_licence, check_signature
from deepseek.packs.signature import CONTEXT, sign
from deepseek.packs.tensors import DTYPES, read_tensors

DEFAULT_POLICY = PackPolicy()


@dataclass(frozen=True)
class ExpertPack:
    """A manifest and its tensors. Create one with `ExpertPack.seal`.

    Attributes:
        manifest: the manifest.
        tensors: the tensors, with the names and shapes of `PackManifest.tensors`.
    """

    manifest: AnyManifest
    tensors: dict[str, Tensor]

    @staticmethod
    def seal(manifest: AnyManifest, tensors: dict[str, Tensor]) -> "ExpertPack":
        """Return an unsigned pack whose manifest contains the digest of the content."""
        digest = content_digest(manifest, tensors)
        return ExpertPack(
            manifest.model_copy(update={"digest": digest, "signature": None}), tensors
        )

    def sign(self, key: Ed25519PrivateKey) -> "ExpertPack":
        """Return a copy of this pack that is signed with `key`."""
        return ExpertPack(
            self.manifest.model_copy(update={"signature": sign(self.manifest.digest, key)}),
            self.tensors,
        )

    @property
    def num_bytes(self) -> int:
        """Size of the tensors in bytes."""
        return sum(tensor.nbytes for tensor in self.tensors.values())


def content_digest(manifest: PackManifest, tensors: dict[str, Tensor]) -> str:
    """Return the SHA-256 over a manifest and its tensors, in hexadecimal.

    The manifest counts without digest and signature, and tensors in the order of their names.
    Names, dtypes and shapes need not be hashed, because they follow from the manifest.
    """
    digest = hashlib.sha256(CONTEXT + manifest.signed_part() + b"\0")
    for name in sorted(tensors):
        digest.update(tensors[name].detach().cpu().contiguous().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def write_pack(
    path: str | Path, pack: ExpertPack, key: Ed25519PrivateKey | None = None, *, new: bool = False
) -> ExpertPack:
    """Write a pack atomically and return it as written.

    Args:
        path: file to write.
        pack: the pack.
        key: private key to sign the pack with; None: leave the signature as it is.
        new: whether to refuse, rather than replace, what is at `path`.

    Raises:
        ConfigError: `new`, and something is at `path`.
        PackError: `read_pack` would not accept the pack.
        TrainError: the disk is full; what was at `path` is still there.
    """
    pack = pack.sign(key) if key else pack
    check_pack(pack)
    content = file_content(pack)
    header_bytes = int.from_bytes(content[:8], "little")
    if header_bytes > MAX_HEADER:
        raise PackError(
            f"expert pack {pack.manifest.name} is refused: its header has {header_bytes} bytes and "
            f"{MAX_HEADER} are allowed; train it on fewer layers, or shorten the texts in its "
            "manifest (domain, metrics, data)."
        )
    with disk_full_explained(no_room(path)), atomic_write(path, new=new) as temporary:
        temporary.write_bytes(content)
    return pack


def file_content(pack: ExpertPack) -> bytes:
    """Return the bytes of a pack's file."""
    manifest = canonical_json(pack.manifest.model_dump(mode="json")).decode()
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in pack.tensors.items()}
    return save(tensors, metadata={KEY: manifest})


def read_pack(
    path: str | Path, policy: PackPolicy = DEFAULT_POLICY, base: BaseDescription | None = None
) -> ExpertPack:
    """Read and check a pack file.

    Args:
        path: the pack file.
        policy: rules on licence, signature and size; by default any licence and any signer.
        base: base model that the pack must belong to; None: any.

    Raises:
        ConfigError: an argument has a wrong type.
        PackError: the pack is refused; the message names the file and the first reason.
    """
    path = checks.path("path", path)
    checks.instance("policy", policy, PackPolicy)
    checks.optional(partial(checks.instance, kind=BaseDescription))("base", base)
    try:
        with open_regular(path, policy.max_bytes) as file:
            return pack_in(file, policy, base)
    except PackError as error:
        raise PackError(f"expert pack {printable(path)} is refused: {error}.") from None


def pack_in(file: BinaryIO, policy: PackPolicy, base: BaseDescription | None) -> ExpertPack:
    """Read and check the pack in an open file, from its first byte.

    Args:
        file: the file.
        policy: rules on licence and signature.
        base: base model that the pack must belong to; None: any.

    Raises:
        PackError: the pack is refused; the message is the reason alone.
    """
    file.seek(0)
    header = read_header(file)
    manifest = manifest_in(header)
    _check_manifest(manifest, policy, base)
    pack = ExpertPack(manifest, read_tensors(file, header, manifest.tensors()))
    _check_content(pack, policy)
    return pack


def check_pack(
    pack: ExpertPack, policy: PackPolicy = DEFAULT_POLICY, base: BaseDescription | None = None
) -> None:
    """Run the checks of `read_pack` on a pack in memory.

    Args:
        pack: the pack.
        policy: rules on licence and signature; by default any licence and any signer.
        base: base model that the pack must belong to; None: any.

    Raises:
        PackError: the pack is refused.
    """
    try:
        _check_manifest(pack.manifest, policy, base)
        specs = pack.manifest.tensors()
        check_names(pack.tensors.keys(), specs.keys())
        for name, tensor in pack.tensors.items():
            dtype, shape = specs[name]
            if tensor.dtype != DTYPES[dtype] or tuple(tensor.shape) != shape:
                raise PackError(
                    f"its tensor {name} is {tensor.dtype} {[*tensor.shape]}, its manifest says "
                    f"{DTYPES[dtype]} {[*shape]}"
                )
        _check_content(pack, policy)
    except PackError as error:
        raise PackError(f"expert pack {pack.manifest.name} is refused: {error}.") from None


def _check_manifest(
    manifest: PackManifest, policy: PackPolicy, base: BaseDescription | None
) -> None:
    check_licence(manifest, policy)
    if base is not None:
        check_base(manifest, base)


def _check_content(pack: ExpertPack, policy: PackPolicy) -> None:
    if content_digest(pack.manifest, pack.tensors) != pack.manifest.digest:
        raise PackError(f"its content does not match its digest; {DAMAGED}")
    check_signature(pack.manifest, policy)
    check_finite(pack.tensors)


def check_finite(tensors: dict[str, Tensor], where: str = "") -> None:
    """Raise `PackError` if a value is NaN or infinite.

    Args:
        tensors: the tensors by name.
        where: words to add to the message.
    """
    for name, tensor in tensors.items():
        # The maximum magnitude is NaN or infinite if any value is. This is three times as fast as
        # isfinite() on every value.
        if not tensor.detach().abs().amax().isfinite():
            raise PackError(f"its tensor {name} holds NaN or infinity {where}".rstrip())
