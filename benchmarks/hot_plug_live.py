"""Plug and unplug an expert repeatedly under live streams; requests without it must not change.

    python benchmarks/hot_plug_live.py [--cycles 1000] [--streams 8] [--pauses 200] [--json FILE]

The first part uses a tiny random model, so that the figures measure the server and not arithmetic.
Streams of the base alone run without pause while one expert is uploaded, asked and unplugged over
HTTP, each time with other content under the same name. Every reply of the base must equal its reply
before anything was plugged; every reply of the expert must match the content just plugged
(otherwise a stale cache was used).

The second part measures the engine's pause on a real base with 8-bit weights (`--base`), `--pauses`
times: an expert of the usual size is plugged, asked for four tokens and unplugged under `--streams`
streams. The pause is the longest time between the end of one step's computation and the beginning
of the next, from the start of the plug to the expert's last token; it includes planning, sampling
and waiting for the interpreter lock. The same figure is reported for the time between plugs.
"""

import argparse
import gc
import sys
import tempfile
import threading
import time
from itertools import pairwise
from pathlib import Path
from typing import Any

import psutil
from engine_batch import prompt_ids
from entry import run_main
from expert_cost import SPEAKS
from expert_cost import save as save_usual
from results import write
from served import percentile

sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))

from live_server import Live, live
from tiny_expert import save_expert

from deepseek.compiled import step
from deepseek.compiled.runner import CompiledRunner
from deepseek.engine.engine import Engine
from deepseek.engine.generation import Generation
from deepseek.engine.load import load
from deepseek.engine.request import ExpertChoice, Request
from deepseek.engine.sampler import Sampling
from deepseek.kernels.numba.buffers import KernelArguments

CONTENTS = 5
WARM_UP = 50


def asked(prompt: str, model: str, tokens: int = 24) -> dict[str, Any]:
    return {
        "model": model,
        "prompt": prompt,
        "max_tokens": tokens,
        "temperature": 0,
        "logit_bias": {"0": -100, "2": -100},
    }


def text(http: Any, body: dict[str, Any]) -> str:
    reply = http.post("/v1/completions", json=body)
    reply.raise_for_status()
    return str(reply.json()["choices"][0]["text"])


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--cycles", type=int, default=1000)
    parser.add_argument("--streams", type=int, default=8)
    parser.add_argument("--pauses", type=int, default=200)
    parser.add_argument("--base", default="smollm2-135m")
    parser.add_argument("--json", type=Path, help="file to write the figures to")
    options = parser.parse_args()
    figures: dict[str, Any] = {}
    if options.cycles:
        with tempfile.TemporaryDirectory() as folder, live(Path(folder)) as server:
            figures = measure(server, Path(folder), options.cycles, options.streams)
    if options.pauses:
        figures |= pauses(options.base, options.pauses, options.streams)
    print(figures)
    if options.json:
        write(options.json, figures)


def measure(server: Live, folder: Path, cycles: int, streams: int) -> dict[str, Any]:
    """Run all cycles and return the figures."""
    loaded, packs = load(folder / "tiny", dtype="float32"), folder / "contents"
    packs.mkdir()
    contents = [
        save_expert(loaded, "same", packs, seed).read_bytes() for seed in range(10, 10 + CONTENTS)
    ]
    prompts = [f"the expert {number} of the model" for number in range(streams)]
    with server.http() as http:
        expected = [text(http, asked(prompt, "tiny+none")) for prompt in prompts]
        expert_texts = []
        for content in contents:
            http.post("/v1/experts/upload", content=content).raise_for_status()
            expert_texts.append(text(http, asked("the router", "tiny+same")))
            http.delete("/v1/experts/same").raise_for_status()
    counts = {"replies": 0, "failed": 0, "different": 0}
    lock, over = threading.Lock(), threading.Event()

    def keep_asking(number: int) -> None:
        with server.http() as http:
            while not over.is_set():
                try:
                    got = text(http, asked(prompts[number], "tiny+none"))
                    with lock:
                        counts["replies"] += 1
                        counts["different"] += got != expected[number]
                except Exception as error:
                    print(f"a stream failed: {error!r}", flush=True)
                    with lock:
                        counts["failed"] += 1

    threads = [threading.Thread(target=keep_asking, args=(number,)) for number in range(streams)]
    for thread in threads:
        thread.start()
    plug, unplug, stale, process, memory = [], [], 0, psutil.Process(), 0
    with server.http() as http:
        for cycle in range(cycles):
            if cycle == min(WARM_UP, cycles - 1):
                memory = process.memory_info().rss
            started = time.perf_counter()
            http.post("/v1/experts/upload", content=contents[cycle % CONTENTS]).raise_for_status()
            plug.append(time.perf_counter() - started)
            if cycle % 5 == 0 or cycles <= 200:
                got = text(http, asked("the router", "tiny+same"))
                stale += got != expert_texts[cycle % CONTENTS]
            started = time.perf_counter()
            http.delete("/v1/experts/same").raise_for_status()
            unplug.append(time.perf_counter() - started)
    drift = process.memory_info().rss / memory - 1
    over.set()
    for thread in threads:
        thread.join()
    return {
        "cycles": cycles,
        "streams": streams,
        **counts,
        "stale": stale,
        "distinct_contents": len(set(expert_texts)),
        "plug_seconds": {
            "median": percentile(plug, 0.5),
            "p99": percentile(plug, 0.99),
            "max": max(plug),
        },
        "unplug_seconds": {"median": percentile(unplug, 0.5), "p99": percentile(unplug, 0.99)},
        "rss_drift": drift,
    }


