"""Ed25519 keys and signatures (RFC 8032) of packs.

A key pair is two PEM files: `NAME.pem` (private, readable by its owner only) and `NAME.pub`. Every
`.pub` in the trust folder, `home()/keys`, names a signer whose packs are trusted; to trust somebody
is to copy their `.pub` there.
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

from deepseek.checkpoint.store import home
from deepseek.errors import PackError
from deepseek.packs.manifest import Signature

CONTEXT = b"deepseek expert pack 1\0"  # keeps a signature from meaning anything elsewhere


def trust_folder() -> Path:
    """Return the folder whose `.pub` files are the trusted keys."""
    return home() / "keys"


def keygen(name: str, folder: Path | None = None) -> tuple[Path, Path]:
    """Write a new key pair `NAME.pem` (mode 0600) and `NAME.pub`; return both paths.

    Raises `PackError` if `name` is no plain file name or one of the files exists: a key is never
    overwritten.
    """
    if not name.replace("-", "").replace("_", "").isalnum() or not name.isascii():
        raise PackError(f"key name {name!r} must consist of letters, digits, - and _.")
    folder = folder or trust_folder()
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
    """Read a private key; raises `PackError` if it is missing, open to others, or not an Ed25519
    key.
    """
    try:
        mode = path.stat().st_mode
        content = path.read_bytes()
    except OSError as error:
        raise PackError(f"the private key {path} cannot be read ({error.strerror}).") from None
    if mode & 0o077:
        raise PackError(f"the private key {path} is open to others; run chmod 600 on it.")
    try:
        key = load_pem_private_key(content, password=None)
    except (TypeError, ValueError, UnsupportedAlgorithm):
        key = None
    if not isinstance(key, Ed25519PrivateKey):
        raise PackError(
            f"{path} is not an unencrypted Ed25519 private key; make one with `deepseek expert keygen`."
        )
    return key


def trusted_keys(folder: Path | None = None) -> frozenset[str]:
    """Return the public keys (hexadecimal) in the trust folder; raises `PackError` if one is
    malformed.
    """
    return frozenset(_public_hex(path) for path in sorted((folder or trust_folder()).glob("*.pub")))


def sign(digest: str, key: Ed25519PrivateKey) -> Signature:
    """Return the signature of a pack's content digest."""
    public = key.public_key().public_bytes(Encoding.Raw, PublicFormat.Raw)
    return Signature(public_key=public.hex(), value=key.sign(CONTEXT + bytes.fromhex(digest)).hex())


def is_valid(signature: Signature, digest: str) -> bool:
    """Whether `signature` was made over `digest` with the private half of its public key."""
    try:
        key = Ed25519PublicKey.from_public_bytes(bytes.fromhex(signature.public_key))
        key.verify(bytes.fromhex(signature.value), CONTEXT + bytes.fromhex(digest))
    except (InvalidSignature, ValueError):
        return False
    return True


def _public_hex(path: Path) -> str:
    try:
        key = load_pem_public_key(path.read_bytes())
    except (OSError, ValueError, UnsupportedAlgorithm):
        key = None
    if not isinstance(key, Ed25519PublicKey):
        raise PackError(f"{path} in the trust folder is not an Ed25519 public key; remove it.")
    return key.public_bytes(Encoding.Raw, PublicFormat.Raw).hex()


def _create(path: Path, content: bytes, mode: int) -> None:
    """Write a new file, never over another, that from its first moment is open to no more than
    `mode` allows.
    """
    handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, mode)
    with os.fdopen(handle, "wb") as file:
        file.write(content)
        os.fsync(file.fileno())
