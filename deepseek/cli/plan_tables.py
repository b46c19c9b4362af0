"""What `deepseek plan` makes of its options, and what it prints."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from deepseek.cli.output import echo
from deepseek.cli.shapes import InferenceEstimate, ScaleRow, TrainingEstimate, print_json
from deepseek.cli.units import duration
from deepseek.planning import DEVICES, Device, InferencePlan, Plan, deepspeed_config, plan_inference
from deepseek.planning import plan as plan_training
from deepseek.registry import pick

PROFILES: dict[str, dict[str, Any]] = {
    "code": {"preset": "deepseek-8b", "length": 4096, "batch": 8, "gpus": 1, "device": "h100"},
    "long": {
        "preset": "deepseek-8b",
        "length": 131_072,
        "batch": 1,
        "gpus": 1,
        "attention": "lsh",
        "device": "h100",
    },
    "small": {
        "preset": "deepseek-8b",
        "length": 2048,
        "batch": 1,
        "gpus": 1,
        "bits": 8,
        "device": "laptop",
    },
}
"""Uses of a model: completion in an editor for a team, one long context, one user's computer."""

FALLBACK = {"preset": "deepseek-8b", "device": "h100", "batch": 2, "gpus": 8}
"""Values of options that neither the user nor a profile gives, for training."""


@dataclass(frozen=True)
class Wish:
    """The options that training and inference share; None, "" and False: not given."""

    preset: str
    profile: str
    inference: bool
    gpus: int | None
    length: int | None
    batch: int | None
    attention: str | None
    bits: int | None
    device: str

    def with_profile(self) -> "Wish":
        """Return the options, completed by those of the profile and the defaults.

        Raises:
            ConfigError: the profile is unknown.
        """
        values: dict[str, Any] = dict(FALLBACK)
        inference = self.inference
        if self.profile:
            values |= pick(PROFILES, self.profile, "profile")
            inference = True
        elif self.inference:
            values |= {"batch": 1, "gpus": 1}
        missing: dict[str, Any] = {
            name: value for name, value in values.items() if getattr(self, name) in (None, "")
        }
        return replace(self, inference=inference, **missing)

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
            memory=memory * 1e9 if memory else device.memory,
            flops=teraflops * 1e12 if teraflops else device.flops,
            bandwidth=bandwidth * 1e9 if bandwidth else device.bandwidth,
        )


def print_inference(wish: Wish, device: Device, dtype: str, as_json: bool) -> None:
    """Plan inference and print it."""
    made = plan_inference(
        wish.preset,
        wish.gpus or 1,
        device=device,
        length=wish.length,
        batch=wish.batch or 1,
        dtype=dtype,
        bits=wish.bits,
        attention=wish.attention,
    )
    if as_json:
        print_json(
            InferenceEstimate(
                model=wish.preset,
                parameters=made.parameters.total,
                active=made.parameters.active,
                gpus=made.gpus,
                length=made.length,
                batch=made.batch,
                memory=asdict(made.memory),
                fits=made.fits,
                prefill_seconds=made.prefill_seconds,
                token_seconds=made.token_seconds,
            )
        )
        return
    echo(
        f"{wish.preset}: {made.parameters.total:,} parameters, {made.parameters.active:,} active "
        f"per token; {made.batch} x {made.length:,} tokens on {made.gpus} {wish.device}"
    )
    _print_memory(asdict(made.memory), made.memory.total, device.memory)
    echo(
        f"first token after {_short(made.prefill_seconds)}, then {_short(made.token_seconds)} "
        f"per token: {made.batch / made.token_seconds:,.0f} tokens/s"
    )
    echo(assumptions(device, made))


