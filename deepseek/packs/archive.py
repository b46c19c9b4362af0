"""Read and write the tar archives of sets of experts: plain files, one after the other.

Archives come from elsewhere, so the reader accepts only what the writer produces: uncompressed
regular files with the expected names in the expected order.
"""

import tarfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import IO, cast

from deepseek.errors import PackError, UserError

BLOCK = 1 << 20
"""Bytes to copy at once, and the longest header that is read."""

MARK, MARK_OFFSET = b"ustar", 257
"""What a tar archive has at a fixed place of its first header."""


def is_archive(path: Path) -> bool:
    """Return whether a file begins as a tar archive does; it must be readable."""
    with open(path, "rb") as file:
        file.seek(MARK_OFFSET)
        return file.read(len(MARK)) == MARK


def write_archive(path: Path, files: Mapping[str, Path]) -> None:
    """Write files into a new archive, which depends only on their names and contents.

    Args:
        path: the archive.
        files: name in the archive -> file, in the order of the archive.
    """
    with tarfile.open(path, "w", format=tarfile.PAX_FORMAT) as archive:
        for name, source in files.items():
            with open(source, "rb") as content:
                header = tarfile.TarInfo(name)  # its time, owner and mode are constants
                header.size = content.seek(0, 2)
                content.seek(0)
                archive.addfile(header, content)


class ArchiveReader:
    """Reads the files of an archive in their order.

    Args:
        path: path of the archive, for messages.
        archive: the opened archive.
    """

    def __init__(self, path: Path, archive: tarfile.TarFile) -> None:
        self._path = path
        self._archive = archive

    def next_file(self, name: str) -> tuple[IO[bytes], int]:
        """Return the next file, opened for reading, and its size in bytes.

        Args:
            name: the name that it must have.

        Raises:
            PackError: the archive ends, or the next entry has another name or is not a plain file.
        """
        entry = self._archive.next()
        if entry is None:
            raise PackError(f"{self._path} ends before {name}; get it again.")
        content = self._archive.extractfile(entry) if _is_plain(entry) else None
        if entry.name != name or content is None:
            raise PackError(
                f"{self._path} is not an archive of `deepseek expert bundle`: it should go on with "
                f"the file {name}; get it again."
            )
        return content, entry.size

    def end(self) -> None:
        """Check that no entry follows.

        Raises:
            PackError: one does.
        """
        if self._archive.next() is not None:
            raise PackError(f"{self._path} holds more than its lock states; get it again.")


def _is_plain(entry: tarfile.TarInfo) -> bool:
    """Return whether an entry is a regular file without holes, which could unfold to any size."""
    return entry.type == tarfile.REGTYPE and not entry.issparse()


@contextmanager
def open_archive(path: Path) -> Iterator[ArchiveReader]:
    """Open an archive for reading; it is closed after the block.

    Raises:
        PackError: it cannot be read or is damaged, also if that is found within the block.
    """
    try:
        file = open(path, "rb")  # noqa: SIM115 - closed below; other errors are not of this file
    except OSError as error:
        raise PackError(f"{path} cannot be read ({error.strerror or error}).") from None
    with file:
        try:
            # Of the type, tarfile needs only these methods.
            with tarfile.open(fileobj=cast("IO[bytes]", _ShortReads(file)), mode="r:") as archive:
                yield ArchiveReader(path, archive)
        except UserError:  # a ValueError too
            raise
        except (tarfile.TarError, EOFError, OverflowError, RecursionError, ValueError) as error:
            raise PackError(f"{path} is damaged ({error}); get it again.") from None


class _ShortReads:
    """A file that refuses long reads, as tarfile reads a header of any stated length at once."""

    def __init__(self, file: IO[bytes]) -> None:
        self._file = file
        self.seek = file.seek
        self.tell = file.tell

    def read(self, size: int) -> bytes:
        """Return up to `size` bytes.

        Raises:
            ValueError: they are more than `BLOCK`.
        """
        if not 0 <= size <= BLOCK:
            raise ValueError(f"a header of {size} bytes")
        return self._file.read(size)
