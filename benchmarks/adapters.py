"""PEFT's LoRA adapters on a running engine: difference of logits from PEFT's, and time to plug.

    python benchmarks/adapters.py [--model smollm2-135m] [--plugs 100] [--json FILE]

PEFT makes three adapters of rank 8 on all linear layers and saves them. Each is imported; its
logits are compared with PEFT's in fp32. Then one adapter is plugged and unplugged repeatedly while
the engine answers requests without a pause, with one of the other adapters or none. Every plug
reads the file and makes all checks.
"""

import argparse
import gc
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from entry import run_main
from peft import LoraConfig, PeftModel, get_peft_model
from results import write
from transformers import AutoModelForCausalLM

from deepseek.checkpoint.hub import resolve
from deepseek.engine.adapters import import_adapter
from deepseek.engine.engine import Engine
from deepseek.engine.load import load
from deepseek.engine.request import ExpertChoice, Request
from deepseek.engine.sampler import Sampling
from deepseek.engine.start import quickest_runner

IDS = torch.arange(100, 164)[None]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--plugs", type=int, default=100)
    parser.add_argument("--json", type=Path, help="file to write the figures to")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        packs = make_adapters(options.model, Path(folder))
        figures = differences(options.model, packs)
        figures |= plug_times(options.model, list(packs.values()), options.plugs)
        figures["pack_megabytes"] = round(next(iter(packs.values())).stat().st_size / 1e6, 2)
    for name, value in figures.items():
        print(f"{name:32} {value}")
    if options.json:
        write(options.json, {"figures": figures})


def make_adapters(model: str, folder: Path, count: int = 3) -> dict[Path, Path]:
    """Make random adapters and return them: PEFT's folder -> imported pack."""
    stock = AutoModelForCausalLM.from_pretrained(resolve(model), dtype=torch.float32)
    packs = {}
    for seed in range(count):
        adapter = folder / f"lora{seed}"
        adapted = get_peft_model(stock, LoraConfig(r=8, target_modules="all-linear"))
        torch.manual_seed(seed)
        for name, parameter in adapted.named_parameters():
            if "lora_" in name:
                torch.nn.init.normal_(parameter, std=0.02)
        adapted.save_pretrained(adapter)
        stock = adapted.unload()
        packs[adapter] = import_adapter(
            adapter, base=model, out=folder / f"{adapter.name}.safetensors"
        )
    return packs


@torch.no_grad()
def differences(model: str, packs: dict[Path, Path]) -> dict[str, Any]:
    """Return the largest differences of logits, in fp32: ours from PEFT's, and PEFT's from the
    base's.
    """
    ours = load(model, dtype="float32").model
    base = ours(IDS).logits
    largest = 0.0
    change = 0.0
    for adapter, pack in packs.items():
        ours.experts.plug(pack)
        unarmed = ours(IDS).logits
        assert torch.equal(unarmed, base)
        with ours.experts.arming(adapter.name):
            logits = ours(IDS).logits
        stock = AutoModelForCausalLM.from_pretrained(resolve(model), dtype=torch.float32)
        expected = PeftModel.from_pretrained(stock, str(adapter)).eval()(IDS).logits
        largest = max(largest, float((logits - expected).abs().max()))
        change = max(change, float((expected - base).abs().max()))
    return {"logits_from_peft": largest, "logits_from_base": round(change, 2)}


def plug_times(model: str, packs: list[Path], count: int) -> dict[str, Any]:
    """Return percentiles of the times to plug and unplug while requests run, in milliseconds."""
    loaded = load(model)
    stop = threading.Event()
    finished = 0
    with Engine(*loaded, quickest_runner(loaded.model)) as engine:
        *kept, moved = packs
        for pack in kept:
            engine.plug(pack)
        names = [pack.stem for pack in kept]

        def ask() -> None:
            nonlocal finished
            sampling = Sampling(max_new_tokens=16)
            choices = [ExpertChoice((name,)) for name in names] + [ExpertChoice(())]
            while not stop.is_set():
                streams = [
                    engine.submit(Request((1, 2, 3, 4), sampling, choice, ignore_end=True))
                    for choice in choices
                ]
                finished += sum(list(stream)[-1].finish_reason == "length" for stream in streams)

        gc.collect()
        gc.freeze()  # as the server does once it is ready: a full collection takes 300 ms
        asking = threading.Thread(target=ask)
        asking.start()
        plugs, unplugs = [], []
        for _ in range(count):
            plugs.append(timed(lambda: engine.plug(moved)))
            unplugs.append(timed(lambda: engine.unplug(moved.stem)))
        stop.set()
        asking.join()
    return {
        "plugs": count,
        "plug_median_ms": round(float(np.median(plugs)), 1),
        "plug_p99_ms": round(float(np.percentile(plugs, 99)), 1),
        "plug_worst_ms": round(max(plugs), 1),
        "unplug_p99_ms": round(float(np.percentile(unplugs, 99)), 1),
        "requests_meanwhile": finished,
    }


def timed(call: Any) -> float:
    """Return the milliseconds that a call takes."""
    started = time.perf_counter()
    call()
    return (time.perf_counter() - started) * 1e3


if __name__ == "__main__":
    run_main(main)
