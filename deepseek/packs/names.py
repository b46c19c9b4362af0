"""Validate names of experts, models and runs, and licences.

Names become file and folder names and option values, so few characters are allowed. This module
imports nothing heavy, for the command line.
"""

import re

from packaging.licenses import InvalidLicenseExpression, canonicalize_license_expression

NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")

RESERVED_NAMES = frozenset({"all", "auto", "none"})
"""Names with a special meaning in `--experts` and `arm`."""


def valid_name(name: str) -> str:
    """Return a name that an expert or a run may have.

    Raises:
        ValueError: it is reserved, is that of a pack file, or would make a bad file name.
    """
    if name.endswith(".safetensors"):
        # Where a name or a file may be given, this would be read as the path of a file.
        raise ValueError(f"{name[:80]!r} is the name of a file; give a name without '.safetensors'")
    if name in RESERVED_NAMES:
        raise ValueError(f"{name!r} is a reserved word; choose another name")
    if not NAME.fullmatch(name):
        raise ValueError(
            f"{name[:80]!r} is no name; use at most 64 letters, digits, '.', '_' and '-', and "
            "begin with a letter or digit"
        )
    return name


def valid_licence(expression: str) -> str:
    """Return an SPDX licence expression in its canonical form.

    Raises:
        ValueError: it is not an SPDX expression.
    """
    try:
        return canonicalize_license_expression(expression)
    except InvalidLicenseExpression:
        raise ValueError(
            "not an SPDX licence expression (a private licence is written LicenseRef-Name)"
        ) from None
