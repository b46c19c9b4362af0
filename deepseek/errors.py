"""Errors that a user can act on.

Every message is one sentence that says what is wrong and what to do. The command line prints it and
exits with code 2. Library users can catch `UserError`, a `ValueError`.
"""

from deepseek.terminal import visible

SHOWN = 80
"""Most characters of a value that a message shows."""


LONGEST = 1000
"""Most characters of a message; of a longer one, begin and end are kept."""


class UserError(ValueError):
    """Base class of errors with a cause outside this library; the message says what to do.

    The message is one printable line: what files, names and other libraries put into it cannot
    write control characters to a terminal, a log or a reply.
    """

    def __init__(self, message: object = "") -> None:
        line = visible(message)
        half = LONGEST // 2
        super().__init__(line if len(line) <= LONGEST else f"{line[:half]} ... {line[-half:]}")


class ConfigError(UserError):
    """A field or option is unknown or invalid, or several contradict each other."""


class DataError(UserError):
    """A text source cannot be read or has no usable content."""


class CheckpointError(UserError):
    """A checkpoint or model folder is missing, damaged or of an unsupported family."""


class DeviceError(UserError):
    """A device is not there, does not support a dtype, or is out of memory."""


class HubError(UserError):
    """A base model cannot be fetched."""


class PackError(UserError):
    """An expert pack is damaged, does not fit the base model, or is refused by policy."""


class TrainError(UserError):
    """Training cannot start or continue."""


def shown(value: object) -> str:
    """Return a value on one printable line of at most `SHOWN` characters."""
    try:
        line = ascii(value)
    except Exception:  # such as an integer of 5,000 digits, which Python does not convert
        line = f"<{type(value).__name__}>"
    line = " ".join(line.split())
    return line if len(line) <= SHOWN else f"{line[:SHOWN]}..."
