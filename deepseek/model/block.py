"""One transformer layer."""

from torch import Tensor, nn
from transformers.modeling_layers import GradientCheckpointingLayer

from deepseek.model.attention import ATTENTION
from deepseek.model.attention.full import AttentionInputs
from deepseek.model.config import ModelConfig
from deepseek.model.context import ForwardContext
from deepseek.model.experts.linear_hooks import adapting
from deepseek.model.feed_forward import FEED_FORWARD
from deepseek.model.moe.experts import Experts
from deepseek.model.moe.layer import MoELayer
from deepseek.model.norm import RMSNorm
from deepseek.registry import pick


class Block(GradientCheckpointingLayer):
    """A pre-norm layer: attention, then a dense or mixture-of-experts feed-forward network.

    Each sublayer reads a normed copy of the residual stream and adds its output to the stream; with
    `config.post_norms`, the output is normed as well.
    """

    def __init__(self, config: ModelConfig, layer_idx: int, pool: Experts | None) -> None:
        super().__init__()
        self.layer_idx = layer_idx
        self.sparse = config.is_sparse(layer_idx)
        self.attention_norm = _norm(config)
        self.attention = pick(ATTENTION, config.attention, "attention")(config, layer_idx)
        self.feed_forward_norm = _norm(config)
        self.feed_forward: nn.Module = (
            MoELayer(config, layer_idx, pool)
            if self.sparse
            else FEED_FORWARD[config.hidden_act](config.hidden_size, config.intermediate_size)
        )
        self.attention_post_norm = _norm(config) if config.post_norms else nn.Identity()
        self.feed_forward_post_norm = _norm(config) if config.post_norms else nn.Identity()

    def forward(self, hidden_BTD: Tensor, ctx: ForwardContext) -> Tensor:
        return self.transform(self.attend(hidden_BTD, ctx), ctx)

    def attend(self, hidden_BTD: Tensor, ctx: ForwardContext) -> Tensor:
        """Return the residual stream `[B, T, D]` after this block's attention.

        Expert modules of this block have no effect on it; adapters have.
        """
        with adapting(ctx.armed):
            attention_BTD: Tensor = self.attention(self.attention_norm(hidden_BTD), ctx)
        normed_BTD: Tensor = self.attention_post_norm(attention_BTD)
        return hidden_BTD + normed_BTD

    def transform(self, hidden_BTD: Tensor, ctx: ForwardContext) -> Tensor:
        """Return the residual stream `[B, T, D]` after the feed-forward network and the experts."""
        x_BTD = self.gate_input(hidden_BTD)
        with adapting(ctx.armed):
            y_BTD: Tensor = (
                self.feed_forward(x_BTD, ctx) if self.sparse else self.feed_forward(x_BTD)
            )
        if ctx.armed is not None:
            y_BTD = ctx.armed.apply(self.layer_idx, x_BTD, y_BTD, ctx)
        normed_BTD: Tensor = self.feed_forward_post_norm(y_BTD)
        return hidden_BTD + normed_BTD

    def attention_inputs(self, hidden_BTD: Tensor, ctx: ForwardContext) -> AttentionInputs:
        """Return this block's queries, keys and values for the residual stream `[B, T, D]`."""
        with adapting(ctx.armed):
            return self.attention.inputs(self.attention_norm(hidden_BTD), ctx)

    def state_bytes(self, length: int, itemsize: int) -> int:
        """Return an upper bound on this block's bytes in the cache for one sequence.

        Args:
            length: tokens of the sequence.
            itemsize: bytes per number in keys and values.
        """
        return self.attention.state_bytes(length, itemsize)

    def gate_input(self, hidden_BTD: Tensor) -> Tensor:
        """Return the normed hidden states `[B, T, D]` after the attention.

        The feed-forward network, the experts and their gates read them.
        """
        normed_BTD: Tensor = self.feed_forward_norm(hidden_BTD)
        return normed_BTD


def _norm(config: ModelConfig) -> RMSNorm:
    return RMSNorm(config.hidden_size, config.rms_norm_eps, config.unit_offset_norms)
