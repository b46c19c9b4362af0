"""`deepseek plan`: estimate what a training run needs on a number of devices."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from deepseek.cli.output import echo

if TYPE_CHECKING:
    from rich.table import Table

    from deepseek.planning import Plan


def plan(
    preset: Annotated[str, typer.Option(help="Preset of ModelConfig.")] = "deepseek-8b",
    config: Annotated[
        Path | None, typer.Option(help="Configuration of `deepseek pretrain`, instead of --preset.")
    ] = None,
    gpus: Annotated[int, typer.Option(min=1, help="Number of devices.")] = 8,
    device: Annotated[str, typer.Option(help="Type of device: a100, h100 or h200.")] = "h100",
    tokens: Annotated[
        float | None, typer.Option(help="Training tokens; default: the config's, or 300 billion.")
    ] = None,
    rows_per_gpu: Annotated[
        int, typer.Option(min=1, help="Rows of full context length per device and step.")
    ] = 2,
    recompute: Annotated[
        bool, typer.Option(help="Recompute activations in the backward pass to save memory.")
    ] = True,
    deepspeed: Annotated[
        Path | None, typer.Option(help="Also write a DeepSpeed ZeRO-3 configuration here.")
    ] = None,
) -> None:
    """Print estimates of memory, traffic and time of a training run, and its scaling table.
    Nothing is allocated.
    """
    from rich.console import Console

    from deepseek.checkpoint.store import write_json
    from deepseek.planning import deepspeed_config
    from deepseek.planning import plan as make
    from deepseek.train.jobs.pretrain_arguments import PretrainArguments

    settings = PretrainArguments.read(config) if config else None
    model = settings.model_config_for(settings.vocab_size, 0) if settings else preset
    num_tokens = tokens or (settings.tokens if settings else 300e9)
    estimate = make(
        model,
        gpus,
        device=device,
        tokens=num_tokens,
        rows_per_gpu=rows_per_gpu,
        recompute=recompute,
    )
    shape = estimate.shape
    scale = estimate.at(gpus)
    echo(
        f"{shape.parameters:,} parameters, {shape.active:,} active per token; "
        f"{num_tokens:,.0f} tokens on {gpus} {device}: "
        f"{estimate.days:,.1f} days, {estimate.days * 24 * gpus:,.0f} device hours"
    )
    if scale.memory > estimate.device.memory:
        echo(
            f"does not fit: {scale.memory / 1e9:.0f} GB needed, "
            f"{estimate.device.memory / 1e9:.0f} GB on each device"
        )
    Console().print(_scaling_table(estimate))
    if deepspeed:
        steps = max(1, round(num_tokens / (estimate.tokens_per_gpu * gpus)))
        zero_config = deepspeed_config(
            gpus=gpus,
            rows_per_gpu=rows_per_gpu,
            learning_rate=3e-4,
            final_learning_rate=1e-5,
            warmup_steps=max(1, steps // 20),
            steps=steps,
            weight_decay=0.1,
        )
        write_json(deepspeed, zero_config)
        echo(deepspeed)


def _scaling_table(estimate: "Plan") -> "Table":
    """Return a table of the needs of one step for growing numbers of devices."""
    from rich.table import Table

    table = Table(
        "devices", "memory GB", "gathered GB", "reduced GB", "seconds per step", "efficiency"
    )
    for scale in estimate.table():
        table.add_row(
            str(scale.gpus),
            f"{scale.memory / 1e9:.1f}",
            f"{scale.gathered / 1e9:.2f}",
            f"{scale.reduced / 1e9:.2f}",
            f"{scale.seconds:.2f}",
            f"{scale.efficiency:.0%}",
        )
    return table
