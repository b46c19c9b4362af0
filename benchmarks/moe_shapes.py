"""Decoding speed of random mixtures of experts in the shapes of other families, beside llama.cpp at
Q8_0 on the same weights.

    python benchmarks/moe_shapes.py --llama PYTHON [--shapes qwen3_moe] [--layers N] [--rounds 5]
        [--threads 2] [--json FILE]

A model is created with `transformers`, saved, and loaded by `deepseek.load` and, as a GGUF file, by
llama.cpp in a Python that has llama-cpp-python (`--llama`). Both take turns as in
`benchmarks/decode.py`: a prefill of 512 tokens, then 64 tokens one by one; medians over the rounds
are compared. Routers have random weights too, so tokens spread over the experts.
"""

import argparse
import json
import re
import tempfile
from pathlib import Path
from typing import Any

import gguf
import torch
from decode import LLAMA, engine, finish_gguf, gguf_writer, rival
from entry import run_main
from results import write
from torch import Tensor
from transformers import CONFIG_MAPPING, AutoConfig, AutoModelForCausalLM
from turns import Turn, add_llama, check_rivals, in_turn, medians

import deepseek
from deepseek.checkpoint import hub
from deepseek.checkpoint.convert import read_tensors
from deepseek.compiled.runner import CompiledRunner
from deepseek.export.gguf import export_gguf
from deepseek.text.tokenizer import load_tokenizer

TOKENIZER = "smollm2-135m"  # all shapes have its vocabulary
SHAPES: dict[str, dict[str, Any]] = {
    # 0.9B parameters, 0.2B of them active per token.
    "qwen3_moe": {
        "vocab_size": 49152,
        "hidden_size": 1024,
        "num_hidden_layers": 16,
        "num_attention_heads": 16,
        "num_key_value_heads": 4,
        "head_dim": 64,
        "num_experts": 64,
        "num_experts_per_tok": 8,
        "moe_intermediate_size": 256,
        "max_position_embeddings": 4096,
        "norm_topk_prob": True,
        "tie_word_embeddings": True,
    },
    # The same, with one key head per query head and query/key norms over the whole width.
    "olmoe": {
        "vocab_size": 49152,
        "hidden_size": 1024,
        "num_hidden_layers": 16,
        "num_attention_heads": 16,
        "num_key_value_heads": 16,
        "num_experts": 64,
        "num_experts_per_tok": 8,
        "intermediate_size": 256,
        "max_position_embeddings": 4096,
        "norm_topk_prob": False,
        "tie_word_embeddings": False,  # llama.cpp requires an output head
        "eos_token_id": 0,
    },
}


def make(shape: str, layers: int | None, folder: Path) -> None:
    """Save a random model of this shape with a tokenizer."""
    torch.manual_seed(0)
    fields = SHAPES[shape] | ({"num_hidden_layers": layers} if layers else {})
    model = AutoModelForCausalLM.from_config(CONFIG_MAPPING[shape](**fields), dtype=torch.bfloat16)
    model.save_pretrained(folder)
    load_tokenizer(hub.pull(TOKENIZER)).save_pretrained(folder)


def write_olmoe(folder: Path, path: Path) -> None:
    """Write an OLMoE as GGUF, which `deepseek export` does not support; without a vocabulary."""
    config = AutoConfig.from_pretrained(folder)
    out = gguf_writer(path, "olmoe", config)
    out.add_expert_count(config.num_experts)
    out.add_expert_used_count(config.num_experts_per_tok)
    out.add_tokenizer_model("none")
    tensors = dict(read_tensors(folder))
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.OLMOE, config.num_hidden_layers)
    stacks: dict[str, list[Tensor]] = {}
    for name in sorted(tensors, key=in_order):
        stem = re.sub(r"experts\.\d+\.", "experts.", name.removesuffix(".weight"))
        stacks.setdefault(f"{names.get_name(stem)}.weight", []).append(tensors[name].float())
    for name, parts in stacks.items():
        values = (torch.stack(parts) if len(parts) > 1 else parts[0]).numpy()
        if values.ndim == 1 or "ffn_gate_inp" in name:
            out.add_tensor(name, values)
        else:
            kind = gguf.GGMLQuantizationType.Q8_0
            out.add_tensor(name, gguf.quantize(values, kind), raw_dtype=kind)
    finish_gguf(out)


def in_order(name: str) -> list[tuple[int, str]]:
    """Return a sort key for a tensor name that orders its numbers numerically."""
    return [(int(part or 0), "") if part.isdecimal() else (0, part) for part in name.split(".")]


def measure(shape: str, options: argparse.Namespace, scratch: Path) -> dict[str, Any]:
    """Return the tokens per second of both sides, and their ratios."""
    folder = scratch / shape
    make(shape, options.layers, folder)
    runner = CompiledRunner(deepseek.load(folder, dtype="bfloat16").model)
    turns: dict[str, Turn] = {"ours int8": engine(runner)}
    if options.llama:
        file = scratch / f"{shape}.gguf"
        if shape == "olmoe":
            write_olmoe(folder, file)
        else:
            export_gguf(folder, file, "q8_0")
        turns["llama.cpp Q8_0"] = rival(options.llama, LLAMA, file, options.threads)
    print(shape, flush=True)
    rounds = in_turn(turns, options.rounds)
    rates = medians(rounds)
    ours = rates["ours int8"]
    theirs = rates.get("llama.cpp Q8_0", {})
    return {
        "tokens_per_second": rates,
        "ours_over_llama.cpp": {key: ours[key] / theirs[key] for key in theirs},
        "weight_bytes": runner.weight_bytes,
        "rounds": rounds,
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=[*SHAPES])
    parser.add_argument("--layers", type=int, help="fewer layers than the shape has")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    add_llama(parser)
    parser.add_argument("--json", type=Path, help="file to write the figures to")
    options = parser.parse_args()
    check_rivals(parser, options.json, llama=options.llama)
    torch.set_num_threads(options.threads)
    with tempfile.TemporaryDirectory() as scratch:
        figures = {shape: measure(shape, options, Path(scratch)) for shape in options.shapes}
    for shape, found in figures.items():
        print(shape, json.dumps({key: found[key] for key in found if key != "rounds"}, indent=1))
    if options.json:
        write(options.json, figures)


if __name__ == "__main__":
    run_main(main)
