"""Total tokens per second of sixteen streams: our server over HTTP beside llama.cpp.

    python benchmarks/batch.py [--llama PYTHON] [--llama-path FOLDER] [--rounds 3] [--json FILE] [--plot FILE]

Each side answers prompts of 128 tokens with 64 tokens, greedily, on two threads, with one stream
and with sixteen, in turn. Ours is `deepseek serve` with default settings (8-bit weights), asked
over HTTP with streaming. llama.cpp (Q8_0) is measured twice: `llama_decode`, called with sixteen
sequences in one batch, without server, tokenizer or sampling; and llama-cpp-python's own server,
which holds a lock until a reply has ended and so answers one request at a time. That server is
asked without streaming, which only helps it. Without `--llama`, this Python is used if it has
llama-cpp-python; otherwise only ours is measured. `--llama-path` names packages that
llama-cpp-python's server needs and the Python of `--llama` lacks. "1" and "16" are the tokens per
second while all streams decode; "whole" is all tokens over the whole time, prompts included, the
only figure for a server that never decodes two streams at once.
"""

import argparse
import asyncio
import json
import os
import subprocess
import sys
import tempfile
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import gguf
import httpx
from bars import draw
from decode import write_gguf
from entry import run_main
from latency import Prompts, stream
from results import write
from served import served
from turns import Turn, add_llama, in_turn, medians, usual_waiting

from deepseek.engine.load import load

MODEL, STREAMS, PROMPT, TOKENS = "smollm2-135m", 16, 128, 64

LLAMA = """
import json, sys, time
import llama_cpp as lc
path, threads, prompts, steps = sys.argv[1], int(sys.argv[2]), json.loads(sys.argv[3]), int(sys.argv[4])
lc.llama_backend_init()
model = lc.llama_model_load_from_file(path.encode(), lc.llama_model_default_params())
def pace(count):
    dials = lc.llama_context_default_params()
    dials.n_ctx, dials.n_batch, dials.n_ubatch, dials.n_seq_max = 256 * count, 512, 512, count
    dials.n_threads = dials.n_threads_batch = threads
    dials.kv_unified = False
    context = lc.llama_init_from_model(model, dials)
    def decode(rows):
        batch = lc.llama_batch_init(len(rows), 0, 1)
        batch.n_tokens = len(rows)
        for i, (token, place, sequence, wanted) in enumerate(rows):
            batch.token[i], batch.pos[i], batch.n_seq_id[i], batch.seq_id[i][0] = token, place, 1, sequence
            batch.logits[i] = wanted
        start = time.perf_counter()
        assert lc.llama_decode(context, batch) == 0
        lc.llama_synchronize(context)
        seconds = time.perf_counter() - start
        lc.llama_batch_free(batch)
        return seconds
    for s in range(count):
        ids = prompts[s]
        decode([(token, i, s, i == len(ids) - 1) for i, token in enumerate(ids)])
    times = sorted(decode([(prompts[s][i], len(prompts[s]) + i, s, True) for s in range(count)]) for i in range(steps))
    lc.llama_free(context)
    return count / times[len(times) // 2]
print("ready", flush=True)
for line in sys.stdin:
    print(json.dumps({str(count): pace(count) for count in (1, len(prompts))}), flush=True)
"""


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    add_llama(parser)
    parser.add_argument(
        "--llama-path", default="", help="further folders of packages for its server"
    )
    parser.add_argument("--json", type=Path, help="file to write the figures to")
    parser.add_argument("--plot", type=Path, default=Path("batch.png"), help="picture to draw")
    options = parser.parse_args()
    loaded = load(MODEL)
    prompts = Prompts(loaded.tokenizer)
    with tempfile.TemporaryDirectory() as folder, ExitStack() as stack:
        port = urlsplit(stack.enter_context(served(MODEL)).url).port
        assert port is not None
        turns = {"ours": ours(port, prompts)}
        if options.llama:
            path = Path(folder) / "model.gguf"
            write_gguf(
                loaded.model, path, "Q8_0", lambda out: add_vocabulary(out, loaded.tokenizer)
            )
            turns["llama_decode"] = batched(options, path, prompts)
            rival = stack.enter_context(LlamaServer(options, path))
            turns["llama.cpp server"] = lambda: rival.turn(prompts)
        found = in_turn(turns, options.rounds)
    rates = medians(found)
    own = rates["ours"]
    ratios = {"16 streams over one": own["16"] / own["1"]}
    for name, key in (
        (("llama_decode", "16"), ("llama.cpp server", "16 whole")) if options.llama else ()
    ):
        ratios[f"16 streams over {name}"] = own[key] / rates[name][key]
    figures = {"tokens_per_second": rates, "ratios": ratios, "rounds": found}
    print(json.dumps({key: value for key, value in figures.items() if key != "rounds"}, indent=1))
    plot(rates, options.plot)
    if options.json:
        write(options.json, figures)


