"""Train or update an expert whose pack is signed.

A signature covers the content of a pack, so an updated pack has to be signed again: a server that
accepts only signed packs would refuse it otherwise.
"""

from pathlib import Path
from typing import Any

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from deepseek.errors import ConfigError
from deepseek.packs.pack import read_pack, write_pack
from deepseek.packs.signature import load_key
from deepseek.train.jobs.expert import train_expert
from deepseek.train.jobs.update import TrainedExpert


def train_signed(*, key: Path | None = None, **arguments: Any) -> Path:
    """Train an expert as `train_expert` does, sign its pack, and return the path of the pack.

    Args:
        key: private key to sign the pack with; None: only for packs that are not signed.
        arguments: those of `train_expert`.

    Raises:
        ConfigError: the pack to update is signed, and no key is given.
        PackError: the key cannot be read.
        UserError: as for `train_expert`.
    """
    signing_key = None if key is None else load_key(key)  # before hours of training
    if arguments.get("update"):
        check_key(TrainedExpert.find(arguments["update"]), key)
    pack = train_expert(**arguments)
    if signing_key is not None and not arguments.get("dry_run"):
        write_pack(pack, read_pack(pack), signing_key)
    return pack


def check_key(expert: TrainedExpert, key: Path | None) -> None:
    """Check that an update of an expert does not drop a signature.

    Args:
        expert: the expert to update.
        key: private key to sign with again; None: none.

    Raises:
        ConfigError: its pack is signed, and there is no key.
        PackError: its pack is damaged.
    """
    if key is None and read_pack(expert.pack).manifest.signature is not None:
        raise ConfigError(
            f"{expert.name} is signed, and an update would drop the signature; give --key to sign "
            "it again."
        )


def sign_if_unsigned(pack: Path, key: Ed25519PrivateKey) -> None:
    """Sign a pack, unless it is signed already.

    Args:
        pack: the pack's file.
        key: private key to sign it with.

    Raises:
        PackError: the pack is damaged.
    """
    content = read_pack(pack)
    if content.manifest.signature is None:
        write_pack(pack, content, key)
