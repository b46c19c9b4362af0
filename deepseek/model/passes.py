"""The forward pass as an object that can be stopped and resumed at any layer.

    step = begin(model, input_ids)    # embeddings, and the context that all layers share
    step.run_to(8)                    # the residual stream that enters layer 8
    step.attend()                     # after layer 8's attention, before its feed-forward network
    step.finish()                     # the remaining layers, then the final norm

`resume` starts from a residual stream that an earlier pass computed; `ragged.begin_ragged` starts a
pass over new tokens of many sequences, each with its own cache. A stock model of `transformers`
with attached experts runs through the same functions. Code outside `model/` never calls a layer,
norm, attention or feed-forward network directly, so that a change inside a layer stays inside
`model/`.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol, overload

from torch import Tensor, nn

from deepseek.errors import ConfigError
from deepseek.model import context as ctx_of
from deepseek.model.attached.forward_pass import AttachedPass, begin_attached, resume_attached
from deepseek.model.attached.model import AttachedModel
from deepseek.model.attention.full import AttentionInputs
from deepseek.model.block import Block
from deepseek.model.config import ModelConfig
from deepseek.model.context import Armed, ForwardContext
from deepseek.model.experts import ExpertSet
from deepseek.model.inputs import check_cache, check_embeds, check_ids, check_positions
from deepseek.model.kv_cache import KVCache
from deepseek.model.moe.stats import RoutingDecision
from deepseek.model.norm import RMSNorm
from deepseek.model.positions import Positions


class Decoder(Protocol):
    """The parts of a model that a forward pass uses. `DeepSeekModel` implements it."""

    config: ModelConfig
    embed_tokens: nn.Module
    layers: nn.ModuleList
    norm: RMSNorm
    positions: Positions
    experts: ExpertSet

    def logits(self, hidden_BTD: Tensor) -> Tensor:
        """Return the logits of final hidden states."""
        ...


class UpperLayers(nn.Module):
    """The layers of a model from `first` on, and its final norm.

    `resume` can run them in place of the model's own layers. A deep copy of this module thus serves
    as a frozen reference model that shares the lower layers.
    """

    def __init__(self, model: Decoder, first: int) -> None:
        super().__init__()
        self.first = first
        self.layers = nn.ModuleList(model.layers[first:])
        self.norm = model.norm


@dataclass
class ForwardPass:
    """A forward pass in progress. No method moves it backwards.

    Attributes:
        model: the model to run.
        hidden_BTD: the residual stream at the current position.
        ctx: the context that all layers share. Fields such as `armed` and `routing` may be set
            before the first layer runs.
        layer: the next layer to run, or the one of which only the attention has run.
        attended: whether the attention of `layer` has run.
        upper: layers to run in place of the model's own; None: the model's.
    """

    model: Decoder
    hidden_BTD: Tensor
    ctx: ForwardContext
    layer: int = 0
    attended: bool = False
    upper: UpperLayers | None = None

    def run_to(self, layer: int) -> Tensor:
        """Run up to `layer` and return the residual stream `[B, T, D]` that enters it.

        Args:
            layer: index of a layer; the number of layers runs all of them.

        Raises:
            ConfigError: the pass is already past that layer, or the model has fewer layers.
        """
        self._check(layer, self.layer + self.attended, len(self.model.layers))
        if self.attended:
            self.hidden_BTD = self._block().transform(self.hidden_BTD, self.ctx)
            self.attended = False
            self.layer += 1
        while self.layer < layer:
            # Call the block as a module, not its two halves: activation checkpointing and the
            # parameter gathering of FSDP2 hook into `__call__`.
            self.hidden_BTD = self._block()(self.hidden_BTD, self.ctx)
            self.layer += 1
        return self.hidden_BTD

    def attend(self) -> Tensor:
        """Run the next layer's attention and return the residual stream `[B, T, D]` after it.

        No expert of this or a higher layer has contributed to the result.

        Raises:
            ConfigError: that attention has already run, or no layer is left.
        """
        self._check(self.layer, self.layer + self.attended, len(self.model.layers) - 1)
        self.hidden_BTD = self._block().attend(self.hidden_BTD, self.ctx)
        self.attended = True
        return self.hidden_BTD

    def attention_inputs(self) -> AttentionInputs:
        """Return the queries, keys and values of the next layer's attention without running it.

        Raises:
            ConfigError: that attention has already run, or no layer is left.
        """
        self._check(self.layer, self.layer + self.attended, len(self.model.layers) - 1)
        return self._block().attention_inputs(self.hidden_BTD, self.ctx)

    def gate_input(self) -> Tensor:
        """Return the normed hidden states `[B, T, D]` that this layer's gates read.

        The feed-forward network and the experts read the same hidden states. The layer's attention
        runs first if it has not run yet.

        Raises:
            ConfigError: no layer is left.
        """
        if not self.attended:
            self.attend()
        return self._block().gate_input(self.hidden_BTD)

    def finish(self, last: int | None = None, rows: Tensor | None = None) -> Tensor:
        """Run the remaining layers and return the final hidden states `[B, T, D]` after the norm.

        Args:
            last: return only the last `last` tokens of each row; None: all tokens.
            rows: return only the tokens with these indices; None: all tokens.
        """
        hidden_BTD = self.run_to(len(self.model.layers))
        if last is not None:
            hidden_BTD = hidden_BTD[:, -last:]
        if rows is not None:
            hidden_BTD = hidden_BTD[:, rows]
        norm = self.model.norm if self.upper is None else self.upper.norm
        normed_BTD: Tensor = norm(hidden_BTD)
        return normed_BTD

    def logits(self) -> Tensor:
        """Run the remaining layers and return the next-token logits `[B, T, V]`."""
        return self.model.logits(self.finish())

    def _block(self) -> Block:
        layers = self.model.layers if self.upper is None else self.upper.layers
        block = layers[self.layer - (0 if self.upper is None else self.upper.first)]
        assert isinstance(block, Block)
        return block

    def _check(self, layer: int, first: int, last: int) -> None:
        if not first <= layer <= last:
            place = (
                f"after the attention of layer {self.layer}"
                if self.attended
                else f"before layer {self.layer}"
            )
            raise ConfigError(
                f"This pass is {place} of {len(self.model.layers)} layers and cannot go to layer "
                f"{layer}; begin another one."
            )


AnyPass = ForwardPass | AttachedPass
"""A forward pass of a model of either kind."""


@overload
def begin(
    model: Decoder,
    input_ids_BT: Tensor | None = None,
    *,
    inputs_embeds: Tensor | None = None,
    attention_mask: Tensor | None = None,
    position_ids: Tensor | None = None,
    cache: KVCache | None = None,
    routing: Mapping[int, RoutingDecision] | None = None,
) -> ForwardPass: ...


@overload
def begin(
    model: AttachedModel,
    input_ids_BT: Tensor | None = None,
    *,
    inputs_embeds: Tensor | None = None,
    attention_mask: Tensor | None = None,
    position_ids: Tensor | None = None,
) -> AttachedPass: ...


def begin(
    model: Decoder | AttachedModel,
    input_ids_BT: Tensor | None = None,
    *,
    inputs_embeds: Tensor | None = None,
    attention_mask: Tensor | None = None,
    position_ids: Tensor | None = None,
    cache: KVCache | None = None,
    routing: Mapping[int, RoutingDecision] | None = None,
) -> AnyPass:
    """Return a forward pass that is about to run layer 0.

    Positions are already added to the embeddings if the encoding is additive.

    Args:
        model: the model to run, with the experts that the sequence in `cache` started with, or else
            the experts that are armed now.
        input_ids_BT: token ids `[B, T]`. Pass either these or `inputs_embeds`.
        inputs_embeds: embeddings `[B, T, D]`. Without ids, relevance cannot be scored, so every
            armed expert counts as relevant.
        attention_mask: 1 for real tokens and 0 for padding, `[B, S]` over past and new tokens;
            None: no padding.
        position_ids: positions `[B, T]`; a document of a packed row starts where they do not
            increase by 1 (see `context.document_ids`); None: counted over real tokens.
        cache: keys and values of past tokens; new ones are appended. None: no cache. A cache of
            packed documents cannot be continued.
        routing: layer -> routing decisions of an earlier pass over the same tokens, to replay;
            None: the router decides.

    Raises:
        ConfigError: both or neither of ids and embeddings; ids, embeddings, positions or a mask of
            a wrong shape, dtype or range; armed experts with a cache that is not a `KVCache`; or
            packed documents with past tokens.
    """
    if (input_ids_BT is None) == (inputs_embeds is None):
        raise ConfigError("Exactly one of input_ids and inputs_embeds must be given.")
    if isinstance(model, AttachedModel):
        return begin_attached(model, input_ids_BT, inputs_embeds, attention_mask, position_ids)
    if inputs_embeds is None:
        input_ids_BT = check_ids(input_ids_BT, model.config.vocab_size, model.norm.weight)
        hidden_BTD: Tensor = model.embed_tokens(input_ids_BT)
    else:
        check_embeds(inputs_embeds, model.norm.weight)
        hidden_BTD = inputs_embeds
    ctx = _context(model, hidden_BTD, input_ids_BT, attention_mask, position_ids, cache)
    ctx.routing = routing or {}
    return ForwardPass(model, model.positions.embed(hidden_BTD, ctx.position_ids_BT), ctx)


@overload
def resume(
    model: Decoder,
    hidden_BTD: Tensor,
    layer: int,
    *,
    attended: bool = False,
    input_ids: Tensor | None = None,
    attention_mask: Tensor | None = None,
    position_ids: Tensor | None = None,
    routing: Mapping[int, RoutingDecision] | None = None,
    upper: UpperLayers | None = None,
) -> ForwardPass: ...


@overload
def resume(
    model: AttachedModel,
    hidden_BTD: Tensor,
    layer: int,
    *,
    attended: bool = False,
    input_ids: Tensor | None = None,
    attention_mask: Tensor | None = None,
    position_ids: Tensor | None = None,
) -> AttachedPass: ...


def resume(
    model: Decoder | AttachedModel,
    hidden_BTD: Tensor,
    layer: int,
    *,
    attended: bool = False,
    input_ids: Tensor | None = None,
    attention_mask: Tensor | None = None,
    position_ids: Tensor | None = None,
    routing: Mapping[int, RoutingDecision] | None = None,
    upper: UpperLayers | None = None,
) -> AnyPass:
    """Return a forward pass that continues from a residual stream, without a cache.

    Args:
        model: the model to run, with the experts that are armed now.
        hidden_BTD: the residual stream `[B, T, D]` that `run_to` or `attend` returned.
        layer: the layer that the stream belongs to.
        attended: whether that layer's attention has run, that is, whether the stream is from
            `attend`. Default: False.
        input_ids: token ids `[B, T]` to score the relevance of experts by; None: every armed expert
            counts as relevant.
        attention_mask, position_ids, routing: those of the pass that computed the stream (see
            `begin`).
        upper: layers to run in place of the model's own, from `layer` or lower; None: the model's.

    Raises:
        ConfigError: a mask or positions of a wrong shape, `upper` starts above `layer`, or an
            attached model needs `input_ids` to resume there.
    """
    if isinstance(model, AttachedModel):
        return resume_attached(
            model,
            hidden_BTD,
            layer,
            attended=attended,
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
        )
    if upper is not None and upper.first > layer:
        raise ConfigError(
            f"The upper layers start at {upper.first} and cannot continue from layer {layer}; "
            "resume at their first layer or above."
        )
    ctx = _context(model, hidden_BTD, input_ids, attention_mask, position_ids, None)
    ctx.routing = routing or {}
    return ForwardPass(model, hidden_BTD, ctx, layer, attended, upper)


def _context(
    model: Decoder,
    hidden_BTD: Tensor,
    input_ids: Tensor | None,
    attention_mask: Tensor | None,
    position_ids: Tensor | None,
    cache: KVCache | None,
) -> ForwardContext:
    """Build the context that all layers of one forward pass share."""
    batch, length, _ = hidden_BTD.shape
    check_cache(cache)
    past = ctx_of.past_length(cache)
    device = hidden_BTD.device
    if position_ids is not None:
        position_ids = check_positions(position_ids, batch, length, device)
    real_BS = ctx_of.real_tokens(attention_mask, batch, past + length)
    positions_BT = ctx_of.resolve_positions(
        batch, length, past, attention_mask, position_ids, device
    )
    documents_BT = None
    if position_ids is not None:
        real_BT = None if real_BS is None else real_BS[:, past:]
        documents_BT = ctx_of.document_ids(positions_BT, real_BT)
        if past and not (documents_BT is None and ctx_of.goes_on(positions_BT, past, real_BS)):
            raise _packed_in_cache()
    if isinstance(cache, KVCache):
        if past and cache.packed:
            raise _packed_in_cache()
        cache.packed = documents_BT is not None
    return ForwardContext(
        positions=model.positions.prepare(positions_BT, hidden_BTD.dtype),
        position_ids_BT=positions_BT,
        past=past,
        window=model.config.sliding_window,
        real_BS=real_BS,
        document_ids_BT=documents_BT,
        cache=cache,
        input_ids_BT=None if input_ids is None else input_ids.long(),
        armed=experts_of(model.experts, cache),
    )


def _packed_in_cache() -> ConfigError:
    return ConfigError(
        "Packed documents share a row of the cache, where the next tokens would see all of them; "
        "run each document with a cache of its own."
    )


def experts_of(experts: ExpertSet, cache: KVCache | None) -> Armed | None:
    """Return the experts that the sequence in `cache` started with, or else those armed now."""
    if cache is None:
        return experts.armed()
    if not isinstance(cache, KVCache):
        if experts.armed() is not None:
            raise ConfigError(
                "Armed experts need deepseek.model.KVCache as cache; leave `cache` out or disarm."
            )
        return None
    if not cache.started:
        cache.armed = experts.armed()
        cache.started = True
    armed: Armed | None = cache.armed
    return armed
