"""Read LoRA adapters in the format of PEFT: `adapter_config.json` and `adapter_model.safetensors`.

Closed by default: a field of the config that is not known to leave the computation unchanged must
have its neutral value. The tensors say which layers an adapter changes, so that `target_modules`,
which may be a regular expression, is never evaluated.
"""

import math
import re
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import regex
from safetensors import SafetensorError, safe_open
from torch import Tensor

from deepseek.checkpoint.files import expanded
from deepseek.checkpoint.store import file_digest
from deepseek.errors import PackError
from deepseek.packs.lora import MAX_RANK, MAX_SITES
from deepseek.packs.manifest import DtypeName, parse_json, printable
from deepseek.packs.pack import check_finite
from deepseek.packs.tensors import DTYPES

CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"
PICKLED = "adapter_model.bin"
MAX_CONFIG = 1 << 20  # bytes
MAX_WEIGHTS = 4 << 30  # bytes
PREFIX = "base_model.model."
PATTERN_SECONDS = 1.0
"""Maximum time to match all patterns of `rank_pattern` or `alpha_pattern`."""
FUZZY = re.compile(r"\{[^{}]*[a-z][^{}]*\}", re.IGNORECASE)
"""Approximate matching, which `regex` supports and PEFT's `re` reads as plain text."""

MAX_PATTERN = 500
"""Longest pattern in characters."""

# Fields that describe training or provenance and do not change what a saved adapter computes.
DESCRIPTIVE = frozenset(
    {
        "auto_mapping",
        "base_model_name_or_path",
        "corda_config",
        "ensure_weight_tying",
        "eva_config",
        "exclude_modules",
        "inference_mode",
        "layers_pattern",
        "layers_to_transform",
        "loftq_config",
        "lora_dropout",
        "megatron_core",
        "peft_version",
        "qalora_group_size",
        "revision",
        "runtime_config",
        "target_modules",
        "task_type",
    }
)
COMPUTED = frozenset(
    {"alpha_pattern", "lora_alpha", "peft_type", "r", "rank_pattern", "use_rslora"}
)
# Other ways to initialise change the base's weights too, so the adapter alone is not the model.
PLAIN_START = (True, False, None, "gaussian", "eva", "orthogonal")


class Matrices(NamedTuple):
    """The two factors of a change: `down` A `[R, D]` and `up` B `[F, R]`, and its scaling."""

    down: Tensor
    up: Tensor
    scaling: float


@dataclass(frozen=True)
class PeftAdapter:
    """A LoRA adapter as PEFT saves it.

    Attributes:
        base: name of the base model that it states; "" if it states none.
        changes: name of a linear layer in the base -> its change.
        dtype: dtype of the tensors, a key of `DTYPES`.
        digest: SHA-256 of the file of weights.
    """

    base: str
    changes: dict[str, Matrices]
    dtype: DtypeName
    digest: str


def read_adapter(folder: str | Path) -> PeftAdapter:
    """Read and check an adapter folder.

    Args:
        folder: folder with `adapter_config.json` and `adapter_model.safetensors`.

    Raises:
        PackError: a file is missing or damaged, or the adapter is of a kind that is not supported;
            the message names the folder and the first reason.
    """
    folder = expanded(folder)
    try:
        config = _read_config(folder)
        _check_config(config)
        tensors = _read_tensors(folder)
        pairs = _pairs(tensors)
        scaling_of = _scalings(config, {name: len(pair[0]) for name, pair in pairs.items()})
        check_finite(tensors)
    except PackError as error:
        raise PackError(f"adapter {printable(folder)} is refused: {error}.") from None
    changes = {name: Matrices(*pairs[name], scaling_of[name]) for name in sorted(pairs)}
    dtypes = {tensor.dtype for tensor in tensors.values()}
    dtype: DtypeName = next((name for name, kind in DTYPES.items() if dtypes == {kind}), "float32")
    # With the three dots of a truncated name, a manifest's limit of 200 characters.
    base = printable(config.get("base_model_name_or_path") or "", 197)
    return PeftAdapter(base, changes, dtype, file_digest(folder / WEIGHTS))


