"""`deepseek plan`: estimate what training or inference needs on a number of devices."""

import math
from pathlib import Path
from typing import Annotated, Literal

import typer

from deepseek.checkpoint.files import writable_file
from deepseek.cli.messages import about_options
from deepseek.cli.options import Json, refuse_ignored
from deepseek.errors import ConfigError

OPTIONS = {"rows_per_gpu": "--batch", "model": "MODEL"} | {
    name: f"--{name}"
    for name in (
        "attention",
        "batch",
        "bits",
        "device",
        "dtype",
        "gpus",
        "length",
        "precision",
        "tokens",
        "trained",
        "zero",
    )
}
"""Options by the argument of `deepseek.plan` that they become."""

NOTHING_FROZEN = "quantises frozen weights (--trained below 1), and all are trained"
"""Why `--bits` is refused."""

Training = "Training"
Inference = "Inference"
Hardware = "Hardware"


def plan(
    model: Annotated[
        str,
        typer.Argument(
            help="deepseek-nano, deepseek-29m, deepseek-1b, deepseek-8b, deepseek-175b, or a model "
            "on this machine: its name or folder; default: deepseek-8b."
        ),
    ] = "",
    config: Annotated[
        Path | None, typer.Option(help="Configuration of `deepseek pretrain`, instead of a model.")
    ] = None,
    profile: Annotated[
        str,
        typer.Option(
            help="Fields of the model and settings of inference for a use: code, long or small; "
            "options override them."
        ),
    ] = "",
    inference: Annotated[
        bool, typer.Option("--inference", help="Plan inference; default: training.")
    ] = False,
    gpus: Annotated[
        int | None, typer.Option(min=1, help="Number of devices; default: 8, in inference 1.")
    ] = None,
    length: Annotated[
        int | None, typer.Option(min=1, help="Tokens per row; default: the longest context.")
    ] = None,
    batch: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="Rows per device and step, sequences at a time in inference; default: 2, in "
            "inference 1, with the profile code 8.",
        ),
    ] = None,
    attention: Annotated[
        Literal["exact", "flash", "lsh"] | None,
        typer.Option(help="exact holds all scores; default: flash, or lsh if the config says so."),
    ] = None,
    bits: Annotated[
        int | None,
        typer.Option(
            help="8 or 4: quantised weights, in training the frozen ones; default: as the model "
            "has them."
        ),
    ] = None,
    precision: Annotated[
        str | None,
        typer.Option(help="mixed, float32 or bfloat16; default: mixed.", rich_help_panel=Training),
    ] = None,
    zero: Annotated[
        int | None,
        typer.Option(min=0, max=3, help="Stage of ZeRO; default: 3.", rich_help_panel=Training),
    ] = None,
    trained: Annotated[
        float | None,
        typer.Option(help="Share of trained parameters; default: 1.", rich_help_panel=Training),
    ] = None,
    tokens: Annotated[
        float | None,
        typer.Option(
            help="Training tokens; default: the config's, or 300 billion.", rich_help_panel=Training
        ),
    ] = None,
    recompute: Annotated[
        bool | None,
        typer.Option(
            help="Recompute activations in the backward pass to save memory; default: yes.",
            rich_help_panel=Training,
        ),
    ] = None,
    deepspeed: Annotated[
        Path | None,
        typer.Option(
            help="Also write a DeepSpeed ZeRO-3 configuration here.", rich_help_panel=Training
        ),
    ] = None,
    dtype: Annotated[
        str | None,
        typer.Option(
            help="bfloat16, float16 or float32; default: bfloat16.", rich_help_panel=Inference
        ),
    ] = None,
    device: Annotated[
        str,
        typer.Option(
            help="a100, h100, h200 or laptop; default: h100, with the profile small laptop.",
            rich_help_panel=Hardware,
        ),
    ] = "",
    memory: Annotated[
        float | None, typer.Option(help="GB of each device.", rich_help_panel=Hardware)
    ] = None,
    teraflops: Annotated[
        float | None, typer.Option(help="Its dense bf16 TFLOP/s.", rich_help_panel=Hardware)
    ] = None,
    bandwidth: Annotated[
        float | None,
        typer.Option(help="GB/s of its memory, for inference.", rich_help_panel=Hardware),
    ] = None,
    as_json: Json = False,
) -> None:
    """Print estimates of parameters, memory by part, and time of a training run with its scaling
    table, or of inference. Nothing is allocated.
    """
    from deepseek.cli.plan_options import ModelChoice, TrainingOptions, only_given, starting_options
    from deepseek.cli.plan_tables import print_inference, print_training

    if model and config:
        raise ConfigError(f"{model} and --config both name the model; give one of them.")
    check_possible(memory=memory, teraflops=teraflops, bandwidth=bandwidth, tokens=tokens)
    is_inference = inference or bool(profile)
    if is_inference:
        refuse_ignored(
            "configures training, not --inference or --profile",
            zero=zero,
            precision=precision,
            deepspeed=deepspeed,
            tokens=tokens,
            trained=trained,
            recompute=recompute or None,
            no_recompute=True if recompute is False else None,
        )
    else:
        refuse_ignored("goes with --inference or --profile", dtype=dtype, bandwidth=bandwidth)
        refuse_ignored(NOTHING_FROZEN, bits=bits if trained in (None, 1) else None)
    if deepspeed:
        refuse_ignored(
            "contradicts --deepspeed, which writes ZeRO stage 3 in mixed precision",
            zero=None if zero == 3 else zero,
            precision=None if precision == "mixed" else precision,
        )
        deepspeed = writable_file(deepspeed)
    options = starting_options(profile, inference).overridden(
        model=model,
        device=device,
        gpus=gpus,
        batch=batch,
        length=length,
        attention=attention,
        bits=bits,
    )
    with about_options(OPTIONS):
        choice = ModelChoice.of(options.model, config, options.fields)
        has_frozen = is_inference or trained not in (None, 1)
        options = options.overridden(bits=choice.bits_to_plan(bits, has_frozen))
        hardware = options.hardware(memory, teraflops, bandwidth)
        if is_inference:
            print_inference(choice, options, hardware, dtype or "bfloat16", as_json)
            return
        training_options = {
            "tokens": tokens,
            "recompute": recompute,
            "precision": precision,
            "zero": zero,
            "trained": trained,
        }
        training = TrainingOptions(**{"tokens": choice.tokens} | only_given(training_options))
        print_training(choice, options, hardware, training, deepspeed, as_json)


def check_possible(**amounts: float | None) -> None:
    """Refuse amounts that no hardware and no training has.

    Args:
        amounts: values by the name of the option; None: not given.

    Raises:
        ConfigError: one of them is not finite, or not more than 0.
    """
    for name, amount in amounts.items():
        if amount is not None and not 0 < amount < math.inf:
            raise ConfigError(f"--{name} {amount:g} is impossible; give a number of more than 0.")
