"""Large models on a small machine: time and peak memory from the checkpoint to the answer.

    python benchmarks/scale.py [1.2b|3b|8b|qwen3-8b|tiny] [--bits 8 4] [--folder DIR] [--json FILE]

A checkpoint of the given shape with random bf16 weights is written shard by shard. Every stage then
runs in a process of its own, whose peak memory is reported beside what Python and the libraries
take before anything is loaded: `quantise`; `serve`, which loads the quantised model and answers;
and `plug`, an expert of the last three layers. The tokenizer is that of SmolLM2.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from results import write

from deepseek.checkpoint.hub import resolve
from deepseek.checkpoint.stream import TensorWriter
from deepseek.device.choose import CPU
from deepseek.device.memory import peak_memory
from deepseek.engine.request import Request
from deepseek.engine.sampler import Sampling
from deepseek.engine.start import start_engine
from deepseek.export.quantize import quantize_model
from deepseek.model.config import ModelConfig
from deepseek.model.experts import ExpertModule
from deepseek.model.transformer import DeepSeekModel
from deepseek.packs.pack import write_pack
from deepseek.text.tokenizer import load_tokenizer

SHAPES: dict[str, dict[str, Any]] = {
    "tiny": {
        "hidden_size": 256,
        "intermediate_size": 768,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 64,
        "vocab_size": 49152,
    },
    "1.2b": {
        "hidden_size": 2048,
        "intermediate_size": 8192,
        "num_hidden_layers": 16,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": 64,
        "vocab_size": 128256,
    },
    "3b": {
        "hidden_size": 3072,
        "intermediate_size": 8192,
        "num_hidden_layers": 28,
        "num_attention_heads": 24,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "vocab_size": 128256,
    },
    "8b": {
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "vocab_size": 128256,
        "tie_word_embeddings": False,
    },
    "qwen3-8b": {
        "hidden_size": 4096,
        "intermediate_size": 12288,
        "num_hidden_layers": 36,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "vocab_size": 151936,
        "tie_word_embeddings": False,
        "qk_norm": "head",
    },
}

PROMPT, ANSWER = 512, 64
CACHE = 1 << 28
PACK_WIDTH = 256


def make(shape: str, folder: Path) -> Path:
    """Write a random checkpoint, one tensor at a time."""
    config = ModelConfig(max_position_embeddings=4096, **SHAPES[shape])
    folder.mkdir()
    with torch.device("meta"):
        model = DeepSeekModel(config)
    generator = torch.Generator().manual_seed(0)
    writer = TensorWriter(folder)
    for name, tensor in model.own_tensors().items():
        if name.endswith("norm.weight"):
            writer.add({name: torch.ones(tensor.shape, dtype=torch.bfloat16)})
        else:
            values = torch.empty(tensor.shape, dtype=torch.bfloat16)
            writer.add({name: values.normal_(0, 0.02, generator=generator)})
    writer.close()
    config.save_pretrained(folder)
    load_tokenizer(resolve("smollm2-135m")).save_pretrained(folder)
    return folder


def quantise(source: Path, out: Path, bits: int) -> dict[str, float]:
    start = time.perf_counter()
    result = quantize_model(source, out, bits=bits)
    return {
        "seconds": time.perf_counter() - start,
        "bytes": result.num_bytes,
        "share of fp32": result.ratio,
        "divergence": result.divergence,
    }


def serve(folder: Path) -> dict[str, float]:
    start = time.perf_counter()
    with start_engine(folder, cache_bytes=CACHE) as engine:
        ready = time.perf_counter() - start
        figures: dict[str, float] = {
            "ready seconds": ready,
            "packed bytes": getattr(engine.runner, "weight_bytes", 0),
            "peak when ready": peak_memory(CPU),
        }
        prompt = tuple(torch.randint(3, 40_000, (PROMPT,)).tolist())
        times = [time.perf_counter()]
        events = engine.submit(Request(prompt, Sampling(ANSWER), ignore_end=True))
        times += [time.perf_counter() for _ in events]
        figures["prefill tokens/s"] = PROMPT / (times[1] - times[0])
        figures["decode tokens/s"] = (len(times) - 2) / (times[-1] - times[1])
    return figures


def plug(folder: Path) -> dict[str, float]:
    with start_engine(folder, cache_bytes=CACHE) as engine, tempfile.TemporaryDirectory() as packs:
        layers = len(engine.model.layers)
        module = ExpertModule.beside(
            engine.model.layers, "one", range(layers - 3, layers), PACK_WIDTH
        )
        path = Path(packs) / "one.safetensors"
        pack = module.requires_grad_(False).to_pack(engine.model.experts.base, "Apache-2.0")
        write_pack(path, pack)
        start = time.perf_counter()
        engine.plug(path)
        return {"plug milliseconds": 1000 * (time.perf_counter() - start)}


STAGES = {"quantise": quantise, "serve": serve, "plug": plug}


def child(stage: str, *arguments: Any) -> dict[str, float]:
    """Run a stage in a process of its own; return its figures with its peak memory."""
    command = [sys.executable, __file__, "--stage", stage, *map(str, arguments)]
    lines = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout
    figures: dict[str, float] = json.loads(lines.splitlines()[-1])
    return figures


def run_stage(stage: str, *arguments: str) -> None:
    before = peak_memory(CPU)
    values = [int(value) if value.isdecimal() else Path(value) for value in arguments]
    figures = STAGES[stage](*values)  # type: ignore[operator]
    print(json.dumps(figures | {"peak before": before, "peak": peak_memory(CPU)}))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("shape", nargs="?", default="1.2b", choices=SHAPES)
    parser.add_argument("--bits", type=int, nargs="+", default=[8, 4])
    parser.add_argument("--folder", type=Path, help="where to write the models; default: temporary")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    figures: dict[str, Any] = {"shape": options.shape}
    with tempfile.TemporaryDirectory(dir=options.folder) as place:
        source = make(options.shape, Path(place) / "plain")
        for bits in options.bits:
            out = Path(place) / f"int{bits}"
            stages = {"quantise": child("quantise", source, out, bits)}
            stages |= {stage: child(stage, out) for stage in ("serve", "plug")}
            served = stages["serve"]
            served["peak over packed bytes"] = (
                served["peak when ready"] - served["peak before"]
            ) / served["packed bytes"]
            figures[f"{bits} bits"] = stages
    print(json.dumps(figures, indent=1))
    if options.json:
        write(options.json, figures)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--stage"]:
        run_stage(*sys.argv[2:])
    else:
        main()
