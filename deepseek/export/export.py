"""Export a model to another runtime: ONNX, OpenVINO, TensorRT, a folder for stock `transformers`,
or a GGUF file (`export.gguf`).

Every export is loaded again and compared with the model before it gets its final name. Optional
packages are imported when they are used.
"""

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from deepseek.checkpoint.files import new_path
from deepseek.checkpoint.hub import resolve
from deepseek.checkpoint.licence import copy_terms
from deepseek.checkpoint.output import new_folder
from deepseek.data.text.document import Progress, silent
from deepseek.device.choose import DTYPES
from deepseek.engine.load import Packs, load
from deepseek.errors import CheckpointError, ConfigError
from deepseek.export.gguf import export_gguf
from deepseek.export.graph import Graph, Step
from deepseek.export.stock import write_stock
from deepseek.model.language_model import own_model
from deepseek.model.transformer import DeepSeekModel
from deepseek.registry import nearest, package, pick

EXPORT_EXTRA = "'deepseek-dmoe[export]'"
GPU = "cuda"
SIZES = ((1, 1, 0), (1, 1, 512), (16, 512, 4096))
"""Minimum, usual and maximum (batch, new tokens, past length) of a TensorRT engine."""


def export_model(
    base: str | Path,
    out: Path,
    to: str,
    *,
    dtype: str | None = None,
    experts: Packs = (),
    progress: Progress = silent,
) -> float:
    """Export a base model, with plugged experts, to a new folder.

    Args:
        base: a known base, a local folder, a GGUF file or a hub id.
        out: the folder to create; for "gguf" the file.
        to: "onnx", "openvino", "tensorrt", "hf" or "gguf".
        dtype: dtype of the exported weights; None selects the first one of the format in `FORMATS`,
            for "gguf" in `gguf.ENCODINGS`.
        experts: expert packs to plug, as paths or names, or their weights (see `load`); default
            none.
        progress: called with the name of each step.

    Returns:
        The largest `difference` of the exported model's logits.

    Raises:
        ConfigError: `out` exists, appears meanwhile, is being written by another process or cannot
            be written, a package or the GPU is missing, the format cannot represent the model, or
            an expert is plugged and not armed.
        CheckpointError: the exported model's logits differ from the model's by more than the
            format's limit.
    """
    out = new_path(out)
    if to == "gguf":
        progress(0, 0, "writing the file, and comparing it with the original")
        return export_gguf(base, out, dtype, experts)
    if to not in FORMATS:
        raise ConfigError(f"format {to!r} is unknown; {nearest(to, [*FORMATS, 'gguf'])}.")
    target = FORMATS[to]
    dtype = dtype or next(iter(target.limits))
    limit = pick(target.limits, dtype, f"dtype of {to}")
    target.check()
    # The exported graph is checked on the CPU, whose float16 is slow but exact enough for that.
    progress(0, 0, f"loading {base}")
    weights = DTYPES["float32" if to == "openvino" else dtype]
    loaded_model, tokenizer = load(base, experts=experts, device="cpu", dtype=weights)
    model = own_model(loaded_model, "Export")
    for info in model.experts.list():
        if info.kind == "lora":
            raise ConfigError(
                f"{info.name} is an adapter, and an export has experts but no adapters; merge it "
                "into the base with PEFT, or leave it out."
            )
        if not info.armed:
            raise ConfigError(
                f"{info.name} is not known to be better than its base and so not armed; give "
                f"--experts {info.name}=1, or leave it out."
            )
    with new_folder(out) as folder:
        progress(0, 0, f"writing {to}, which can take minutes")
        step = target.write(model, folder, dtype)
        progress(0, 0, "comparing with the original")
        error = difference(model.float(), step)
        if not error <= limit:
            raise CheckpointError(
                f"The exported model's logits differ from those of {base} by {error:.1e} of the "
                f"largest one, more than {limit:.0e}; nothing was written. "
                "Choose another dtype or format."
            )
        tokenizer.save_pretrained(folder)
        copy_terms(resolve(base), folder)
    return error


