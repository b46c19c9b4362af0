"""A model's forward pass as a pure function of tensors, built from the model's own blocks, for
runtimes without Python.
"""

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from deepseek.errors import ConfigError
from deepseek.model.context import ForwardContext
from deepseek.model.kv_cache import KVCache
from deepseek.model.passes import ForwardPass
from deepseek.model.support import (
    LSH_FIELDS,
    MIXTURE_FIELDS,
    NOT_COMPUTED_WITH,
    any_of,
    one_of,
    unsupported,
)
from deepseek.model.transformer import DeepSeekModel

Step = Callable[[tuple[Tensor, ...], Any], tuple[Tensor, Any]]
"""Runs an exported model: (ids, mask, positions) of the new tokens and the past (None at first) ->
logits and the new past.
"""

TOKEN_INPUTS = ("input_ids", "attention_mask", "position_ids")

# A graph is traced from the model's own blocks, which honour all fields. Three things cannot be
# traced for any length: LSH attention, whose reads depend on values in the prompt; position
# encodings that bias the scores or have a table of fixed length; and capped scores, which are
# computed for as many queries at a time as the length allows.
RULES = (
    any_of(NOT_COMPUTED_WITH)
    | any_of(LSH_FIELDS)
    | any_of(MIXTURE_FIELDS)
    | any_of(
        (
            "attention_bias",
            "attention_output_bias",
            "clip_qkv",
            "final_logit_softcapping",
            "full_attention_layers",
            "head_dim",
            "hidden_size",
            "intermediate_size",
            "local_rope_theta",
            "max_position_embeddings",
            "num_attention_heads",
            "num_experts",
            "num_hidden_layers",
            "num_key_value_heads",
            "post_norms",
            "qk_norm",
            "query_pre_attn_scalar",
            "rms_norm_eps",
            "rope_parameters",
            "scale_embeddings",
            "sliding_window",
            "tie_word_embeddings",
            "unit_offset_norms",
            "train_len",  # used only by positional_encoding="dpe"
            "vocab_size",
        )
    )
    | {
        "attention": one_of("full"),
        "attn_logit_softcapping": one_of(None),
        "hidden_act": one_of("gelu_pytorch_tanh", "silu"),
        "positional_encoding": one_of("rope", "none"),
    }
)
"""Field -> the values that a graph supports."""


