"""Write a stock model as a GGUF file for llama.cpp: config, weights, tokenizer, chat template.

Weights are written tensor by tensor, so that memory is bounded by the largest one. The file is read
back before it gets its name: its config has to be the model's, field by field.
"""

import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import numpy.typing as npt
import torch
from gguf import GGMLQuantizationType, LlamaFileType
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig
from transformers.integrations.ggml import GGUF_CONFIG_MAPPING

from deepseek.checkpoint.convert import OWN_TYPE, is_computed, read_tensors
from deepseek.checkpoint.files import new_path
from deepseek.checkpoint.gguf.config import (
    FAMILIES,
    LLAMA3_LIMITS,
    MORE_FIELDS,
    llama3_factors,
    model_config,
)
from deepseek.checkpoint.gguf.convert import convert_gguf
from deepseek.checkpoint.gguf.reader import read_gguf
from deepseek.checkpoint.hub import resolve
from deepseek.checkpoint.licence import read_licence
from deepseek.checkpoint.models import model_name
from deepseek.checkpoint.output import new_file, scratch_folder
from deepseek.checkpoint.store import read_object
from deepseek.errors import CheckpointError, ConfigError
from deepseek.export.gguf_tokenizer import check_tokenizer, stop_ids, tokenizer_facts
from deepseek.registry import nearest, pick
from deepseek.text.tokenizer import load_tokenizer

ARCHITECTURES = {
    "llama": "llama",
    "mistral": "llama",
    "qwen2": "qwen2",
    "qwen3": "qwen3",
    "qwen3_moe": "qwen3moe",
    "gemma2": "gemma2",
    "gemma3_text": "gemma3",
}
"""`model_type` of a config -> llama.cpp's architecture."""

ENCODINGS = {
    "float16": (GGMLQuantizationType.F16, LlamaFileType.MOSTLY_F16, 1e-2),
    "bfloat16": (GGMLQuantizationType.BF16, LlamaFileType.MOSTLY_BF16, 5e-2),
    "float32": (GGMLQuantizationType.F32, LlamaFileType.ALL_F32, 1e-5),
    "q8_0": (GGMLQuantizationType.Q8_0, LlamaFileType.MOSTLY_Q8_0, 1e-1),
    "q5_1": (GGMLQuantizationType.Q5_1, LlamaFileType.MOSTLY_Q5_1, 5e-1),
    "q5_0": (GGMLQuantizationType.Q5_0, LlamaFileType.MOSTLY_Q5_0, 5e-1),
    "q4_1": (GGMLQuantizationType.Q4_1, LlamaFileType.MOSTLY_Q4_1, 1.0),
    "q4_0": (GGMLQuantizationType.Q4_0, LlamaFileType.MOSTLY_Q4_0, 1.0),
}
"""Dtype -> encoding of the matrices, the file's type, and the largest difference of the logits,
relative to the largest logit. The first one is the default.
"""

UNREAD = {
    "_name_or_path",
    "_sliding_window_pattern",
    "architectures",
    "attention_dropout",
    "bos_token_id",
    "dtype",
    "eos_token_id",
    "initializer_range",
    "max_window_layers",
    "model_type",
    "output_router_logits",
    "pad_token_id",
    "pretraining_tp",
    "router_aux_loss_coef",
    "transformers_version",
    "use_cache",
    "use_sliding_window",
}
"""Config fields that no forward pass reads, or that llama.cpp reads from the tokenizer."""

_ONE_EXPERT = re.compile(r"^(.*\.mlp\.experts)\.(\d+)\.((?:gate|up|down)_proj)\.weight$")

Floats = npt.NDArray[np.float32]


