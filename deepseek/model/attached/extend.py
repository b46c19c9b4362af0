"""Extend the class of one object, such as a loaded model or a cache."""

_EXTENDED: dict[tuple[type, type], type] = {}


def extend_class(instance: object, part: type) -> None:
    """Make an object's class a subclass of `part` and of its own class, under the same name.

    FSDP2 extends modules in the same way. The object keeps its attributes, and is still an instance
    of its class.

    Args:
        instance: the object, of a class written in Python without slots.
        part: the class whose methods come first.
    """
    kind = type(instance)
    if (kind, part) not in _EXTENDED:
        names = {"__module__": kind.__module__, "__qualname__": kind.__qualname__}
        _EXTENDED[kind, part] = type(kind.__name__, (part, kind), names)
    instance.__class__ = _EXTENDED[kind, part]


def restore_class(instance: object) -> None:
    """Undo `extend_class`."""
    instance.__class__ = type(instance).__bases__[1]
