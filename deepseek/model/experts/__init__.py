"""Expert modules plugged into a model at run time. Start with `expert_set.py`."""

from deepseek.model.experts.expert_set import ExpertInfo, ExpertSet
from deepseek.model.experts.module import ExpertModule

__all__ = ["ExpertInfo", "ExpertModule", "ExpertSet"]
