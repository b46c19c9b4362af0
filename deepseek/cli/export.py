"""`deepseek export`: a model for other runtimes."""

from pathlib import Path
from typing import Annotated

import typer

from deepseek.cli.options import Experts, expert_packs


def export(
    model: Annotated[str, typer.Argument(help="Model: a known name, a folder or a hub id.")],
    out: Annotated[Path, typer.Argument(help="Folder to write; it must not exist yet.")],
    to: Annotated[
        str,
        typer.Option(
            help="onnx, openvino, tensorrt, or hf: a folder that stock transformers reads."
        ),
    ],
    experts: Experts = "",
    dtype: Annotated[
        str, typer.Option(help="Of the weights, such as int8 for openvino; default: the format's.")
    ] = "",
) -> None:
    """Write a model in another runtime's format, run what was written, and compare its logits with
    the model's own.
    """
    from deepseek.export.export import export_model

    found = export_model(model, out, to, dtype=dtype or None, experts=expert_packs(experts, model))
    print(f"{out}: logits differ from the model's own by {found:.1e} of the largest at most")
