"""`deepseek.import_adapter`: turn a LoRA adapter of PEFT into a pack to plug like an expert."""

import re
from pathlib import Path

import torch
from pydantic import ValidationError
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

from deepseek import checks
from deepseek.checkpoint.files import expanded
from deepseek.checkpoint.hub import resolve
from deepseek.checkpoint.models import model_name
from deepseek.checkpoint.store import read_json
from deepseek.errors import PackError
from deepseek.model.config import ModelConfig
from deepseek.model.experts.adapter import match_sites
from deepseek.model.experts.linear_hooks import linear_layers
from deepseek.model.language_model import is_own
from deepseek.model.pretrained import read_config
from deepseek.model.transformer import DeepSeekModel
from deepseek.packs.library import SUFFIX, check_free, experts_folder
from deepseek.packs.lora import LoraManifest, LoraSite
from deepseek.packs.manifest import BaseDescription, explain
from deepseek.packs.pack import ExpertPack, read_pack, write_pack
from deepseek.packs.peft import Matrices, PeftAdapter, read_adapter
from deepseek.packs.signature import load_key
from deepseek.packs.tensors import DTYPES


def import_adapter(
    folder: str | Path,
    *,
    name: str | None = None,
    base: str | Path = "smollm2-135m",
    licence: str = "LicenseRef-Unknown",
    domain: str = "",
    auto: bool = False,
    key: Path | None = None,
    out: Path | None = None,
) -> Path:
    """Import a LoRA adapter that PEFT saved, and return the pack that it becomes.

    The pack is plugged, armed by name and weighted like that of an expert.

    Args:
        folder: folder with `adapter_config.json` and `adapter_model.safetensors`.
        name: name of the pack; None: that of the folder.
        base: base model that the pack is for: a known name, a folder, a GGUF file or a hub id.
            The adapter's layers must fit it.
        licence: SPDX expression of the adapter's licence.
        domain: short description of what it is for.
        auto: whether "auto" arms it. An adapter has no gate, so it would then change every request
            that does not choose its experts.
        key: private key to sign the pack with; None: a new pack is not signed, and one that was
            imported before stays as it is.
        out: the pack file to write; None: NAME.safetensors in the folder of trained experts.

    Raises:
        PackError: the adapter is damaged, of a kind that is not supported, or does not fit the
            base, or another pack has its name. Nothing is written then.
        ConfigError: an argument has a wrong type, or a run, a retrieval index or prompts of that
            name are in the home, which would be taken for those of the adapter.
        HubError, CheckpointError: the base cannot be found or read.
    """
    for field, value in {"folder": folder, "base": base}.items():
        checks.path(field, value)
    for field, own in {"key": key, "out": out}.items():
        checks.optional(checks.path)(field, own)
    checks.flag("auto", auto)
    adapter = read_adapter(folder)
    signing_key = None if key is None else load_key(Path(key))
    model_folder = resolve(base)
    title = _name_of(expanded(folder)) if name is None else name
    description = BaseDescription.of(model_folder, model_name(base))
    pack = _pack(adapter, title, description, licence, domain, auto)
    assert isinstance(pack.manifest, LoraManifest)
    match_sites(pack.manifest, linear_layers(_skeleton(model_folder)))
    path = experts_folder() / f"{title}{SUFFIX}" if out is None else expanded(out)
    if path.exists():
        _check_same(path, pack)
        if signing_key is None:
            return path  # unchanged: writing it again would drop a signature
    elif out is None:
        check_free(title)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_pack(path, pack, signing_key)
    return path


def other_base(manifest: LoraManifest) -> str | None:
    """Return the base that an imported adapter was trained on, if its name is not that of the
    pack's base; else None.
    """
    stated = manifest.trained_on.rstrip("/").rpartition("/")[2]
    return manifest.trained_on if stated and stated.lower() != manifest.base.name.lower() else None


def _name_of(folder: Path) -> str:
    """Return the name of an adapter folder, made valid as the name of an expert."""
    return re.sub(r"[^A-Za-z0-9._-]+", "-", folder.resolve().name).strip("-._")[:64] or "adapter"


def _pack(
    adapter: PeftAdapter, name: str, base: BaseDescription, licence: str, domain: str, auto: bool
) -> ExpertPack:
    try:
        manifest = LoraManifest(
            name=name,
            domain=domain,
            base=base,
            dtype=adapter.dtype,
            licence=licence,
            sites=tuple(_site(layer, change) for layer, change in adapter.changes.items()),
            auto=auto,
            source=adapter.digest,
            trained_on=adapter.base,
        )
    except ValidationError as error:
        raise PackError(
            f"The adapter's manifest would be invalid: {explain(error)}; correct the argument."
        ) from None
    tensors = {}
    for layer, (down, up, _) in adapter.changes.items():
        tensors[f"{layer}.lora_A"] = down.to(DTYPES[adapter.dtype])
        tensors[f"{layer}.lora_B"] = up.to(DTYPES[adapter.dtype])
    return ExpertPack.seal(manifest, tensors)


def _site(layer: str, change: Matrices) -> LoraSite:
    return LoraSite(
        name=layer,
        inputs=change.down.shape[1],
        outputs=change.up.shape[0],
        rank=change.down.shape[0],
        scaling=change.scaling,
    )


def _skeleton(folder: Path) -> nn.Module:
    """Return the model of a folder without its weights."""
    is_ours = is_own(read_json(folder / "config.json"))
    with torch.device("meta"):
        if is_ours:
            return DeepSeekModel(ModelConfig(**read_config(folder)))
        config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
        model: nn.Module = AutoModelForCausalLM.from_config(config, trust_remote_code=False)
        return model


def _check_same(path: Path, pack: ExpertPack) -> None:
    """Raise `PackError` unless an existing file holds this same pack."""
    try:
        is_same = read_pack(path).manifest.digest == pack.manifest.digest
    except PackError:
        is_same = False
    if not is_same:
        raise PackError(
            f"{path} exists and is another pack; give this one another name, or delete that one."
        )
