"""Decoding and prefill on a GPU against `transformers`, and speed of training and plugging experts.

    python benchmarks/gpu.py [--device cuda] [--models smollm2-135m llama-1.2b] [--json FILE]
    python benchmarks/gpu.py --device cpu --quick

`llama-1.2b` is a stock Llama checkpoint of the shape of Llama 3.2 1B with random weights, and
`tiny`, which `--quick` uses, one with three narrow layers. Ours is the engine's runner, without
sampler or HTTP. The rival is `generate` of the stock model: same files, dtype and prompts, greedy,
with its default cache. The two take turns, so that other work on the machine slows both alike; the
figures are medians over the rounds, after a warm-up round.

A decoding figure counts the tokens after the first of each stream and their time, so prompts do not
count. `prefill` is one prompt in one pass. `training_tokens_per_s` is measured on steps of an
expert on the last three layers with cached hidden states, as in `expert train`; `plug_ms` is the
time to read, check and plug a pack of that size.
"""

import argparse
import json
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import torch
from engine_batch import prompt_ids
from entry import run_main
from results import write
from torch_batch import Streams
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from deepseek.checkpoint.hub import resolve
from deepseek.data import Batch
from deepseek.device.choose import choose_device, choose_dtype
from deepseek.device.memory import synchronize
from deepseek.engine.runners import reference_runner
from deepseek.kernels.cross_entropy import CandidateHead
from deepseek.model.language_model import (
    LanguageModel,
    expert_beside,
    load_language_model,
    output_head,
)
from deepseek.packs.manifest import BaseDescription
from deepseek.packs.pack import write_pack
from deepseek.runner import Chunk
from deepseek.train.jobs.expert_task import ExpertTask
from deepseek.train.loop.optim import OptimConfig, adamw, clip_gradients
from deepseek.train.text.trunk_cache import run_trunk

SHAPES: dict[str, dict[str, Any]] = {
    "llama-1.2b": {
        "vocab_size": 128_256,
        "hidden_size": 2048,
        "intermediate_size": 8192,
        "num_hidden_layers": 16,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "max_position_embeddings": 8192,
        "tie_word_embeddings": True,
    },
    "tiny": {
        "vocab_size": 40_960,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 512,
        "tie_word_embeddings": True,
    },
}
"""Shapes of stock Llama checkpoints with random weights."""


FREQUENT = 4096
"""Number of token ids that are always candidates of the training loss, as in `expert train`."""


@dataclass(frozen=True)
class Sizes:
    """Sizes of the measurement.

    Attributes:
        streams: number of streams that decode together.
        prompt: tokens per prompt before decoding.
        steps: new tokens per stream.
        prefill: tokens of the prompt for the prefill figure.
        rows, row_length: shape of a training batch.
        width: width of the expert.
        packs: number of packs plugged.
        rounds: number of rounds.
    """

    streams: int = 64
    prompt: int = 128
    steps: int = 64
    prefill: int = 2048
    rows: int = 4
    row_length: int = 512
    width: int = 512
    packs: int = 8
    rounds: int = 5


QUICK = Sizes(
    streams=3, prompt=8, steps=3, prefill=32, rows=2, row_length=16, width=16, packs=2, rounds=1
)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--models", nargs="+", help="known names, folders, llama-1.2b, tiny")
    parser.add_argument("--quick", action="store_true", help="a tiny model and few tokens")
    parser.add_argument("--json", type=Path, help="file to write the figures to")
    options = parser.parse_args()
    device = choose_device(options.device)
    dtype = choose_dtype(options.dtype, device)
    models = options.models or (["tiny"] if options.quick else ["smollm2-135m", "llama-1.2b"])
    figures: dict[str, Any] = {"device": device_name(device), "dtype": str(dtype).split(".")[-1]}
    for name in models:
        figures[name] = measure(name, device, dtype, QUICK if options.quick else Sizes())
        print(name, json.dumps(figures[name], indent=1), flush=True)
    if options.json:
        write(options.json, {"figures": figures})


