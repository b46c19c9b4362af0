"""`deepseek quantize`: quantise a model's weights to 8 bits or fewer."""

from pathlib import Path
from typing import Annotated

import typer

from deepseek.checkpoint.files import new_path
from deepseek.cli.options import Device, DryRun
from deepseek.cli.output import echo
from deepseek.errors import ConfigError


def quantize(
    model: Annotated[
        str, typer.Argument(help="Model: a known name, a folder, a GGUF file or a hub id.")
    ],
    out: Annotated[Path, typer.Option(help="Folder to write; it must not exist yet.")],
    bits: Annotated[
        float,
        typer.Option(
            help="Mean number of bits of the layers' weights, 4 to 8. Between the two, the "
            "matrices that need them most have 8. The embedding and the head always have 8."
        ),
    ] = 8,
    device: Device = "auto",
    dry_run: DryRun = False,
) -> None:
    """Quantise a model's weight matrices to 8 bits or fewer, compare its predictions with the
    original, and write it.

    The model is read and written layer by layer, so that it need not fit into memory. If
    interrupted, the same command goes on after the last finished layer.
    """
    if not 4 <= bits <= 8:  # NaN too
        raise ConfigError(f"--bits {bits:g} must be from 4 to 8.")
    out = new_path(out)
    from deepseek.device.choose import choose_device
    from deepseek.export.estimate import estimate_quantisation
    from deepseek.export.quantize import quantize_model
    from deepseek.train.loop.progress import ProgressBar

    choose_device(device)  # a wrong one is told before anything is loaded
    if dry_run:
        with ProgressBar() as progress:
            estimate = estimate_quantisation(
                model, out, bits=bits, device=device, progress=progress
            )
        echo(f"{estimate}")
        return
    with ProgressBar() as progress:
        result = quantize_model(model, out, bits=bits, device=device, progress=progress)
    echo(
        f"{out}: {result.num_bytes / 1e6:.1f} MB, {result.ratio:.3f} of fp32; "
        f"predictions differ by {result.divergence:.5f} nats per token"
    )