class Graph(nn.Module):
    """Maps `input_ids` `[B, T]`, `attention_mask` `[B, S]`, `position_ids` `[B, T]` and the past to
    logits `[B, T, V]`.

    The past is `past_key_values.0.key` and so on, `[B, G, S - T, K]`, with the names that `optimum`
    uses. With plugged experts it also has `past_gates.N`, the running gate sums `[B, 3, M]` of
    layer N, initially zeros. The outputs `present.0.key` and so on, and `present_gates.N`, are the
    past of the next call.

    Args:
        model: the model, with its armed experts.

    Attributes:
        inputs, outputs: names of the graph's inputs and outputs, in order.
        gated: layer -> number of experts with a gate there.
        dtype: dtype of the model, and of keys and values.

    Raises:
        ConfigError: the model's attention or positions cannot be represented in a graph for any
            length.
    """

    def __init__(self, model: DeepSeekModel) -> None:
        super().__init__()
        reason = unsupported(model.config, RULES)
        if reason is not None:
            raise ConfigError(
                f"A model with {reason} has no exported form that holds for any length; "
                "use `deepseek serve` instead."
            )
        self.model = model
        self.dtype = model.dtype
        self.armed = model.experts.armed()
        if self.armed is not None and self.armed.adapts:
            raise ConfigError(
                f"The adapter {self.armed.strongest_adapter} is armed, and an exported graph has "
                "experts but no adapters; merge it into the base with PEFT, or leave it out."
            )
        roster = self.armed.roster if self.armed else None
        # Registered as submodules, so that the experts' weights become weights of the graph.
        self.modules_armed = nn.ModuleList(roster.modules if roster else ())
        self.gated_layers = (
            {layer: len(owners) for layer, owners in roster.owners.items()} if roster else {}
        )
        parts = [
            f"{layer}.{part}"
            for layer in range(model.config.num_hidden_layers)
            for part in ("key", "value")
        ]
        self.inputs = [
            *TOKEN_INPUTS,
            *(f"past_key_values.{part}" for part in parts),
            *(f"past_gates.{layer_index}" for layer_index in self.gated_layers),
        ]
        self.outputs = [
            "logits",
            *(f"present.{part}" for part in parts),
            *(f"present_gates.{layer_index}" for layer_index in self.gated_layers),
        ]

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor, position_ids: Tensor, past: list[Tensor]
    ) -> list[Tensor]:
        """Run the forward pass on the inputs in the order of `inputs`; return the outputs in the
        order of `outputs`.
        """
        model = self.model
        layers = model.config.num_hidden_layers
        keys = past[0 : 2 * layers : 2]
        values = past[1 : 2 * layers : 2]
        gates = past[2 * layers :]
        cache = KVCache(zip(keys, values, strict=True))
        cache.gate_state = dict(zip(self.gated_layers, gates, strict=True))
        hidden_BTD = model.embed_tokens(input_ids)
        ctx = ForwardContext(
            positions=model.positions.prepare(position_ids, hidden_BTD.dtype),
            position_ids_BT=position_ids,
            past=keys[0].shape[2],
            window=model.config.sliding_window,
            real_BS=attention_mask.bool(),
            cache=cache,
            armed=self.armed,
        )
        logits_BTV = ForwardPass(model, hidden_BTD, ctx).logits()
        present_states: list[Tensor] = []
        for states in cache:
            present_states += states[:2]
        return [
            logits_BTV,
            *present_states,
            *(cache.gate_state[layer] for layer in self.gated_layers),
        ]

    def past(self, batch: int, length: int = 0) -> list[Tensor]:
        """Return a past of `length` tokens, all zeros."""
        config = self.model.config
        shape = (batch, config.num_key_value_heads, length, config.head_dim)
        states = [torch.zeros(shape, dtype=self.dtype) for _ in range(2 * config.num_hidden_layers)]
        return [*states, *(torch.zeros(batch, 3, count) for count in self.gated_layers.values())]

    def example(self, batch: int, length: int, past: int) -> list[Tensor]:
        """Return example inputs of the given sizes, all distinct tensors: the tracer would merge
        inputs that share one.
        """
        new = (
            torch.ones(batch, size, dtype=torch.long) for size in (length, past + length, length)
        )
        return [*new, *self.past(batch, past)]

    def write(self, path: Path) -> None:
        """Write the graph as ONNX, free in batch, length and past; its weights beside it in
        `<path>.data`.
        """
        new_axes = {0: "batch", 1: "length"}
        total_axes = {0: "batch", 1: "total"}
        ids, mask, positions, *past = self.example(2, 3, 5)
        states = [{0: "batch", 2: "past"} if state.dim() == 4 else {0: "batch"} for state in past]
        with torch.no_grad(), warnings.catch_warnings():
            # Silences torch's warnings about equal axes with several names and deprecated calls.
            warnings.simplefilter("ignore")
            torch.onnx.export(
                self.eval(),
                (ids, mask, positions, past),
                path,
                dynamo=True,
                external_data=True,
                verbose=False,
                input_names=self.inputs,
                output_names=self.outputs,
                dynamic_shapes=(new_axes, total_axes, new_axes, states),
                custom_translation_table={torch.ops.aten.sort.stable: _stable_sort},
            )


def _stable_sort(
    values: Any, stable: bool | None = None, dim: int = -1, descending: bool = False
) -> Any:
    """Translate a stable sort along the last axis to ONNX.

    TopK over the whole axis is stable: its specification puts the lower index first among equal
    values.
    """
    from onnxscript import opset18

    assert stable and dim == -1
    return opset18.TopK(values, opset18.Shape(values, start=-1), axis=dim, largest=int(descending))
