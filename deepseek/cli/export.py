"""`deepseek export`: export a model to other runtimes."""

from pathlib import Path
from typing import Annotated

import typer

from deepseek.cli.options import Experts, expert_packs
from deepseek.cli.output import echo


def export(
    model: Annotated[
        str, typer.Argument(help="Model: a known name, a folder, a GGUF file or a hub id.")
    ],
    out: Annotated[
        Path, typer.Argument(help="Folder to write (gguf: the file); it must not exist yet.")
    ],
    to: Annotated[
        str,
        typer.Option(
            help="onnx, openvino, tensorrt, hf (a folder for stock transformers), or gguf (a file "
            "for llama.cpp)."
        ),
    ],
    experts: Experts = "",
    dtype: Annotated[
        str,
        typer.Option(
            help="Type of the weights, such as int8 for openvino, q8_0 for gguf; "
            "default: the format's."
        ),
    ] = "",
) -> None:
    """Export a model to another runtime's format, run the result there, and compare its logits with
    the original model's.
    """
    from deepseek.export.export import export_model
    from deepseek.train.loop.progress import ProgressBar

    packs = expert_packs(experts, model)
    with ProgressBar() as progress:
        difference = export_model(
            model, out, to, dtype=dtype or None, experts=packs, progress=progress
        )
    echo(f"{out}: logits differ by at most {difference:.1e} of the largest logit")
