"""Messages about arguments of Python functions, in the words of the command line."""

import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

from deepseek.errors import ConfigError

WORD_START = r"(?<![\w./\\'\"-])"
WORD_END = r"(?![\w/\\'\"-]|\.\w)"
"""Where a word stands alone: as a part of a path or of a quoted value it is the user's own."""


def with_options(message: str, options: Mapping[str, str]) -> str:
    """Return a message with the names of options in place of those of arguments.

    A message begins with the argument at fault; elsewhere only names with an underscore are told
    from ordinary words.

    Args:
        message: the message.
        options: options by the name of the argument, such as {"row_length": "--row-length"}.
    """
    for name, option in options.items():
        message = re.sub(rf"^{name}(?=[ :=])", option, message)
        if "_" in name:
            message = re.sub(rf"{WORD_START}{name}{WORD_END}", option, message)
    return message


@contextmanager
def about_options(options: Mapping[str, str]) -> Iterator[None]:
    """Raise each `ConfigError` of the block in the words of the command line.

    Args:
        options: options by the name of the argument.
    """
    try:
        yield
    except ConfigError as error:
        raise ConfigError(with_options(str(error), options)) from None
