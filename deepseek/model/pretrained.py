"""Load a model from a checkpoint folder: read, convert and, if asked, upcycle to experts."""

from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor, nn
from transformers import GenerationConfig

from deepseek import checks
from deepseek.checkpoint.convert import convert_config, convert_tensors, read_tensors
from deepseek.checkpoint.hub import HubOptions, resolve
from deepseek.checkpoint.store import read_object
from deepseek.checkpoint.stream import TensorFiles
from deepseek.device.choose import CPU, choose_device, choose_dtype
from deepseek.errors import CheckpointError, ConfigError, shown
from deepseek.model.config import ModelConfig
from deepseek.model.moe.layer import MoELayer, init_upcycled
from deepseek.model.quantised import (
    SCALES,
    SUFFIXES,
    LoadedTensors,
    Tensors,
    keep_matrices,
    restored,
)
from deepseek.model.stored import store_weights
from deepseek.model.unread_arguments import refuse_attention_kind
from deepseek.registry import nearest

if TYPE_CHECKING:
    from deepseek.model.transformer import DeepSeekModel

BLOCK_ROWS = 4096
"""Rows of a matrix that are read at once to compare it with another."""

Model = TypeVar("Model", bound="DeepSeekModel")

# Arguments that Hugging Face's own callers (AutoModel, PEFT, pipelines, lm-eval) pass. They are
# ignored.
_PASSED_ALONG = {
    "_commit_hash",
    "_from_auto",
    "adapter_kwargs",
    "attn_implementation",
    "low_cpu_mem_usage",
    "trust_remote_code",
    "use_safetensors",
}

HUB_ARGUMENTS: dict[str, checks.Check] = {
    "cache_dir": checks.path,
    "force_download": checks.flag,
    "local_files_only": checks.flag,
    "revision": checks.text,
    "token": lambda name, value: value if isinstance(value, bool) else checks.text(name, value),
}
"""Arguments of Hugging Face that say how a model is fetched (see `HubOptions`), and their checks."""


class LoadedGenerationConfig(GenerationConfig):
    """The generation config of a checkpoint, which can be saved with sampling values that greedy
    decoding does not read.

    Published checkpoints have such values, and `generate(do_sample=True)` reads them.
    """

    def validate(self, strict: bool = False, user_set_attributes: set[str] | None = None) -> None:
        """Raise `ValueError` if a value is impossible.

        Args:
            strict: ignored; it would also refuse values that are not read.
            user_set_attributes: names of the values to warn of; None: all.
        """
        super().validate(strict=False, user_set_attributes=user_set_attributes)


OURS = ("config", "device_map", "dtype", "upcycle_seed", *HUB_ARGUMENTS)
QUANTISING = ("load_in_4bit", "load_in_8bit", "quantization_config")


def load_pretrained(
    cls: type[Model],
    name_or_path: Any,
    config: ModelConfig | None = None,
    *,
    dtype: torch.dtype | str | None = None,
    torch_dtype: torch.dtype | str | None = None,
    device_map: Any = None,
    upcycle_seed: int = 0,
    **kwargs: Any,
) -> Model:
    """Load a model from a name, folder or hub id (see `DeepSeekModel.from_pretrained`).

    Args:
        cls: class of the model.
        name_or_path: model name, folder or hub id.
        config: overrides of the checkpoint's config; None: use the checkpoint's.
        dtype: dtype of the weights and of mixed precision; None or "auto": the fastest on the
            device, whatever the checkpoint's.
        torch_dtype: older name of `dtype`.
        device_map: one device (see `choose_device`); None: the CPU.
        upcycle_seed: seed of the routed experts and routers of an upcycled model.
        **kwargs: how a hub id is fetched (see `HubOptions`), and other arguments of Hugging Face,
            which are ignored.

    Raises:
        HubError, CheckpointError, ConfigError, DeviceError: see `DeepSeekModel.from_pretrained`.
    """
    hub = _hub_options(kwargs)
    refuse_attention_kind(kwargs.get("attn_implementation"))
    for key, value in kwargs.items():
        if key in QUANTISING:
            raise ConfigError(
                f"from_pretrained has no argument {key!r}; quantise the model first, with "
                "`deepseek quantize`, and load the result."
            )
        # Callers pass some of their own arguments on, unset, whether anybody reads them or not.
        if key not in {*_PASSED_ALONG, *HUB_ARGUMENTS} and value not in (None, False, ""):
            raise ConfigError(f"from_pretrained has no argument {key!r}; {nearest(key, OURS)}.")
    checks.path("pretrained_model_name_or_path", name_or_path)
    checks.optional(partial(checks.instance, kind=ModelConfig))("config", config)
    checks.whole("upcycle_seed", upcycle_seed, least=0, most=checks.MAX_SEED)
    folder = resolve(str(name_or_path), hub=hub)
    device = _single_device(device_map)
    checkpoint = read_config(folder)
    merged = config.merged_into(checkpoint) if config is not None else ModelConfig(**checkpoint)
    wanted = dtype if dtype is not None else torch_dtype
    target = choose_dtype(wanted, device)
    upcycled = merged.num_experts > 0 and not checkpoint.get("num_experts")
    if upcycled:
        merged = _shared_from_dense(merged)
    plain, matrices = restored(convert_tensors(read_tensors(folder), merged.to_dict()))
    _check_head(merged, LoadedTensors(plain))
    tensors = _placed(plain, device, target)
    converted = merged.positional_encoding != ModelConfig(**checkpoint).positional_encoding
    model = (
        _upcycle(cls, merged, tensors, upcycle_seed)
        if upcycled
        else _fill(cls, merged, tensors, converted)
    )
    keep_matrices(model, {} if upcycled else matrices)
    if wanted not in (None, "auto"):
        model.compute_dtype = target
    return _finish(model, folder, str(name_or_path), device, target)


