"""The tables that `deepseek plan` prints."""

from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.table import Table

from deepseek.cli.output import echo, figures_table, print_table
from deepseek.cli.plan_options import ModelChoice, PlanOptions, TrainingOptions
from deepseek.cli.shapes import InferenceEstimate, ScaleRow, TrainingEstimate, print_json
from deepseek.cli.units import duration
from deepseek.planning import Device, InferencePlan, Plan, deepspeed_config, plan_inference
from deepseek.planning import plan as plan_training

LABELS = {"keys_values": "keys and values"}
"""Names of parts of the memory that are not those of their fields."""


def print_inference(
    model: ModelChoice, options: PlanOptions, hardware: Device, dtype: str, as_json: bool
) -> None:
    """Plan inference and print it.

    Args:
        model: the model.
        options: the options.
        hardware: the figures of their device.
        dtype: type of weights that are not quantised.
        as_json: print JSON in place of tables.
    """
    estimate = plan_inference(
        model.config,
        options.gpus,
        device=hardware,
        length=options.length,
        batch=options.batch,
        dtype=dtype,
        bits=options.bits,
        attention=options.attention,
    )
    if as_json:
        print_json(_inference_json(model.name, options.fields, estimate))
        return
    count = estimate.parameters
    echo(
        f"{model.name}: {count.total:,} parameters, {count.active:,} active per token; "
        f"{estimate.batch} x {estimate.length:,} tokens on {estimate.gpus} {options.device}"
    )
    if options.fields:
        field_values = ", ".join(f"{name}={value!r}" for name, value in options.fields.items())
        echo(f"with {field_values}")
    _print_memory(asdict(estimate.memory), estimate.memory.total, hardware.memory)
    echo(
        f"first token after {_format_duration(estimate.prefill_seconds)}, then "
        f"{_format_duration(estimate.token_seconds)} per token: "
        f"{estimate.batch / estimate.token_seconds:,.0f} tokens/s"
    )
    echo(_assumptions(hardware, estimate))


def print_training(
    model: ModelChoice,
    options: PlanOptions,
    hardware: Device,
    training: TrainingOptions,
    deepspeed: Path | None,
    as_json: bool,
) -> None:
    """Plan a training run and print it; write the DeepSpeed configuration.

    Args:
        model: the model.
        options: the options.
        hardware: the figures of their device.
        training: further options.
        deepspeed: file for the DeepSpeed configuration; None: it is not written.
        as_json: print JSON in place of tables.
    """
    from deepseek.checkpoint.store import write_json

    estimate = plan_training(
        model.config,
        options.gpus,
        device=hardware,
        rows_per_gpu=options.batch,
        length=options.length,
        attention=options.attention,
        bits=options.bits,
        tokens=training.tokens,
        recompute=training.recompute,
        precision=training.precision,
        zero=training.zero,
        trained=training.trained,
    )
    if as_json:
        print_json(_training_json(model.name, estimate))
    else:
        _print_training(model.name, options.device, estimate)
    if deepspeed:
        write_json(deepspeed, _deepspeed(estimate))
        echo(deepspeed, error=as_json)


def _print_training(model: str, device: str, estimate: Plan) -> None:
    shape = estimate.shape
    memory = estimate.memory(estimate.gpus)
    echo(
        f"{model}: {shape.parameters:,} parameters, {shape.active:,} active per token; "
        f"{estimate.tokens:,.0f} tokens on {estimate.gpus} {device}: "
        f"{estimate.days:,.1f} days, {estimate.days * 24 * estimate.gpus:,.0f} device hours"
    )
    _print_memory(asdict(memory), memory.total, estimate.device.memory)
    print_table(_scaling_table(estimate))
    rows = estimate.tokens_per_gpu // estimate.length
    echo(
        f"assumes {estimate.device.utilisation:.0%} of {estimate.device.flops / 1e12:,.0f} "
        f"TFLOP/s, steps of {rows} x {estimate.length:,} tokens per device, ZeRO stage "
        f"{estimate.zero}, {estimate.attention} attention"
    )


