"""`deepseek.load`: a model and its tokenizer, experts plugged, in one call."""

from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

import torch
from transformers import PreTrainedTokenizerFast

from deepseek.checkpoint.fingerprint import fingerprint
from deepseek.checkpoint.hub import resolve
from deepseek.model.attention.hash import hash_file, load_hashes, plug_hashes
from deepseek.model.config import ModelConfig
from deepseek.model.transformer import DeepSeekModel
from deepseek.packs.library import find_pack
from deepseek.text.tokenizer import load_tokenizer


class Loaded(NamedTuple):
    """A model with its tokenizer."""

    model: DeepSeekModel
    tokenizer: PreTrainedTokenizerFast


def load(
    name: str | Path = "smollm2-135m",
    *,
    experts: Iterable[str | Path] = (),
    config: ModelConfig | None = None,
    dtype: torch.dtype | str = "auto",
    device: str | None = None,
) -> Loaded:
    """Load a base model and its tokenizer, and plug experts into it.

    With attention="lsh" the hashes that `deepseek distill-hash` has put beside the model are used.

    Args:
        name: a known base (fetched if needed), a local folder or a hub id.
        experts: packs to plug, by file or by the name of a trained expert; they are armed
            automatically.
        config: choices laid over the checkpoint's config (see `DeepSeekModel.from_pretrained`).
        dtype: "auto" takes the fastest on the device.
        device: "cpu", "cuda", ...; None takes the CPU.

    Raises:
        HubError, CheckpointError, ConfigError, PackError: with the cause and the mend.
    """
    folder = resolve(str(name))
    model = DeepSeekModel.from_pretrained(folder, config=config, dtype=dtype, device_map=device)
    model.config.name_or_path = str(name)
    if model.config.attention == "lsh" and hash_file(folder).exists():
        plug_hashes(model, load_hashes(hash_file(folder), fingerprint(folder).weights))
    for expert in experts:
        model.experts.plug(find_pack(expert))
    return Loaded(model, load_tokenizer(folder))
