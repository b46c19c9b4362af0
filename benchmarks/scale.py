"""Large models on a small machine: time and peak memory from checkpoint to answer.

    python benchmarks/scale.py [1.2b|3b|8b|tiny] [--bits 8 4] [--nearest 4]
        [--formats Q8_0 Q4_0 Q4_K_M] [--llama PYTHON] [--rounds 3] [--train-tokens 4096]
        [--work FOLDER] [--json FILE]

A checkpoint of the given shape with random bf16 weights is written shard by shard. Every stage then
runs in its own process, and its peak memory is reported beside that of Python and the libraries
before anything is loaded: `quantise`, or `rounded` for the bits of `--nearest` (quantised without
calibration, in minutes instead of an hour); `serve`, which loads the quantised model and answers;
`plug`, a random expert on the last three layers; and `train`, an expert trained on this
repository's documentation on the first quantised model, with a tenth of the public text
(`--train-tokens 0`: not run). The tokenizer is SmolLM2's.

`beside` compares each quantised model with llama.cpp on the same weights, in its own formats with
as many bits (`--formats`), if a Python with llama-cpp-python is named or installed. The sides take
turns as in `benchmarks/decode.py`: a prefill of 512 tokens, then 64 tokens one by one. `memory` is
the rate at which the threads read 2 GiB, the best of eight times, and `share of memory` is the rate
at which a side reads weights while decoding, relative to that.

Models and the figures of each stage stay in `--work`, so that an interrupted run can resume.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from contextlib import redirect_stdout
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from decode import LLAMA, engine, rival, write_gguf
from entry import run_main
from llama_logits import llama_quantise
from results import ROOT, resumed, write
from turns import Figures, Turn, add_llama, check_rivals, in_turn, medians, usual_waiting

from deepseek.checkpoint.hub import resolve
from deepseek.checkpoint.store import atomic_folder, read_object, write_json
from deepseek.checkpoint.stream import TensorWriter
from deepseek.device.choose import CPU
from deepseek.device.memory import peak_memory
from deepseek.engine.request import Request
from deepseek.engine.sampler import Sampling
from deepseek.engine.start import start_engine
from deepseek.errors import ConfigError
from deepseek.export.calibrate import quantised
from deepseek.export.quantize import quantize_model
from deepseek.model.config import ModelConfig
from deepseek.model.experts import ExpertModule
from deepseek.model.pretrained import load_stored
from deepseek.model.quantised import stored_form
from deepseek.model.stored import stored_matrices
from deepseek.model.transformer import DeepSeekModel
from deepseek.packs.pack import read_pack, write_pack
from deepseek.text.tokenizer import load_tokenizer
from deepseek.train.gates import background, conversations, public_text
from deepseek.train.jobs.expert import train_expert

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
}

SETTINGS = ("shape", "nearest", "formats", "train_tokens", "rounds", "threads")
"""Options that affect a stage's figures."""

PROMPT, ANSWER = 512, 64
CACHE = 1 << 28
PACK_WIDTH = 256
READ_BYTES, READS = 1 << 31, 8

FEWER: dict[Any, dict[str, int]] = {
    public_text: {
        "ROWS_PER_KIND": 8,
        "SAMPLES_PER_OPENING": 1,
        "SAMPLED_ROWS": len(public_text.OPENINGS),
    },
    conversations: {"PAIR_STRIDE": 80, "INVENTED": 4},
    background: {
        "SAMPLED_ROWS": len(public_text.OPENINGS),
        "FILES": 80,
        "PACKAGE_FILES": 4,
        "PACKAGE_PASSAGES": 1,
    },
}
"""Settings for about a tenth of the public text of a base."""


def make(shape: str, folder: Path) -> None:
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


def quantise(source: Path, out: Path, bits: int) -> dict[str, float]:
    start = time.perf_counter()
    result = quantize_model(source, out, bits=bits)
    return {
        "seconds": time.perf_counter() - start,
        "bytes": result.num_bytes,
        "share of fp32": result.ratio,
        "divergence": result.divergence,
    }


