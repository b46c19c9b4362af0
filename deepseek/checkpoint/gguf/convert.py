"""Convert a GGUF file to a Hugging Face folder: config, safetensors, tokenizer, chat template.

The architectures in `config.FAMILIES` are converted tensor by tensor. Memory holds one file of the
result at a time, of `SHARD_BYTES` or one larger tensor, and the tensor that is converted.
`transformers` loads all others whole and saves them again.
"""

from collections.abc import Iterator
from contextlib import redirect_stderr
from io import StringIO
from pathlib import Path
from typing import Any

import gguf
import torch
from gguf import GGMLQuantizationType
from torch import Tensor
from transformers import AutoModelForCausalLM, PretrainedConfig, PreTrainedModel
from transformers.core_model_loading import revert_weight_conversion
from transformers.modeling_gguf_pytorch_utils import (
    GGUF_SUPPORTED_ARCHITECTURES,
    TENSOR_PROCESSORS,
    TensorProcessor,
)
from transformers.utils.quantization_config import GgufConfig

from deepseek.checkpoint.gguf.config import (
    FAMILIES,
    check_layers,
    describes_no_model,
    generation_config,
    model_config,
)
from deepseek.checkpoint.gguf.reader import GgufFile, read_gguf
from deepseek.checkpoint.gguf.tokenizer import gguf_tokenizer
from deepseek.checkpoint.stream import TensorWriter
from deepseek.errors import CheckpointError, shown
from deepseek.registry import nearest, pick

SHARD_BYTES = 2 << 30
"""Maximum bytes of one file of weights, if no single tensor is larger."""

WITHOUT_PARAMETER = {"rope_freqs.weight"}
"""Tensors that become config fields, not parameters."""

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}

UNQUANTISED_DTYPES = {
    GGMLQuantizationType.F16: torch.float16,
    GGMLQuantizationType.BF16: torch.bfloat16,
    GGMLQuantizationType.F32: torch.float32,
}
"""Encodings without quantisation."""


def convert_gguf(source: str | Path, folder: Path, dtype: str | None = None) -> None:
    """Convert a GGUF file; the output is deterministic.

    Args:
        source: the GGUF file.
        folder: existing, empty folder to write to.
        dtype: dtype of the weights, a key of `DTYPES`. None keeps every matrix exactly: the dtype
            of the file's matrices, or fp32 if they are quantised or of several dtypes. Vectors,
            which files hold in fp32, are rounded to it, as `transformers` rounds them.

    Raises:
        ConfigError: the dtype is unknown.
        CheckpointError: the file is damaged, or its architecture, quantisation or tokenizer is not
            known.
    """
    file = read_gguf(source)
    parts = file.facts.get("split.count", 0)
    if not isinstance(parts, int) or parts > 1:
        raise CheckpointError(
            f"{source} is one of {shown(parts)} parts of a model; join them with llama.cpp's "
            "`llama-gguf-split --merge` first."
        )
    if file.architecture not in FAMILIES and file.architecture not in _read_by_transformers():
        raise CheckpointError(
            f"{source} holds a model of the unknown architecture {file.architecture!r}; "
            f"{nearest(file.architecture, {*FAMILIES, *_read_by_transformers()})}."
        )
    check_layers(file)
    tokenizer = gguf_tokenizer(file)
    weights_dtype = pick(DTYPES, dtype, "dtype") if dtype else exact_dtype(file)
    if file.architecture in FAMILIES:
        _write_by_tensor(file, folder, weights_dtype)
    else:
        _write_whole(file, folder, weights_dtype)
    generation_config(file).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def exact_dtype(file: GgufFile) -> torch.dtype:
    """Return the narrowest dtype that represents every weight matrix of the file exactly."""
    kinds = {tensor.kind for tensor in file.tensors.values() if len(tensor.shape) > 1}
    return (
        UNQUANTISED_DTYPES[kinds.pop()]
        if len(kinds) == 1 and kinds <= UNQUANTISED_DTYPES.keys()
        else torch.float32
    )


def _read_by_transformers() -> set[str]:
    from transformers.integrations.gguf.gguf_config_mapping import GGUF_CONFIG_ARCHS

    return {*GGUF_SUPPORTED_ARCHITECTURES, *GGUF_CONFIG_ARCHS} - {"general", "tokenizer"}


def _write_by_tensor(file: GgufFile, folder: Path, dtype: torch.dtype) -> None:
    """Write config and weights, with one file and one tensor in memory at a time."""
    config = model_config(file)
    config.dtype = dtype
    try:
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config, trust_remote_code=False)
    except Exception as error:  # model classes divide by sizes that config classes let through
        raise describes_no_model(file, FAMILIES[file.architecture], error) from None
    config.architectures = [type(model).__name__]
    config.save_pretrained(folder)
    writer = TensorWriter(folder, SHARD_BYTES)
    for name, tensor in _parameters(file, model, dtype):
        writer.add({name: tensor})
    writer.close()


