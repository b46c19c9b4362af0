"""Errors that a user can act on.

Every message is one sentence that names the cause and the mend. The command line prints it and
exits with code 2; a library user catches `UserError` (a `ValueError`, as such mistakes are
elsewhere in the Python world).
"""


class UserError(ValueError):
    """Something outside the program is wrong, and the message says what to do about it."""


class ConfigError(UserError):
    """A field, option or combination of them is unknown or contradictory."""


class DataError(UserError):
    """A text source cannot be read or holds nothing usable."""


class CheckpointError(UserError):
    """A checkpoint or model folder is missing, damaged or of an unsupported family."""


class HubError(UserError):
    """A base model cannot be fetched."""


class PackError(UserError):
    """An expert pack is damaged, does not fit the base model, or is refused by policy."""


class TrainError(UserError):
    """Training cannot start or go on."""