def print_training(
    wish: Wish,
    device: Device,
    config: Path | None,
    options: Mapping[str, Any],
    deepspeed: Path | None,
    as_json: bool,
) -> None:
    """Plan a training run and print it; write the DeepSpeed configuration."""
    from deepseek.checkpoint.store import write_json

    model: Any = wish.preset
    tokens = options["tokens"] or 300e9
    if config is not None:
        from deepseek.train.jobs.pretrain_arguments import PretrainArguments

        settings = PretrainArguments.read(config)
        model = settings.model_config_for(settings.vocab_size, 0)
        tokens = options["tokens"] or settings.tokens
    gpus = wish.gpus or 8
    made = plan_training(
        model,
        gpus,
        device=device,
        rows_per_gpu=wish.batch or 2,
        length=wish.length,
        attention=wish.attention,
        bits=wish.bits,
        **{**options, "tokens": tokens},
    )
    if as_json:
        print_json(_training_json(wish.preset if config is None else str(config), made))
    else:
        _print_training(wish, made)
    if deepspeed:
        write_json(deepspeed, _deepspeed(made))
        echo(deepspeed, error=as_json)


def _print_training(wish: Wish, made: Plan) -> None:
    shape = made.shape
    memory = made.memory(made.gpus)
    echo(
        f"{shape.parameters:,} parameters, {shape.active:,} active per token; "
        f"{made.tokens:,.0f} tokens on {made.gpus} {wish.device}: "
        f"{made.days:,.1f} days, {made.days * 24 * made.gpus:,.0f} device hours"
    )
    _print_memory(asdict(memory), memory.total, made.device.memory)
    Console().print(_scaling_table(made))


def _print_memory(parts: dict[str, float], total: float, limit: float) -> None:
    """Print the bytes of each part, and whether they fit."""
    table = Table("memory per device", "GB")
    table.columns[1].justify = "right"
    for name, value in parts.items():
        table.add_row(name.replace("_", " and " if name == "keys_values" else " "), _gb(value))
    table.add_row("total", _gb(total), style="bold")
    Console().print(table)
    if total > limit:
        echo(f"does not fit: {_gb(total)} GB needed, {_gb(limit)} GB on each device")


def _scaling_table(made: Plan) -> Table:
    """Return a table of the needs of one step for growing numbers of devices."""
    table = Table(
        "devices", "memory GB", "gathered GB", "reduced GB", "seconds per step", "efficiency"
    )
    for scale in made.table():
        table.add_row(
            str(scale.gpus),
            f"{scale.memory / 1e9:.1f}",
            f"{scale.gathered / 1e9:.2f}",
            f"{scale.reduced / 1e9:.2f}",
            f"{scale.seconds:.2f}",
            f"{scale.efficiency:.0%}",
        )
    return table


def _training_json(model: str, made: Plan) -> TrainingEstimate:
    return TrainingEstimate(
        model=model,
        parameters=made.shape.parameters,
        active=made.shape.active,
        gpus=made.gpus,
        tokens=made.tokens,
        days=made.days,
        memory=asdict(made.memory(made.gpus)),
        fits=made.memory(made.gpus).total <= made.device.memory,
        scaling=[ScaleRow.model_validate(scale, from_attributes=True) for scale in made.table()],
    )


def _deepspeed(made: Plan) -> dict[str, Any]:
    steps = max(1, round(made.tokens / (made.tokens_per_gpu * made.gpus)))
    return deepspeed_config(
        gpus=made.gpus,
        rows_per_gpu=made.tokens_per_gpu // made.length,
        learning_rate=3e-4,
        final_learning_rate=1e-5,
        warmup_steps=max(1, steps // 20),
        steps=steps,
        weight_decay=0.1,
    )


def assumptions(device: Device, made: InferencePlan) -> str:
    """Return what the times assume, in one line."""
    hops = f", {1e6 * device.hop:.0f} microseconds a reduction" if made.gpus > 1 else ""
    return (
        f"assumes {device.utilisation:.0%} of {device.flops / 1e12:,.0f} TFLOP/s in prefill, "
        f"{device.bandwidth_share:.0%} of {device.bandwidth / 1e9:,.0f} GB/s in decoding, "
        f"{made.attention} attention{hops}"
    )


def _gb(num_bytes: float) -> str:
    return f"{num_bytes / 1e9:,.2f}"


def _short(seconds: float) -> str:
    return f"{1e3 * seconds:.3g} ms" if seconds < 1 else duration(seconds)
