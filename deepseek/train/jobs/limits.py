"""Types and bounds of job arguments: names, licences, layers and numbers.

A number beyond these bounds is a typing error, which would otherwise fail somewhere deep inside.
"""

from pathlib import Path
from typing import Annotated

from pydantic import AfterValidator

from deepseek.packs.names import valid_licence, valid_name
from deepseek.terminal import is_unicode

LAYERS = r"^(all|last:[0-9]{1,4}|[0-9]{1,4}(-[0-9]{1,4})?(, ?[0-9]{1,4}(-[0-9]{1,4})?)*)$"

PRINTABLE = r"^\P{C}*$"
"""No control characters, as in a pack's manifest."""

UNKNOWN_LICENCE = "LicenseRef-Unknown"

MAX_SEED = 2**32 - 1
"""Largest seed that NumPy's legacy generators accept."""

MAX_TOKENS = 10**15
MAX_LENGTH = 1 << 20
"""Tokens of a row or of an answer, far beyond any model's context."""

MAX_WIDTH = 1 << 17
"""Width of an expert, as in a pack's manifest."""

MAX_COUNT = 10**6
"""Rows of a batch, passes, rollouts: more is a typing error."""

MAX_RATE = 10.0
MAX_MINUTES = 60 * 24 * 365


def _result_name(name: str) -> str:
    """Return the name of an expert or a run; empty: that of the source."""
    return valid_name(name) if name else name


def _model_text(model: Path | str) -> str:
    """Return the name or path of a model as a text, as requests are stored."""
    name = str(model)
    if not is_unicode(name):
        raise ValueError("not a Unicode text; correct the name or the path")
    return name


def model_name(name: str) -> str:
    """Return the name of a new model and of its run.

    Raises:
        ValueError: it is not a valid name, or a published model has it, which it would hide.
    """
    from deepseek.checkpoint.hub import KNOWN, UNPUBLISHED

    if name in KNOWN or name in UNPUBLISHED:
        raise ValueError(f"{name!r} is the name of a published model; choose another name")
    return _result_name(name)


BaseModelName = Annotated[Path | str, AfterValidator(_model_text)]
"""Name or folder of a base model. The validated value is a text."""

ResultName = Annotated[str, AfterValidator(_result_name)]
ModelName = Annotated[str, AfterValidator(model_name)]
SpdxLicence = Annotated[str, AfterValidator(valid_licence)]
