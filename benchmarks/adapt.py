"""Compare training the last three layers, LoRA and full fine-tuning on the same tokens of an unseen
code base.

    python benchmarks/adapt.py FOLDER [--tokens 60000] [--functions 10] [--json benchmarks/results/adapt.json]
    python benchmarks/adapt.py FOLDER --exercises --modes last-n --rate 2e-3 --tokens 0 --epochs 1 --functions 400

Each mode runs in its own process, so that peak memory is measured per mode; `working_memory` is the
peak less that of the imported libraries. BLEU scores greedily generated bodies of documented
functions in the held-out files, before and after training. `--exercises` trains on the documented
functions of the other files (as `deepseek data code` writes them) instead of on whole files, so
that the training task is the evaluation task.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from dataclasses import asdict
from pathlib import Path
from typing import Any

from entry import existing_path, run_main
from results import write

HELD_OUT = 0.15

WORKER = """
import json, sys
from pathlib import Path
import deepseek, deepseek.train.jobs.adapt
from deepseek.device.choose import CPU
from deepseek.device.memory import peak_memory
libraries = peak_memory(CPU)
mode, source, folder, options = sys.argv[1], json.loads(sys.argv[2]), Path(sys.argv[3]), json.loads(sys.argv[4])
deepseek.adapt(name="x", mode=mode, device="cpu", out=folder / "model", run_folder=folder / "run", **source, **options)
print(json.dumps({"libraries": libraries}))
"""


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=existing_path)
    parser.add_argument("--base", default="smollm2-135m")
    parser.add_argument("--tokens", type=int, default=60_000)
    parser.add_argument("--functions", type=int, default=10, help="0: no BLEU")
    parser.add_argument("--modes", default="last-n,lora,full")
    parser.add_argument("--epochs", type=int, default=2)
    parser.add_argument("--rate", type=float, help="learning rate, in place of each mode's own")
    parser.add_argument(
        "--exercises", action="store_true", help="train on functions instead of files"
    )
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    figures: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as name:
        source: dict[str, Any] = {"from_folder": str(options.folder), "held_out": HELD_OUT}
        if options.exercises:
            source = {
                "from_jsonl": str(write_exercises(options.folder, Path(name) / "exercises.jsonl"))
            }
        training = json.dumps(
            {
                "base": options.base,
                "tokens": options.tokens,
                "epochs": options.epochs,
                "learning_rate": options.rate,
            }
        )
        for mode in options.modes.split(","):
            folder = Path(name) / mode
            command = [
                sys.executable,
                "-c",
                WORKER,
                mode,
                json.dumps(source),
                str(folder),
                training,
            ]
            done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
            found = json.loads((folder / "run" / "result.json").read_text())["figures"]
            libraries = json.loads(done.stdout.splitlines()[-1])["libraries"]
            figures[mode] = {**found, "working_memory": found["peak_memory"] - libraries}
            print(mode, figures[mode], flush=True)
        if options.functions:
            for mode in ("base", *options.modes.split(",")):
                model = options.base if mode == "base" else str(Path(name) / mode / "model")
                figures.setdefault(mode, {})["bodies"] = bodies(
                    model, options.folder, options.functions
                )
                print(mode, figures[mode]["bodies"], flush=True)
    if options.json:
        settings = {"base": options.base, "exercises": options.exercises}
        write(options.json, settings | {"figures": figures})


def functions_of(folder: Path) -> tuple[list[Any], list[Any]]:
    """Return the documented functions of the training files and of the held-out files."""
    from deepseek.data import clean, read_folder, split
    from deepseek.data.builders.functions import documented_functions

    train, held_out = split(clean(read_folder(folder))[0], HELD_OUT)
    return documented_functions(train), documented_functions(held_out)


def write_exercises(folder: Path, path: Path) -> Path:
    """Write the functions of the training files as `deepseek data code` does."""
    lines = (json.dumps({"text": function.text}) for function in functions_of(folder)[0])
    path.write_text("\n".join(lines) + "\n", "utf-8")
    return path


def bodies(model: str, folder: Path, count: int) -> dict[str, float]:
    """Return the scores of bodies generated for functions of the held-out files."""
    from deepseek.engine.load import load
    from deepseek.evaluate.code import drawn_functions, score_bodies

    held_out = [function for function in functions_of(folder)[1] if len(function.header) < 1200]
    return asdict(score_bodies(*load(model), drawn_functions(held_out)[:count]))


if __name__ == "__main__":
    run_main(main)
