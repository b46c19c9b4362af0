"""Expert modules that are plugged into a model at run time. Start with `expert_set.py`."""

from deepseek.model.experts.expert_set import ExpertSet
from deepseek.model.experts.module import ExpertModule
from deepseek.model.experts.state import ExpertInfo

__all__ = ["ExpertInfo", "ExpertModule", "ExpertSet"]
