"""The forward pass in pieces, for all that runs a part of a model by itself.

    step = begin(model, input_ids)         # embeddings, and the context that all layers share
    step.run_to(8)                         # the residual stream that enters layer 8
    step.attend()                          # after layer 8's attention, before its feed-forward part and its experts
    step.finish()                          # the layers that are left, then the last norm

`resume` goes on from a residual stream that an earlier pass has computed. Nobody outside `model/`
calls a layer, its norms, its attention or its feed-forward part: a model that changes within a
layer changes nothing elsewhere.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor, nn

from deepseek.errors import ConfigError
from deepseek.model import context as ctx_of
from deepseek.model.attention.full import AttentionInputs
from deepseek.model.block import Block
from deepseek.model.config import ModelConfig
from deepseek.model.context import Armed, ForwardContext
from deepseek.model.experts import ExpertSet
from deepseek.model.kv_cache import KVCache
from deepseek.model.moe.stats import RoutingDecision
from deepseek.model.norm import RMSNorm
from deepseek.model.positions import Positions


class Decoder(Protocol):
    """The parts of a model that a pass goes through; `DeepSeekModel` is one."""

    config: ModelConfig
    embed_tokens: nn.Module
    layers: nn.ModuleList
    norm: RMSNorm
    lm_head: nn.Linear
    positions: Positions
    experts: ExpertSet


class UpperLayers(nn.Module):
    """The layers of a model from `first` on and its last norm.

    `resume` runs them in place of the model's own, so that a deep copy is a reference which shares
    all that lies below.
    """

    def __init__(self, model: Decoder, first: int) -> None:
        super().__init__()
        self.first = first
        self.layers = nn.ModuleList(model.layers[first:])
        self.norm = model.norm


@dataclass
class ForwardPass:
    """One forward pass and where it stands. Every method moves it forward or leaves it where it is.

    Attributes:
        model: what runs.
        hidden_BTD: the residual stream.
        ctx: what all layers share; `armed`, `routing` and the like may be set before the first
            layer runs.
        layer: the layer that runs next, or of which only the attention has run.
        attended: whether that layer's attention has run.
        upper: layers that run in place of the model's own; None: the model's.
    """

    model: Decoder
    hidden_BTD: Tensor
    ctx: ForwardContext
    layer: int = 0
    attended: bool = False
    upper: UpperLayers | None = None

    def run_to(self, layer: int) -> Tensor:
        """Return the residual stream `[B, T, D]` that enters `layer`; the number of layers runs
        them all.

        Raises:
            ConfigError: the pass is beyond that layer, or the model has fewer.
        """
        self._check(layer, self.layer + self.attended, len(self.model.layers))
        if self.attended:
            self.hidden_BTD = self._block().transform(self.hidden_BTD, self.ctx)
            self.attended = False
            self.layer += 1
        while self.layer < layer:
            # The whole block is called, not its two halves: that call recomputes activations and
            # gathers parameters.
            self.hidden_BTD = self._block()(self.hidden_BTD, self.ctx)
            self.layer += 1
        return self.hidden_BTD

    def attend(self) -> Tensor:
        """Return the residual stream `[B, T, D]` after the attention of the next layer.

        No expert of that layer or of one above it has had a part in it.

        Raises:
            ConfigError: that attention has run, or no layer is left.
        """
        self._check(self.layer, self.layer + self.attended, len(self.model.layers) - 1)
        self.hidden_BTD = self._block().attend(self.hidden_BTD, self.ctx)
        self.attended = True
        return self.hidden_BTD

    def attention_inputs(self) -> AttentionInputs:
        """Return the queries, keys and values that the next layer's attention works on; the pass
        stays where it is.

        Raises:
            ConfigError: that attention has run, or no layer is left.
        """
        self._check(self.layer, self.layer + self.attended, len(self.model.layers) - 1)
        return self._block().attention_inputs(self.hidden_BTD, self.ctx)

    def gate_input(self) -> Tensor:
        """Return the normed stream `[B, T, D]` that this layer's feed-forward part, experts and
        gates read.

        The attention runs if it has not; the pass then stands behind it.

        Raises:
            ConfigError: no layer is left.
        """
        if not self.attended:
            self.attend()
        return self._block().gate_input(self.hidden_BTD)

    def finish(self, last: int | None = None) -> Tensor:
        """Run the layers that are left; return the normed hidden states `[B, T, D]` that the head
        reads.

        Args:
            last: number of tokens at the end of each row that are wanted; None: all.
        """
        hidden_BTD = self.run_to(len(self.model.layers))
        norm = self.model.norm if self.upper is None else self.upper.norm
        normed_BTD: Tensor = norm(hidden_BTD if last is None else hidden_BTD[:, -last:])
        return normed_BTD

    def logits(self) -> Tensor:
        """Run the layers that are left; return the next-token logits `[B, T, V]`."""
        logits_BTV: Tensor = self.model.lm_head(self.finish())
        return logits_BTV

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
                f"This pass stands {place} of {len(self.model.layers)} layers and cannot go to layer {layer}; begin "
                "another one."
            )


def begin(
    model: Decoder,
    input_ids_BT: Tensor | None = None,
    *,
    inputs_embeds: Tensor | None = None,
    attention_mask: Tensor | None = None,
    position_ids: Tensor | None = None,
    cache: KVCache | None = None,
    routing: Mapping[int, RoutingDecision] | None = None,
) -> ForwardPass:
    """Return a pass that stands before layer 0, with positions added to the embeddings where the
    encoding does so.

    Args:
        model: the model to run; the experts armed in it, or those that the sequence in `cache`
            began with, take part.
        input_ids_BT: token ids `[B, T]`.
        inputs_embeds: embeddings `[B, T, D]` in their place; experts then count as relevant
            everywhere.
        attention_mask: 1 at real and 0 at padding tokens, `[B, S]` over past and new tokens; None:
            all are real.
        position_ids: positions `[B, T]`, restarting at each document of a packed row; None: counted
            over real tokens.
        cache: past keys and values, to which the new ones are added; None: nothing is kept.
        routing: layer -> experts chosen in an earlier pass over the same tokens, to be used again;
            None: chosen anew.

    Raises:
        ConfigError: not exactly one of ids and embeddings, a mask of another shape, or experts and
            a foreign cache.
    """
    if (input_ids_BT is None) == (inputs_embeds is None):
        raise ConfigError("Exactly one of input_ids and inputs_embeds must be given.")
    hidden_BTD: Tensor = (
        model.embed_tokens(input_ids_BT) if inputs_embeds is None else inputs_embeds
    )
    ctx = _context(model, hidden_BTD, input_ids_BT, attention_mask, position_ids, cache)
    ctx.routing = routing or {}
    return ForwardPass(model, model.positions.embed(hidden_BTD, ctx.position_ids_BT), ctx)


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
) -> ForwardPass:
    """Return a pass that goes on from a residual stream, without a cache.

    Args:
        model: the model to run; the experts armed in it take part.
        hidden_BTD: the stream `[B, T, D]` that enters `layer`, as `run_to` returned it.
        layer: the layer at which the pass stands.
        attended: whether that layer's attention has run, as `attend` returned the stream.
        input_ids: token ids `[B, T]` by which experts judge their relevance; None: they are
            relevant everywhere.
        attention_mask, position_ids, routing: those of the pass that computed the stream (see
            `begin`).
        upper: layers from `layer` on to run in place of the model's; None: the model's own.

    Raises:
        ConfigError: a mask of another shape, or `upper` begins above `layer`.
    """
    if upper is not None and upper.first > layer:
        raise ConfigError(
            f"The upper layers begin at {upper.first}; they cannot go on from layer {layer}."
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
    """Build what all layers of one forward pass share."""
    batch, length, _ = hidden_BTD.shape
    past = ctx_of.past_length(cache)
    device = hidden_BTD.device
    real_BS = ctx_of.real_tokens(attention_mask, past + length)
    positions_BT = ctx_of.resolve_positions(
        batch, length, past, attention_mask, position_ids, device
    )
    packed = position_ids is not None and past == 0 and real_BS is None
    return ForwardContext(
        positions=model.positions.prepare(positions_BT, hidden_BTD.dtype),
        position_ids_BT=positions_BT,
        past=past,
        window=model.config.sliding_window,
        real_BS=real_BS,
        document_ids_BT=ctx_of.document_ids(positions_BT) if packed else None,
        cache=cache,
        input_ids_BT=input_ids,
        armed=_armed(model.experts, cache),
    )


def _armed(experts: ExpertSet, cache: KVCache | None) -> Armed | None:
    """Return the experts that take part: those the sequence in `cache` started with, else those
    armed now.
    """
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
