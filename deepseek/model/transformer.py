"""The model from input to logits: embeddings, transformer blocks, final norm, LM head.

Read this file first.
"""

from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from transformers import AutoConfig, AutoModelForCausalLM, GenerationMixin, PreTrainedModel

from deepseek import checks
from deepseek.errors import ConfigError
from deepseek.model.attention.capped import soft_cap
from deepseek.model.block import Block
from deepseek.model.config import ModelConfig
from deepseek.model.contradictions import refuse_contradictions
from deepseek.model.embedding import ScaledEmbedding
from deepseek.model.experts import ExpertSet
from deepseek.model.init import init_module
from deepseek.model.inputs import check_labels
from deepseek.model.kv_cache import KVCache
from deepseek.model.moe.experts import Experts
from deepseek.model.moe.layer import MoELayer
from deepseek.model.norm import RMSNorm
from deepseek.model.output import ModelOutput
from deepseek.model.passes import begin
from deepseek.model.positions import POSITIONS
from deepseek.model.pretrained import load_pretrained
from deepseek.model.prompt_experts import PromptExperts, pin
from deepseek.model.stored import stored_matrices
from deepseek.model.unread_arguments import refuse_cache_kind, refuse_unread
from deepseek.registry import pick


class DeepSeekModel(PreTrainedModel, GenerationMixin):
    """A causal language model, dense or mixture of experts, with pluggable expert modules.

    >>> model = DeepSeekModel(ModelConfig.preset("deepseek-nano"))  # random weights
    >>> model = DeepSeekModel.from_pretrained("smollm2-135m")  # a name, a folder or a hub id
    >>> model.experts.plug("code.safetensors")
    """

    config_class = ModelConfig
    supports_gradient_checkpointing = True
    _no_split_modules = {"Block"}  # noqa: RUF012 - Hugging Face declares it an instance variable
    _tied_weights_keys = {"lm_head.weight": "embed_tokens.weight"}  # noqa: RUF012
    _supports_sdpa = True

    config: ModelConfig

    compute_dtype: torch.dtype | None = None
    """Dtype of mixed precision (see `model/precision.py`); None: the fastest on the device."""

    def __init__(self, config: ModelConfig) -> None:
        refuse_contradictions(config)  # fields may have been assigned since it was constructed
        super().__init__(config)
        embedding = ScaledEmbedding if config.scale_embeddings else nn.Embedding
        self.embed_tokens: nn.Module = embedding(config.vocab_size, config.hidden_size)
        self.expert_pools = nn.ModuleList(build_pools(config))
        self.layers = nn.ModuleList(
            Block(config, i, self._pool_of(i)) for i in range(config.num_hidden_layers)
        )
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps, config.unit_offset_norms)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.positions = pick(
            POSITIONS, config.positional_encoding, "positional_encoding"
        ).positions(config)
        self.experts = ExpertSet(self)
        self.post_init()

    @classmethod
    def from_pretrained(  # type: ignore[override]
        cls,
        pretrained_model_name_or_path: Any,
        *model_args: Any,
        config: ModelConfig | None = None,
        **kwargs: Any,
    ) -> Self:
        """Load a base model of our own format or of a supported Hugging Face family.

        A dense checkpoint loaded with a `config` that asks for routed experts is upcycled. The
        upcycled model starts with the logits of the dense one.

        Args:
            pretrained_model_name_or_path: model name, folder or hub id.
            *model_args: ignored; part of Hugging Face's signature.
            config: overrides of the checkpoint's config. Fields that it does not set come from the
                checkpoint. Default: None, use the checkpoint's config as it is.
            **kwargs: `dtype` (default "auto", the fastest dtype on the device: bf16 if the
                processor has bf16 units, else fp32; not the checkpoint's dtype, which "auto" means
                in Transformers), `device_map` (a single device or "auto", default CPU),
                `upcycle_seed` (default 0), and of Hugging Face's hub arguments `revision`, `token`,
                `cache_dir`, `local_files_only` and `force_download`.

        Returns:
            The model in eval mode.

        Raises:
            HubError: the model does not exist or cannot be fetched.
            CheckpointError: the folder is damaged or of an unsupported family.
            ConfigError: `config` contradicts the checkpoint, or an argument is unknown.
            DeviceError: there is no such device, or it does not support the dtype.
        """
        return load_pretrained(cls, pretrained_model_name_or_path, config, **kwargs)

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        cache: KVCache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        past_key_values: KVCache | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        prompt_experts: PromptExperts | None = None,
        num_items_in_batch: Tensor | int | None = None,
        **kwargs: Any,
    ) -> ModelOutput | tuple[Any, ...]:
        """Run one forward pass and return next-token logits `[B, T, V]`.

        Args:
            input_ids: token ids `[B, T]`. Pass either these or `inputs_embeds`.
            attention_mask: 1 for real tokens and 0 for padding, `[B, S]` over past and new tokens;
                None: no padding.
            position_ids: positions `[B, T]`. A position that is not the one before plus 1 starts a
                new document, whose tokens do not attend to the previous one (see
                `context.document_ids`). None: counted over real tokens.
            cache: keys and values of past tokens; new ones are appended. A cache with several
                documents per row cannot be continued.
            inputs_embeds: embeddings `[B, T, D]` in place of `input_ids`.
            labels: target ids `[B, T]`, shifted internally as Hugging Face does; -100 is ignored.
            use_cache: whether to create a cache if none is passed; None: `config.use_cache`. A
                model in training mode never creates one.
            logits_to_keep: compute logits for the last n tokens only, or for the indices in a
                tensor; 0: all tokens.
            past_key_values: older name of `cache`.
            output_hidden_states: whether to return the residual stream before each layer and the
                final hidden states.
            return_dict: False returns a tuple.
            prompt_experts: the experts that `generate` has chosen by the prompt; None: those of the
                cache, or else those that are armed now.
            num_items_in_batch: divisor of the summed loss: the number of labels in all
                micro-batches of an optimizer step, as Hugging Face's `Trainer` passes it; None: the
                number of labels in this batch.
            **kwargs: what callers pass to models of any family, if it changes nothing here (see
                `model/unread_arguments.py`).

        Returns:
            `ModelOutput`; `loss` is set if `labels` are passed, in nats.

        Raises:
            ConfigError: both or neither of ids and embeddings, an unknown argument or one of a
                wrong shape, dtype or range, armed experts with a cache that is not a `KVCache`, or
                several documents in a row with past tokens.
        """
        refuse_unread(kwargs, DeepSeekModel.forward, position_ids)
        cache = cache if cache is not None else past_key_values
        if (
            cache is None
            and (self.config.use_cache if use_cache is None else use_cache)
            and not self.training
        ):
            cache = KVCache()
        step = begin(
            self,
            input_ids,
            inputs_embeds=inputs_embeds,
            attention_mask=attention_mask,
            position_ids=position_ids,
            cache=cache,
        )
        if prompt_experts is not None:
            step.ctx.armed = prompt_experts.armed
        if labels is not None:
            labels = check_labels(labels, step.hidden_BTD, self.config.vocab_size, logits_to_keep)
        hidden_states = [
            step.run_to(layer) for layer in range(len(self.layers) if output_hidden_states else 0)
        ]
        hidden_BTD = step.finish()
        logits = self.logits(_keep(hidden_BTD, logits_to_keep))
        output = ModelOutput(
            loss=None if labels is None else next_token_loss(logits, labels, num_items_in_batch),
            logits=logits,
            cache=cache,
            hidden_states=(*hidden_states, hidden_BTD) if output_hidden_states else None,
            # A copy, because activation checkpointing appends to the list again.
            router_stats=tuple(step.ctx.router_stats) or None,
            experts=step.ctx.armed,
        )
        return output.to_tuple() if return_dict is False else output

    def logits(self, hidden_BTD: Tensor) -> Tensor:
        """Return the logits `[B, T, V]` of a pass's final hidden states (`ForwardPass.finish`)."""
        logits_BTV: Tensor = self.lm_head(hidden_BTD)
        cap = self.config.final_logit_softcapping
        return logits_BTV if cap is None else soft_cap(logits_BTV, cap)

    @torch.no_grad()
    def log_probs(self, input_ids: Tensor) -> Tensor:
        """Return each token's log probability given its prefix, in nats, `[B, T - 1]`.

        The first token has no prefix and therefore no entry.

        Args:
            input_ids: token ids `[B, T]`.

        Raises:
            ConfigError: an id is outside the vocabulary.
        """
        logits = self(input_ids, use_cache=False).logits[:, :-1].float()
        targets = input_ids[:, 1:, None].long()
        return logits.gather(-1, targets).squeeze(-1) - logits.logsumexp(-1)

    @property
    def sparse_layers(self) -> list[int]:
        """The indices of the mixture-of-experts layers."""
        return [layer for layer in range(len(self.layers)) if self.config.is_sparse(layer)]

    def routing_width(self) -> int:
        """Return the number of experts per token in a `RoutingDecision`; 0 for a dense model."""
        for module in self.modules():
            if isinstance(module, MoELayer):
                return module.router.choice_width
        return 0

    def state_bytes(self, length: int) -> int:
        """Return an upper bound on the bytes of a `KVCache` for one sequence of `length` tokens.

        The state of plugged experts is not included.
        """
        total = 0
        for block in self.layers:
            assert isinstance(block, Block)
            total += block.state_bytes(length, self.dtype.itemsize)
        return total

    def save_pretrained(self, *args: Any, **kwargs: Any) -> None:
        """Write the model to a folder (see `PreTrainedModel.save_pretrained`).

        Raises:
            ConfigError: the model's matrices are in the files of another folder.
        """
        if stored_matrices(self):
            raise ConfigError(
                "This model was loaded with stored=True, so its matrices are still in the files of "
                f"{self.experts.base_folder}; copy that folder, or load the model without stored."
            )
        super().save_pretrained(*args, **kwargs)

    def own_tensors(self) -> dict[str, Tensor]:
        """Return the state dict with each tied tensor under its first name only."""
        return {
            name: tensor
            for name, tensor in self.state_dict().items()
            if name not in self.all_tied_weights_keys
        }

    def _init_weights(self, module: nn.Module) -> None:
        init_module(module, self.config.initializer_range)

    def _prepare_cache_for_generation(  # type: ignore[override]
        self, generation_config: Any, model_kwargs: dict[str, Any], *args: Any
    ) -> None:
        if model_kwargs.get("cache") is not None:
            # Hugging Face records that the caller owns the cache and may read it afterwards.
            super()._prepare_cache_for_generation(  # type: ignore[misc]
                generation_config, model_kwargs, *args
            )
            return
        refuse_cache_kind(generation_config.cache_implementation)
        # Hugging Face would create a plain DynamicCache, which cannot hold the gates' running
        # sums.
        if generation_config.use_cache is not False:
            model_kwargs["cache"] = KVCache()
        else:
            model_kwargs["prompt_experts"] = PromptExperts()

    def prepare_inputs_for_generation(
        self,
        input_ids: Tensor,
        # Hugging Face looks for this name in the signature to allow embeddings as prompts.
        inputs_embeds: Tensor | None = None,
        **kwargs: Any,
    ) -> dict[str, Any]:
        cache = kwargs.get("cache")
        pinned = cache if isinstance(cache, KVCache) else kwargs.get("prompt_experts")
        if pinned is not None:
            pin(pinned, self.experts, input_ids, inputs_embeds, kwargs.get("attention_mask"))
        prepared: dict[str, Any] = super().prepare_inputs_for_generation(
            input_ids, inputs_embeds=inputs_embeds, **kwargs
        )
        return prepared

    def _pool_of(self, layer_idx: int) -> Experts | None:
        if not len(self.expert_pools):
            return None
        pool = self.expert_pools[layer_idx // self.config.expert_sharing]
        assert isinstance(pool, Experts)
        return pool


def build_pools(config: ModelConfig) -> list[Experts]:
    """Return one pool of routed experts per `expert_sharing` layers.

    The list is empty for a dense model, or if every layer owns its experts.
    """
    if config.num_experts == 0 or config.expert_sharing == 1:
        return []
    count = -(-config.num_hidden_layers // config.expert_sharing)
    return [
        Experts(config.num_experts, config.hidden_size, config.expert_dim) for _ in range(count)
    ]


def next_token_loss(
    logits_BTV: Tensor, labels_BT: Tensor, items: Tensor | int | None = None
) -> Tensor:
    """Return the mean cross-entropy of `labels[:, t + 1]` under `logits[:, t]`, in nats.

    Labels of -100 are ignored.

    Args:
        logits_BTV: logits.
        labels_BT: target ids.
        items: divisor of the sum; None: the number of labels.
    """
    logits_NV = logits_BTV[:, :-1].flatten(0, 1).float()
    labels_N = labels_BT[:, 1:].flatten()
    if items is None:
        return cross_entropy(logits_NV, labels_N, ignore_index=-100)
    total = cross_entropy(logits_NV, labels_N, ignore_index=-100, reduction="sum")
    # Under data parallelism, one tensor is passed to the replicas on all devices.
    return total / (items.to(total.device) if isinstance(items, Tensor) else items)


def _keep(hidden_BTD: Tensor, logits_to_keep: int | Tensor) -> Tensor:
    length = hidden_BTD.shape[1]
    if isinstance(logits_to_keep, Tensor):
        checks.tensor("logits_to_keep", logits_to_keep, "whole", dims=(1,), empty=True)
        checks.within("logits_to_keep", logits_to_keep, -length, length - 1, "indices of tokens")
        return hidden_BTD[:, logits_to_keep.long()]
    checks.whole("logits_to_keep", logits_to_keep, least=0)
    return hidden_BTD[:, -logits_to_keep:] if logits_to_keep else hidden_BTD


AutoConfig.register(ModelConfig.model_type, ModelConfig)
AutoModelForCausalLM.register(ModelConfig, DeepSeekModel)