def device_name(device: torch.device) -> str:
    """Return the name of the GPU, or the type of another device."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


def measure(name: str, device: torch.device, dtype: torch.dtype, sizes: Sizes) -> dict[str, Any]:
    """Return the figures of one model, ours and those of `transformers`."""
    with tempfile.TemporaryDirectory() as scratch:
        folder = checkpoint(name, Path(scratch))
        model = load_language_model(folder, dtype=dtype, device=device).requires_grad_(False)
        figures: dict[str, Any] = speeds(model, folder, sizes)
        figures["training_tokens_per_s"] = round(training(model, sizes), 1)
        figures["plug_ms"] = round(plugging(model, Path(scratch), sizes), 2)
    return figures


def speeds(model: LanguageModel, folder: Path, sizes: Sizes) -> dict[str, dict[str, float]]:
    """Return decoding and prefill speeds beside those of the stock model in `folder`."""
    stock = AutoModelForCausalLM.from_pretrained(folder, dtype=model.dtype)
    stock = stock.to(model.device).eval()
    figures = {}
    for label, streams in (("one_stream", 1), (f"{sizes.streams}_streams", sizes.streams)):
        figures[label] = beside(
            partial(decode, model, streams, sizes),
            partial(generate, stock, streams, sizes),
            sizes.rounds,
        )
    ours = partial(prefill, model, sizes)
    figures["prefill"] = beside(ours, partial(prefill_stock, stock, sizes), sizes.rounds)
    return figures


def checkpoint(name: str, scratch: Path) -> Path:
    """Return the folder of a known model, or of a new random one with a shape of `SHAPES`."""
    if name not in SHAPES:
        return resolve(name)
    torch.manual_seed(0)
    folder = scratch / "model"
    LlamaForCausalLM(LlamaConfig(**SHAPES[name])).save_pretrained(folder)
    return folder


def beside(ours: Callable[[], float], theirs: Callable[[], float], rounds: int) -> dict[str, float]:
    """Return the median tokens/s of both sides, measured in turns, and their median ratio."""
    pairs = [(ours(), theirs()) for _ in range(rounds + 1)][1:]
    return {
        "tokens_per_s": round(median(own for own, _ in pairs), 1),
        "transformers_tokens_per_s": round(median(rival for _, rival in pairs), 1),
        "ratio": round(median(own / rival for own, rival in pairs), 2),
    }


@torch.inference_mode()
def decode(model: LanguageModel, streams: int, sizes: Sizes) -> float:
    """Return the total tokens/s of streams that decode together."""
    prompts = [prompt_ids(sizes.prompt, number) for number in range(streams)]
    side_by_side = Streams(reference_runner(model), prompts, sizes.prompt + sizes.steps + 1)
    synchronize(model.device)
    return streams * sizes.steps / side_by_side.decode(sizes.steps)


@torch.inference_mode()
def generate(stock: Any, streams: int, sizes: Sizes) -> float:
    """Return the tokens/s of `generate` after the first token."""
    prompts = [prompt_ids(sizes.prompt, number) for number in range(streams)]
    ids_BT = torch.tensor(prompts, device=stock.device)

    def seconds(tokens: int) -> float:
        synchronize(stock.device)
        started = time.perf_counter()
        stock.generate(
            ids_BT,
            attention_mask=torch.ones_like(ids_BT),
            do_sample=False,
            max_new_tokens=tokens,
            min_new_tokens=tokens,
            pad_token_id=0,
        )
        synchronize(stock.device)
        return time.perf_counter() - started

    first = seconds(1)
    return streams * sizes.steps / max(seconds(sizes.steps + 1) - first, 1e-9)


@torch.inference_mode()
def prefill(model: LanguageModel, sizes: Sizes) -> float:
    """Return the tokens/s of a prompt computed in one pass."""
    runner = reference_runner(model)
    state = runner.start(None, sizes.prefill)
    started = time.perf_counter()
    runner.forward([Chunk(state, prompt_ids(sizes.prefill, 0))])  # its logits are on the CPU
    return sizes.prefill / (time.perf_counter() - started)


@torch.inference_mode()
def prefill_stock(stock: Any, sizes: Sizes) -> float:
    """Return the tokens/s of the stock model on the same prompt."""
    ids_1T = torch.tensor([prompt_ids(sizes.prefill, 0)], device=stock.device)
    synchronize(stock.device)
    started = time.perf_counter()
    stock(input_ids=ids_1T, use_cache=True, logits_to_keep=1).logits.float().cpu()
    return sizes.prefill / (time.perf_counter() - started)


def training(model: LanguageModel, sizes: Sizes) -> float:
    """Return the tokens/s of an expert's training steps with cached hidden states."""
    device = model.device
    last = model.config.num_hidden_layers
    first = max(0, last - 3)
    module = expert_beside(model, "new", range(first, last), sizes.width)
    rows = [prompt_ids(sizes.row_length + 1, number) for number in range(sizes.rows)]
    ids = torch.tensor(rows)
    positions = torch.arange(sizes.row_length).expand(sizes.rows, -1)
    batch = Batch(ids[:, :-1], ids[:, 1:].contiguous(), positions, torch.arange(sizes.rows))
    with torch.no_grad():
        stream_BTD = run_trunk(model, first, batch)
    candidates = torch.cat([torch.arange(FREQUENT), ids.flatten()]).unique()
    head = CandidateHead(output_head(model).weight_VD, candidates, 64, 0, dtype=model.dtype)
    task = ExpertTask(
        model,
        module,
        head,
        stream=lambda _: stream_BTD,
        held_out=[],
        held_out_stream=lambda _: stream_BTD,
    )
    optimizer = adamw(task.parameters, OptimConfig(learning_rate=1e-3))
    seconds = []
    for step in range(2 * sizes.rounds + 1):
        synchronize(device)
        started = time.perf_counter()
        optimizer.zero_grad()
        task.loss(batch, step).loss.backward()
        clip_gradients(task.parameters.values(), 1.0)
        optimizer.step()
        synchronize(device)
        seconds.append(time.perf_counter() - started)
    return sizes.rows * sizes.row_length / median(seconds[1:])


def plugging(model: LanguageModel, folder: Path, sizes: Sizes) -> float:
    """Return the median time to read, check and plug a pack, in milliseconds."""
    last = model.config.num_hidden_layers
    model.experts.base = BaseDescription(
        name="measured",
        weights="0" * 64,
        tokenizer="0" * 64,
        hidden_size=model.config.hidden_size,
        num_layers=last,
    )
    seconds = []
    for number in range(sizes.packs):
        layers = range(max(0, last - 3), last)
        module = expert_beside(model, f"e{number}", layers, sizes.width, seed=number)
        path = folder / f"e{number}.safetensors"
        write_pack(path, module.requires_grad_(False).to_pack(model.experts.base, "Apache-2.0"))
        synchronize(model.device)
        started = time.perf_counter()
        model.experts.plug(path)
        synchronize(model.device)
        seconds.append(time.perf_counter() - started)
    return 1000 * median(seconds)


if __name__ == "__main__":
    run_main(main)
