"""Start an engine from the name of a model, compiled and ready for requests."""

import logging
from pathlib import Path
from typing import Any

import torch

from deepseek.compiled.runner import CompiledRunner
from deepseek.compiled.support import unsupported_reason
from deepseek.data.text.document import Progress, silent
from deepseek.device.memory import out_of_memory_explained
from deepseek.engine.engine import Engine
from deepseek.engine.load import Packs, load
from deepseek.engine.request import Request
from deepseek.engine.runners import reference_runner
from deepseek.engine.sampler import Sampling
from deepseek.model.attached.model import AttachedModel
from deepseek.model.language_model import LanguageModel
from deepseek.runner import Runner

LIGHTER = "take --dtype bfloat16, a smaller model or --device cpu."
"""What needs less memory, for the message when the device has too little."""

log = logging.getLogger(__name__)


def start_engine(
    name: str | Path = "smollm2-135m",
    *,
    experts: Packs = (),
    int8: bool = True,
    device: str | torch.device = "auto",
    dtype: torch.dtype | str = "auto",
    progress: Progress = silent,
    **dials: Any,
) -> Engine:
    """Load a model, plug experts, and return an engine with the fastest runner that supports it.

    One token is generated before the function returns, so that the first request does not wait for
    compilation.

    Args:
        name: a known base, a local folder or a hub id (see `load`); default "smollm2-135m".
        experts: expert packs to plug, or their weights (see `load`).
        int8: quantise the weights to 8 bits if the compiled runner supports the model, which is
            several times as fast; default True. Other models keep their weights, and so do those
            with an explicit `dtype` and those on a GPU.
        device: where to compute (see `load`).
        dtype: dtype of the weights (see `load`).
        progress: told which step is running: each can take many seconds.
        dials: passed on to `Engine`.

    Returns:
        The running engine.

    Raises:
        HubError, CheckpointError, ConfigError, DeviceError, PackError: see `load`.
    """
    with out_of_memory_explained(LIGHTER):
        progress(0, 0, f"loading {Path(name).name}")
        model, tokenizer = load(name, experts=experts, device=device, dtype=dtype)
        progress(0, 0, "packing the weights")
        runner = quickest_runner(model) if int8 and dtype == "auto" else None
        progress(0, 0, "compiling kernels, which are kept for the next start")
        engine = Engine(model, tokenizer, runner, **dials)
        for _ in engine.submit(Request((0,), Sampling(max_new_tokens=1))):
            pass
    return engine


def quickest_runner(model: LanguageModel) -> Runner:
    """Return the compiled runner with 8-bit weights if it supports `model`, else the reference
    runner.

    The reason why the compiled runner is not used is logged at level INFO.
    """
    if isinstance(model, AttachedModel):
        return reference_runner(model)
    reason = unsupported_reason(model)
    if reason is None:
        return CompiledRunner(model)
    log.info("%s The reference runner computes this model.", reason)
    return reference_runner(model)
