"""`deepseek.attach`: give a stock `transformers` causal model `model.experts`."""

import inspect
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import try_to_load_from_cache
from huggingface_hub.errors import HFValidationError
from torch import Tensor
from transformers import Cache, GenerationMixin, PreTrainedModel

from deepseek.errors import ConfigError
from deepseek.model.attached.extend import Extension, extend_class, restore_class
from deepseek.model.attached.hooks import ExpertHooks
from deepseek.model.attached.memory import remembering
from deepseek.model.attached.sites import find_sites
from deepseek.model.experts import ExpertSet
from deepseek.model.prompt_experts import PromptExperts, pin


class AttachedModel(Extension, PreTrainedModel, GenerationMixin):
    """A stock model with experts.

    `attach` makes the class of a loaded model a subclass of this one and of its own, so that the
    model stays an instance of its class, with the same name and state dict. This class is never
    instantiated directly.

    Attributes:
        experts: the expert modules of the model.
        expert_hooks: the hooks by which they take part in a forward pass.
    """

    experts: ExpertSet
    expert_hooks: ExpertHooks

    compute_dtype: torch.dtype | None = None
    """Dtype of mixed precision (see `model/precision.py`); None: the fastest on the device."""

    def _prepare_cache_for_generation(  # type: ignore[override]
        self, generation_config: Any, model_kwargs: dict[str, Any], *args: Any
    ) -> None:
        super()._prepare_cache_for_generation(  # type: ignore[misc]
            generation_config, model_kwargs, *args
        )
        if model_kwargs.get("cache") is None:
            model_kwargs["prompt_experts"] = PromptExperts()

    def prepare_inputs_for_generation(
        self,
        input_ids: Tensor,
        # Hugging Face looks for this name in the signature to allow embeddings as prompts.
        inputs_embeds: Tensor | None = None,
        prompt_experts: PromptExperts | None = None,
        **kwargs: Any,
    ) -> dict[str, Any]:
        prepare = super().prepare_inputs_for_generation
        if inputs_embeds is not None:
            if "inputs_embeds" not in inspect.signature(prepare).parameters:
                raise ConfigError(
                    f"A {type(self).__name__} does not generate from inputs_embeds; pass input_ids."
                )
            kwargs["inputs_embeds"] = inputs_embeds
        cache = kwargs.get("cache")
        pinned = remembering(cache) if isinstance(cache, Cache) else prompt_experts
        if pinned is not None:
            pin(pinned, self.experts, input_ids, inputs_embeds, kwargs.get("attention_mask"))
        prepared: dict[str, Any] = prepare(input_ids, **kwargs)
        if isinstance(pinned, PromptExperts):
            prepared["prompt_experts"] = pinned  # for the hooks, which remove it again
        return prepared

    @torch.no_grad()
    def log_probs(self, input_ids: Tensor) -> Tensor:
        """Return each token's log probability given its prefix, in nats, `[B, T - 1]`.

        The first token has no prefix and therefore no entry.

        Args:
            input_ids: token ids `[B, T]`.
        """
        input_ids = input_ids.long()
        logits = self(input_ids=input_ids, use_cache=False).logits[:, :-1].float()
        targets = input_ids[:, 1:, None]
        return logits.gather(-1, targets).squeeze(-1) - logits.logsumexp(-1)


def attach(model: PreTrainedModel) -> AttachedModel:
    """Give a causal language model of `transformers` a set of experts, `model.experts`.

    Experts run in parallel to the feed-forward modules of its layers, dense or mixtures;
    `model.experts.sites` lists these. With no expert armed, outputs are bit-identical to before,
    and the state dict, `save_pretrained` and PEFT adapters never see the experts.

    Args:
        model: the model, on any device and in any dtype. It is changed in place; an attached model
            is returned unchanged.

    Returns:
        The same model.

    Raises:
        ConfigError: experts cannot attach to the model; the message says why.
    """
    if isinstance(model, AttachedModel):
        return model
    if not isinstance(model, PreTrainedModel) or not model.can_generate():
        raise ConfigError(
            f"Experts attach to a causal language model of transformers, not to a "
            f"{type(model).__name__}; load it with AutoModelForCausalLM."
        )
    if isinstance(getattr(model, "experts", None), ExpertSet):
        raise ConfigError(f"A {type(model).__name__} has experts of its own; use model.experts.")
    sites = find_sites(model)
    experts = ExpertSet(model)
    experts.sites = sites
    experts.base_folder = _folder_of(str(model.config.name_or_path))
    extend_class(model, AttachedModel)
    assert isinstance(model, AttachedModel)
    model.experts = experts
    model.expert_hooks = ExpertHooks(sites, experts)
    model.expert_hooks.install(model)
    return model


def detach(model: PreTrainedModel) -> PreTrainedModel:
    """Remove the experts and all hooks from an attached model, and return the model.

    Raises:
        ConfigError: the model is not attached.
    """
    if not isinstance(model, AttachedModel):
        raise ConfigError(
            f"This {type(model).__name__} has no attached experts; nothing to detach."
        )
    model.expert_hooks.remove()
    del model.experts, model.expert_hooks
    restore_class(model)
    return model


def _folder_of(name: str) -> Path | None:
    """Return the folder that a model was loaded from: a path, or a hub id in the local cache."""
    folder = Path(name)
    if (folder / "config.json").is_file():
        return folder
    try:
        cached = try_to_load_from_cache(name, "config.json")
    except HFValidationError:
        return None
    return Path(cached).parent if isinstance(cached, str) else None
