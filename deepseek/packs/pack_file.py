"""Packs whose files stay open, so that their tensors can be read again when they are needed."""

import tempfile
import threading
import weakref
from pathlib import Path
from typing import BinaryIO, cast

from deepseek.errors import PackError
from deepseek.packs.container import open_regular
from deepseek.packs.manifest import BaseDescription, printable
from deepseek.packs.pack import (
    DEFAULT_POLICY,
    ExpertPack,
    check_pack,
    file_content,
    pack_in,
    read_pack,
)
from deepseek.packs.policy import PackPolicy


class PackFile:
    """An open pack file.

    It stays the file that was opened, even if its path is replaced. Every read checks the digest,
    so that a file that was changed in place is refused. The file is read, not mapped: truncating a
    mapped file would end the process.

    Args:
        file: the open file, which is closed with this object.
        label: name of the pack in messages.
    """

    def __init__(self, file: BinaryIO, label: str) -> None:
        self._file = file
        self._label = label
        self._digest = ""
        self._lock = threading.Lock()
        weakref.finalize(self, file.close)

    @staticmethod
    def of(source: Path | ExpertPack, max_bytes: int) -> "PackFile":
        """Open a pack file, or write a pack that is in memory to a temporary one without a name.

        Args:
            source: the file or the pack.
            max_bytes: size of the largest file to accept.

        Raises:
            PackError: the file cannot be opened, or the disk is full.
        """
        if isinstance(source, ExpertPack):
            return PackFile(_temporary(source), source.manifest.name)
        label = printable(source)
        try:
            return PackFile(open_regular(source, max_bytes), label)
        except PackError as error:
            raise PackError(f"expert pack {label} is refused: {error}.") from None

    def read(
        self, policy: PackPolicy = DEFAULT_POLICY, base: BaseDescription | None = None
    ) -> ExpertPack:
        """Read and check the pack.

        Args:
            policy: rules on licence and signature; by default any licence and any signer.
            base: base model that the pack must belong to; None: any.

        Raises:
            PackError: the pack is refused, or it is not the one that was read first.
        """
        try:
            with self._lock:
                pack = pack_in(self._file, policy, base)
                if self._digest not in ("", pack.manifest.digest):
                    raise PackError("its content is that of another pack")
                self._digest = pack.manifest.digest
        except PackError as error:
            change_note = f"its file was changed after it was plugged ({error})"
            reason = f"{change_note}, so unplug it and plug it again" if self._digest else error
            raise PackError(f"expert pack {self._label} is refused: {reason}.") from None
        return pack


def open_pack(
    source: Path | ExpertPack, policy: PackPolicy, base: BaseDescription, keep: bool
) -> tuple[ExpertPack, PackFile | None]:
    """Return a checked pack, and the open file in which its weights stay; None: not kept open.

    Args:
        source: the file or the pack.
        policy: rules on licence, signature and size.
        base: base model that the pack must belong to.
        keep: whether the file stays open, for weights that are read when they are needed.

    Raises:
        PackError: the pack is refused.
    """
    if keep:
        file = PackFile.of(source, policy.max_bytes)
        return file.read(policy, base), file
    if isinstance(source, ExpertPack):
        check_pack(source, policy, base)
        return source, None
    return read_pack(source, policy, base), None


def _temporary(pack: ExpertPack) -> BinaryIO:
    """Return a temporary file with a pack."""
    file = tempfile.TemporaryFile()  # noqa: SIM115 - closed with the `PackFile`
    try:
        file.write(file_content(pack))
        file.flush()
    except OSError as error:
        file.close()
        raise PackError(
            f"expert {pack.manifest.name} cannot be written to the temporary folder "
            f"({error.strerror}); make space there, or plug its file."
        ) from None
    return cast(BinaryIO, file)
