"""`ForwardPass` for attached models: a stock decoder that is stopped and resumed at any layer.

The decoder's own `forward` runs every time, so it computes masks, positions and everything else
itself. To stop before a layer, a hook takes the hidden states that enter it and raises an exception
that only this file catches. To resume there, the layers below return the stored hidden states
instead of computing them.

Some decoders cannot be resumed from hidden states alone, for example if upper layers reuse the
keys of lower ones. Each layer is checked on a few tokens when it is first cut; where resuming
changes the result, the pass computes the lower layers again from the token ids.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Cache

from deepseek.device.memory import is_out_of_memory
from deepseek.errors import ConfigError
from deepseek.model import context as ctx_of
from deepseek.model.attached.documents import Documents
from deepseek.model.attached.hooks import AttachedContext, gate_input
from deepseek.model.attached.model import AttachedModel
from deepseek.model.attached.sites import first_tensor
from deepseek.model.attached.traits import decoder_of, layers_of, supported, traits_of
from deepseek.model.inputs import check_positions


class _StoppedError(Exception):
    """Ends a decoder's forward pass with the hidden states that were asked for."""

    def __init__(self, hidden: Tensor) -> None:
        self.hidden = hidden


@dataclass
class AttachedPass:
    """A forward pass of an attached model in progress, with the methods of `ForwardPass`.

    It differs in two points: the layer whose attention `attend` has run is resumed before the
    attention, not after it; and logits are computed by `language_model.output_head` from what
    `finish` returns.

    Attributes:
        model: the model to run.
        arguments: the arguments of the decoder's `forward`.
        ctx: what armed experts read; None: no expert is armed.
        layer: the next layer to run, or the one of which only the attention has run.
        attended: whether the attention of `layer` has run.
        stream_BTD: the residual stream that enters `layer`; None: not computed yet.
        documents: the documents of packed rows, if each must run in a row of its own; else None.
    """

    model: AttachedModel
    arguments: dict[str, Any]
    ctx: AttachedContext | None
    layer: int = 0
    attended: bool = False
    stream_BTD: Tensor | None = None
    documents: Documents | None = None

    @property
    def hidden_BTD(self) -> Tensor:
        """The residual stream `[B, T, D]` that enters `layer`."""
        if self.stream_BTD is None:
            self.stream_BTD = self._run(self._before(self.layer))
        return self.stream_BTD

    def run_to(self, layer: int) -> Tensor:
        """Run up to `layer` and return the residual stream `[B, T, D]` that enters it.

        Args:
            layer: index of a layer; the number of layers runs all of them.

        Raises:
            ConfigError: the pass is already past that layer, or the model has fewer layers.
        """
        self._check(layer, self.layer + self.attended, len(layers_of(self.model)))
        if layer > self.layer:
            self.stream_BTD = self._run(self._before(layer))
            self.layer = layer
            self.attended = False
        return self.hidden_BTD

    def attend(self) -> Tensor:
        """Return a stream `[B, T, D]` from which `resume` continues with `attended=True`.

        No expert of this or a higher layer has contributed to it.

        Raises:
            ConfigError: that attention has already run, or no layer is left.
        """
        self._check(self.layer, self.layer + self.attended, len(layers_of(self.model)) - 1)
        self.attended = True
        return self.hidden_BTD

    def gate_input(self) -> Tensor:
        """Return the hidden states `[B, T, D]` that this layer's feed-forward module reads.

        Raises:
            ConfigError: the layer has no feed-forward module.
        """
        site = self.model.expert_hooks.sites.at(self.layer)
        self.attended = True

        def stop(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            raise _StoppedError(gate_input(args, kwargs))

        module = self.model.get_submodule(site.path)
        return self._run(lambda: module.register_forward_pre_hook(stop, with_kwargs=True))

    def finish(self, last: int | None = None) -> Tensor:
        """Run the remaining layers and return what the output head multiplies, `[B, T, D]`.

        These are the final hidden states after the norm, scaled if the model scales its logits. The
        pass itself does not advance.

        Args:
            last: return only the last `last` tokens of each row; None: all tokens.

        Raises:
            ConfigError: the output head is not linear.
        """
        hidden_BTD = self._run(None) * traits_of(self.model).logit_scale
        return hidden_BTD if last is None else hidden_BTD[:, -last:]

    def _run(self, stop: Callable[[], Any] | None) -> Tensor:
        """Run the decoder from the stored stream on.

        Args:
            stop: registers the hook at which to stop; None: run to the end.
        """
        with ExitStack() as stack:
            stack.enter_context(self.model.expert_hooks.running(self.ctx))
            if self.stream_BTD is not None and can_cut(self.model, self.layer):
                stream = self.stream_BTD
                if self.documents is not None:
                    stream = self.documents.split(stream)
                stack.enter_context(_started(self.model, self.layer, stream))
            if stop is not None:
                handle = stop()
                stack.callback(handle.remove)
            try:
                output = decoder_of(self.model)(**self.arguments)
                hidden = first_tensor(output if isinstance(output, tuple) else output.to_tuple())
            except _StoppedError as reached:
                hidden = reached.hidden
        assert hidden is not None
        rows = self.arguments.get("input_ids")
        rows = self.arguments["inputs_embeds"] if rows is None else rows
        hidden = hidden.view(*rows.shape[:2], -1)
        return hidden if self.documents is None else self.documents.join(hidden)

    def _before(self, layer: int) -> Callable[[], Any]:
        """Return a function that registers a hook that stops the decoder before `layer`."""
        layers = layers_of(self.model)

        def enter(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            raise _StoppedError(gate_input(args, kwargs))

        def leave(_module: nn.Module, _args: Any, output: Any) -> None:
            hidden = first_tensor(output)
            assert hidden is not None
            raise _StoppedError(hidden)

        if layer == len(layers):
            return lambda: layers[-1].register_forward_hook(leave)
        return lambda: layers[layer].register_forward_pre_hook(enter, with_kwargs=True)

    def _check(self, layer: int, first: int, last: int) -> None:
        if not first <= layer <= last:
            place = "after the attention of" if self.attended else "before"
            raise ConfigError(
                f"This pass is {place} layer {self.layer} of {len(layers_of(self.model))} layers "
                f"and cannot go to layer {layer}; begin another one."
            )


def begin_attached(
    model: AttachedModel,
    input_ids_BT: Tensor | None,
    inputs_embeds: Tensor | None,
    attention_mask: Tensor | None,
    position_ids: Tensor | None,
    cache: Cache | None = None,
) -> AttachedPass:
    """Return a forward pass of an attached model that is about to run layer 0.

    Args: see `passes.begin`. A pass with a cache cannot be stopped, only finished.

    Raises:
        ConfigError: positions of a wrong shape, dtype or range, or packed documents and padding.
    """
    if position_ids is not None:
        tokens = inputs_embeds if input_ids_BT is None else input_ids_BT
        assert tokens is not None
        batch, length = tokens.shape[:2]
        position_ids = check_positions(position_ids, batch, length, tokens.device)
        position_ids = position_ids.expand(batch, length)
    inputs = {
        "input_ids": input_ids_BT,
        "inputs_embeds": inputs_embeds,
        "attention_mask": attention_mask,
        "position_ids": position_ids,
    }
    given = {name: value for name, value in inputs.items() if value is not None}
    documents = None
    if cache is None and _is_packed(given):
        given.pop(
            "attention_mask", None
        )  # all ones, but given a mask, a decoder does not separate documents
        if not traits_of(model).separates_documents:
            documents = Documents.of(given["position_ids"])
    if documents is not None:
        given = {name: documents.split(value) for name, value in given.items()}
    use_cache = cache is not None
    arguments = supported(decoder_of(model), **given, cache=cache, use_cache=use_cache)
    ctx = model.expert_hooks.context(arguments)
    if ctx is not None and not use_cache:
        ctx = replace(ctx, cache=None)  # a layer may run several times
    if ctx is not None and documents is not None:
        ctx = replace(ctx, token_mask_BT=documents.real_NL, document_ids_BT=None)
    return AttachedPass(model, arguments, ctx, documents=documents)


def resume_attached(
    model: AttachedModel,
    stream_BTD: Tensor,
    layer: int,
    *,
    attended: bool,
    input_ids: Tensor | None,
    attention_mask: Tensor | None,
    position_ids: Tensor | None,
) -> AttachedPass:
    """Return a forward pass of an attached model that continues from a residual stream.

    Args: see `passes.resume`.

    Raises:
        ConfigError: the model cannot be resumed at `layer` without the token ids.
    """
    embeds = stream_BTD if input_ids is None else None
    if input_ids is None and not can_cut(model, layer):
        raise ConfigError(
            f"A {type(model).__name__} cannot be resumed at layer {layer} from hidden states "
            "alone; pass input_ids as well."
        )
    step = begin_attached(model, input_ids, embeds, attention_mask, position_ids)
    step.stream_BTD = stream_BTD
    step.layer = layer
    step.attended = attended
    return step


def _is_packed(inputs: Mapping[str, Tensor]) -> bool:
    """Return whether a row holds several documents, by the rule that gates and masks follow.

    Args:
        inputs: the arguments of a decoder: positions and attention mask, if there are any.

    Raises:
        ConfigError: one does, and there is padding, which a stock decoder supports only with one
            document per row.
    """
    positions_BT = inputs.get("position_ids")
    if positions_BT is None:
        return False
    real_BT = ctx_of.real_tokens(inputs.get("attention_mask"), *positions_BT.shape)
    if ctx_of.document_ids(positions_BT, real_BT) is None:
        return False
    if real_BT is None:
        return True
    raise ConfigError(
        "Rows of an attached model hold packed documents or padding, not both; leave the attention "
        "mask out, or give each document a row."
    )


def can_cut(model: AttachedModel, layer: int) -> bool:
    """Return whether a pass that is stopped before `layer` and resumed gives the uncut result."""
    cuts = traits_of(model).cuts
    if layer not in cuts:
        cuts[layer] = _resumes(model, layer)
    return cuts[layer]


@torch.no_grad()
def _resumes(model: AttachedModel, layer: int) -> bool:
    """Return whether stopping before `layer` and resuming changes nothing for a few tokens."""
    traits = traits_of(model)
    arguments = supported(decoder_of(model), input_ids=traits.ids, use_cache=False)
    stream_BTD = AttachedPass(model, arguments, None).run_to(layer)
    try:
        with _started(model, layer, stream_BTD):
            resumed_BTD = traits.hidden(traits.ids)
    except INCOMPLETE as error:
        if is_out_of_memory(error):
            raise  # says nothing about the decoder
        return False
    return torch.equal(traits.hidden(traits.ids), resumed_BTD)


INCOMPLETE = (
    AssertionError,
    AttributeError,
    LookupError,
    NameError,
    RuntimeError,
    TypeError,
    ValueError,
)
"""Errors of a decoder whose upper layers lack state that the lower ones would have stored."""


@contextmanager
def _started(model: AttachedModel, layer: int, stream: Tensor) -> Iterator[None]:
    """Within the block, the decoder begins at `layer` with the given residual stream."""
    layers = layers_of(model)
    length = traits_of(model).layer_outputs
    output = (stream, *[None] * (length - 1)) if length else stream

    def substitute(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if args:
            return (stream, *args[1:]), kwargs
        first = next(name for name, value in kwargs.items() if torch.is_tensor(value))
        return args, {**kwargs, first: stream}

    with ExitStack() as stack:
        for below in list(layers)[:layer]:
            stack.enter_context(_returning(below, output))
        if layer == 0:
            handle = layers[0].register_forward_pre_hook(substitute, with_kwargs=True)
            stack.callback(handle.remove)
        yield


@contextmanager
def _returning(module: nn.Module, output: Any) -> Iterator[None]:
    """Within the block, calling a module returns `output`."""
    before = module.__dict__.get("forward")
    module.__dict__["forward"] = lambda *_args, **_kwargs: output
    try:
        yield
    finally:
        del module.__dict__["forward"]
        if before is not None:
            module.__dict__["forward"] = before
