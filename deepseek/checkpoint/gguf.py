"""Convert a Llama model in a GGUF file to a Hugging Face model folder.

`transformers` reads GGUF as well, but parses the file three times and guesses the tokenizer's split
rule. This single pass takes a quarter of the time, which every first start has to wait for.
"""

from pathlib import Path
from typing import Any

import numpy as np
import torch
from gguf import GGUFReader, TokenType
from gguf.quants import dequantize
from safetensors.torch import save_file
from tokenizers import AddedToken, Tokenizer, decoders, pre_tokenizers
from tokenizers.models import BPE
from torch import Tensor
from transformers import GenerationConfig, LlamaConfig, PreTrainedTokenizerFast

from deepseek.errors import CheckpointError
from deepseek.registry import pick

NAMES = {
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "output": "lm_head",
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}

SPLIT_RULES = {
    "smollm": pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
}


def convert_gguf(source: Path, folder: Path) -> None:
    """Convert a GGUF file to bf16 safetensors, config and tokenizer files.

    The weights are dequantised to bf16, the precision that such models were trained in. Its
    rounding error (2^-9 of a value) is far below the step of a 4-bit code. The output is
    deterministic.

    Args:
        source: the GGUF file.
        folder: existing folder to write to.

    Raises:
        CheckpointError: the architecture is not llama.
        ConfigError: the tokenizer's split rule is unknown.
    """
    reader = GGUFReader(source)
    facts = {name: field.contents() for name, field in reader.fields.items()}
    if facts["general.architecture"] != "llama":
        raise CheckpointError(
            f"{source} holds a {facts['general.architecture']} model; only llama is read from GGUF."
        )
    weights = _weights(reader, facts)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    _config(facts, tied="lm_head.weight" not in weights).save_pretrained(folder)
    tokens = {
        f"{name}_token_id": facts[f"tokenizer.ggml.{name}_token_id"] for name in ("bos", "eos")
    }
    GenerationConfig(**tokens, pad_token_id=tokens["eos_token_id"]).save_pretrained(folder)
    _tokenizer(facts).save_pretrained(folder)


def _weights(reader: GGUFReader, facts: dict[str, Any]) -> dict[str, Tensor]:
    """Return all tensors under their Hugging Face names in bf16."""
    heads = {
        "attn_q": facts["llama.attention.head_count"],
        "attn_k": facts["llama.attention.head_count_kv"],
    }
    weights = {}
    for tensor in reader.tensors:
        *block, part, kind = tensor.name.split(".")  # blk.0.attn_q.weight, output_norm.weight
        value = torch.from_numpy(dequantize(tensor.data, tensor.tensor_type).astype(np.float32))
        if part in heads:
            value = _restore_row_order(value, heads[part])
        layer = f"model.layers.{block[1]}." if block else ""
        weights[f"{layer}{NAMES[part]}.{kind}"] = value.bfloat16().contiguous()
    return weights


def _restore_row_order(rows_KD: Tensor, heads: int) -> Tensor:
    """Return the rows of a query or key projection in Hugging Face's order.

    RoPE in llama.cpp rotates pairs of adjacent rows of a head; Hugging Face pairs the two halves.
    """
    return rows_KD.reshape(heads, -1, 2, rows_KD.shape[1]).transpose(1, 2).reshape(rows_KD.shape)


def _config(facts: dict[str, Any], tied: bool) -> LlamaConfig:
    config = LlamaConfig(
        vocab_size=len(facts["tokenizer.ggml.tokens"]),
        hidden_size=facts["llama.embedding_length"],
        intermediate_size=facts["llama.feed_forward_length"],
        num_hidden_layers=facts["llama.block_count"],
        num_attention_heads=facts["llama.attention.head_count"],
        num_key_value_heads=facts["llama.attention.head_count_kv"],
        max_position_embeddings=facts["llama.context_length"],
        # GGUF stores epsilon in fp32. Its shortest decimal form is the value in the original
        # config.
        rms_norm_eps=float(f"{facts['llama.attention.layer_norm_rms_epsilon']:.6g}"),
        rope_parameters={"rope_type": "default", "rope_theta": facts["llama.rope.freq_base"]},
        tie_word_embeddings=tied,
        bos_token_id=facts["tokenizer.ggml.bos_token_id"],
        eos_token_id=facts["tokenizer.ggml.eos_token_id"],
        pad_token_id=facts["tokenizer.ggml.eos_token_id"],
        dtype="bfloat16",
    )
    config.architectures = ["LlamaForCausalLM"]
    return config


def _tokenizer(facts: dict[str, Any]) -> PreTrainedTokenizerFast:
    """Return the byte-level BPE tokenizer with its special tokens and chat template."""
    tokens = facts["tokenizer.ggml.tokens"]
    kinds = facts["tokenizer.ggml.token_type"]
    merges = [tuple(merge.split(" ")) for merge in facts["tokenizer.ggml.merges"]]
    backend = Tokenizer(BPE({token: index for index, token in enumerate(tokens)}, merges))
    backend.pre_tokenizer = pick(SPLIT_RULES, facts["tokenizer.ggml.pre"], "split rule")
    backend.decoder = decoders.ByteLevel()
    control = [
        token for token, kind in zip(tokens, kinds, strict=True) if kind == TokenType.CONTROL
    ]
    backend.add_special_tokens(
        [AddedToken(token, special=True, normalized=False) for token in control]
    )
    eos = tokens[facts["tokenizer.ggml.eos_token_id"]]
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token=tokens[facts["tokenizer.ggml.bos_token_id"]],
        eos_token=eos,
        pad_token=eos,
        chat_template=facts["tokenizer.chat_template"],
        model_max_length=facts["llama.context_length"],
    )