def rounded(source: Path, out: Path, bits: int) -> dict[str, float]:
    """Quantise weights to the nearest value, without calibration, in the format of calibrated ones;
    head and embedding have 8 bits.
    """
    start = time.perf_counter()
    model = load_stored(DeepSeekModel, source, "float32")
    with atomic_folder(out) as folder:
        writer = TensorWriter(folder)
        for matrix in stored_matrices(model).values():
            own = bits if matrix.name.startswith("layers.") else 8
            writer.add(stored_form(matrix.name, quantised(matrix, None, own)))
        writer.add(model.own_tensors())
        writer.close()
        model.config.save_pretrained(folder)
        load_tokenizer(source).save_pretrained(folder)
    return {"seconds": time.perf_counter() - start, "bytes": writer.num_bytes}


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


def train(folder: Path, tokens: int) -> dict[str, float]:
    """Train an expert on the last three layers, in a separate home, with a tenth of the public
    text: all of it takes hours for 8B.
    """
    for module, fewer in FEWER.items():
        for name, count in fewer.items():
            setattr(module, name, count)
    with tempfile.TemporaryDirectory(dir=folder.parent) as own_home:
        os.environ["DEEPSEEK_HOME"] = own_home
        texts = Path(own_home) / "texts"
        shutil.copytree(ROOT / "docs", texts, ignore=shutil.ignore_patterns("*.py", "images"))
        start = time.perf_counter()
        with redirect_stdout(sys.stderr):
            pack = train_expert(
                str(folder),
                name="docs",
                from_folder=texts,
                tokens=tokens,
                epochs=1,
                held_out_tokens=1024,
                width=PACK_WIDTH,
            )
        metric = read_pack(pack).manifest.metrics["held-out"]
    return {
        "seconds": time.perf_counter() - start,
        "tokens": tokens,
        "held-out loss": metric.after,
        "held-out loss of the base": metric.before,
    }


def in_bf16(source: Path, out: Path) -> dict[str, float]:
    """Write the checkpoint as a bf16 GGUF file, from which llama.cpp quantises its formats."""
    write_gguf(DeepSeekModel.from_pretrained(source, dtype="bfloat16"), out, "BF16")
    return {"bytes": out.stat().st_size}


