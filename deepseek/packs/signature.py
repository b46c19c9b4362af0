"""Ed25519 keys and signatures (RFC 8032) of packs.

A key pair consists of two PEM files, `NAME.pem` (private, readable by its owner only) and
`NAME.pub`. Every `.pub` file in the trust folder, `home()/keys`, is the key of a trusted signer. To
trust somebody, copy their `.pub` file there.
"""

import os
from pathlib import Path

from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    PublicFormat,
    load_pem_private_key,
    load_pem_public_key,
)

from deepseek.checkpoint.files import expanded, is_special
from deepseek.checkpoint.store import home
from deepseek.errors import PackError
from deepseek.packs.manifest import Signature

# Domain separation: a signature of a pack is not valid for any other kind of data.
CONTEXT = b"deepseek expert pack 1\0"


def trust_folder() -> Path:
    """Return the folder of the trusted public keys (`*.pub`)."""
    return home() / "keys"


def keygen(name: str, folder: Path | None = None) -> tuple[Path, Path]:
    """Write a new key pair and return the paths of the private and the public key.

    Args:
        name: name of the key; the files are `NAME.pem` (mode 0600) and `NAME.pub`.
        folder: folder to write to; None: the trust folder.

    Raises:
        PackError: `name` is not a plain file name, or a file exists; keys are never overwritten.
    """
    if not name.replace("-", "").replace("_", "").isalnum() or not name.isascii():
        raise PackError(f"key name {name!r} must consist of letters, digits, - and _.")
    folder = trust_folder() if folder is None else expanded(folder)
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    private = folder / f"{name}.pem"
    public = folder / f"{name}.pub"
    for path in (private, public):
        if path.exists():
            raise PackError(f"{path} exists and a key is never overwritten; choose another name.")
    key = Ed25519PrivateKey.generate()
    _create(private, key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()), 0o600)
    _create(
        public,
        key.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo),
        0o644,
    )
    return private, public


def load_key(path: Path) -> Ed25519PrivateKey:
    """Return the private key in a PEM file.

    Args:
        path: the file, or the name of a key that `keygen` wrote to the trust folder.

    Raises:
        PackError: the file cannot be read, is accessible to other users, or is not an unencrypted
            Ed25519 key.
    """
    path = expanded(path)
    if len(path.parts) == 1 and not path.exists():
        path = trust_folder() / f"{path.name.removesuffix('.pem')}.pem"
    if is_special(path):
        raise PackError(f"{path} is a pipe or a device; give the file of a private key.")
    try:
        mode = path.stat().st_mode
        content = path.read_bytes()
    except OSError as error:
        raise PackError(
            f"the private key {path} cannot be read ({error.strerror}); give the path or the name "
            "of a key that `deepseek expert keygen` wrote."
        ) from None
    if mode & 0o077:
        raise PackError(f"the private key {path} is open to others; run chmod 600 on it.")
    try:
        key = load_pem_private_key(content, password=None)
    except (TypeError, ValueError, UnsupportedAlgorithm):
        key = None
    if not isinstance(key, Ed25519PrivateKey):
        raise PackError(
            f"{path} is not an unencrypted Ed25519 private key; make one with "
            "`deepseek expert keygen`."
        )
    return key


def trusted_keys(folder: Path | None = None) -> frozenset[str]:
    """Return the trusted public keys in hexadecimal.

    Args:
        folder: folder of `.pub` files; None: the trust folder.

    Raises:
        PackError: a file is not an Ed25519 public key.
    """
    return frozenset(_public_hex(path) for path in sorted((folder or trust_folder()).glob("*.pub")))


def sign(digest: str, key: Ed25519PrivateKey) -> Signature:
    """Return the signature of a pack's content digest."""
    public = key.public_key().public_bytes(Encoding.Raw, PublicFormat.Raw)
    return Signature(public_key=public.hex(), value=key.sign(CONTEXT + bytes.fromhex(digest)).hex())


def is_valid(signature: Signature, digest: str) -> bool:
    """Return whether `signature` is a valid signature of `digest` under its public key."""
    try:
        key = Ed25519PublicKey.from_public_bytes(bytes.fromhex(signature.public_key))
        key.verify(bytes.fromhex(signature.value), CONTEXT + bytes.fromhex(digest))
    except (InvalidSignature, ValueError):
        return False
    return True


def _public_hex(path: Path) -> str:
    try:
        key = None if is_special(path) else load_pem_public_key(path.read_bytes())
    except (OSError, ValueError, UnsupportedAlgorithm):
        key = None
    if not isinstance(key, Ed25519PublicKey):
        raise PackError(f"{path} in the trust folder is not an Ed25519 public key; remove it.")
    return key.public_bytes(Encoding.Raw, PublicFormat.Raw).hex()


def _create(path: Path, content: bytes, mode: int) -> None:
    """Create a file with mode `mode` from the start; raise `FileExistsError` if it exists."""
    handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, mode)
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(content)
            os.fsync(file.fileno())
    except OSError:  # half a key could neither be used nor be written again
        path.unlink()
        raise
