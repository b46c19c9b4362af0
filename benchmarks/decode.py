"""Decoding and prefill speed of SmolLM2-135M on the CPU: our 8-bit runner, our eager runner, and
rivals.

    python benchmarks/decode.py [--json FILE] [--rounds 3] [--threads 2] [--llama PYTHON]
        [--openvino PYTHON] [--keep FOLDER] [--plot FILE] [--dtype auto]

The sides take turns within every round, in this process or in one that waits on a pipe, so that all
run under the same conditions; medians over the rounds are compared. A turn is a prefill of 512
tokens, then 64 tokens one by one.

llama.cpp runs in a Python that has llama-cpp-python (`--llama`, or this one if it has it), on GGUF
files at Q8_0 and bf16 that are written here from our weights; only `llama_decode` is timed.

OpenVINO runs in a Python that has optimum-intel (`--openvino`, or this one if it has it), the usual
way to export a model: a stateful model with its own key/value cache, 8-bit weights, and otherwise
OpenVINO's defaults for this processor; only `infer` is timed. The exported model computes logits
for the whole prompt. The others do not, so the input of its last matrix product is cut to the last
token.

Models in the rivals' formats are written to a temporary folder, or once to that of `--keep`.

To simulate a processor with only AVX2, set NUMBA_CPU_NAME=znver3 and
NUMBA_CPU_FEATURES=+avx2,+fma,+f16c,+bmi,+bmi2,+lzcnt,+popcnt for our engine;
ATEN_CPU_CAPABILITY=avx2, ONEDNN_MAX_CPU_ISA=AVX2, MKL_ENABLE_INSTRUCTIONS=AVX2 (effective on Intel
processors) and `--dtype float32` for torch; and build llama-cpp-python with GGML_NATIVE=OFF and
GGML_AVX2, GGML_FMA, GGML_F16C and GGML_BMI2=ON. Leave OpenVINO out.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
from bars import draw, installed
from entry import run_main
from results import write
from turns import Turn, add_llama, check_rivals, in_turn, medians, usual_waiting

import deepseek
from deepseek.compiled.runner import CompiledRunner
from deepseek.engine.torch_runner import TorchRunner
from deepseek.runner import Chunk

PROMPT, STEPS, STREAMS = 512, 64, 16


def prompt() -> list[int]:
    return torch.randint(100, 40000, (PROMPT,), generator=torch.Generator().manual_seed(0)).tolist()


def engine(runner: Any, steps: int = STEPS) -> Turn:
    """Return a turn of one of our runners: tokens per second, with `steps` decoded tokens."""

    def turn() -> dict[str, float]:
        state = runner.start(None, PROMPT + steps)
        ids = prompt()
        start = time.perf_counter()
        runner.forward([Chunk(state, ids)])
        prefilled = time.perf_counter() - start
        seconds = []
        for token in ids[:steps]:
            start = time.perf_counter()
            runner.forward([Chunk(state, [token])])
            seconds.append(time.perf_counter() - start)
        return {"prefill": PROMPT / prefilled, "decode": 1 / median(seconds)}

    return turn


def batch(runner: CompiledRunner) -> Turn:
    """Return a turn: tokens per second of all streams together."""

    def turn() -> dict[str, float]:
        states = [runner.start(None, PROMPT + STEPS) for _ in range(STREAMS)]
        for state in states:
            runner.forward([Chunk(state, prompt()[:128])])
        steps = []
        for i in range(STEPS // 2):
            start = time.perf_counter()
            runner.forward([Chunk(state, [i]) for state in states])
            steps.append(time.perf_counter() - start)
        return {f"{STREAMS} streams": STREAMS / median(steps)}

    return turn


def transformers_bf16(folder: str) -> Turn:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)

    @torch.inference_mode()
    def turn() -> dict[str, float]:
        ids = torch.tensor([prompt()])
        start = time.perf_counter()
        output = model(ids, logits_to_keep=1)
        prefilled, steps = time.perf_counter() - start, []
        for i in range(STEPS // 2):
            start = time.perf_counter()
            output = model(ids[:, i : i + 1], past_key_values=output.past_key_values)
            steps.append(time.perf_counter() - start)
        return {"prefill": PROMPT / prefilled, "decode": 1 / median(steps)}

    return turn


LLAMA = """
import ctypes, json, sys, time
import llama_cpp as lc
path, threads, ids, steps = sys.argv[1], int(sys.argv[2]), json.loads(sys.argv[3]), int(sys.argv[4])
llm = lc.Llama(path, n_ctx=1024, n_batch=512, n_ubatch=512, n_threads=threads, n_threads_batch=threads, verbose=False)
def decode(tokens, past):
    batch = lc.llama_batch_init(len(tokens), 0, 1)
    batch.n_tokens = len(tokens)
    for i, token in enumerate(tokens):
        batch.token[i], batch.pos[i], batch.n_seq_id[i], batch.seq_id[i][0] = token, past + i, 1, 0
        batch.logits[i] = i == len(tokens) - 1
    start = time.perf_counter()
    assert lc.llama_decode(llm.ctx, batch) == 0
    seconds = time.perf_counter() - start
    lc.llama_batch_free(batch)
    return seconds
