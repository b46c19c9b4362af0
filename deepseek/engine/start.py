"""Start an engine from the name of a model, compiled and ready for requests."""

import logging
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from deepseek.checkpoint.convert import convert_config
from deepseek.checkpoint.hub import resolve
from deepseek.checkpoint.store import read_object
from deepseek.compiled.runner import CompiledRunner
from deepseek.compiled.support import unsupported_config_reason, unsupported_reason
from deepseek.data.text.document import Progress, silent
from deepseek.device.choose import choose_device, choose_dtype
from deepseek.device.memory import out_of_memory_explained
from deepseek.engine.engine import Engine
from deepseek.engine.load import Packs, load
from deepseek.engine.memory import memory_need
from deepseek.engine.request import Request
from deepseek.engine.runners import reference_runner
from deepseek.engine.sampler import Sampling
from deepseek.engine.scheduler import CACHE_BYTES
from deepseek.model.attached.model import AttachedModel
from deepseek.model.config import ModelConfig
from deepseek.model.language_model import LanguageModel, is_own
from deepseek.runner import Runner

LIGHTER = "take --dtype bfloat16, a smaller model or --device cpu."
"""Advice for the message when the device has too little memory."""

log = logging.getLogger(__name__)


def start_engine(
    name: str | Path = "smollm2-135m",
    *,
    experts: Packs = (),
    int8: bool = True,
    device: str | torch.device = "auto",
    dtype: torch.dtype | str = "auto",
    expert_bytes: int | None = None,
    progress: Progress = silent,
    report: Callable[[str], None] = log.info,
    **dials: Any,
) -> Engine:
    """Load a model, plug experts, and return an engine with the fastest runner that supports it.

    One token is generated before the function returns, so that the first request does not wait for
    compilation.

    Args:
        name: a known base, a local folder or a hub id (see `load`); default "smollm2-135m".
        experts: expert packs to plug, or their weights (see `load`).
        int8: quantise the weights to 8 bits if the compiled runner supports the model, which is
            several times as fast; default True. Weights that `deepseek quantize` has quantised stay
            as they are. Other models keep their weights, and so do those with an explicit `dtype`
            and those on a GPU.
        device: where to compute (see `load`).
        dtype: dtype of the weights (see `load`).
        expert_bytes: budget in bytes for the weights of experts in the runner's form (see `load`).
        progress: called with the name of each step, because each can take many seconds.
        report: called with one sentence on the memory that the model needs, before it is loaded;
            default: it is logged at level INFO.
        dials: passed on to `Engine`.

    Returns:
        The running engine.

    Raises:
        HubError, CheckpointError, ConfigError, PackError: see `load`.
        DeviceError: there is no such device, or it has too little memory.
    """
    place = choose_device(device)
    folder = resolve(str(name))
    packed = int8 and dtype == "auto" and place.type == "cpu" and _is_compiled(folder)
    if place.type == "cpu":
        cache_bytes = dials.get("cache_bytes", CACHE_BYTES)
        need = memory_need(folder, choose_dtype(dtype, place), cache_bytes, packed)
        need = replace(need, experts=expert_bytes or 0)
        need.check(str(name))
        report(f"{name} needs {need}.")
    with out_of_memory_explained(LIGHTER):
        progress(0, 0, f"loading {Path(name).name}")
        model, tokenizer = load(
            name,
            experts=experts,
            device=place,
            dtype=dtype,
            stored=packed,
            expert_bytes=expert_bytes,
        )
        runner = None
        if int8 and dtype == "auto":
            runner = quickest_runner(model, progress)
        engine = Engine(model, tokenizer, runner, **dials)
        for _ in engine.submit(Request((0,), Sampling(max_new_tokens=1))):
            pass
    return engine


def _is_compiled(folder: Path) -> bool:
    """Return whether the compiled runner supports the model in a folder."""
    raw = read_object(folder / "config.json")
    return is_own(raw) and unsupported_config_reason(ModelConfig(**convert_config(raw))) is None


def quickest_runner(model: LanguageModel, progress: Progress = silent) -> Runner:
    """Return the compiled runner with 8-bit weights if it supports `model`, else the reference
    runner.

    The reason why the compiled runner is not used is logged at level INFO.

    Args:
        model: the model.
        progress: called with the name of each slow step of the compiled runner, of which the
            last, the compilation, begins at its first pass; default: not called.
    """
    if isinstance(model, AttachedModel):
        return reference_runner(model)
    reason = unsupported_reason(model)
    if reason is None:
        progress(0, 0, "packing the weights")
        runner = CompiledRunner(model)
        progress(0, 0, "compiling kernels, which are kept for the next start")
        return runner
    log.info("%s The reference runner computes this model.", reason)
    return reference_runner(model)
