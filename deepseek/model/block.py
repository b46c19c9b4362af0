"""One layer of the transformer."""

from torch import Tensor, nn
from transformers.modeling_layers import GradientCheckpointingLayer

from deepseek.model.attention import ATTENTION
from deepseek.model.attention.full import AttentionInputs
from deepseek.model.config import ModelConfig
from deepseek.model.context import ForwardContext
from deepseek.model.feed_forward import SwiGLU
from deepseek.model.moe.experts import Experts
from deepseek.model.moe.layer import MoELayer
from deepseek.model.norm import RMSNorm
from deepseek.registry import pick


class Block(GradientCheckpointingLayer):
    """Attention, then feed-forward (dense or mixture of experts), each on a normed copy added back to the stream."""

    def __init__(self, config: ModelConfig, layer_idx: int, pool: Experts | None) -> None:
        super().__init__()
        self.layer_idx = layer_idx
        self.sparse = config.is_sparse(layer_idx)
        self.attention_norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.attention = pick(ATTENTION, config.attention, "attention")(config, layer_idx)
        self.feed_forward_norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.feed_forward: nn.Module = (
            MoELayer(config, layer_idx, pool) if self.sparse else SwiGLU(config.hidden_size, config.intermediate_size)
        )

    def forward(self, hidden_BTD: Tensor, ctx: ForwardContext) -> Tensor:
        return self.transform(self.attend(hidden_BTD, ctx), ctx)

    def attend(self, hidden_BTD: Tensor, ctx: ForwardContext) -> Tensor:
        """Return the stream `[B, T, D]` after this block's attention, which no plugged expert of the block changes."""
        attended: Tensor = self.attention(self.attention_norm(hidden_BTD), ctx)
        return hidden_BTD + attended

    def transform(self, hidden_BTD: Tensor, ctx: ForwardContext) -> Tensor:
        """Return the stream `[B, T, D]` after this block's feed-forward part and the experts plugged beside it."""
        x_BTD = self.gate_input(hidden_BTD)
        y_BTD: Tensor = self.feed_forward(x_BTD, ctx) if self.sparse else self.feed_forward(x_BTD)
        if ctx.armed is not None:
            y_BTD = ctx.armed.apply(self.layer_idx, x_BTD, y_BTD, ctx)
        return hidden_BTD + y_BTD

    def attention_inputs(self, hidden_BTD: Tensor, ctx: ForwardContext) -> AttentionInputs:
        """Return the queries, keys and values of this block's attention on the stream `[B, T, D]` that enters it."""
        return self.attention.inputs(self.attention_norm(hidden_BTD), ctx)

    def state_bytes(self, length: int, itemsize: int) -> int:
        """Return the most bytes that this block keeps in the cache for one sequence (see `FullAttention`)."""
        return self.attention.state_bytes(length, itemsize)

    def gate_input(self, hidden_BTD: Tensor) -> Tensor:
        """Return what the feed-forward part, the experts and their gates read of the stream `[B, T, D]`."""
        normed_BTD: Tensor = self.feed_forward_norm(hidden_BTD)
        return normed_BTD