def export_gguf(
    base: str | Path, out: Path, dtype: str | None = None, experts: Iterable[str | Path] = ()
) -> float:
    """Write a model as a GGUF file.

    Args:
        base: a known base, a local folder, a GGUF file or a hub id.
        out: the file to create, ending in ".gguf".
        dtype: a key of `ENCODINGS`; None: float16.
        experts: must be empty, because llama.cpp has no plugged experts.

    Returns:
        The largest difference between the logits of the file and of the model, relative to the
        largest logit.

    Raises:
        ConfigError: `out` exists, appears meanwhile, is being written by another process or is no
            GGUF name, or the format cannot represent the model or its tokenizer.
        CheckpointError: the written file computes something else.
    """
    dtype = dtype or next(iter(ENCODINGS))
    encoding, file_type, limit = pick(ENCODINGS, dtype, "dtype of gguf")
    if out.suffix != ".gguf":
        raise ConfigError(f"{out} is no name of a GGUF file; end it in .gguf.")
    out = new_path(out)
    if list(experts):
        raise ConfigError(
            "llama.cpp has no plugged experts; export the base alone, or use --to onnx."
        )
    original = resolve(base)
    _check_type(original)
    with new_file(out) as temporary, scratch_folder(out) as scratch:
        folder = _stock_folder(original, scratch)
        config = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
        _write(folder, config, temporary, encoding, file_type, original)
        _check_config(config, temporary)
        check_tokenizer(load_tokenizer(folder), temporary)
        error = _difference(folder, temporary, scratch / "read")
        if not error <= limit:
            raise CheckpointError(
                f"The exported model's logits differ from those of {base} by {error:.1e} of the "
                f"largest one, more than {limit:.0e}; nothing was written. Choose another --dtype."
            )
    return error


def _check_type(folder: Path) -> None:
    """Raise `ConfigError` unless a model is of a type that can be written, before `transformers`
    reads its config: it offers to run the code of a type that it does not know.
    """
    model_type = str(read_object(folder / "config.json").get("model_type"))
    if model_type not in (*ARCHITECTURES, OWN_TYPE):
        raise ConfigError(
            f"Models of type {model_type!r:.60} are not written as GGUF; "
            f"{nearest(model_type, ARCHITECTURES)}."
        )


def _stock_folder(folder: Path, scratch: Path) -> Path:
    """Return `folder`, or a stock architecture's folder with the same model if it is of ours."""
    from deepseek.export.stock import write_stock
    from deepseek.model.transformer import DeepSeekModel

    if read_object(folder / "config.json")["model_type"] != OWN_TYPE:
        return folder
    stock = scratch / "stock"
    stock.mkdir()
    write_stock(DeepSeekModel.from_pretrained(folder, dtype="float32"), stock)
    load_tokenizer(folder).save_pretrained(stock)
    return stock


def _write(
    folder: Path,
    config: PretrainedConfig,
    path: Path,
    encoding: GGMLQuantizationType,
    file_type: LlamaFileType,
    original: Path,
) -> None:
    """Write metadata and tensors; name and licence are those of the `original` folder."""
    architecture = ARCHITECTURES[config.model_type]
    writer = gguf.GGUFWriter(path, architecture)
    licence = read_licence(original)
    facts = {
        "general.type": "model",
        "general.name": model_name(original),
        "general.file_type": int(file_type),
        "general.quantization_version": gguf.GGML_QUANT_VERSION,
        **({"general.license": licence.name} if licence.name else {}),
        **({"general.license.link": licence.link} if licence.link else {}),
        **_model_facts(config, architecture),
        **tokenizer_facts(load_tokenizer(folder), config.vocab_size, stop_ids(folder)),
    }
    for key, value in facts.items():
        _add(writer, key, value)
    tensors = dict(read_tensors(folder))
    sources = _sources(tensors, config, architecture)
    for name, parts in sources.items():
        shape = (
            (len(parts), *tensors[parts[0]].shape) if len(parts) > 1 else tensors[parts[0]].shape
        )
        kind = _encoding(name, shape, encoding)
        block, block_bytes = gguf.GGML_QUANT_SIZES[kind]
        row_bytes = shape[-1] // block * block_bytes
        byte_shape = (*shape[:-1], row_bytes)
        num_bytes = int(np.prod(byte_shape))
        writer.add_tensor_info(name, byte_shape, np.dtype(np.uint8), num_bytes, kind)
    factor_tensors = _frequency_factors(config)
    for name, values in factor_tensors.items():
        writer.add_tensor_info(name, values.shape, values.dtype, values.nbytes)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for name, parts in sources.items():
        values = np.stack([_in_their_order(part, tensors[part], config) for part in parts])
        values = values if len(parts) > 1 else values[0]
        kind = _encoding(name, values.shape, encoding)
        writer.write_tensor_data(gguf.quants.quantize(values, kind).view(np.uint8))
    for values in factor_tensors.values():
        writer.write_tensor_data(values)
    writer.close()


