"""Language models with hot-pluggable expert modules.

Each expert is trained on its own beside a frozen base model, plugged into a live model, and
removed without a trace when it is unplugged. From a model's name to an answer:

    import deepseek
    # The base stays frozen while the expert trains.
    pack = deepseek.train_expert("smollm2-135m", name="repository", from_git="path/to/repository")
    model, tokenizer = deepseek.load("smollm2-135m")
    model.experts.plug(pack)      # verifies base, tokenizer, digests and licence first
    model.experts.arm("auto")     # a prompt uses only the experts whose domain it is about
    prompt = tokenizer("def main():", return_tensors="pt")
    answer = model.generate(**prompt, max_new_tokens=64)
    model.experts.unplug(model.experts.list()[0].name)  # bit-identical to the base again

Public names are imported at first use, so `import deepseek` is instant. Hugging Face's Auto classes
know our models once `from deepseek import DeepSeekModel` has been run.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from deepseek.engine.adapters import import_adapter as import_adapter
    from deepseek.engine.load import load as load
    from deepseek.model.attached.model import attach as attach
    from deepseek.model.attached.model import detach as detach
    from deepseek.model.attention.sparse import sparse_attention as sparse_attention
    from deepseek.model.config import ModelConfig as ModelConfig
    from deepseek.model.moe.router import DynamicRouter as DynamicRouter
    from deepseek.model.positions.learned import (
        DynamicPositionalEncoding as DynamicPositionalEncoding,
    )
    from deepseek.model.transformer import DeepSeekModel as DeepSeekModel
    from deepseek.planning import plan as plan
    from deepseek.server.run import serve as serve
    from deepseek.train.jobs.adapt import adapt as adapt
    from deepseek.train.jobs.align import align as align
    from deepseek.train.jobs.distill_hash import distill_hash as distill_hash
    from deepseek.train.jobs.expert import train_expert as train_expert
    from deepseek.train.jobs.pretrain import pretrain as pretrain
    from deepseek.train.rl.update import rlpo_update as rlpo_update

_HOMES = {
    "DeepSeekModel": "deepseek.model.transformer",
    "DynamicPositionalEncoding": "deepseek.model.positions.learned",
    "DynamicRouter": "deepseek.model.moe.router",
    "ModelConfig": "deepseek.model.config",
    "adapt": "deepseek.train.jobs.adapt",
    "align": "deepseek.train.jobs.align",
    "attach": "deepseek.model.attached.model",
    "detach": "deepseek.model.attached.model",
    "distill_hash": "deepseek.train.jobs.distill_hash",
    "import_adapter": "deepseek.engine.adapters",
    "load": "deepseek.engine.load",
    "plan": "deepseek.planning",
    "pretrain": "deepseek.train.jobs.pretrain",
    "rlpo_update": "deepseek.train.rl.update",
    "serve": "deepseek.server.run",
    "sparse_attention": "deepseek.model.attention.sparse",
    "train_expert": "deepseek.train.jobs.expert",
}

_MODULES = ("errors", "planning")
"""Modules with public names of their own."""

__all__ = ["__version__", *_HOMES]  # noqa: PLE0604


def __getattr__(name: str) -> Any:
    """Import a public name from its module at first use (PEP 562)."""
    if name in _MODULES:
        return import_module(f"deepseek.{name}")
    if name not in _HOMES:
        raise AttributeError(f"module 'deepseek' has no attribute {name!r}")
    value = globals()[name] = getattr(import_module(_HOMES[name]), name)
    return value


def __dir__() -> list[str]:
    return sorted([*__all__, *_MODULES])
