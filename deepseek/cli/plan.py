"""`deepseek plan`: what a training run would need on so many devices."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from rich.table import Table

    from deepseek.planning import Plan


def plan(
    preset: Annotated[str, typer.Option(help="A preset of ModelConfig.")] = "deepseek-8b",
    config: Annotated[
        Path | None, typer.Option(help="A configuration of `deepseek pretrain` instead.")
    ] = None,
    gpus: Annotated[int, typer.Option(min=1, help="Devices.")] = 8,
    device: Annotated[str, typer.Option(help="a100, h100 or h200.")] = "h100",
    tokens: Annotated[
        float | None, typer.Option(help="To train on; default: 300 billion, or the config's.")
    ] = None,
    rows_per_gpu: Annotated[
        int, typer.Option(min=1, help="Rows of the longest context a device takes a step.")
    ] = 2,
    recompute: Annotated[
        bool, typer.Option(help="Compute blocks again in the backward pass to save memory.")
    ] = True,
    deepspeed: Annotated[
        Path | None, typer.Option(help="Also write a DeepSpeed ZeRO-3 configuration here.")
    ] = None,
) -> None:
    """Print memory, traffic, time and the scaling table of a run; nothing is allocated."""
    from rich.console import Console

    from deepseek.checkpoint.store import write_json
    from deepseek.planning import deepspeed_config
    from deepseek.planning import plan as make
    from deepseek.train.jobs.pretrain_arguments import PretrainArguments

    settings = PretrainArguments.read(config) if config else None
    model = settings.model_config_for(settings.vocab_size, 0) if settings else preset
    wanted = tokens or (settings.tokens if settings else 300e9)
    made = make(
        model, gpus, device=device, tokens=wanted, rows_per_gpu=rows_per_gpu, recompute=recompute
    )
    shape = made.shape
    last = made.at(gpus)
    print(
        f"{shape.parameters:,} parameters, {shape.active:,} active a token; {wanted:,.0f} tokens on {gpus} {device}: "
        f"{made.days:,.1f} days, {made.days * 24 * gpus:,.0f} device hours"
    )
    if last.memory > made.device.memory:
        print(
            f"does not fit: {last.memory / 1e9:.0f} GB of {made.device.memory / 1e9:.0f} GB on each device"
        )
    Console().print(_scaling_table(made))
    if deepspeed:
        steps = max(1, round(wanted / (made.tokens_per_gpu * gpus)))
        made_config = deepspeed_config(
            gpus=gpus,
            rows_per_gpu=rows_per_gpu,
            learning_rate=3e-4,
            final_learning_rate=1e-5,
            warmup_steps=max(1, steps // 20),
            steps=steps,
            weight_decay=0.1,
        )
        write_json(deepspeed, made_config)
        print(deepspeed)


def _scaling_table(made: "Plan") -> "Table":
    """Return the table of what a step needs on ever more devices."""
    from rich.table import Table

    table = Table(
        "devices", "memory GB", "gathered GB", "reduced GB", "seconds a step", "efficiency"
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