def plot(rates: dict[str, dict[str, float]], path: Path) -> None:
    """Draw one stream and sixteen, while all decode and over the whole time."""
    titles = {"while all streams speak": ("1", "16"), "prompts included": ("1 whole", "16 whole")}
    panels = {
        f"{title}, tokens/s": {
            f"{name}, {key.split()[0]} stream{'s' if '6' in key else ''}": own[key]
            for name, own in rates.items()
            for key in keys
            if key in own
        }
        for title, keys in titles.items()
    }
    draw(path, panels)


def add_vocabulary(out: gguf.GGUFWriter, tokenizer: Any) -> None:
    """Add the tokenizer, which a server needs, to the file."""
    model = json.loads(tokenizer.backend_tokenizer.to_str())
    tokens = [tokenizer.convert_ids_to_tokens(i) for i in range(len(tokenizer))]
    special = {one["content"] for one in model["added_tokens"]}
    out.add_tokenizer_model("gpt2")
    out.add_tokenizer_pre("smollm")
    out.add_token_list(tokens)
    out.add_token_types(
        [gguf.TokenType.CONTROL if token in special else gguf.TokenType.NORMAL for token in tokens]
    )
    out.add_token_merges(
        [pair if isinstance(pair, str) else " ".join(pair) for pair in model["model"]["merges"]]
    )
    out.add_eos_token_id(tokenizer.eos_token_id)


def ours(port: int, prompts: Prompts) -> Turn:
    """Our server over HTTP: rate of tokens between the last stream's first token and the first
    stream's last, and over the whole time.
    """

    async def pace(count: int) -> dict[str, float]:
        streams = await asyncio.gather(
            *(stream(port, prompts.next(), TOKENS) for _ in range(count))
        )
        begin, end = max(times[1] for times in streams), min(times[-1] for times in streams)
        moments = [moment for times in streams for moment in times[1:]]
        together = sum(begin < moment <= end for moment in moments) / (end - begin)
        whole = len(moments) / (max(moments) - min(times[0] for times in streams))
        return {str(count): together, f"{count} whole": whole}

    return lambda: {**asyncio.run(pace(1)), **asyncio.run(pace(STREAMS))}


def batched(options: argparse.Namespace, path: Path, prompts: Prompts) -> Turn:
    """Start a process that measures `llama_decode` for each line on its standard input."""
    texts = json.dumps([prompts.next() for _ in range(STREAMS)])
    command = [str(options.llama), "-c", LLAMA, str(path), str(options.threads), texts, str(TOKENS)]
    pipe = subprocess.PIPE
    process = subprocess.Popen(
        command, stdin=pipe, stdout=pipe, stderr=subprocess.DEVNULL, text=True, env=usual_waiting()
    )
    assert process.stdin is not None and process.stdout is not None
    assert process.stdout.readline().strip() == "ready"

    def turn() -> dict[str, float]:
        print("go", file=process.stdin, flush=True)
        return json.loads(process.stdout.readline())

    return turn


class LlamaServer:
    """llama-cpp-python's own server."""

    def __init__(self, options: argparse.Namespace, path: Path) -> None:
        threads, self.port = str(options.threads), 18_643
        command = [
            str(options.llama),
            "-m",
            "llama_cpp.server",
            "--model",
            str(path),
            "--port",
            str(self.port),
            "--n_threads",
            threads,
            "--n_threads_batch",
            threads,
            "--n_ctx",
            "1024",
            "--interrupt_requests",
            "False",
        ]
        paths = os.pathsep.join([options.llama_path, os.environ.get("PYTHONPATH", "")])
        self.process = subprocess.Popen(
            command, env={**usual_waiting(), "PYTHONPATH": paths}, stderr=subprocess.DEVNULL
        )

    def __enter__(self) -> "LlamaServer":
        while self.process.poll() is None:
            try:
                httpx.get(f"http://127.0.0.1:{self.port}/v1/models")
                return self
            except httpx.TransportError:
                time.sleep(0.2)
        sys.exit("llama-cpp-python's server did not start; see --llama-path.")

    def __exit__(self, *_: object) -> None:
        self.process.terminate()
        self.process.wait()

    def turn(self, prompts: Prompts) -> dict[str, float]:
        """Return all tokens over the whole time, for one stream and for sixteen."""
        return {f"{count} whole": asyncio.run(self.pace(prompts, count)) for count in (1, STREAMS)}

    async def pace(self, prompts: Prompts, count: int) -> float:
        async with httpx.AsyncClient(timeout=300) as http:
            # The server does not accept token ids.
            texts = [prompts.tokenizer.decode(prompts.next()) for _ in range(count)]
            bodies = [{"prompt": text, "max_tokens": TOKENS, "temperature": 0} for text in texts]
            url, started = f"http://127.0.0.1:{self.port}/v1/completions", time.perf_counter()
            replies = await asyncio.gather(*(http.post(url, json=body) for body in bodies))
            tokens = sum(
                reply.raise_for_status().json()["usage"]["completion_tokens"] for reply in replies
            )
            return tokens / (time.perf_counter() - started)


if __name__ == "__main__":
    run_main(main)
