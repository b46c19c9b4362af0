"""Start an engine from the name of a model, compiled and ready for requests."""

import logging
from pathlib import Path
from typing import Any

from deepseek.compiled.runner import CompiledRunner
from deepseek.compiled.support import unsupported_reason
from deepseek.engine.engine import Engine
from deepseek.engine.load import Packs, load
from deepseek.engine.request import Request
from deepseek.engine.runners import reference_runner
from deepseek.engine.sampler import Sampling
from deepseek.model.attached.model import AttachedModel
from deepseek.model.language_model import LanguageModel
from deepseek.runner import Runner

log = logging.getLogger(__name__)


def start_engine(
    name: str | Path = "smollm2-135m", *, experts: Packs = (), int8: bool = True, **dials: Any
) -> Engine:
    """Load a model, plug experts, and return an engine with the fastest runner that supports it.

    One token is generated before the function returns, so that the first request does not wait for
    compilation.

    Args:
        name: a known base, a local folder or a hub id (see `load`); default "smollm2-135m".
        experts: expert packs to plug, or their weights (see `load`).
        int8: quantise the weights to 8 bits if the compiled runner supports the model, which is
            several times as fast; default True. Other models keep their weights.
        dials: passed on to `Engine`.

    Returns:
        The running engine.

    Raises:
        HubError, CheckpointError, ConfigError, PackError: see `load`.
    """
    model, tokenizer = load(name, experts=experts)
    engine = Engine(model, tokenizer, quickest_runner(model) if int8 else None, **dials)
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
