"""Checks of single values, one rule each, that every public constructor and function uses.

    size = whole("width", width, least=1)
    rate = number("balance_rate", rate, least=0, most=1)

A check returns the value in its plain type (`int` for a NumPy integer), or raises a `ConfigError`
of one sentence that names the field, the value and what is valid. `bool` is no number here,
although Python counts it as one, and NaN and infinity never pass. Rules that involve several fields
stay with the class that has these fields.

This module imports nothing heavy; the checks of tensors import torch when they are called.
"""

import math
import os
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from numbers import Integral, Real
from pathlib import Path
from typing import TYPE_CHECKING, Any

from deepseek.errors import ConfigError, shown
from deepseek.registry import nearest

if TYPE_CHECKING:
    from torch import Tensor

Check = Callable[[str, Any], Any]
"""A check without its limits: name of the field, value -> the value in its plain type."""

MAX_SIZE = 2**31 - 1
"""Largest size of a tensor's axis that a field may ask for."""

MAX_WHOLE = 2**63 - 1
"""Largest whole number of any field: what fits into 64 bits."""

MAX_SEED = 2**32 - 1
"""Largest seed that every random generator takes."""


def whole(name: str, value: Any, least: int | None = None, most: int | None = None) -> int:
    """Return a whole number from `least` to `most`; None: the limit of 64 bits on that side."""
    rule = _with_range("a whole number", least, most)
    if isinstance(value, bool) or not isinstance(value, Integral):
        raise _refusal(name, value, rule)
    integer = int(value)
    low = -MAX_WHOLE - 1 if least is None else least
    if not low <= integer <= (MAX_WHOLE if most is None else most):
        raise _refusal(name, value, rule)
    return integer


def positive(name: str, value: Any) -> int:
    """Return a whole number of at least 1."""
    return whole(name, value, least=1)


def number(
    name: str,
    value: Any,
    *,
    least: float | None = None,
    above: float | None = None,
    most: float | None = None,
    below: float | None = None,
) -> float:
    """Return a finite number within the limits; `above` and `below` exclude the limit itself."""
    limits = [(least, "at least"), (above, "more than"), (most, "at most"), (below, "less than")]
    words = [f"{phrase} {limit:g}" for limit, phrase in limits if limit is not None]
    rule = f"a finite number of {' and '.join(words)}" if words else "a finite number"
    if isinstance(value, bool) or not isinstance(value, Real):
        raise _refusal(name, value, rule)
    try:
        as_float = float(value)
    except OverflowError:
        raise _refusal(name, value, rule) from None
    is_outside = (
        not math.isfinite(as_float)
        or (least is not None and as_float < least)
        or (above is not None and as_float <= above)
        or (most is not None and as_float > most)
        or (below is not None and as_float >= below)
    )
    if is_outside:
        raise _refusal(name, value, rule)
    return as_float


def flag(name: str, value: Any) -> bool:
    """Return a truth value; numbers and texts are none."""
    if not isinstance(value, bool):
        raise _refusal(name, value, "True or False")
    return value


def text(name: str, value: Any) -> str:
    """Return a text that can be written as UTF-8."""
    if not isinstance(value, str):
        raise _refusal(name, value, "a text")
    try:
        value.encode()
    except UnicodeEncodeError:
        raise _refusal(name, value, "a text without lone surrogates") from None
    return value


def choice(name: str, value: Any, valid: Iterable[str]) -> str:
    """Return one of the `valid` texts; the message suggests the nearest one."""
    valid_values = tuple(valid)
    if not isinstance(value, str) or value not in valid_values:
        word = value if isinstance(value, str) else shown(value)
        raise ConfigError(f"{name}={shown(value)} is unknown; {nearest(word, valid_values)}.")
    return value


def path(name: str, value: Any) -> Path:
    """Return a path that a file system can hold."""
    if not isinstance(value, str | Path):
        raise _refusal(name, value, "a path")
    raw = os.fsencode(value) if _encodes(str(value)) else b"\0"
    if not raw or b"\0" in raw or len(raw) >= MAX_PATH or max(map(len, raw.split(b"/"))) > MAX_NAME:
        raise _refusal(name, str(value), "a path that a file system can hold")
    return Path(value)


