"""What `deepseek plan` plans: its options, profiles, and the model."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from deepseek.checkpoint.store import read_object
from deepseek.errors import ConfigError
from deepseek.model.presets import PRESETS
from deepseek.planning import DEVICES, Device
from deepseek.registry import pick

if TYPE_CHECKING:
    from deepseek.model.config import ModelConfig

TOKENS = 300e9
"""Training tokens if neither an option nor a config says how many."""


def only_given(options: dict[str, Any]) -> dict[str, Any]:
    """Return the options that the user gives; None and "" are not given."""
    return {name: value for name, value in options.items() if value not in (None, "")}


@dataclass(frozen=True)
class PlanOptions:
    """Options that plans of training and of inference share.

    Attributes:
        model: a preset, or name or folder of a model on this machine.
        device: type of the devices, one of `DEVICES`.
        gpus: number of devices.
        batch: rows per device and step; in inference, sequences at a time.
        length: tokens per row; None: the longest context.
        attention: "exact", "flash" or "lsh"; None: as the config says.
        bits: 8 or 4 for quantised weights; None: they are not.
        fields: fields of `ModelConfig` in place of the model's own.
    """

    model: str = "deepseek-8b"
    device: str = "h100"
    gpus: int = 1
    batch: int = 1
    length: int | None = None
    attention: str | None = None
    bits: int | None = None
    fields: Mapping[str, Any] = field(default_factory=dict)

    def overridden(self, **overrides: Any) -> "PlanOptions":
        """Return these options with those that the user gives (see `only_given`)."""
        return replace(self, **only_given(overrides))

    def hardware(
        self, memory: float | None, teraflops: float | None, bandwidth: float | None
    ) -> Device:
        """Return the device, with stated figures in place of its data sheet's.

        Args:
            memory: GB; None: the data sheet's.
            teraflops: dense bf16 TFLOP/s; None: the data sheet's.
            bandwidth: GB/s of its memory; None: the data sheet's.
        """
        device = pick(DEVICES, self.device, "device")
        return replace(
            device,
            memory=device.memory if memory is None else memory * 1e9,
            flops=device.flops if teraflops is None else teraflops * 1e12,
            bandwidth=device.bandwidth if bandwidth is None else bandwidth * 1e9,
        )


PROFILES = {
    "code": PlanOptions(
        length=4096, batch=8, fields={"routing_threshold": 0.7, "min_experts": 3, "max_experts": 5}
    ),
    "long": PlanOptions(
        fields={
            "positional_encoding": "dpe",
            "attention": "lsh",
            "max_position_embeddings": 131_072,
        }
    ),
    "small": PlanOptions(length=2048, bits=8, device="laptop"),
}
"""Inference for a use: completion in an editor for a team, one long context, one user's own
computer.
"""


def starting_options(profile: str, inference: bool) -> PlanOptions:
    """Return the options that those of the user override.

    Args:
        profile: name of a profile; "": none.
        inference: whether to plan inference, if there is no profile.

    Raises:
        ConfigError: the profile is unknown.
    """
    if profile:
        return pick(PROFILES, profile, "profile")
    return PlanOptions() if inference else PlanOptions(gpus=8, batch=2)


@dataclass(frozen=True)
class ModelChoice:
    """The model of a plan.

    Attributes:
        name: its preset, its name or folder, or the file of its configuration.
        config: its preset, fields or config.
        tokens: training tokens that its configuration states, else `TOKENS`.
        bits: 8 or 4 if its folder holds quantised weights, else None.
    """

    name: str
    config: "str | Mapping[str, Any] | ModelConfig"
    tokens: float
    bits: int | None = None

    @staticmethod
    def of(model: str, file: Path | None, fields: Mapping[str, Any]) -> "ModelChoice":
        """Return a preset, a model on this machine or, if there is one, that of a file for
        `deepseek pretrain`.

        Args:
            model: name of a preset, or name or folder of a model.
            file: the file; None: `model` is meant.
            fields: fields of `ModelConfig` in place of the model's own.

        Raises:
            ConfigError: `model` is neither, or the model is not of our own families.
        """
        if file is None:
            if model in PRESETS:
                config = PRESETS[model] | dict(fields)
                return ModelChoice(model, config if fields else model, TOKENS)
            from deepseek.model.config import ModelConfig
            from deepseek.model.pretrained import read_config
            from deepseek.model.quantised import bits_of_layers

            folder = _local_folder(model)
            own_config = _with_fields(ModelConfig(**read_config(folder)), fields)
            return ModelChoice(model, own_config, TOKENS, bits_of_layers(folder))
        from deepseek.train.jobs.pretrain_arguments import PretrainArguments

        settings = PretrainArguments.read(file)
        file_config = settings.model_config_for(settings.vocab_size, 0)
        return ModelChoice(str(file), _with_fields(file_config, fields), settings.tokens)

    def bits_to_plan(self, wanted: int | None, has_frozen: bool) -> int | None:
        """Return the bits of the quantised weights in a plan; None: no weights are quantised, or
        the profile decides.

        Args:
            wanted: value of the option; None: not given.
            has_frozen: whether the plan has weights that are not trained.

        Raises:
            ConfigError: the option contradicts the model's weights, or all weights would be
                trained, and they are quantised.
        """
        if self.bits is None:
            return wanted
        if wanted not in (None, self.bits):
            raise ConfigError(
                f"bits={wanted}: {self.name} has {self.bits}-bit weights; leave it out."
            )
        if not has_frozen:
            raise ConfigError(
                f"{self.name} has {self.bits}-bit weights, which cannot be trained; plan the model "
                "that they were made from, or the training of a part of it with --trained."
            )
        return self.bits


def _with_fields(config: "ModelConfig", fields: Mapping[str, Any]) -> "ModelConfig":
    """Return a config with some fields in place of its own."""
    return type(config)(**{**config.given, **fields}) if fields else config


def _local_folder(name: str) -> Path:
    """Return the folder of a model on this machine; nothing is downloaded or converted.

    Args:
        name: name or folder of the model.

    Raises:
        ConfigError: there is none, or it is not of our own families.
    """
    from deepseek.checkpoint.hub import is_to_download, names_file, resolve
    from deepseek.checkpoint.models import stored_models
    from deepseek.model.language_model import is_own

    if is_to_download(name) or names_file(name):
        raise ConfigError(
            f"{name} is not a model folder; fetch or convert it first with `deepseek pull {name}`."
        )
    if "/" not in name and not Path(name).is_dir():
        stored_names = [model.name for model in stored_models()]
        pick(dict.fromkeys([*PRESETS, *stored_names]), name, "model")
    folder = resolve(name)
    if not is_own(read_object(folder / "config.json")):
        raise ConfigError(
            f"{name} is a stock model of transformers, and plans are for our own families; give a "
            "config of its shape with --config."
        )
    return folder


@dataclass(frozen=True)
class TrainingOptions:
    """Options that only plans of training have; see `deepseek.planning.plan`."""

    tokens: float = TOKENS
    recompute: bool = True
    precision: str = "mixed"
    zero: int = 3
    trained: float = 1.0