def _print_memory(parts: dict[str, float], total: float, limit: float) -> None:
    """Print the bytes of each part, and whether they fit."""
    table = figures_table("memory per device", ["GB"])
    for name, value in parts.items():
        table.add_row(LABELS.get(name, name.replace("_", " ")), _gb(value))
    table.add_row("total", _gb(total), style="bold")
    print_table(table)
    if total > limit:
        echo(f"does not fit: {_gb(total)} GB needed, {_gb(limit)} GB on each device")


def _scaling_table(estimate: Plan) -> Table:
    """Return a table of the needs of one step for growing numbers of devices."""
    table = figures_table(
        "devices", ["memory GB", "gathered GB", "reduced GB", "seconds per step", "efficiency"]
    )
    for scale in estimate.table():
        table.add_row(
            str(scale.gpus),
            f"{scale.memory / 1e9:.1f}" + " (too much)" * (scale.memory > estimate.device.memory),
            f"{scale.gathered / 1e9:.2f}",
            f"{scale.reduced / 1e9:.2f}",
            f"{scale.seconds:.2f}",
            f"{scale.efficiency:.0%}",
        )
    return table


def _inference_json(
    model: str, fields: Mapping[str, Any], estimate: InferencePlan
) -> InferenceEstimate:
    return InferenceEstimate(
        model=model,
        fields=dict(fields),
        parameters=estimate.parameters.total,
        active=estimate.parameters.active,
        gpus=estimate.gpus,
        length=estimate.length,
        batch=estimate.batch,
        weight_bits=estimate.bits or round(8 * estimate.compute_bytes),
        memory=asdict(estimate.memory),
        fits=estimate.fits,
        prefill_seconds=estimate.prefill_seconds,
        token_seconds=estimate.token_seconds,
    )


def _training_json(model: str, estimate: Plan) -> TrainingEstimate:
    return TrainingEstimate(
        model=model,
        parameters=estimate.shape.parameters,
        active=estimate.shape.active,
        gpus=estimate.gpus,
        tokens=estimate.tokens,
        days=estimate.days,
        memory=asdict(estimate.memory(estimate.gpus)),
        fits=estimate.memory(estimate.gpus).total <= estimate.device.memory,
        scaling=[
            ScaleRow(**asdict(scale), fits=scale.memory <= estimate.device.memory)
            for scale in estimate.table()
        ],
    )


def _deepspeed(estimate: Plan) -> dict[str, Any]:
    steps = max(1, round(estimate.tokens / (estimate.tokens_per_gpu * estimate.gpus)))
    return deepspeed_config(
        gpus=estimate.gpus,
        rows_per_gpu=estimate.tokens_per_gpu // estimate.length,
        learning_rate=3e-4,
        final_learning_rate=1e-5,
        warmup_steps=max(1, steps // 20),
        steps=steps,
        weight_decay=0.1,
    )


def _assumptions(device: Device, estimate: InferencePlan) -> str:
    """Return what the times assume, in one line."""
    hops = f", {1e6 * device.hop:.0f} microseconds a reduction" if estimate.gpus > 1 else ""
    return (
        f"assumes {device.utilisation:.0%} of {device.flops / 1e12:,.0f} TFLOP/s in prefill, "
        f"{device.bandwidth_share:.0%} of {device.bandwidth / 1e9:,.0f} GB/s in decoding, weights "
        f"in {estimate.bits or 8 * estimate.compute_bytes:.0f} bits, "
        f"{estimate.attention} attention{hops}"
    )


def _gb(num_bytes: float) -> str:
    return f"{num_bytes / 1e9:,.2f}"


def _format_duration(seconds: float) -> str:
    return f"{1e3 * seconds:.3g} ms" if seconds < 1 else duration(seconds)