def _encoding(
    name: str, shape: tuple[int, ...], encoding: GGMLQuantizationType
) -> GGMLQuantizationType:
    """Return the encoding of a tensor: llama.cpp wants vectors and routers in fp32, and a row that
    is no whole number of blocks cannot be quantised.
    """
    if len(shape) == 1 or "ffn_gate_inp" in name:
        return GGMLQuantizationType.F32
    return (
        encoding
        if shape[-1] % gguf.GGML_QUANT_SIZES[encoding][0] == 0
        else GGMLQuantizationType.F16
    )


def _sources(
    tensors: Mapping[str, Tensor], config: PretrainedConfig, architecture: str
) -> dict[str, list[str]]:
    """Return the parameters of each GGUF tensor: one, or the matrices of a layer's experts."""
    keys = {name: key for key, name in gguf.MODEL_ARCH_NAMES.items()}
    table = gguf.get_tensor_name_map(keys[architecture], config.num_hidden_layers)
    experts: dict[tuple[str, int], str] = {}
    sources: dict[str, list[str]] = {}
    for name in sorted(tensors):
        if is_computed(name) or (name == "lm_head.weight" and config.tie_word_embeddings):
            continue
        match = _ONE_EXPERT.match(name)
        stem = (
            f"{match[1]}.{match[3]}"
            if match
            else name.removesuffix(".weight").removesuffix(".bias")
        )
        gguf_stem = table.get_name(stem)
        if gguf_stem is None:
            raise ConfigError(
                f"llama.cpp's {architecture} has no tensor for {name}; the model cannot be written "
                "as GGUF."
            )
        if match:
            experts[f"{gguf_stem}.weight", int(match[2])] = name
        else:
            sources[f"{gguf_stem}.{name.rpartition('.')[2]}"] = [name]
    for (gguf_name, _), name in sorted(experts.items()):
        sources.setdefault(gguf_name, []).append(name)
    return sources


def _in_their_order(name: str, tensor: Tensor, config: PretrainedConfig) -> Floats:
    """Return a parameter in fp32 and in llama.cpp's conventions."""
    values: Floats = tensor.float().numpy()
    heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
    architecture = ARCHITECTURES[config.model_type]
    module = name.split(".")[-2]
    if architecture == "llama" and module in heads:
        # RoPE in llama.cpp rotates pairs of adjacent rows of a head; here it pairs the two halves.
        value_pairs = values.reshape(heads[module], 2, -1, *values.shape[1:]).swapaxes(1, 2)
        return value_pairs.reshape(values.shape)
    if architecture.startswith("gemma") and module.endswith("norm"):
        return values + 1
    return values


def _model_facts(config: PretrainedConfig, architecture: str) -> dict[str, Any]:
    """Return the metadata of a config."""
    family = FAMILIES[architecture]
    table: dict[str, str | None] = GGUF_CONFIG_MAPPING[family] | MORE_FIELDS  # type: ignore[operator]
    facts = {
        f"{architecture}.{key}": value
        for key, field in table.items()
        if field is not None and (value := getattr(config, field, None)) is not None
    }
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    for key in ("attention.key_length", "attention.value_length", "rope.dimension_count"):
        facts[f"{architecture}.{key}"] = head_dim
    rope = config.rope_parameters
    if "full_attention" in rope:
        facts[f"{architecture}.rope.freq_base_swa"] = float(rope["sliding_attention"]["rope_theta"])
        rope = rope["full_attention"]
    facts[f"{architecture}.rope.freq_base"] = float(rope["rope_theta"])
    if rope["rope_type"] in ("linear", "yarn"):
        facts[f"{architecture}.rope.scaling.type"] = rope["rope_type"]
        facts[f"{architecture}.rope.scaling.factor"] = float(rope["factor"])
    if rope["rope_type"] == "yarn":
        length = rope["original_max_position_embeddings"]
        facts[f"{architecture}.rope.scaling.original_context_length"] = length
    return facts