def load_stored(
    cls: type[Model],
    name_or_path: str | Path,
    dtype: torch.dtype | str | None = None,
    device: torch.device = CPU,
) -> Model:
    """Load a model whose matrices stay in the checkpoint's files (see `model/stored.py`).

    Args:
        cls: class of the model.
        name_or_path: model name, folder or hub id.
        dtype: dtype of everything else, and of the matrices when they are read; None: the fastest
            on the device.
        device: device to compute on.

    Raises:
        HubError, CheckpointError, ConfigError, DeviceError: see `DeepSeekModel.from_pretrained`.
    """
    folder = resolve(str(name_or_path))
    config = ModelConfig(**read_config(folder))
    target = choose_dtype(dtype, device)
    files = TensorFiles(folder, post_norms=config.post_norms)
    _check_head(config, files)
    with torch.device("meta"):
        model = cls(config)
    stored = store_weights(model, files, target, device)
    suffixes = ("", SCALES, *SUFFIXES.values())
    # A tied head in the files equals the embeddings, so it is not loaded as well.
    names = (*stored, *model.all_tied_weights_keys)
    read_later = {name + suffix for name in names for suffix in suffixes}
    rest = ((name, files.read(name)) for name in files if name not in read_later)
    plain, matrices = restored(convert_tensors(rest, config.to_dict()))
    _load(model, _placed(plain, device, target))
    keep_matrices(model, matrices)
    return _finish(model, folder, str(name_or_path), device, target)


def _hub_options(kwargs: dict[str, Any]) -> HubOptions:
    """Return how a model is fetched; what is not among the arguments, or is None, has its default.

    Raises:
        ConfigError: an argument is wrong.
    """
    given = {name: kwargs[name] for name in HUB_ARGUMENTS if kwargs.get(name) is not None}
    return HubOptions(**{name: HUB_ARGUMENTS[name](name, value) for name, value in given.items()})


def _check_head(config: ModelConfig, tensors: Tensors) -> None:
    """Raise `CheckpointError` if the config ties the output head to the embeddings, but the
    checkpoint has a different head.

    Quantised matrices in files are not compared: checkpoints with them store no tied head.
    """
    names = ("embed_tokens.weight", "lm_head.weight")
    if not config.tie_word_embeddings or not all(name in tensors for name in names):
        return
    table, head = (tensors.shape(name) for name in names)
    blocks = range(0, sum(table[:1]), BLOCK_ROWS)  # empty for a scalar, which has no rows
    if table != head or not all(
        torch.equal(*(tensors.read(name, first, first + BLOCK_ROWS) for name in names))
        for first in blocks
    ):
        raise CheckpointError(
            "The checkpoint's lm_head.weight differs from its embed_tokens.weight, and "
            "tie_word_embeddings=true would discard it; set tie_word_embeddings to false in "
            "config.json."
        )


def _placed(
    tensors: dict[str, Tensor], device: torch.device, dtype: torch.dtype
) -> dict[str, Tensor]:
    """Return a checkpoint's tensors on a device and in a dtype.

    Raises:
        CheckpointError: a tensor is not floating point.
    """
    for name, tensor in tensors.items():
        if not tensor.is_floating_point():
            raise CheckpointError(
                f"The checkpoint's tensor {shown(name)} is of dtype {tensor.dtype}; weights must "
                "be floating-point numbers."
            )
    return {
        # Balance buffers stay fp32: their updates vanish in bf16.
        name: t.to(device, t.dtype if ".balance." in name else dtype)
        for name, t in tensors.items()
    }


def _finish(
    model: Model, folder: Path, name: str, device: torch.device, dtype: torch.dtype
) -> Model:
    """Return a filled model in eval mode, with the name and generation config of its folder."""
    model.config.name_or_path = name
    model.generation_config = _generation_config(folder, model)
    model.experts.base_folder = folder
    return nn.Module.to(model, device, dtype).eval()