def pauses(base: str, plugs: int, streams: int) -> dict[str, Any]:
    """Plug and unplug under streams of the base alone; return the engine's pauses in seconds."""
    loaded, computed = load(base), note_steps()
    windows, plug = [], []
    with (
        tempfile.TemporaryDirectory() as folder,
        Engine(*loaded, CompiledRunner(loaded.model)) as engine,
    ):
        pack = save_usual(loaded, SPEAKS, Path(folder), 1)
        gc.collect()
        gc.freeze()  # as the server does
        alone = [ask_base(engine, number) for number in range(streams)]
        for number in range(plugs + WARM_UP // 10):
            alone = [one if is_under_way(one) else ask_base(engine, number) for one in alone]
            time.sleep(0.1)
            started = time.perf_counter()
            engine.plug(pack)
            plug.append(time.perf_counter() - started)
            expert = Request(
                prompt_ids(16, number), Sampling(4, temperature=0.0), ExpertChoice((SPEAKS,))
            )
            assert all(
                event.expert == SPEAKS or event.token_id is None for event in engine.submit(expert)
            )
            windows.append((started, time.perf_counter()))
            engine.unplug(SPEAKS)
    del windows[: WARM_UP // 10], plug[: WARM_UP // 10]
    gaps = [(end, begin) for (_, end), (begin, _) in pairwise(computed)]
    within = longest(gaps, windows)
    between = longest(gaps, [(before, after) for (_, before), (after, _) in pairwise(windows)])
    shares = {"median": 0.5, "p99": 0.99, "max": 1.0}
    told = {
        "pause_seconds": within,
        "pause_seconds_without_plug": between,
        "plug_seconds_base": plug,
    }
    return {
        "pauses": plugs,
        **{k: {n: percentile(v, s) for n, s in shares.items()} for k, v in told.items()},
    }


def longest(gaps: list[tuple[float, float]], windows: list[tuple[float, float]]) -> list[float]:
    """Return the longest gap that overlaps each window; windows within one step are skipped."""
    lengths = ([e - b for b, e in gaps if e > start and b < stop] for start, stop in windows)
    return [max(found) for found in lengths if found]


def note_steps() -> list[tuple[float, float]]:
    """Return a list to which every step's start and end times will be appended."""
    computed: list[tuple[float, float]] = []
    run = step.run

    def noting(*tables: KernelArguments) -> None:
        begin = time.perf_counter()
        run(*tables)
        computed.append((begin, time.perf_counter()))

    step.run = noting
    return computed


def ask_base(engine: Engine, number: int) -> Generation:
    """Ask the base alone for a long text."""
    request = Request(
        prompt_ids(32, number), Sampling(1500, temperature=0.0), ExpertChoice(()), ignore_end=True
    )
    return engine.submit(request)


def is_under_way(generation: Generation) -> bool:
    return generation.usage.completion_tokens < generation.request.sampling.max_new_tokens


if __name__ == "__main__":
    run_main(main)
