"""Who may read what the library writes."""

import stat
from pathlib import Path
from secrets import token_hex


def settle_permissions(file: Path, replaced: Path) -> None:
    """Give a file the permissions of the one that it will replace, else at least the usual ones.

    Args:
        file: the new file.
        replaced: the path that it will be renamed to.
    """
    if replaced.is_file():
        file.chmod(stat.S_IMODE(replaced.stat().st_mode))
    else:
        open_to_readers(file)


def open_to_readers(file: Path) -> None:
    """Give a file at least the permissions of a new one, 0666 less the umask.

    safetensors writes with mode 0600, which would shut out the user of a service. A new file shows
    the umask; reading it with `os.umask` would change it for other threads.
    """
    mode = stat.S_IMODE(file.stat().st_mode)
    if file.is_symlink() or mode & 0o077:  # what `open` makes has them already
        return
    probe = file.with_name(f".new.{token_hex(4)}.tmp")
    probe.touch()
    default_mode = probe.stat().st_mode & 0o666
    probe.unlink()
    if mode | default_mode != mode:
        file.chmod(mode | default_mode)
