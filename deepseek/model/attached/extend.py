"""Extend the class of one object, such as a loaded model or a cache."""

from typing import Any

_EXTENDED: dict[tuple[type, type], type] = {}


class Extension:
    """Base of the classes that extend others.

    The extended class has the name of the object's own class, so a serialiser cannot find it by
    name; the two classes that it is made of can be found.
    """

    def __reduce_ex__(self, protocol: Any) -> Any:
        reduced: Any = super().__reduce_ex__(max(int(protocol), 2))
        _, (extended, *arguments), *state = reduced
        part, kind = extended.__bases__
        return (_new, (kind, part, *arguments), *state)


def extend_class(instance: object, part: type[Extension]) -> None:
    """Make an object's class a subclass of `part` and of its own class, under the same name.

    FSDP2 extends modules in the same way. The object keeps its attributes, and is still an instance
    of its class.

    Args:
        instance: the object, of a class written in Python without slots.
        part: the class whose methods come first.
    """
    instance.__class__ = _extended(type(instance), part)


def restore_class(instance: object) -> None:
    """Undo `extend_class`."""
    instance.__class__ = type(instance).__bases__[1]


def _extended(kind: type, part: type) -> type:
    """Return the class that extends `kind` by `part`."""
    if (kind, part) not in _EXTENDED:
        names = {"__module__": kind.__module__, "__qualname__": kind.__qualname__}
        _EXTENDED[kind, part] = type(kind.__name__, (part, kind), names)
    return _EXTENDED[kind, part]


def _new(kind: type, part: type, *arguments: Any) -> object:
    """Return an object of an extended class, before its attributes are set."""
    extended = _extended(kind, part)
    return extended.__new__(extended, *arguments)