def _encodes(value: str) -> bool:
    try:
        os.fsencode(value)
    except UnicodeEncodeError:
        return False
    return True


MAX_PATH = 4096
MAX_NAME = 255
"""Most bytes of a path, and of each name in it, on the file systems of Linux and macOS."""


def sequence(name: str, value: Any, check: Check, what: str = "values") -> list[Any]:
    """Return a list of values that each pass `check`; a text or a mapping is no list."""
    # Only where torch is loaded can a value be a tensor, and to load it takes seconds.
    tensors = getattr(sys.modules.get("torch"), "Tensor", ())
    if isinstance(value, tensors) and value.dim() == 1:
        value = value.tolist()
    if isinstance(value, str | bytes | Mapping) or not isinstance(value, Iterable):
        raise _refusal(name, value, f"a list of {what}")
    try:
        return [check(f"{name}[{place}]", item) for place, item in enumerate(value)]
    except TypeError:  # a 0-dimensional array has an iterator that refuses
        raise _refusal(name, value, f"a list of {what}") from None


def mapping(name: str, value: Any) -> dict[str, Any]:
    """Return a mapping with texts as keys, copied."""
    if not isinstance(value, Mapping) or not all(isinstance(key, str) for key in value):
        raise _refusal(name, value, "a mapping of names to values")
    return dict(value)


def layers(name: str, value: Any, count: int) -> list[int]:
    """Return indices of layers of a model with `count` layers."""
    return sequence(name, value, partial(whole, least=0, most=count - 1), "layer indices")


def token_ids(name: str, value: Any, vocab_size: int = MAX_SIZE) -> list[int]:
    """Return the ids of tokens, each 0 to `vocab_size` - 1."""
    is_plain_list = isinstance(value, list | tuple) and set(map(type, value)) == {int}
    if is_plain_list and min(value) >= 0 and max(value) < vocab_size:  # fast: prompts are long
        return list(value)
    return sequence(name, value, partial(whole, least=0, most=vocab_size - 1), "token ids")


def prompt(name: str, value: Any, vocab_size: int = MAX_SIZE) -> list[int]:
    """Return the ids of a prompt, at least one."""
    ids = token_ids(name, value, vocab_size)
    if not ids:
        raise ConfigError(f"{name} has 0 tokens, but at least 1 is needed; give some text.")
    return ids


def texts(name: str, value: Any) -> list[str]:
    """Return a list of texts; one text alone is no list."""
    return sequence(name, value, text, "texts")


def instance(name: str, value: Any, kind: type) -> Any:
    """Return an object of a class."""
    if not isinstance(value, kind):
        raise _refusal(name, value, f"of class {kind.__name__}")
    return value


def function(name: str, value: Any) -> Any:
    """Return something that can be called."""
    if not callable(value):
        raise _refusal(name, value, "a function")
    return value


def optional(check: Check) -> Check:
    """Return a check that also lets None pass."""
    return lambda name, value: None if value is None else check(name, value)


def apply(checks: Mapping[str, Check], target: Any) -> None:
    """Check the attributes of an object, a check each, and store them in their plain types."""
    for name, check in checks.items():
        object.__setattr__(target, name, check(name, getattr(target, name)))