@torch.inference_mode()
def difference(model: DeepSeekModel, step: Step) -> float:
    """Return the largest absolute difference between the logits of `step` and of the model,
    relative to the largest logit.

    Compares a single row, and two rows of which the first is padded, each in two prefill chunks and
    two decode steps.

    Args:
        model: the model, in fp32.
        step: runs the exported model.
    """
    errors = []
    for batch, padding in ((1, 0), (2, 5)):
        ids = torch.randint(
            model.config.vocab_size, (batch, 24), generator=torch.Generator().manual_seed(batch)
        )
        mask = torch.ones_like(ids)
        mask[0, :padding] = 0
        # Embeddings rather than ids: without ids, the model does not choose experts by the prompt.
        # An exported graph does not either; it has the experts armed at export, and their gates.
        embeddings = model.embed_tokens(ids)
        expected_logits = model(
            inputs_embeds=embeddings, attention_mask=mask, use_cache=False
        ).logits
        positions = (mask.cumsum(1) - 1).clamp(min=0)
        past = None
        chunks = []
        for start, stop in ((0, 14), (14, 22), (22, 23), (23, 24)):
            logits, past = step(
                (ids[:, start:stop], mask[:, :stop], positions[:, start:stop]), past
            )
            chunks.append(logits.float().cpu())
        errors.append(
            (torch.cat(chunks, dim=1) - expected_logits)[mask.bool()].abs().max()
            / expected_logits.abs().max()
        )
    return float(torch.stack(errors).max())


def write_onnx(model: DeepSeekModel, folder: Path) -> Step:
    """Write `model.onnx` and its weights, `model.onnx.data`; return how to run them."""
    runtime = package("onnxruntime", EXPORT_EXTRA)
    graph = Graph(model)
    graph.write(folder / "model.onnx")
    session = runtime.InferenceSession(folder / "model.onnx", providers=["CPUExecutionProvider"])
    return _stateless(graph, lambda feeds: session.run(None, feeds))


def write_openvino(model: DeepSeekModel, folder: Path, dtype: str) -> Step:
    """Write `openvino_model.xml` and `.bin` with weights in `dtype`; return how to run them."""
    openvino = package("openvino", EXPORT_EXTRA)
    graph = Graph(model)
    graph.write(folder / "model.onnx")
    openvino_model = openvino.convert_model(folder / "model.onnx")
    if dtype == "int8":
        nncf = package("nncf", EXPORT_EXTRA)
        nncf.set_log_level(logging.ERROR)
        openvino_model = nncf.compress_weights(openvino_model)
    path = folder / "openvino_model.xml"
    openvino.save_model(openvino_model, path, compress_to_fp16=dtype == "float16")
    for source in folder.glob("model.onnx*"):
        source.unlink()
    # The comparison is of the written weights, so the CPU plugin's own quantisation is turned off.
    exact_options = {"INFERENCE_PRECISION_HINT": "f32", "DYNAMIC_QUANTIZATION_GROUP_SIZE": 0}
    compiled = openvino.Core().compile_model(path, "CPU", exact_options)
    return _stateless(graph, lambda feeds: list(compiled(feeds).values()))


def write_tensorrt(model: DeepSeekModel, folder: Path) -> Step:
    """Write `model.plan`, an engine for this machine's GPU in the model's own dtypes; return how to
    run it.

    Raises:
        CheckpointError: TensorRT cannot read the graph or build the engine.
    """
    trt = package("tensorrt", "tensorrt")
    graph = Graph(model)
    graph.write(folder / "model.onnx")
    logger = trt.Logger(trt.Logger.ERROR)
    builder = trt.Builder(logger)
    network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    parser = trt.OnnxParser(network, logger)
    if not parser.parse_from_file(str(folder / "model.onnx")):
        raise CheckpointError(
            f"TensorRT cannot read the model's graph: {parser.get_error(0)}; use --to onnx."
        )
    config = builder.create_builder_config()
    profile = builder.create_optimization_profile()
    with torch.device("meta"):
        examples = [graph.example(*sizes) for sizes in SIZES]
    for name, *inputs in zip(graph.inputs, *examples, strict=True):
        profile.set_shape(name, *(tuple(example.shape) for example in inputs))
    config.add_optimization_profile(profile)
    plan = builder.build_serialized_network(network, config)
    if plan is None:
        raise CheckpointError(
            "TensorRT cannot build an engine of the model; its log says why. Use --to onnx."
        )
    (folder / "model.plan").write_bytes(plan)
    for source in folder.glob("model.onnx*"):
        source.unlink()
    context = trt.Runtime(logger).deserialize_cuda_engine(plan).create_execution_context()
    return _stateless(graph, lambda feeds: _execute(context, graph, feeds))


