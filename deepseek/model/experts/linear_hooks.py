"""Where adapters act: hooks on the linear layers of a model.

A hook asks the armed experts of the running pass for their change to the layer's output. If no
adapter is armed, it returns None and leaves the layer's output untouched. Hooks are kept out of the
state dict and need no change in a model's code, so they work on any model.
"""

import secrets
import threading
import weakref
from collections.abc import Mapping
from contextlib import AbstractContextManager
from contextvars import ContextVar
from functools import partial
from types import TracebackType
from typing import Any, Protocol

from torch import Tensor, nn

from deepseek.checkpoint.convert import our_name


class Adapting(Protocol):
    """The armed experts of one forward pass, if an adapter is among them."""

    def adapt(self, site: str, x: Tensor, y: Tensor) -> Tensor:
        """Return the output `y` `[..., F]` of a linear layer with the changes of the adapters.

        Args:
            site: name of the layer in the model.
            x: input of the layer, `[..., D]`.
            y: its output.
        """


_running: ContextVar[Adapting | None] = ContextVar("adapting", default=None)


def adapting(armed: Any) -> AbstractContextManager[None]:
    """Return a context in which the hooks of linear layers apply the adapters of a pass.

    Args:
        armed: the armed experts; None, or experts without an adapter: the hooks do nothing.
    """
    return _Scope(armed if armed is not None and armed.adapts else None)


class _Scope(AbstractContextManager[None]):
    # Not a generator, which would cost more than the hooks do.
    def __init__(self, armed: Adapting | None) -> None:
        self._armed = armed

    def __enter__(self) -> None:
        self._before = _running.get()
        _running.set(self._armed)

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        # An interruption leaves a scope open. It is ended by the next pass, perhaps in another
        # asyncio task, whose context may have a value of its own by then.
        if _running.get() is self._armed:
            _running.set(self._before)


def _adapt_output(
    site: str, _table: str, _: nn.Module, inputs: tuple[Tensor, ...], y: Tensor
) -> Any:
    armed = _running.get()
    return None if armed is None else armed.adapt(site, inputs[0], y)


class SiteHook:
    """The hook on one linear layer, removed when the last adapter that needs it is gone.

    Sequences in flight keep their adapters, and thereby the hooks, after an adapter is unplugged.

    Args:
        site: name of the layer in the model.
        layer: the layer.
        table: mark of the `HookTable` that owns the hook and has no other live one on the layer.
    """

    def __init__(self, site: str, layer: nn.Linear, table: str) -> None:
        self.layer = layer  # keeps its id, by which the table finds this hook, from being reused
        owners = _owners(layer)
        # A copied model's layers have copies of the hooks; a second hook would add changes twice.
        if any(owner != table for owner in owners.values()):
            return
        # One of the same table is about to be removed: the last adapter that needed it is gone, but
        # its finaliser has not run yet.
        for handle_id in owners:
            layer._forward_hooks.pop(handle_id, None)
        # The hook must not refer to this object, or it would never be collected; and a model with
        # hooks must stay picklable, so the hook is not a closure.
        handle = layer.register_forward_hook(partial(_adapt_output, site, table))
        weakref.finalize(self, handle.remove)


def _owners(layer: nn.Linear) -> dict[int, str]:
    """Return the marks of the tables of a layer's hooks, by the id of their handle."""
    hooks = layer._forward_hooks
    # Iterate over a copy: a finaliser may remove a hook at any time, in any thread.
    found = [(handle_id, hooks.get(handle_id)) for handle_id in tuple(hooks)]
    return {
        handle_id: hook.args[1]
        for handle_id, hook in found
        if isinstance(hook, partial) and hook.func is _adapt_output
    }


class HookTable:
    """The hooks on a model's linear layers: at most one for each, shared by its adapters."""

    def __init__(self) -> None:
        self._hooks: weakref.WeakValueDictionary[int, SiteHook] = weakref.WeakValueDictionary()
        # Tells the hooks of this table from those that copying a model has brought along.
        self._mark = secrets.token_hex(8)
        self._lock = threading.RLock()

    def hook(self, site: str, layer: nn.Linear) -> SiteHook:
        """Return the hook on a linear layer, which lasts as long as the result is referenced.

        Args:
            site: name of the layer in the model.
            layer: the layer.
        """
        with self._lock:
            hook = self._hooks.get(id(layer))
            if hook is None:
                hook = SiteHook(site, layer, self._mark)
                self._hooks[id(layer)] = hook
            return hook


def linear_layers(model: nn.Module) -> dict[str, nn.Linear]:
    """Return the linear layers inside the blocks of a model, by name.

    The head is left out: it may be tied to the embedding, and losses read its weight directly.
    """
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and ("layers." in name or ".h." in name)
    }


def site_name(name: str, layers: Mapping[str, object]) -> str | None:
    """Return the name under which a model has the linear layer that an adapter calls `name`.

    An adapter may use Hugging Face's names where the model has ours. In a model that was upcycled
    to a mixture of experts, the dense network is the shared expert.

    Args:
        name: name of the layer in the model that the adapter was trained on.
        layers: names of the model's linear layers.
    """
    ours = our_name(f"{name}.weight").removesuffix(".weight")
    shared = ours.replace(".feed_forward.", ".feed_forward.shared_experts.")
    for candidate in (name, ours, shared):
        if candidate in layers:
            return candidate
    return None
