"""The hooks by which armed experts take part in a stock model's forward pass.

A pre-hook on the model and on its decoder notes positions, padding, documents and cache; a hook on
each feed-forward module adds what the armed experts contribute. With no expert armed the hooks
return None, so the stock code path runs, bit for bit.
"""

import inspect
import threading
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Cache, PreTrainedModel
from transformers.utils.generic import ModelOutput

from deepseek.errors import ConfigError
from deepseek.model import context as ctx_of
from deepseek.model.attached.memory import ExpertMemory, remembering
from deepseek.model.attached.sites import ExpertSites, first_tensor
from deepseek.model.context import Armed
from deepseek.model.experts import ExpertSet
from deepseek.model.experts.linear_hooks import adapting
from deepseek.model.prompt_experts import PromptExperts

CACHE_NAMES = ("cache", "past_key_values")
"""Names of the cache among the arguments and outputs of a stock model, the current one first."""


@dataclass
class AttachedContext:
    """The context of one forward pass for armed experts (see `GateContext`, `ForwardContext`)."""

    position_ids_BT: Tensor
    token_mask_BT: Tensor | None
    document_ids_BT: Tensor | None
    input_ids_BT: Tensor | None
    cache: ExpertMemory | None
    armed: Armed | None
    words_BTM: Tensor | None = None

    @property
    def length(self) -> int:
        """Number of new tokens."""
        return self.position_ids_BT.shape[1]


class _Current(threading.local):
    """The forward passes in progress in this thread, the outermost first.

    Attributes:
        passes: their contexts.
        base: number of passes up to that of the innermost `running`; when a call of the model
            starts, any beyond these were left by an interruption.
    """

    def __init__(self) -> None:
        self.passes: list[AttachedContext | None] = []
        self.base = 0
        self._scopes: list[AbstractContextManager[None]] = []

    def push(self, ctx: AttachedContext | None) -> None:
        """Begin a pass, and apply the adapters among its experts."""
        scope = adapting(None if ctx is None else ctx.armed)
        scope.__enter__()
        self._scopes.append(scope)
        self.passes.append(ctx)

    def pop(self) -> AttachedContext | None:
        """End the innermost pass and return its context."""
        self._scopes.pop().__exit__(None, None, None)
        return self.passes.pop()

    def cut(self, depth: int) -> None:
        """End the passes inside the outermost `depth` ones."""
        while len(self._scopes) > depth:
            self._scopes.pop().__exit__(None, None, None)
        del self.passes[depth:]

    def __deepcopy__(self, memo: dict[int, Any]) -> "_Current":
        return _Current()


