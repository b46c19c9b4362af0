"""Divergence of exported GGUF files, as llama.cpp runs them, from the model in fp32.

    python benchmarks/gguf_export.py TEXT... [--base smollm2-135m] [--dtypes bfloat16 q8_0]
        [--rows 8] [--llama PYTHON] [--json FILE]

TEXT are folders, .jsonl or .parquet files; rows of 256 tokens are taken from them. For each dtype,
two mean Kullback-Leibler divergences from the model's own predictions are printed, in nats: that of
the file's weights in fp32 arithmetic ("weights"), and that of llama.cpp, which on a CPU may also
quantise the activations to 8 bits ("llama.cpp"). llama.cpp runs in a Python that has
llama-cpp-python (`--llama`, or this one if it has it).
"""

import argparse
import tempfile
from pathlib import Path

import numpy as np
import torch
from divergence import divergence
from entry import existing_path, run_main
from int8_quality import rows
from llama_logits import llama_predictions
from results import write
from turns import add_llama

import deepseek
from deepseek.export.gguf import ENCODINGS, export_gguf

ROW = 256


def predictions(base: str | Path, ids: np.ndarray) -> torch.Tensor:
    """Return a model's log probabilities in fp32 after every token, `[rows, ROW, vocabulary]`."""
    model = deepseek.load(str(base), dtype="float32").model
    with torch.inference_mode():
        return torch.stack(
            [model(torch.tensor(row)[None]).logits[0].float().log_softmax(-1) for row in ids]
        )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "texts", nargs="+", type=existing_path, help="folders, .jsonl or .parquet files"
    )
    parser.add_argument("--base", default="smollm2-135m", help="the model to export")
    parser.add_argument("--dtypes", nargs="+", default=["bfloat16", "q8_0"], choices=ENCODINGS)
    parser.add_argument("--rows", type=int, default=8, help="rows of 256 tokens")
    add_llama(parser)
    parser.add_argument("--json", type=Path, help="file to write the figures to")
    options = parser.parse_args()
    if options.llama is None:
        parser.error("llama.cpp is not there; name a Python that has it with --llama")
    tokenizer = deepseek.load(options.base).tokenizer
    ids = np.array([row[:ROW] for row in rows(tokenizer, options.texts, options.rows)])
    wanted = predictions(options.base, ids)
    figures: dict[str, dict[str, float]] = {}
    with tempfile.TemporaryDirectory() as scratch:
        for dtype in options.dtypes:
            path = Path(scratch) / f"{dtype}.gguf"
            export_gguf(options.base, path, dtype)
            theirs = llama_predictions(options.llama, path, ids, Path(scratch))
            figures[dtype] = {
                "bytes": path.stat().st_size,
                "weights": divergence(wanted, predictions(path, ids)),
                "llama.cpp": divergence(wanted, theirs),
            }
            print(
                f"{dtype:10} {figures[dtype]['bytes'] / 1e6:7.1f} MB  "
                f"weights {figures[dtype]['weights']:.1e}  "
                f"llama.cpp {figures[dtype]['llama.cpp']:.1e}"
            )
    if options.json:
        write(options.json, figures)


if __name__ == "__main__":
    run_main(main)
