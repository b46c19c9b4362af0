"""`deepseek quantize`: quantise a model's weights to 8 bits."""

from pathlib import Path
from typing import Annotated

import typer

from deepseek.cli.options import Device
from deepseek.cli.output import echo


def quantize(
    model: Annotated[
        str, typer.Argument(help="Model: a known name, a folder, a GGUF file or a hub id.")
    ],
    out: Annotated[Path, typer.Option(help="Folder to write; it must not exist yet.")],
    device: Device = "auto",
) -> None:
    """Quantise a model's weight matrices to 8 bits, compare its predictions with the original, and
    write it.
    """
    from deepseek.device.choose import choose_device
    from deepseek.export.quantize import quantize_model
    from deepseek.train.loop.progress import ProgressBar

    choose_device(device)  # a wrong one is told before anything is loaded
    with ProgressBar() as progress:
        result = quantize_model(model, out, device=device, progress=progress)
    echo(
        f"{out}: {result.num_bytes / 1e6:.1f} MB, {result.ratio:.3f} of fp32; "
        f"predictions differ by {result.divergence:.5f} nats per token"
    )