@dataclass
class ExpertHooks:
    """The hooks of one attached model.

    Attributes:
        sites: where the experts attach.
        experts: the model's experts.
    """

    sites: ExpertSites
    experts: ExpertSet
    _handles: list[Any] = field(default_factory=list)
    _current: _Current = field(default_factory=_Current)

    def install(self, model: PreTrainedModel) -> None:
        """Register the hooks on the model's modules."""
        decoder = model.get_submodule(self.sites.decoder)
        self._handles.append(model.register_forward_pre_hook(self._drop_interrupted))
        for module in (model, decoder):
            self._handles += [
                module.register_forward_pre_hook(self._enter, with_kwargs=True),
                module.register_forward_hook(self._leave, always_call=True),
            ]
        self._handles.append(decoder.register_forward_pre_hook(self._all_tokens, with_kwargs=True))
        for site in self.sites:
            hook = partial(self._add, site.layer)
            module = model.get_submodule(site.path)
            self._handles.append(module.register_forward_hook(hook, with_kwargs=True))

    def remove(self) -> None:
        """Remove the hooks."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    @contextmanager
    def running(self, ctx: AttachedContext | None) -> Iterator[None]:
        """Within the block, forward passes of the model use `ctx`; with None, no experts."""
        current = self._current
        depth, base = len(current.passes), current.base
        try:
            current.push(ctx)
            current.base = depth + 1
            yield
        finally:
            current.base = base
            current.cut(depth)  # more than one pass if an interruption ended the block

    def context(
        self, arguments: Mapping[str, Any], memory: ExpertMemory | None = None
    ) -> AttachedContext | None:
        """Return the context of a forward pass; None if no expert is armed.

        Args:
            arguments: the arguments of the model's or the decoder's `forward`.
            memory: keeps the experts' state; None: that of the cache, or a new one.

        Raises:
            ConfigError: experts are armed, and padding cannot be read from the attention mask.
        """
        cache = _cache(arguments)
        if memory is None:
            memory = ExpertMemory() if cache is None else remembering(cache)
        if not memory.started:
            memory.start(self.experts.armed())
        if memory.armed is None:
            return None
        ids_BT = arguments.get("input_ids")
        tokens = ids_BT if ids_BT is not None else arguments["inputs_embeds"]
        batch, length = tokens.shape[:2]
        past = 0 if cache is None else int(cache.get_seq_length())
        mask = arguments.get("attention_mask")
        if mask is not None and not (isinstance(mask, Tensor) and mask.dim() == 2):
            raise ConfigError(
                "Armed experts need an attention mask of shape [batch, length]; leave "
                "cache_implementation out, or disarm the experts."
            )
        real_BS = ctx_of.real_tokens(mask, batch, past + length)
        positions = _text_positions(arguments.get("position_ids"))
        real_BT = None if real_BS is None else real_BS[:, past:]
        positions_BT = ctx_of.resolve_positions(batch, length, past, mask, positions, tokens.device)
        return AttachedContext(
            position_ids_BT=positions_BT,
            token_mask_BT=real_BT,
            document_ids_BT=None
            if positions is None
            else ctx_of.document_ids(positions_BT, real_BT),
            input_ids_BT=ids_BT,
            cache=memory,
            armed=memory.armed,
        )

    def _drop_interrupted(self, module: nn.Module, args: tuple[Any, ...]) -> None:
        # torch calls `_leave` after every `Exception`, but not after a `KeyboardInterrupt`.
        self._current.cut(self._current.base)

    def _enter(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        kwargs = dict(kwargs)
        prompt_experts: PromptExperts | None = kwargs.pop("prompt_experts", None)
        passes = self._current.passes
        ctx = passes[-1] if passes else None
        try:
            # The model calls its decoder, and `running` may have set a context already.
            if not passes:
                arguments = inspect.signature(module.forward).bind(*args, **kwargs).arguments
                arguments |= arguments.pop("kwargs", {})
                memory = (
                    None
                    if prompt_experts is None
                    else ExpertMemory(armed=prompt_experts.armed, started=True)
                )
                ctx = self.context(arguments, memory)
        finally:
            self._current.push(ctx)  # `_leave` is called even if this raises
        if ctx is not None and ctx.armed is not None:
            _check_recomputation(module)
        return args, kwargs

    def _all_tokens(self, module: nn.Module, args: Any, kwargs: dict[str, Any]) -> Any:
        # Gemma 4 drops all but the last tokens in layers that store no keys and values. The gates
        # there need the earlier tokens; the model's head drops them later.
        if self._current.passes[-1] is None or not kwargs.get("logits_to_keep"):
            return None
        return args, {**kwargs, "logits_to_keep": 0}

    def _leave(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        ctx = self._current.pop()
        if self._current.passes or not isinstance(output, ModelOutput):
            return
        output.experts = None if ctx is None else ctx.armed
        cache = _cache(output)
        if cache is not None:  # the model may have created it
            remembering(cache, ExpertMemory(started=True) if ctx is None else ctx.cache)

    def _add(
        self,
        layer: int,
        module: nn.Module,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        output: Any,
    ) -> Any:
        passes = self._current.passes
        ctx = passes[-1] if passes else None
        if ctx is None or ctx.armed is None:
            return None
        x = gate_input(args, kwargs)
        y = first_tensor(output)
        assert y is not None
        shape = (*ctx.position_ids_BT.shape, x.shape[-1])
        added = ctx.armed.apply(layer, x.view(shape), y.view(shape), ctx).view_as(y)
        return (added, *output[1:]) if isinstance(output, tuple | list) else added


def _check_recomputation(decoder: nn.Module) -> None:
    """Check that the backward pass will not recompute a layer, which would omit its experts.

    Raises:
        ConfigError: activation checkpointing is on.
    """
    if torch.is_grad_enabled() and any(
        module.training and getattr(module, "gradient_checkpointing", False)
        for module in decoder.modules()
    ):
        raise ConfigError(
            "Activation checkpointing would compute the layers again without the armed experts; "
            "call activation_checkpointing_disable() on the model, or disarm the experts."
        )


def gate_input(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Tensor:
    """Return the hidden states among the arguments of a feed-forward module."""
    x = args[0] if args else next(value for value in kwargs.values() if torch.is_tensor(value))
    assert isinstance(x, Tensor)
    return x


def _cache(arguments: Mapping[str, Any]) -> Cache | None:
    """Return the cache among arguments or outputs, under its present or its older name."""
    # Look keys up first: reading an older name from an output logs a warning.
    for name in CACHE_NAMES:
        if name in arguments.keys() and isinstance(arguments[name], Cache):  # noqa: SIM118
            cache: Cache = arguments[name]
            return cache
    return None


def _text_positions(position_ids: Tensor | None) -> Tensor | None:
    """Return positions `[B, T]`; of several axes `[A, B, T]`, the first counts text tokens."""
    return position_ids[0] if position_ids is not None and position_ids.dim() == 3 else position_ids