def _read_config(folder: Path) -> dict[str, Any]:
    if not folder.is_dir():
        raise PackError(f"it is not a folder; give the folder that holds {CONFIG}")
    path = folder / CONFIG
    if not path.is_file():
        raise PackError(f"it holds no {CONFIG}; give the folder that PEFT's save_pretrained wrote")
    if path.stat().st_size > MAX_CONFIG:
        raise PackError(f"its {CONFIG} has more than {MAX_CONFIG} bytes")
    try:
        config = parse_json(path.read_bytes().decode("utf-8"))
    except UnicodeDecodeError:
        raise PackError(f"its {CONFIG} is not UTF-8 text; save the adapter again") from None
    if not isinstance(config, dict):
        raise PackError(f"its {CONFIG} is not a table; save the adapter again")
    return config


def _check_config(config: Mapping[str, Any]) -> None:
    """Raise `PackError` unless the config describes a plain LoRA adapter."""
    kind = config.get("peft_type")
    if kind != "LORA":
        raise PackError(
            f"it is of type {printable(kind, 40)} and only LORA is supported; merge it into its "
            "base with PEFT instead"
        )
    if config.get("init_lora_weights", True) not in PLAIN_START:
        raise PackError(
            f"it was started with init_lora_weights={printable(config['init_lora_weights'], 40)}, "
            "which changes the base's weights; convert it with PEFT's save_pretrained and "
            "path_initial_model_for_weight_conversion"
        )
    targets = config.get("target_modules")
    if targets is not None and not isinstance(targets, str) and not _is_list_of_names(targets):
        raise PackError("its target_modules is neither text nor a list of names")
    for name in ("rank_pattern", "alpha_pattern"):
        if not isinstance(config.get(name) or {}, dict):
            raise PackError(f"its {name} is not a table")
    if not isinstance(config.get("use_rslora", False), bool):
        raise PackError("its use_rslora is not true or false")
    for name, value in config.items():
        neutral = value is None or value is False or value in ([], {}, "")
        if name == "bias":
            neutral = value == "none"
        if name in DESCRIPTIVE or name in COMPUTED or name == "init_lora_weights" or neutral:
            continue
        raise PackError(
            f"it uses {printable(name, 40)}={printable(value, 60)}, which is not supported; "
            "train it without, or merge it into its base with PEFT"
        )


def _is_list_of_names(value: object) -> bool:
    return isinstance(value, list) and all(isinstance(name, str) for name in value)


def _read_tensors(folder: Path) -> dict[str, Tensor]:
    path = folder / WEIGHTS
    if not path.is_file():
        if (folder / PICKLED).exists():
            raise PackError(
                f"it holds only {PICKLED}, a pickle, which could run code; load it with PEFT and "
                "save it again, with safe_serialization=True"
            )
        raise PackError(f"it holds no {WEIGHTS}; fetch the adapter again")
    if path.stat().st_size > MAX_WEIGHTS:
        raise PackError(f"its {WEIGHTS} has more than {MAX_WEIGHTS} bytes")
    try:
        with safe_open(path, framework="pt") as weights:
            names = list(weights.keys())
            if len(names) > 2 * MAX_SITES:
                raise PackError(f"it holds {len(names)} tensors and {2 * MAX_SITES} are allowed")
            tensors = {name: weights.get_tensor(name) for name in names}
    except (SafetensorError, OSError, ValueError) as error:
        raise PackError(f"its {WEIGHTS} is damaged ({printable(error)}); fetch it again") from None
    for name, tensor in tensors.items():
        if tensor.dtype not in DTYPES.values():
            raise PackError(
                f"its tensor {printable(name)} is {tensor.dtype}; save it as {', '.join(DTYPES)}"
            )
    return tensors