def _frequency_factors(config: PretrainedConfig) -> dict[str, Floats]:
    """Return the tensor of Llama 3's frequency factors, {} for other models."""
    rope = config.rope_parameters
    if rope.get("rope_type") != "llama3":
        return {}
    for key, value in LLAMA3_LIMITS.items():
        if rope[key] != value:
            raise ConfigError(
                f"A GGUF file cannot say rope_parameters[{key!r}]={rope[key]}, only Llama 3's "
                f"{value}; keep the model's own folder."
            )
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    factors = llama3_factors(rope, rope["rope_theta"], head_dim // 2)
    return {"rope_freqs.weight": factors.astype(np.float32)}


def _add(writer: gguf.GGUFWriter, key: str, value: Any) -> None:
    """Add one entry of metadata by the type of its value."""
    if isinstance(value, bool):
        writer.add_bool(key, value)
    elif isinstance(value, int):
        writer.add_uint32(key, value)
    elif isinstance(value, float):
        writer.add_float32(key, value)
    elif isinstance(value, str):
        writer.add_string(key, value)
    else:
        writer.add_array(key, value)


def _check_config(config: PretrainedConfig, path: Path) -> None:
    """Raise `ConfigError` unless the config in a GGUF file is the model's in all fields that a
    forward pass reads, so that nothing is left out in silence.
    """
    model_fields = config.to_dict()
    file_fields = model_config(read_gguf(path)).to_dict()
    head_dim = config.hidden_size // config.num_attention_heads
    model_fields["head_dim"] = model_fields.get("head_dim") or head_dim
    file_fields["head_dim"] = file_fields.get("head_dim") or head_dim
    if not model_fields.get("use_sliding_window", True):
        model_fields["sliding_window"] = None
    differences = sorted(
        name
        for name in (model_fields.keys() | file_fields.keys()) - UNREAD
        if not _match(model_fields.get(name), file_fields.get(name))
    )
    if differences:
        reason = ", ".join(f"{name}={model_fields.get(name)!r}" for name in differences)
        raise ConfigError(
            f"A GGUF file cannot say {reason}; llama.cpp would compute another model."
        )


def _match(first: Any, second: Any) -> bool:
    """Return whether two config values are equal: floats to the precision of fp32; absent and false
    values count as equal.
    """
    if isinstance(first, dict) and isinstance(second, dict):
        return all(_match(first.get(key), second.get(key)) for key in first.keys() | second.keys())
    if isinstance(first, float) or isinstance(second, float):
        return bool(np.isclose(first or 0.0, second or 0.0, rtol=1e-5, atol=0))
    return (first or None) == (second or None)


@torch.inference_mode()
def _difference(folder: Path, path: Path, scratch: Path) -> float:
    """Return the largest difference between the logits of a folder and of a GGUF file, relative to
    the largest logit.
    """
    scratch.mkdir()
    convert_gguf(path, scratch, "float32")
    logits = []
    for source in (folder, scratch):
        model = AutoModelForCausalLM.from_pretrained(
            source, dtype=torch.float32, local_files_only=True, trust_remote_code=False
        )
        generator = torch.Generator().manual_seed(0)
        ids = torch.randint(model.config.vocab_size, (2, 64), generator=generator)
        logits.append(model(ids).logits)
    return float((logits[0] - logits[1]).abs().max() / logits[0].abs().max())