def memory() -> Turn:
    """Return a turn: bytes per second that the threads read, in huge pages like packed weights."""
    values = torch.from_numpy(np.ones(READ_BYTES // 4, np.float32))

    def turn() -> Figures:
        seconds = []
        for _ in range(READS):
            start = time.perf_counter()
            values.sum()
            seconds.append(time.perf_counter() - start)
        return {"bytes/s": READ_BYTES / min(seconds)}

    return turn


def beside(llama: Path, threads: int, rounds: int, *models: Path) -> dict[str, Any]:
    """Return the speeds of models, measured in turn: our folders and llama.cpp's files."""
    torch.set_num_threads(threads)
    turns: dict[str, Turn] = {"memory": memory()}
    sizes = {}
    for path in models:
        if path.suffix == ".gguf":
            turns[path.stem] = rival(llama, LLAMA, path, threads)
            sizes[path.stem] = path.stat().st_size
        else:
            runner = start_engine(path, cache_bytes=CACHE).runner
            turns[path.name] = engine(runner)
            sizes[path.name] = getattr(runner, "weight_bytes", 0)
    found = in_turn(turns, rounds)
    rates = medians(found)
    bandwidth = rates["memory"]["bytes/s"]
    shares = {name: rates[name]["decode"] * size / bandwidth for name, size in sizes.items()}
    return {"medians": rates, "bytes": sizes, "share of memory": shares, "rounds": found}


STAGES = {
    "quantise": quantise,
    "rounded": rounded,
    "serve": serve,
    "plug": plug,
    "train": train,
    "in_bf16": in_bf16,
    "beside": beside,
}


class Work:
    """A folder in which every stage runs once.

    Args:
        folder: the folder.
        settings: what the figures depend on; a folder with other settings is refused.
    """

    def __init__(self, folder: Path, settings: dict[str, Any]) -> None:
        self.folder = resumed(folder)
        known = folder / "settings.json"
        if not known.exists():
            write_json(known, settings)
        elif read_object(known) != settings:
            raise ConfigError(f"{folder} has figures of other settings; name another --work.")

    def run(self, stage: str, name: str, *arguments: Any) -> dict[str, Any]:
        """Run a stage in its own process, unless it ran before; return its figures with its peak
        memory.

        Arguments that are functions are called only if the stage has to run.
        """
        kept = self.folder / f"{stage}-{name}.json"
        if not kept.exists():
            print(stage, name, file=sys.stderr, flush=True)
            values = [value() if callable(value) else value for value in arguments]
            command = [sys.executable, __file__, "--stage", stage, *map(str, values)]
            done = subprocess.run(
                command, stdout=subprocess.PIPE, text=True, check=True, env=usual_waiting()
            )
            kept.write_text(done.stdout.splitlines()[-1])
        figures: dict[str, Any] = json.loads(kept.read_text())
        return figures


def run_stage(stage: str, *arguments: str) -> None:
    before = peak_memory(CPU)
    values = [int(value) if value.isdecimal() else Path(value) for value in arguments]
    figures = STAGES[stage](*values)  # type: ignore[operator]
    print(json.dumps(figures | {"peak before": before, "peak": peak_memory(CPU)}))


def checkpoint(shape: str, work: Work) -> Path:
    """Return the checkpoint; create it on the first call."""
    folder = work.folder / "plain"
    if not folder.exists():
        unfinished = work.folder / "unfinished"
        shutil.rmtree(unfinished, ignore_errors=True)
        make(shape, unfinished)
        unfinished.rename(folder)
    return folder


def in_format(form: str, options: argparse.Namespace, work: Work) -> Path:
    """Return the checkpoint in a llama.cpp format; create it on the first call."""
    path = work.folder / f"{form}.gguf"
    if not path.exists():
        plain = work.folder / "BF16.gguf"
        work.run("in_bf16", "plain", partial(checkpoint, options.shape, work), plain)
        llama_quantise(options.llama, plain, path, form)
    return path


def measure(options: argparse.Namespace, work: Work) -> dict[str, Any]:
    """Return the figures of all stages."""
    source = partial(checkpoint, options.shape, work)
    figures: dict[str, Any] = {"shape": options.shape}
    for bits in options.bits:
        name = f"{bits} bits"
        out = work.folder / f"int{bits}"
        first = "rounded" if bits in options.nearest else "quantise"
        stages = {first: work.run(first, name, source, out, bits)}
        stages |= {stage: work.run(stage, name, out) for stage in ("serve", "plug")}
        served = stages["serve"]
        served["peak over packed bytes"] = (
            served["peak when ready"] - served["peak before"]
        ) / served["packed bytes"]
        if options.train_tokens and bits == options.bits[0]:
            stages["train"] = work.run("train", name, out, options.train_tokens)
        if options.llama:
            forms = [form for form in options.formats if form.startswith("Q8") == (bits > 6)]
            files = [partial(in_format, form, options, work) for form in forms]
            arguments = (options.llama, options.threads, options.rounds, out, *files)
            stages["beside"] = work.run("beside", name, *arguments)
        figures[name] = stages
    return figures


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("shape", nargs="?", default="1.2b", choices=SHAPES)
    parser.add_argument("--bits", type=int, nargs="+", default=[8, 4])
    parser.add_argument("--nearest", type=int, nargs="*", default=[], help="bits not calibrated")
    parser.add_argument("--formats", nargs="*", default=["Q8_0", "Q4_0", "Q4_K_M"])
    parser.add_argument("--train-tokens", type=int, default=4096)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--work", type=Path, help="what is made stays here; default: temporary")
    parser.add_argument("--json", type=Path)
    add_llama(parser)
    options = parser.parse_args()
    check_rivals(parser, options.json, llama=options.llama)
    with tempfile.TemporaryDirectory() as temporary:
        settings = {name: getattr(options, name) for name in SETTINGS}
        work = Work(options.work or Path(temporary), settings)
        figures = measure(options, work)
    print(json.dumps(figures, indent=1))
    if options.json:
        write(options.json, figures)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--stage"]:
        run_stage(*sys.argv[2:])
    else:
        run_main(main)
