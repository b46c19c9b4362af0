"""Load a stock model of `transformers` from a folder and attach experts to it."""

from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from deepseek.checkpoint.store import read_object
from deepseek.errors import CheckpointError
from deepseek.model.attached.model import AttachedModel, attach
from deepseek.model.attached.sites import find_sites

UNREADABLE = (OSError, ValueError, RuntimeError, KeyError, TypeError, SafetensorError)
"""Errors that `transformers` raises for damaged folders."""


def is_stock(config: dict[str, Any]) -> bool:
    """Return whether `transformers` has a causal language model for the content of a
    `config.json`.
    """
    family = config.get("model_type")
    return isinstance(family, str) and family in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES


def load_attached(folder: Path, dtype: torch.dtype | str, device: torch.device) -> AttachedModel:
    """Return the stock model in a folder, in eval mode, with experts attached.

    Code in the folder is never executed.

    Args:
        folder: model folder with safetensors weights.
        dtype: dtype of the weights, or its name.
        device: device of the weights.

    Raises:
        CheckpointError: the folder is damaged, or its weights do not match its config.
        ConfigError: experts cannot attach to the model.
    """
    if "transformers_weights" in read_object(folder / "config.json"):
        raise CheckpointError(
            f"{folder}/config.json names its weights itself (transformers_weights), so that their "
            "fingerprint could be that of others; remove the field."
        )
    try:
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            folder,
            dtype=dtype,
            trust_remote_code=False,
            local_files_only=True,
            use_safetensors=True,
            output_loading_info=True,
        )
    except UNREADABLE as error:
        raise _refused(folder, error) from error
    model, report = loaded
    if report["missing_keys"]:
        missing = sorted(report["missing_keys"])
        raise CheckpointError(
            f"The checkpoint lacks {missing[0]} ({len(missing)} missing); its weights do not match "
            "its config.json."
        )
    attached = attach(model.to(device).eval())
    attached.experts.base_folder = folder
    return attached


def stock_layers(folder: Path) -> tuple[int, ...]:
    """Return the layers of the stock model in a folder that have a feed-forward module.

    Raises:
        CheckpointError: the config is damaged.
        ConfigError: experts cannot attach to the model.
    """
    try:
        config = AutoConfig.from_pretrained(folder, trust_remote_code=False, local_files_only=True)
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config, trust_remote_code=False)
    except UNREADABLE as error:
        raise _refused(folder, error) from error
    return find_sites(model).indices


def _refused(folder: Path, error: Exception) -> CheckpointError:
    lines = str(error).strip().splitlines()
    return CheckpointError(
        f"transformers cannot load {folder} ({lines[0] if lines else type(error).__name__}); "
        "download the model again."
    )