def _stateless(graph: Graph, run: Callable[[dict[str, Any]], list[Any]]) -> Step:
    """Return the step of a runtime whose `run` maps named arrays to a list of arrays."""

    def step(new: tuple[Tensor, ...], past: Any) -> tuple[Tensor, Any]:
        feeds = dict(zip(graph.inputs, (*new, *(past or graph.past(len(new[0])))), strict=True))
        logits, *present_states = run({name: tensor.numpy() for name, tensor in feeds.items()})
        return torch.from_numpy(logits), [torch.from_numpy(part) for part in present_states]

    return step


def _execute(context: Any, graph: Graph, feeds: dict[str, Any]) -> list[Any]:
    """Run a TensorRT engine on the default stream."""
    tensors = []
    for name, array in feeds.items():
        tensor = torch.from_numpy(array).to(GPU).contiguous()
        context.set_input_shape(name, tuple(tensor.shape))
        # TensorRT needs a valid address for an empty past, too.
        tensors.append(tensor if tensor.numel() else torch.empty(1, device=GPU))
        context.set_tensor_address(name, tensors[-1].data_ptr())
    outputs = []
    for name in graph.outputs:
        dtype = torch.float32 if "gates" in name else graph.dtype
        outputs.append(torch.empty(tuple(context.get_tensor_shape(name)), dtype=dtype, device=GPU))
        context.set_tensor_address(name, outputs[-1].data_ptr())
    if not context.execute_async_v3(0):
        raise CheckpointError(
            "TensorRT cannot run the engine that it built; its log says why. Use --to onnx."
        )
    return [output.cpu().numpy() for output in outputs]


def check_packages(*names: str) -> None:
    """Raise `ConfigError` unless packages of the extra `export` are installed."""
    for name in names:
        package(name, EXPORT_EXTRA)


def check_tensorrt() -> None:
    """Raise `ConfigError` unless there are a GPU and TensorRT."""
    if GPU == "cuda" and not torch.cuda.is_available():
        raise ConfigError(
            "A TensorRT engine is built on the GPU that will run it; this needs a GPU and tensorrt."
        )
    package("tensorrt", "tensorrt")


class Format(NamedTuple):
    """An export format.

    Attributes:
        check: raises `ConfigError`, before anything is loaded, if this machine cannot write it.
        write: writes a model to a folder, with weights in a dtype, and returns how to run the
            result.
        limits: dtype of the weights -> maximum `difference`; the first dtype is the default.
    """

    check: Callable[[], None]
    write: Callable[[DeepSeekModel, Path, str], Step]
    limits: dict[str, float]


FORMATS = {
    "onnx": Format(
        lambda: check_packages("onnxruntime", "onnxscript"),
        lambda model, folder, _: write_onnx(model, folder),
        {"float32": 1e-4},
    ),
    "openvino": Format(
        lambda: check_packages("onnxscript", "openvino", "nncf"),
        write_openvino,
        {"float16": 1e-2, "float32": 1e-4, "int8": 2e-1},
    ),
    "tensorrt": Format(
        check_tensorrt, lambda model, folder, _: write_tensorrt(model, folder), {"float16": 2e-2}
    ),
    "hf": Format(
        lambda: None,
        lambda model, folder, _: write_stock(model, folder),
        {"float32": 1e-5, "bfloat16": 1e-5, "float16": 1e-5},
    ),
}
