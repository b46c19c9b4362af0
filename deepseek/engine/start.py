"""From the name of a model to an engine that answers at once."""

import logging
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from deepseek.compiled.runner import CompiledRunner
from deepseek.compiled.support import unsupported_reason
from deepseek.engine.engine import Engine
from deepseek.engine.load import load
from deepseek.engine.request import Request
from deepseek.engine.sampler import Sampling
from deepseek.engine.torch_runner import TorchRunner
from deepseek.model.transformer import DeepSeekModel
from deepseek.runner import Runner

log = logging.getLogger(__name__)


def start_engine(
    name: str | Path = "smollm2-135m",
    *,
    experts: Iterable[str | Path] = (),
    int8: bool = True,
    **dials: Any,
) -> Engine:
    """Load a model, plug experts, and return an engine over the quickest runner that computes it.

    What is compiled at the first step is compiled here, before anybody waits for an answer.

    Args:
        name, experts: see `load`.
        int8: quantise weights to 8 bits where the compiled runner computes the model, which is
            several times as fast; otherwise, and for other models, the weights stay as they are.
        dials: see `Engine`.

    Raises what `load` raises.
    """
    model, tokenizer = load(name, experts=experts)
    engine = Engine(model, tokenizer, quickest_runner(model) if int8 else None, **dials)
    for _ in engine.submit(Request((0,), Sampling(max_new_tokens=1))):
        pass
    return engine


def quickest_runner(model: DeepSeekModel) -> Runner:
    """Return the compiled runner, with 8-bit weights, where it computes `model`, else the one for
    every model.

    Why it is not the compiled one is logged at level INFO.
    """
    reason = unsupported_reason(model)
    if reason is None:
        return CompiledRunner(model)
    log.info("%s The reference runner computes this model.", reason)
    return TorchRunner(model)