def _parameters(
    file: GgufFile, model: PreTrainedModel, dtype: torch.dtype
) -> Iterator[tuple[str, Tensor]]:
    """Yield name and value of every parameter, under the names that `save_pretrained` writes.

    Raises:
        CheckpointError: the tensors of the file are not those of the model.
    """
    model_state = model.state_dict()
    if model.config.tie_word_embeddings:
        model_state.pop("lm_head.weight", None)
    processor = TENSOR_PROCESSORS.get(file.architecture, TensorProcessor)(
        config=model.config.to_dict()
    )
    names = parameter_names(file.architecture, model_state, model.config, processor)
    # The stacked matrices of a mixture's experts are parameters without the suffix ".weight".
    stems = {name: name if name in names else name.removesuffix(".weight") for name in file.tensors}
    unknown_names = sorted(
        name
        for name, stem in stems.items()
        if not {stem, name} & (names.keys() | WITHOUT_PARAMETER)
    )
    missing_names = sorted(names.keys() - set(stems.values()))
    if unknown_names or missing_names:
        raise _misfit_error(file, missing_names, unknown_names)
    sources: dict[str, list[str]] = {}
    for gguf_name, stem in stems.items():
        if stem in names:
            sources.setdefault(names[stem], []).append(gguf_name)
    for name, gguf_names in sources.items():
        value = _value(file, gguf_names, name, names, processor)
        if value.shape != model_state[name].shape:
            raise CheckpointError(
                f"{file.path} holds {gguf_names[0]!r} as {list(value.shape)}, where its metadata "
                f"asks for {list(model_state[name].shape)}; convert the original model again."
            )
        yield from revert_weight_conversion(model, {name: value.to(dtype)}).items()


def _misfit_error(file: GgufFile, missing: list[str], unknown: list[str]) -> CheckpointError:
    """Return the error for a file without tensors that its metadata call for, or with others.

    Args:
        file: the file.
        missing, unknown: names of these tensors, not both empty.
    """
    problem = f"an unknown tensor {unknown[0]!r}" if unknown else f"no tensor for {missing[0]!r}"
    return CheckpointError(
        f"{file.path} has {problem}, so it does not fit its own metadata ({len(missing)} missing, "
        f"{len(unknown)} unknown); convert the original model to GGUF again."
    )


def parameter_names(
    architecture: str,
    parameters: dict[str, Tensor],
    config: PretrainedConfig,
    processor: TensorProcessor,
) -> dict[str, str]:
    """Return the `transformers` name of each tensor in a GGUF file of this model.

    The names of stacked experts lack the suffix ".weight".

    Args:
        architecture: llama.cpp's name of the architecture.
        parameters: the model's state dict.
        config: config of the model.
        processor: `transformers`' rules for the architecture.
    """
    # Mistral is a llama in llama.cpp.
    keys = {name: key for key, name in gguf.MODEL_ARCH_NAMES.items()} | {
        "mistral": gguf.MODEL_ARCH.LLAMA
    }
    table = gguf.get_tensor_name_map(keys[architecture], config.num_hidden_layers)
    names: dict[str, str] = {}
    for name in parameters:
        stem, dot, kind = processor.preprocess_name(name).rpartition(".")
        if kind not in ("weight", "bias"):
            stem, dot, kind = processor.preprocess_name(name), "", ""
        gguf_stem = table.get_name(stem)
        if gguf_stem is not None:
            names[f"{gguf_stem}{dot}{kind}"] = name
        else:
            processor.perform_fallback_tensor_mapping(names, f"{dot}{kind}", "", name)
    return names


def _value(
    file: GgufFile,
    gguf_names: list[str],
    name: str,
    names: dict[str, str],
    processor: TensorProcessor,
) -> Tensor:
    """Return the parameter `name` in fp32, assembled from its tensors in the file."""
    parsed_parameters: dict[str, Any] = {"tensors": {}}
    for gguf_name in gguf_names:
        values = file.values(gguf_name)
        try:
            result = processor.process(
                values, gguf_name, tensor_key_mapping=names, parsed_parameters=parsed_parameters
            )
        except (IndexError, KeyError, TypeError, ValueError, ZeroDivisionError) as error:
            # The processors reshape by the numbers of heads and experts, and check neither.
            raise CheckpointError(
                f"{file.path} holds {gguf_name!r} as {list(values.shape)}, which its metadata does "
                f"not fit ({error}); convert the original model to GGUF again."
            ) from None
        if result.name is not None:
            parsed_parameters["tensors"][name] = torch.from_numpy(result.weights)
    return parsed_parameters["tensors"][name]


def _write_whole(file: GgufFile, folder: Path, dtype: torch.dtype) -> None:
    """Load the model with `transformers` and save it.

    Raises:
        CheckpointError: it cannot be read, or its tensors are not those of the model, which
            `transformers` would fill with random numbers.
    """
    try:
        with redirect_stderr(StringIO()):  # its progress bars
            model_and_report: Any = AutoModelForCausalLM.from_pretrained(
                file.path.parent,
                gguf_file=file.path.name,
                dtype=dtype,
                quantization_config=GgufConfig(dequantize=True),
                output_loading_info=True,
                local_files_only=True,
                trust_remote_code=False,
            )
    except Exception as error:  # its readers raise errors of many types
        reason = " ".join(str(error).split())
        raise CheckpointError(
            f"transformers cannot read the {file.architecture} model in {file.path} ({reason}); "
            "use the original model's folder or hub id."
        ) from None
    model, report = model_and_report
    missing_names, unknown_names = sorted(report["missing_keys"]), sorted(report["unexpected_keys"])
    if missing_names or unknown_names:
        raise _misfit_error(file, missing_names, unknown_names)
    model.save_pretrained(folder, max_shard_size=SHARD_BYTES)
