"""Kill training at random moments, simulate a full disk, and check that the resulting weights are
bit for bit the same.

    python benchmarks/crash.py [--kills 100] [--full 20] [--stages pretrain,adapt,align] [--seconds 240] [--json FILE]

Each stage runs once undisturbed. Then it runs repeatedly in new folders, is killed (SIGKILL) at
random times, also while it writes checkpoints, and restarted until it finishes; its weights must
equal those of the undisturbed run. For the full disk, one checkpoint write fails with ENOSPC: the
process must exit with an error message, and the restarted run must end with the same weights.
"""

import argparse
import hashlib
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from entry import run_main
from results import write

TESTS = Path(__file__).parent.parent / "tests"

WORKER = """
import sys
sys.path.insert(0, {tests!r})
from pathlib import Path
from train.loop.tiny_pretrain import settings
import deepseek
from deepseek.checkpoint import store
from deepseek.errors import UserError

stage, texts, folder, full = sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3]), int(sys.argv[4])
writes, save = 0, store.save_state
def save_state(*arguments):
    global writes
    writes += 1
    if writes == full:
        raise OSError(28, "No space left on device")
    save(*arguments)
store.save_state = save_state
try:
    if stage == "pretrain":
        deepseek.pretrain(settings(texts, folder, steps=60, checkpoint_every=2), quiet=True)
    elif stage == "align":
        deepseek.align({base!r}, prefs=texts / "pairs.db", name="x", rollouts=8, rollout_size=16, new_tokens=6,
                       layers="all", out=folder / "model", run_folder=folder / "run", quiet=True)
    else:
        deepseek.adapt({base!r}, name="x", from_folder=texts / "words", last=1, epochs=12, row_length=32, batch_rows=2,
                       out=folder / "model", run_folder=folder / "run", quiet=True)
except UserError as error:
    print(error)
    sys.exit(2)
print(writes)
"""


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--full", type=int, default=20)
    parser.add_argument("--stages", default="pretrain,adapt,align")
    parser.add_argument("--seconds", type=float, default=240, help="stop early after so long")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    stages = options.stages.split(",")
    kills, full, different, refused = 0, 0, 0, 0
    draw = random.Random(0)
    with tempfile.TemporaryDirectory() as name:
        root = Path(name)
        make_texts(root / "texts")
        base = root / "pretrain" / "model"
        script = root / "worker.py"
        script.write_text(WORKER.format(tests=str(TESTS), base=str(base)))
        expected, seconds, writes = {}, {}, {}
        for stage in ("pretrain", *(s for s in stages if s != "pretrain")):
            started = time.monotonic()
            process = run(script, stage, root / "texts", root / stage, 0)
            writes[stage] = int(process.communicate()[0].split()[-1])
            assert process.returncode == 0
            seconds[stage], expected[stage] = (
                time.monotonic() - started,
                digest(root / stage / "model"),
            )
            if stage == "pretrain":
                make_pairs(root / "texts" / "pairs.db", base)
        number, deadline = 0, time.monotonic() + options.seconds
        while (kills < options.kills or full < options.full) and time.monotonic() < deadline:
            stage, folder = stages[number % len(stages)], root / f"run-{number}"
            number += 1
            if full < options.full and (number % 4 == 0 or not options.kills):
                process = run(script, stage, root / "texts", folder, draw.randint(1, writes[stage]))
                output, _ = process.communicate()
                told = process.returncode == 2 and "is full" in output
                refused += told
                print(
                    stage,
                    "disk full:",
                    "told" if told else f"NOT TOLD, code {process.returncode}",
                    flush=True,
                )
                full += 1
            while time.monotonic() < deadline and kills < options.kills:
                process = run(script, stage, root / "texts", folder, 0)
                try:
                    process.wait(timeout=seconds[stage] * draw.uniform(0.3, 1.2))
                    break
                except subprocess.TimeoutExpired:
                    process.send_signal(signal.SIGKILL)
                    process.wait()
                    kills += 1
            assert run(script, stage, root / "texts", folder, 0).wait() == 0, (
                "the last start did not end"
            )
            different += digest(folder / "model") != expected[stage]
    figures = {
        "kills": kills,
        "runs": number,
        "disk_full": full,
        "disk_full_told": refused,
        "different": different,
    }
    print(figures)
    if options.json:
        write(options.json, {"figures": figures})
    sys.exit(bool(different) or refused < full)


def run(script: Path, stage: str, texts: Path, folder: Path, full: int) -> "subprocess.Popen[str]":
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "DEEPSEEK_HOME": str(script.parent / "home"),
    }
    command = [sys.executable, str(script), stage, str(texts), str(folder), str(full)]
    return subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    )


def digest(folder: Path) -> str:
    return hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest()


def make_texts(root: Path) -> None:
    """Write two folders of short files."""
    words = ["alpha", "beta", "gamma", "delta", "epsilon", "zeta", "eta", "theta", "iota", "kappa"]
    draw = random.Random(0)
    for name, ending in (("words", "txt"), ("code", "py")):
        (root / name).mkdir(parents=True)
        for number in range(30):
            text = " ".join(draw.choice(words) for _ in range(120))
            (root / name / f"{number}.{ending}").write_text(
                f"# {text}\n" if ending == "py" else text + ".\n"
            )


def make_pairs(path: Path, base: Path) -> None:
    """Write preferences for some words over others, and give the tokenizer of `base` a chat
    template.
    """
    from deepseek.data.preferences.database import Preference, PreferenceDatabase
    from deepseek.text.tokenizer import load_tokenizer

    tokenizer = load_tokenizer(base)
    tokenizer.chat_template = "{% for m in messages %}{{ m['content'] }}\n{% endfor %}"
    tokenizer.save_pretrained(base)
    store = PreferenceDatabase(path)
    for number in range(80):
        store.add(
            Preference(
                ({"role": "user", "content": f"beta {number}"},), "alpha gamma", "kappa iota"
            )
        )
    store.set_eval_share(0.3)
    store.close()


if __name__ == "__main__":
    run_main(main)