def read_config(folder: Path) -> dict[str, Any]:
    """Return the `ModelConfig` fields of a checkpoint folder of any supported family.

    Raises:
        CheckpointError: `config.json` cannot be read, or the family is not supported.
    """
    return convert_config(read_object(folder / "config.json"))


def _single_device(device_map: Any) -> torch.device:
    """Return the device of Hugging Face's `device_map`: a name, a number, or a map of one entry."""
    device = device_map.get("") if isinstance(device_map, dict) else device_map
    if isinstance(device, int):
        device = f"cuda:{device}"
    if device is not None and not isinstance(device, str | torch.device):
        raise ConfigError(
            f"device_map={shown(device_map)} is not supported; name one device, such as 'cpu' or "
            "'cuda:0'."
        )
    return CPU if device is None else choose_device(device)


def _fill(
    cls: type[Model], config: ModelConfig, tensors: dict[str, Tensor], converted: bool
) -> Model:
    """Build the model on the meta device, then assign the checkpoint's tensors.

    The meta device skips weight initialisation. With `converted`, the checkpoint has another
    positional encoding, so the weights of the new one get their initial values.
    """
    with torch.device("meta"):
        model = cls(config)
    _load(model, (_start_positions(model) if converted else {}) | tensors)
    return model


def _start_positions(model: "DeepSeekModel") -> dict[str, Tensor]:
    """Return the initial weights of the model's positional encoding."""
    start: dict[str, Tensor] = {}
    for name, module in model.named_modules():
        if (name == "positions" or name.endswith(".score_bias")) and list(module.parameters()):
            module.to_empty(device="cpu").reset_parameters()
            start |= module.state_dict(prefix=f"{name}.")
    return start


def _upcycle(cls: type[Model], config: ModelConfig, tensors: dict[str, Tensor], seed: int) -> Model:
    """Upcycle a dense checkpoint to a mixture of experts with the same logits."""
    model = nn.Module.to(cls(config), next(iter(tensors.values())).dtype)
    _load(model, {**model.state_dict(), **tensors})
    generator = torch.Generator().manual_seed(seed)
    for block in model.layers:
        if isinstance(block.feed_forward, MoELayer):
            init_upcycled(block.feed_forward, generator)
    return model


def _shared_from_dense(config: ModelConfig) -> ModelConfig:
    """Return `config` with the dense feed-forward network as its only shared expert."""
    if config.shared_expert_dim not in (0, config.intermediate_size):
        raise ConfigError(
            f"shared_expert_dim={config.shared_expert_dim} contradicts the dense checkpoint, whose "
            f"feed-forward networks of width {config.intermediate_size} become the shared expert; "
            "leave num_shared_experts and shared_expert_dim out."
        )
    config.num_shared_experts = 1
    config.shared_expert_dim = config.intermediate_size
    return config


def _load(model: "DeepSeekModel", tensors: dict[str, Tensor]) -> None:
    if model.config.tie_word_embeddings and isinstance(model.embed_tokens, nn.Embedding):
        tensors.setdefault("lm_head.weight", tensors.get("embed_tokens.weight", torch.empty(0)))
    try:
        result = model.load_state_dict(tensors, strict=False, assign=True)
    except RuntimeError as error:
        raise CheckpointError(
            "The checkpoint's tensors do not fit its config.json: "
            f"{str(error).splitlines()[-1].strip()}"
        ) from None
    if isinstance(model.embed_tokens, nn.Embedding):
        model.tie_weights()
    missing = sorted(name for name in result.missing_keys if ".balance." not in name)
    if missing or result.unexpected_keys:
        what = (
            f"lacks {missing[0]}"
            if missing
            else f"has an unknown tensor {result.unexpected_keys[0]}"
        )
        raise CheckpointError(
            f"The checkpoint {what} ({len(missing)} missing, {len(result.unexpected_keys)} "
            "unknown); its weights do not match its config.json."
        )
    _materialise_buffers(model)


def _materialise_buffers(model: "DeepSeekModel") -> None:
    """Initialise buffers that the checkpoint does not have, such as the balance bias."""
    for module in model.modules():
        if any(buffer.is_meta for buffer in module.buffers(recurse=False)):
            module.reset_buffers()  # type: ignore[operator]


def _generation_config(folder: Path, model: "DeepSeekModel") -> GenerationConfig:
    path = folder / "generation_config.json"
    if path.exists():
        settings = read_object(path)
        settings.pop("cache_implementation", None)  # Gemma's names a cache of the stock model
        try:
            return LoadedGenerationConfig.from_dict(settings)
        except (TypeError, ValueError, AttributeError, KeyError) as error:
            raise CheckpointError(
                f"{path} is no generation config ({error}); fetch the model again, or delete it."
            ) from None
    return GenerationConfig.from_model_config(model.config)
