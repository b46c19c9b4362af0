"""A model for other runtimes: ONNX, OpenVINO, TensorRT, or a folder that stock `transformers`
reads.

What was written is read back and run against the model before it gets its name. The packages are
imported at use.
"""

import logging
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from deepseek.checkpoint.store import atomic_folder
from deepseek.engine.load import load
from deepseek.errors import CheckpointError, ConfigError
from deepseek.export.graph import Graph, Step
from deepseek.export.stock import write_stock
from deepseek.model.transformer import DeepSeekModel
from deepseek.registry import package, pick

EXTRA = "'deepseek-dmoe[export]'"
GPU = "cuda"
SIZES = ((1, 1, 0), (1, 1, 512), (16, 512, 4096))
"""Least, usual and largest batch, new tokens and past that a TensorRT engine is built for."""


def export_model(
    base: str | Path,
    out: Path,
    to: str,
    *,
    dtype: str | None = None,
    experts: Iterable[str | Path] = (),
) -> float:
    """Write `base`, with `experts` plugged in, into the new folder `out`; return the `difference`
    that it makes.

    Args:
        to: "onnx", "openvino", "tensorrt" or "hf".
        dtype: of the weights written; None takes the format's first.

    Raises:
        ConfigError: `out` exists, a package or the GPU is missing, or the format cannot hold such a
            model.
        CheckpointError: what was written does not compute what the model does.
    """
    form = pick(FORMATS, to, "format")
    dtype = dtype or next(iter(form.limits))
    limit = pick(form.limits, dtype, f"dtype of {to}")
    if out.exists():
        raise ConfigError(f"{out} exists already; choose another folder or delete it.")
    model, tokenizer = load(base, experts=experts, dtype="float32" if to == "openvino" else dtype)
    with atomic_folder(out) as folder:
        step = form.write(model, folder, dtype)
        found = difference(model.float(), step)
        if not found <= limit:
            raise CheckpointError(
                f"The exported model's logits differ from those of {base} by {found:.1e} of the largest one, more than "
                f"{limit:.0e}; nothing was written. Choose another dtype or format."
            )
        tokenizer.save_pretrained(folder)
    return found


@torch.inference_mode()
def difference(model: DeepSeekModel, step: Step) -> float:
    """Return the largest difference of `step`'s logits from the model's own, relative to the
    largest of those.

    A row alone, then two with padding before one of them; each in two pieces and two single tokens.
    """
    worst = []
    for batch, padding in ((1, 0), (2, 5)):
        ids = torch.randint(
            model.config.vocab_size, (batch, 24), generator=torch.Generator().manual_seed(batch)
        )
        mask = torch.ones_like(ids)
        mask[0, :padding] = 0
        # A graph is given no words to judge: its experts are those armed at export, and their gates
        # decide.
        embedded = model.embed_tokens(ids)
        expected = model(inputs_embeds=embedded, attention_mask=mask, use_cache=False).logits
        positions = (mask.cumsum(1) - 1).clamp(min=0)
        past = None
        found = []
        for start, stop in ((0, 14), (14, 22), (22, 23), (23, 24)):
            logits, past = step(
                (ids[:, start:stop], mask[:, :stop], positions[:, start:stop]), past
            )
            found.append(logits.float().cpu())
        worst.append(
            (torch.cat(found, dim=1) - expected)[mask.bool()].abs().max() / expected.abs().max()
        )
    return float(torch.stack(worst).max())


def write_onnx(model: DeepSeekModel, folder: Path) -> Step:
    """Write `model.onnx` and `model.onnx.data`, which holds the weights."""
    runtime = package("onnxruntime", EXTRA)
    graph = Graph(model)
    package("onnxscript", EXTRA)
    graph.write(folder / "model.onnx")
    session = runtime.InferenceSession(folder / "model.onnx", providers=["CPUExecutionProvider"])
    return _stateless(graph, lambda feeds: session.run(None, feeds))


def write_openvino(model: DeepSeekModel, folder: Path, dtype: str) -> Step:
    """Write `openvino_model.xml` and `.bin`, with weights in `dtype`."""
    openvino = package("openvino", EXTRA)
    graph = Graph(model)
    graph.write(folder / "model.onnx")
    converted = openvino.convert_model(folder / "model.onnx")
    if dtype == "int8":
        nncf = package("nncf", EXTRA)
        nncf.set_log_level(logging.ERROR)
        converted = nncf.compress_weights(converted)
    path = folder / "openvino_model.xml"
    openvino.save_model(converted, path, compress_to_fp16=dtype == "float16")
    for source in folder.glob("model.onnx*"):
        source.unlink()
    # What was written is checked, without the roundings that the processor's plugin adds for speed.
    exact = {"INFERENCE_PRECISION_HINT": "f32", "DYNAMIC_QUANTIZATION_GROUP_SIZE": 0}
    compiled = openvino.Core().compile_model(path, "CPU", exact)
    return _stateless(graph, lambda feeds: list(compiled(feeds).values()))


def write_tensorrt(model: DeepSeekModel, folder: Path) -> Step:
    """Write `model.plan`, an engine for the GPU of this machine, in the types of the model
    itself.
    """
    if GPU == "cuda" and not torch.cuda.is_available():
        raise ConfigError(
            "A TensorRT engine is built on the GPU that will run it; this needs a GPU and tensorrt."
        )
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
        profile.set_shape(name, *(tuple(one.shape) for one in inputs))
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
    """Return the step of a runtime that maps arrays by name to a list of arrays."""

    def step(new: tuple[Tensor, ...], past: Any) -> tuple[Tensor, Any]:
        feeds = dict(zip(graph.inputs, (*new, *(past or graph.past(len(new[0])))), strict=True))
        logits, *present = run({name: tensor.numpy() for name, tensor in feeds.items()})
        return torch.from_numpy(logits), [torch.from_numpy(part) for part in present]

    return step


def _execute(context: Any, graph: Graph, feeds: dict[str, Any]) -> list[Any]:
    """Run a TensorRT engine on the default stream."""
    held = []
    for name, array in feeds.items():
        tensor = torch.from_numpy(array).to(GPU).contiguous()
        context.set_input_shape(name, tuple(tensor.shape))
        held.append(
            tensor if tensor.numel() else torch.empty(1, device=GPU)
        )  # an empty past needs an address too
        context.set_tensor_address(name, held[-1].data_ptr())
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


class Format(NamedTuple):
    """How a format is written.

    Attributes:
        write: writes a model into a folder, with weights in a dtype, and returns how to run what it
            wrote.
        limits: dtype of the weights -> largest `difference` that passes; the first is the default.
    """

    write: Callable[[DeepSeekModel, Path, str], Step]
    limits: dict[str, float]


FORMATS = {
    "onnx": Format(lambda model, folder, _: write_onnx(model, folder), {"float32": 1e-4}),
    "openvino": Format(write_openvino, {"float16": 1e-2, "float32": 1e-4, "int8": 2e-1}),
    "tensorrt": Format(lambda model, folder, _: write_tensorrt(model, folder), {"float16": 2e-2}),
    "hf": Format(
        lambda model, folder, _: write_stock(model, folder),
        {"float32": 1e-5, "bfloat16": 1e-5, "float16": 1e-5},
    ),
}
