"""`deepseek.load`: load a model, its tokenizer and its experts in one call."""

from collections.abc import Iterable, Mapping
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from transformers import PreTrainedTokenizerFast

from deepseek import checks
from deepseek.checkpoint.fingerprint import fingerprint
from deepseek.checkpoint.hub import resolve
from deepseek.device.choose import choose_device, choose_dtype
from deepseek.errors import ConfigError
from deepseek.model.attention.hash import hash_file, load_hashes, plug_hashes
from deepseek.model.config import ModelConfig
from deepseek.model.experts.arming import AUTO, EVERY_EXPERT, Arming
from deepseek.model.language_model import LanguageModel, load_language_model
from deepseek.model.pretrained import load_stored
from deepseek.model.transformer import DeepSeekModel
from deepseek.packs.kinds import AnyManifest
from deepseek.packs.library import find_pack
from deepseek.packs.lora import LoraManifest
from deepseek.text.tokenizer import load_tokenizer

Packs = Iterable[str | Path] | Mapping[Any, float | None]
"""Expert packs by path or name, or their weights."""


class Loaded(NamedTuple):
    """A model with its tokenizer."""

    model: LanguageModel
    tokenizer: PreTrainedTokenizerFast


def load(
    name: str | Path = "smollm2-135m",
    *,
    experts: Packs = (),
    config: ModelConfig | None = None,
    device: str | torch.device = "auto",
    dtype: torch.dtype | str = "auto",
    stored: bool = False,
    expert_bytes: int | None = None,
) -> Loaded:
    """Load a base model and its tokenizer, and plug experts into it.

    With attention="lsh", the hashes that `deepseek distill-hash` has stored with the model are
    used.

    Args:
        name: a known base (downloaded if needed), a local folder or a hub id; default
            "smollm2-135m".
        experts: expert packs to plug, as paths or as names of trained experts. They are armed
            automatically, adapters only if they were imported for that. A mapping of packs to
            weights arms them by name, with these weights; None: an adapter with weight 1, and an
            expert automatically.
        config: config fields that override those of the checkpoint (see
            `DeepSeekModel.from_pretrained`).
        device: "cpu", "cuda", "cuda:N" or "mps"; "auto" takes a GPU if there is one.
        dtype: "float32", "bfloat16" or "float16"; "auto" takes the fastest one on the device that
            has the range of fp32, not the checkpoint's dtype, which "auto" means in Transformers.
        stored: leave the matrices in the checkpoint's files and read them when they are used, for a
            runner that packs its own; default: load them. For our own families, without `config`.
            Such a model cannot be saved; copy its folder instead.
        expert_bytes: budget in bytes for the weights of experts, which are then read when they are
            armed or chosen; the least recently used are evicted. Default: all stay in memory.

    Returns:
        The model and its tokenizer.

    Raises:
        HubError: the checkpoint cannot be downloaded.
        CheckpointError: the checkpoint is missing or damaged.
        ConfigError: the config is invalid or goes with `stored`, or a name is unknown.
        DeviceError: there is no such device, or it does not support the dtype.
        PackError: a pack cannot be read, or does not fit the model.
    """
    checks.path("name", name)
    checks.optional(partial(checks.instance, kind=ModelConfig))("config", config)
    if stored and config is not None:
        raise ConfigError(
            "stored=True uses the config of the checkpoint; leave config out, or load the weights "
            "with stored=False."
        )
    names = list(experts) if isinstance(experts, Mapping) else experts
    packs = [find_pack(expert) for expert in checks.sequence("experts", names, checks.path)]
    place = choose_device(device)
    precision = dtype if isinstance(dtype, str) and dtype == "auto" else choose_dtype(dtype, place)
    folder = resolve(str(name))
    model: LanguageModel = (
        load_stored(DeepSeekModel, folder, precision, place)
        if stored
        else load_language_model(folder, config=config, dtype=precision, device=place)
    )
    model.config.name_or_path = str(name)
    if (
        isinstance(model, DeepSeekModel)
        and model.config.attention == "lsh"
        and hash_file(folder).exists()
    ):
        plug_hashes(model, load_hashes(hash_file(folder), fingerprint(folder).weights))
    model.experts.weight_cache.limit = checks.optional(partial(checks.whole, least=1))(
        "expert_bytes", expert_bytes
    )
    plugged = [model.experts.plug(pack).name for pack in packs]
    if isinstance(experts, Mapping):
        manifests = [model.experts.manifest(name) for name in plugged]
        model.experts.arm(arming_at_start(experts, manifests).value)
    return Loaded(model, load_tokenizer(folder))


def arming_at_start(experts: Packs, manifests: Iterable[AnyManifest]) -> Arming:
    """Return the arming of the packs that a model starts with (see `load`).

    Args:
        experts: the packs, or their weights.
        manifests: their manifests, in the same order.

    Raises:
        ConfigError: a weight is out of range.
    """
    if not isinstance(experts, Mapping):
        return EVERY_EXPERT
    named: dict[str, float] = {}
    for weight, manifest in zip(experts.values(), manifests, strict=True):
        if weight is not None:
            named[manifest.name] = weight
        elif isinstance(manifest, LoraManifest):
            named[manifest.name] = 1.0
    return Arming.parse({AUTO: 1.0, **named})
