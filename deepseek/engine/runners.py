"""The runner that computes any model."""

from deepseek.engine.attached_runner import AttachedRunner
from deepseek.engine.torch_runner import TorchRunner
from deepseek.model.attached.model import AttachedModel
from deepseek.model.language_model import LanguageModel
from deepseek.runner import Runner


def reference_runner(model: LanguageModel) -> Runner:
    """Return the runner on PyTorch for a model: one for our own, one for stock models."""
    return AttachedRunner(model) if isinstance(model, AttachedModel) else TorchRunner(model)
