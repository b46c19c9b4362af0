"""Read the manifest of a pack for listings, without its tensors and without torch."""

from pathlib import Path

from deepseek.errors import PackError
from deepseek.packs.container import check_table, open_regular, read_header
from deepseek.packs.kinds import AnyManifest, manifest_in
from deepseek.packs.manifest import printable
from deepseek.packs.policy import PackPolicy


def read_manifest(path: Path) -> AnyManifest:
    """Return the manifest of a pack file, after checking that header and size match it.

    Digest, signature and values are not checked; `read_pack` does that, before anything is plugged.

    Raises:
        PackError: the file is no pack, or is cut short; the message names it and the reason.
    """
    try:
        with open_regular(path, PackPolicy().max_bytes) as file:
            header = read_header(file)
            manifest = manifest_in(header)
            check_table(header, manifest.tensors())
    except PackError as error:
        raise PackError(f"expert pack {printable(path)} is refused: {error}.") from None
    return manifest