def _pairs(tensors: Mapping[str, Tensor]) -> dict[str, tuple[Tensor, Tensor]]:
    """Return the matrices A and B of each changed layer.

    Raises:
        PackError: a tensor is of another kind, has no partner, or they do not fit together.
    """
    halves: dict[str, dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        layer, half = _parse_name(name)
        halves.setdefault(layer, {})[half] = tensor
    if not halves:
        raise PackError(f"its {WEIGHTS} holds no tensors; fetch it again")
    pairs = {}
    for layer, matrices_by_half in halves.items():
        if matrices_by_half.keys() != {"lora_A", "lora_B"}:
            missing_half = ({"lora_A", "lora_B"} - matrices_by_half.keys()).pop()
            raise PackError(f"its tensor {printable(layer)}.{missing_half}.weight is missing")
        down = matrices_by_half["lora_A"]
        up = matrices_by_half["lora_B"]
        matrices = down.dim() == up.dim() == 2 and down.shape[0] == up.shape[1]
        if not (matrices and down.numel() and up.numel()):
            raise PackError(
                f"its matrices at {printable(layer)} are {[*down.shape]} and {[*up.shape]}, which "
                "are not the two factors of a linear layer's change"
            )
        if len(down) > MAX_RANK:
            raise PackError(
                f"its rank at {printable(layer)} is {len(down)} and {MAX_RANK} is allowed"
            )
        pairs[layer] = (down, up)
    return pairs


def _parse_name(name: str) -> tuple[str, str]:
    """Return the layer and the half, "lora_A" or "lora_B", that a tensor belongs to."""
    match = regex.fullmatch(r"((?:[A-Za-z0-9_]+\.)*[A-Za-z0-9_]+)\.(lora_[AB])\.weight", name)
    if match is None or len(name) > 250:
        raise PackError(
            f"its tensor {printable(name, 80)} is not a matrix of a linear layer's LoRA (DoRA, "
            "biases, embeddings and modules_to_save are not supported); train it without, or merge "
            "it into its base with PEFT"
        )
    return match[1].removeprefix(PREFIX), match[2]


def _scalings(config: Mapping[str, Any], ranks: Mapping[str, int]) -> dict[str, float]:
    """Return the scaling of each layer's change: alpha / r, or alpha / sqrt(r) (rsLoRA).

    Raises:
        PackError: a rank is not that of the tensors, or an alpha is not a number.
    """
    rank_of = _by_pattern(config, "rank_pattern", config.get("r", 8), ranks)
    alpha_of = _by_pattern(config, "alpha_pattern", config.get("lora_alpha", 8), ranks)
    scalings = {}
    for layer, rank in ranks.items():
        if rank_of[layer] != rank:
            raise PackError(
                f"its tensors at {printable(layer)} have rank {rank} and its config says "
                f"{rank_of[layer]:g}; save the adapter again"
            )
        root = math.sqrt(rank) if config.get("use_rslora") else rank
        scalings[layer] = alpha_of[layer] / root
        if abs(scalings[layer]) > 1e4:
            raise PackError(f"its lora_alpha {alpha_of[layer]:g} is out of range")
    return scalings


def _by_pattern(
    config: Mapping[str, Any], field: str, default: Any, layers: Mapping[str, int]
) -> dict[str, float]:
    """Return the value of each layer: that of the first pattern that matches its end, or `default`.

    Patterns are regular expressions of an untrusted adapter, so the time to match is limited.
    """
    patterns = dict(config.get(field) or {})
    for value in (default, *patterns.values()):
        is_number = isinstance(value, int | float) and not isinstance(value, bool)
        if not is_number or not abs(value) < 1e6:
            raise PackError(f"a value of its rank or alpha is {printable(value, 40)}, no number")
    if len(patterns) > MAX_SITES or any(len(pattern) > MAX_PATTERN for pattern in patterns):
        raise PackError(f"its {field} has too many or too long patterns")
    values = dict.fromkeys(layers, float(default))
    deadline = time.monotonic() + PATTERN_SECONDS
    try:
        # The first pattern that matches counts, so it is applied last.
        for pattern, value in reversed(patterns.items()):
            compiled = _compiled(pattern)
            for layer in layers:
                seconds = deadline - time.monotonic()
                if seconds <= 0:
                    raise TimeoutError
                if compiled.match(layer, timeout=seconds) is not None:
                    values[layer] = float(value)
    except (TimeoutError, MemoryError):
        raise PackError(
            f"its {field} takes longer than {PATTERN_SECONDS:g} s to match; name the layers in it"
        ) from None
    except (re.error, regex.error, RecursionError, OverflowError):
        raise PackError(f"its {field} has a pattern that is no regular expression") from None
    return values


def _compiled(pattern: str) -> "regex.Pattern[str]":
    """Return a compiled pattern in PEFT's syntax, that of `re`, for matching with a timeout."""
    re.compile(pattern)
    if FUZZY.search(pattern):
        raise re.error("braces around letters")
    return regex.compile(rf"(.*\.)?({pattern})$")
