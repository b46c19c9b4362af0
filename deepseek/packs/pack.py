"""The expert pack: one `.safetensors` file that holds an expert module and its papers.

Metadata has one key, `deepseek.expert`, with the manifest as JSON. The manifest's digest is a
SHA-256 over the rest of the manifest and the bytes of all tensors; a signature is made over the
digest. The same pack always has the same bytes. Reading refuses a file before anything of it is
used: header, manifest, licence, base and tensor table are checked before the tensors are read, and
their digest, signature and values before the pack is returned.
"""

import hashlib
from dataclasses import dataclass
from pathlib import Path

import torch
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from safetensors.torch import save
from torch import Tensor

from deepseek.checkpoint.store import atomic_write, canonical_json
from deepseek.errors import PackError
from deepseek.packs.container import DAMAGED, check_names, open_regular, read_header, read_tensors
from deepseek.packs.manifest import BaseDescription, Manifest, parse_manifest, printable
from deepseek.packs.policy import PackPolicy, check_base, check_licence, check_signature
from deepseek.packs.signature import CONTEXT, sign

KEY = "deepseek.expert"
DEFAULT_POLICY = PackPolicy()


@dataclass(frozen=True)
class ExpertPack:
    """A manifest and its tensors (names and shapes: `Manifest.tensors`). Make one with
    `ExpertPack.seal`.
    """

    manifest: Manifest
    tensors: dict[str, Tensor]

    @staticmethod
    def seal(manifest: Manifest, tensors: dict[str, Tensor]) -> "ExpertPack":
        """Return a pack whose manifest carries the digest of its content and no signature yet."""
        digest = content_digest(manifest, tensors)
        return ExpertPack(
            manifest.model_copy(update={"digest": digest, "signature": None}), tensors
        )

    def sign(self, key: Ed25519PrivateKey) -> "ExpertPack":
        """Return this pack with a signature."""
        return ExpertPack(
            self.manifest.model_copy(update={"signature": sign(self.manifest.digest, key)}),
            self.tensors,
        )

    @property
    def num_bytes(self) -> int:
        """Size of the tensors."""
        return sum(tensor.nbytes for tensor in self.tensors.values())


def content_digest(manifest: Manifest, tensors: dict[str, Tensor]) -> str:
    """Return the SHA-256 over the manifest (without digest and signature) and the tensors' bytes in
    order of name.

    Names, dtypes and shapes need no place of their own in it: they follow from the manifest.
    """
    digest = hashlib.sha256(CONTEXT + manifest.signed_part() + b"\0")
    for name in sorted(tensors):
        digest.update(tensors[name].detach().cpu().contiguous().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def write_pack(
    path: str | Path, pack: ExpertPack, key: Ed25519PrivateKey | None = None
) -> ExpertPack:
    """Write `pack` to `path` in one step, signed if `key` is given; return it as written.

    Raises `PackError` if it is not a pack that `read_pack` would accept.
    """
    pack = pack.sign(key) if key else pack
    check_pack(pack)
    manifest = canonical_json(pack.manifest.model_dump(mode="json")).decode()
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in pack.tensors.items()}
    with atomic_write(path) as temporary:
        temporary.write_bytes(save(tensors, metadata={KEY: manifest}))
    return pack


def read_pack(
    path: str | Path, policy: PackPolicy = DEFAULT_POLICY, base: BaseDescription | None = None
) -> ExpertPack:
    """Read and check a pack file; with `base`, also that it belongs to that model.

    Raises `PackError`: one sentence that names the file and the first reason to refuse it.
    """
    path = Path(path)
    try:
        with open_regular(path, policy.max_bytes) as file:
            header = read_header(file)
            if header.metadata.keys() != {KEY}:
                raise PackError("its header holds no expert manifest; it is not an expert pack")
            manifest = parse_manifest(header.metadata[KEY])
            _check_papers(manifest, policy, base)
            pack = ExpertPack(manifest, read_tensors(file, header, manifest.tensors()))
        _check_content(pack, policy)
    except PackError as error:
        raise PackError(f"expert pack {printable(path)} is refused: {error}.") from None
    return pack


def check_pack(
    pack: ExpertPack, policy: PackPolicy = DEFAULT_POLICY, base: BaseDescription | None = None
) -> None:
    """Make the checks of `read_pack` on a pack in memory. Raises `PackError`."""
    try:
        _check_papers(pack.manifest, policy, base)
        specs = pack.manifest.tensors()
        check_names(pack.tensors.keys(), specs.keys())
        for name, tensor in pack.tensors.items():
            if (tensor.dtype, tuple(tensor.shape)) != specs[name]:
                raise PackError(
                    f"its tensor {name} is {tensor.dtype} {[*tensor.shape]}, its manifest says {specs[name]}"
                )
        _check_content(pack, policy)
    except PackError as error:
        raise PackError(f"expert pack {pack.manifest.name} is refused: {error}.") from None


def _check_papers(manifest: Manifest, policy: PackPolicy, base: BaseDescription | None) -> None:
    check_licence(manifest, policy)
    if base is not None:
        check_base(manifest, base)


def _check_content(pack: ExpertPack, policy: PackPolicy) -> None:
    if content_digest(pack.manifest, pack.tensors) != pack.manifest.digest:
        raise PackError(f"its content does not match its digest; {DAMAGED}")
    check_signature(pack.manifest, policy)
    check_finite(pack.tensors)


def check_finite(tensors: dict[str, Tensor], where: str = "") -> None:
    """Raise `PackError` if a value is NaN or infinite."""
    for name, tensor in tensors.items():
        # The largest magnitude is NaN or infinite if any value is; three times as fast as
        # isfinite() on all of them.
        if not tensor.detach().abs().amax().isfinite():
            raise PackError(f"its tensor {name} holds NaN or infinity {where}".rstrip())