print("ready", flush=True)
for line in sys.stdin:
    lc.llama_memory_clear(lc.llama_get_memory(llm.ctx), True)
    first = decode(ids, 0)
    times = sorted(decode([ids[i]], len(ids) + i) for i in range(steps))
    print(json.dumps({"prefill": len(ids) / first, "decode": 1 / times[len(times) // 2]}), flush=True)
"""


OPENVINO = """
import json, sys, time
from pathlib import Path
import numpy as np, openvino as ov
path, threads, ids, steps = Path(sys.argv[1]), int(sys.argv[2]), json.loads(sys.argv[3]), int(sys.argv[4])
if not path.exists():
    from optimum.intel import OVModelForCausalLM, OVWeightQuantizationConfig
    int8 = OVWeightQuantizationConfig(bits=8)
    model = OVModelForCausalLM.from_pretrained(sys.argv[5], export=True, compile=False, quantization_config=int8)
    model.save_pretrained(path)
model = ov.Core().read_model(path / "openvino_model.xml")
head = model.output("logits").get_node()
while head.get_type_name() != "MatMul":
    head = head.input_value(0).get_node()
last = ov.opset13.slice(head.input_value(0), [-1], [np.iinfo(np.int64).max], [1], [1])
head.input(0).replace_source_output(last.output(0))
model.validate_nodes_and_infer_types()
settings = {"PERFORMANCE_HINT": "LATENCY", "INFERENCE_NUM_THREADS": threads}
request = ov.Core().compile_model(model, "CPU", settings).create_infer_request()
names = {name for one in model.inputs for name in one.names}
def decode(tokens, past):
    feeds = {
        "input_ids": np.array([tokens]), "attention_mask": np.ones((1, past + len(tokens)), dtype=np.int64),
        "position_ids": np.arange(past, past + len(tokens))[None], "beam_idx": np.zeros(1, dtype=np.int32),
    }
    feeds = {name: value for name, value in feeds.items() if name in names}
    start = time.perf_counter()
    request.infer(feeds, share_inputs=True, share_outputs=True)
    seconds = time.perf_counter() - start
    assert request.get_tensor("logits").shape[1] == 1
    return seconds
print("ready", flush=True)
for line in sys.stdin:
    request.reset_state()
    prefill = len(ids) / decode(ids, 0)
    times = sorted(decode([ids[i]], len(ids) + i) for i in range(steps))
    print(json.dumps({"prefill": prefill, "decode": 1 / times[len(times) // 2]}), flush=True)
"""


def rival(python: Path, source: str, model: Path, threads: int, base: Any = "") -> Turn:
    """Start another Python that runs `source`; it takes a turn for each line on standard input."""
    command = [
        str(python),
        "-c",
        source,
        str(model),
        str(threads),
        json.dumps(prompt()),
        str(STEPS),
        str(base),
    ]
    pipe = subprocess.PIPE
    process = subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True, env=usual_waiting())
    assert process.stdin is not None and process.stdout is not None
    while (line := process.stdout.readline()).strip() != "ready":
        assert line, "the rival's process has ended; see its messages above"

    def turn() -> dict[str, float]:
        print("go", file=process.stdin, flush=True)
        return json.loads(process.stdout.readline())

    return turn


def gguf_writer(path: Path, architecture: str, config: Any) -> Any:
    """Return a writer of a GGUF file with the sizes of a model and no vocabulary."""
    import gguf

    out = gguf.GGUFWriter(path, architecture, use_temp_file=True)
    out.add_context_length(config.max_position_embeddings)
    out.add_embedding_length(config.hidden_size)
    out.add_block_count(config.num_hidden_layers)
    out.add_feed_forward_length(config.intermediate_size)
    out.add_head_count(config.num_attention_heads)
    out.add_head_count_kv(config.num_key_value_heads)
    out.add_rope_freq_base(config.rope_parameters["rope_theta"])
    out.add_layer_norm_rms_eps(config.rms_norm_eps)
    out.add_vocab_size(config.vocab_size)
    return out


def finish_gguf(out: Any) -> None:
    """Write everything added to a writer, and close it."""
    out.write_header_to_file()
    out.write_kv_data_to_file()
    out.write_tensors_to_file()
    out.close()


def write_gguf(
    model: Any, path: Path, kind: str, add_vocabulary: Callable[[Any], None] | None = None
) -> None:
    """Write the weights of a Llama as GGUF; without `add_vocabulary`, tokens have ids but no
    text.
    """
    import gguf

    config = model.config
    out = gguf_writer(path, "llama", config)
    out.add_rope_dimension_count(config.head_dim)
    if add_vocabulary is None:
        out.add_tokenizer_model("none")
    else:
        add_vocabulary(out)
    names = {
        "attention_norm": "attn_norm",
        "attention.q_proj": "attn_q",
        "attention.k_proj": "attn_k",
        "attention.v_proj": "attn_v",
        "attention.o_proj": "attn_output",
        "feed_forward_norm": "ffn_norm",
        "feed_forward.gate_proj": "ffn_gate",
        "feed_forward.up_proj": "ffn_up",
        "feed_forward.down_proj": "ffn_down",
    }
    quant = getattr(gguf.GGMLQuantizationType, kind)
    for name, tensor in model.state_dict().items():
        if name == "lm_head.weight" and config.tie_word_embeddings:
            continue
        part = name.removesuffix(".weight")
        if part.startswith("layers."):
            _, layer, kind_of = part.split(".", 2)
            own = f"blk.{layer}.{names[kind_of]}.weight"
        else:
            own = {
                "embed_tokens": "token_embd.weight",
                "norm": "output_norm.weight",
                "lm_head": "output.weight",
            }[part]
        value = tensor.float()
        heads = {"attn_q": config.num_attention_heads, "attn_k": config.num_key_value_heads}.get(
            own.split(".")[-2]
        )
        if heads:  # llama.cpp rotates adjacent pairs, Hugging Face the halves of a head
            value = value.reshape(heads, 2, -1, value.shape[1]).transpose(1, 2).reshape(value.shape)
        array = np.ascontiguousarray(value.numpy())
        if array.ndim == 1:
            out.add_tensor(own, array)
        else:
            out.add_tensor(own, gguf.quantize(array, quant), raw_dtype=quant)
    finish_gguf(out)


def plot(rates: dict[str, dict[str, float]], path: Path) -> None:
    """Draw ours beside the rivals that were measured."""
    titles = {"decode": "decoding, tokens/s", "prefill": f"prefill of {PROMPT} tokens, tokens/s"}
    draw(
        path,
        {
            title: {name: own[key] for name, own in rates.items() if key in own}
            for key, title in titles.items()
        },
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--base", default="smollm2-135m")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    add_llama(parser)
    parser.add_argument(
        "--openvino",
        type=Path,
        default=installed("optimum"),
        help="Python that has optimum-intel; default: this one",
    )
    parser.add_argument("--plot", type=Path, default=Path("decode.png"), help="picture to draw")
    parser.add_argument("--dtype", default="auto", help="dtype of our eager engine")
    parser.add_argument("--keep", type=Path, help="folder for models in the rivals' formats")
    options = parser.parse_args()
    check_rivals(parser, options.json, llama=options.llama, openvino=options.openvino)
    torch.set_num_threads(options.threads)
    model, _ = deepseek.load(options.base, dtype=options.dtype)
    compiled = CompiledRunner(model)
    turns = {
        "ours int8": engine(compiled),
        "ours batch": batch(compiled),
        "ours eager": engine(TorchRunner(model)),
    }
    turns["transformers bf16"] = transformers_bf16(str(model.experts.base_folder))
    with tempfile.TemporaryDirectory() as temporary:
        base = model.experts.base_folder
        folder = (options.keep or Path(temporary)) / base.name  # one folder per base
        folder.mkdir(parents=True, exist_ok=True)
        for kind in ("Q8_0", "BF16") if options.llama else ():
            if not (folder / f"{kind}.gguf").exists():
                write_gguf(model, folder / f"{kind}.gguf", kind)
            turns[f"llama.cpp {kind}"] = rival(
                options.llama, LLAMA, folder / f"{kind}.gguf", options.threads
            )
        if options.openvino:
            path = folder / "openvino"
            turns["openvino int8"] = rival(options.openvino, OPENVINO, path, options.threads, base)
        found = in_turn(turns, options.rounds)
    rates = medians(found)
    ours = rates["ours int8"]
    ratios = {
        f"{key} over {name}": ours[key] / own[key]
        for name, own in rates.items()
        for key in own
        if key in ours
    }
    ratios[f"{STREAMS} streams over one"] = (
        rates["ours batch"][f"{STREAMS} streams"] / ours["decode"]
    )
    figures = {
        "tokens_per_second": rates,
        "ratios": ratios,
        "weight_bytes": compiled.weight_bytes,
        "weight_gigabytes_per_second": ours["decode"] * compiled.weight_bytes / 1e9,
        "rounds": found,
    }
    print(json.dumps({key: figures[key] for key in ("tokens_per_second", "ratios")}, indent=1))
    if options.json:
        write(options.json, figures)
    plot(rates, options.plot)
    sys.stdout.flush()


if __name__ == "__main__":
    run_main(main)