def tensor(
    name: str,
    value: Any,
    kind: str,
    *,
    dims: Sequence[int] = (),
    width: int | None = None,
    empty: bool = False,
) -> "Tensor":
    """Return a tensor of a kind of dtype.

    Args:
        name: name of the argument.
        value: what was passed.
        kind: "real" (floating point), "whole" (integers) or "mask" (booleans or integers).
        dims: numbers of dimensions that are allowed; default: any but 0.
        width: size of the last dimension; None: any.
        empty: whether a dimension may be 0.

    Raises:
        ConfigError: it is no tensor, or dtype, dimensions or width are others.
    """
    import torch

    kinds = {
        "real": {torch.float16, torch.bfloat16, torch.float32, torch.float64},
        "whole": {torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64},
    }
    kinds["mask"] = kinds["whole"] | {torch.bool}
    if not isinstance(value, torch.Tensor):
        raise _refusal(name, value, f"a tensor of {KINDS[kind]}")
    if value.dtype not in kinds[kind]:
        raise ConfigError(f"{name} is of dtype {value.dtype}; it must be of {KINDS[kind]}.")
    sizes = tuple(value.shape)
    if (dims and value.dim() not in dims) or value.dim() == 0:
        allowed_dims = " or ".join(map(str, dims)) or "at least 1"
        raise ConfigError(f"{name} has shape {sizes}; it must have {allowed_dims} dimensions.")
    if width is not None and sizes[-1] != width:
        raise ConfigError(f"{name} has shape {sizes}; its last dimension must be {width}.")
    if not empty and 0 in sizes:
        raise ConfigError(f"{name} has shape {sizes}; no dimension may be 0.")
    return value


KINDS = {
    "real": "floating-point numbers",
    "whole": "integers",
    "mask": "booleans, or integers 0 and 1",
}
"""Kinds of tensors, and their wording in messages."""


def shape(name: str, value: "Tensor", expected: Sequence[int], axes: str) -> None:
    """Check a tensor's whole shape.

    Args:
        name: name of the argument.
        value: the tensor.
        expected: the shape.
        axes: the shape in words, such as "[batch, seq]".
    """
    if tuple(value.shape) != tuple(expected):
        raise ConfigError(
            f"{name} has shape {tuple(value.shape)}; it must be {axes} = {tuple(expected)}."
        )


def alike(**tensors: "Tensor | None") -> None:
    """Check that tensors have one dtype and are on one device; None is skipped."""
    present_tensors = {name: value for name, value in tensors.items() if value is not None}
    if len({value.dtype for value in present_tensors.values()}) > 1:
        dtypes = ", ".join(f"{name} is {value.dtype}" for name, value in present_tensors.items())
        raise ConfigError(f"{dtypes}; cast them to one dtype.")
    same_device(**present_tensors)


def same_device(**tensors: "Tensor | None") -> None:
    """Check that tensors are on one device; None is skipped."""
    present_tensors = {name: value for name, value in tensors.items() if value is not None}
    if len({value.device for value in present_tensors.values()}) > 1:
        devices = ", ".join(
            f"{name} is on {value.device}" for name, value in present_tensors.items()
        )
        raise ConfigError(f"{devices}; move them to one device.")


def finite(name: str, value: "Tensor") -> None:
    """Check that no element of a floating-point tensor is NaN or infinite."""
    if _abstract(value):
        return
    # A sum takes a twentieth of the time and is finite only if all elements are.
    if not bool(value.detach().sum().isfinite()) and not bool(value.detach().isfinite().all()):
        raise ConfigError(f"{name} holds NaN or infinity; it must hold finite numbers.")


def within(name: str, value: "Tensor", least: int, most: int, what: str) -> None:
    """Check that all elements of an integer tensor lie between `least` and `most`.

    Args:
        name: name of the argument.
        value: the tensor.
        least, most: the limits.
        what: the elements in words, such as "token ids".
    """
    if _abstract(value) or value.numel() == 0:
        return
    low, high = (int(limit) for limit in value.aminmax())
    if low < least or high > most:
        bad_value = low if low < least else high
        raise ConfigError(f"{name} holds {bad_value}; {what} go from {least} to {most}.")


def _abstract(value: "Tensor") -> bool:
    """Return whether a tensor has no values to look at: on the meta device or in a traced graph."""
    import torch

    return value.is_meta or torch.compiler.is_compiling() or torch.compiler.is_exporting()


def _refusal(name: str, value: object, rule: str) -> ConfigError:
    return ConfigError(f"{name}={shown(value)} must be {rule}.")


def _with_range(description: str, least: int | None, most: int | None) -> str:
    if least is None and most is None:
        return description
    if least is None:
        return f"{description} of at most {most}"
    return (
        f"{description} of at least {least}"
        if most is None
        else f"{description} from {least} to {most}"
    )
