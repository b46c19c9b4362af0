"""Update an expert with new commits: time until it is served, gain on the new text, forgetting.

    python benchmarks/fresh.py REPOSITORY [--commits 50] [--minutes 5] [--update-minutes 1] [--json FILE]

An expert is trained on the repository as it was `--commits` commits ago. Then the commits arrive:
`deepseek expert train --update` runs in its own process, and the new pack replaces the old one in a
running server. `seconds_from_commits_to_plugged` is the time from the commits to the server's
answer. For comparison, a second expert is trained from scratch on the whole history, within the
minutes of the first training: the full retraining that the update avoids. It reuses the public text
and the base's statistics that the first training computed.

Three texts are scored with the whole model and the exact loss, the expert forced on: `new`,
training documents that the commits brought; `unseen`, held-out documents that the commits brought,
if any; and `old`, held-out documents of the first training. The gain is the relative reduction of
the base's loss. The runs `fresh-bench` and `fresh-bench-whole` of an earlier measurement are
deleted first, so use a separate `DEEPSEEK_HOME`.
"""

import argparse
import json
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from entry import existing_path, run_main
from results import write

from deepseek.checkpoint.store import home
from deepseek.data import Document, RowLoader, TokenShards
from deepseek.data.text.document import silent
from deepseek.engine.load import Loaded, load
from deepseek.errors import DataError
from deepseek.model.experts import ExpertModule
from deepseek.packs.library import installed
from deepseek.packs.pack import read_pack
from deepseek.train.jobs.expert_server import ExpertServer
from deepseek.train.loop.losses import held_out_loss
from deepseek.train.text.corpus import NONE_KNOWN, Source, read_sides

DEEPSEEK = [sys.executable, "-m", "deepseek"]
ROW_LENGTH = 512
BATCH_ROWS = 4


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("repository", type=existing_path)
    parser.add_argument("--commits", type=int, default=50)
    parser.add_argument("--base", default="smollm2-135m")
    parser.add_argument("--minutes", type=float, default=5)
    parser.add_argument("--update-minutes", type=float, default=1)
    parser.add_argument("--tokens", type=int, default=32_768, help="most tokens to score per text")
    parser.add_argument(
        "--train-tokens", type=int, help="of the first training; default: by minutes"
    )
    parser.add_argument("--no-server", action="store_true", help="do not plug into a server")
    parser.add_argument("--json", type=Path, help="file to write the figures to")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        figures = measure(options, Path(folder))
    print(json.dumps(figures, indent=1))
    if options.json:
        write(options.json, {"figures": figures})


@dataclass(frozen=True)
class Texts:
    """Documents to score.

    Attributes:
        new: training documents that the commits brought.
        old: held-out documents of the first training.
        unseen: held-out documents that the commits brought.
    """

    new: list[Document]
    old: list[Document]
    unseen: list[Document]


def measure(options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Train, update, retrain, and return the figures."""
    for name in ("fresh-bench", "fresh-bench-whole"):
        shutil.rmtree(home() / "runs" / name, ignore_errors=True)
    clone = folder / options.repository.resolve().name
    git("clone", "-q", "--no-hardlinks", str(options.repository.resolve()), str(clone))
    head = git("-C", str(clone), "rev-parse", "HEAD").strip()
    git("-C", str(clone), "checkout", "-q", "-B", "work", f"{head}~{options.commits}")
    train("fresh-bench", options, clone)
    packs = {name: installed()["fresh-bench"] for name in ("before", "updated")}
    packs["before"] = shutil.copy(packs["before"], folder)
    first = documents(clone)
    server = None if options.no_server else Server(options.base)
    try:
        git("-C", str(clone), "reset", "-q", "--hard", head)
        started = time.perf_counter()
        run("expert", "train", "--update", "fresh-bench", "--minutes", str(options.update_minutes))
        updated = time.perf_counter()
        if server is not None:
            server.expert_server.plug_again("fresh-bench")
        seconds = time.perf_counter() - started
    finally:
        if server is not None:
            server.stop()
    retraining = time.perf_counter()
    train("fresh-bench-whole", options, clone)
    retraining = time.perf_counter() - retraining
    texts = compared(first, documents(clone))
    packs["retrained"] = installed()["fresh-bench-whole"]
    gains = scores(options, texts, packs, folder)
    return {
        "commits": options.commits,
        "new_documents": len(texts.new),
        "unseen_documents": len(texts.unseen),
        "seconds_from_commits_to_plugged": round(seconds, 1),
        "seconds_of_the_update": round(updated - started, 1),
        "seconds_of_a_retraining": round(retraining, 1),
        "gains_percent": gains,
        **ratios(gains),
    }


def ratios(gains: dict[str, dict[str, float]]) -> dict[str, float]:
    """Return the update's gain relative to the retraining's on new text, and to the first
    training's on old text.
    """
    new, old = gains["new"], gains["old"]
    return {
        "share_of_retraining_on_new": round(new["updated"] / new["retrained"], 3),
        "share_of_retraining_on_new_without_update": round(new["before"] / new["retrained"], 3),
        "kept_on_old": round(old["updated"] / old["before"], 3),
    }


def git(*words: str) -> str:
    """Run git and return its output."""
    return subprocess.run(["git", *words], check=True, capture_output=True, text=True).stdout


def run(*words: str) -> None:
    """Run a `deepseek` command in its own process."""
    subprocess.run([*DEEPSEEK, *words], check=True)


def train(name: str, options: argparse.Namespace, clone: Path) -> None:
    """Train an expert on the current state of the clone."""
    words = ["--name", name, "--base", options.base, "--minutes", str(options.minutes)]
    if options.train_tokens is not None:
        words += ["--tokens", str(options.train_tokens)]
    run("expert", "train", "--from-git", str(clone), *words)


def documents(clone: Path) -> tuple[list[Document], list[Document]]:
    """Return the training and held-out documents of the clone, split as in a training."""
    sides = read_sides(Source(git=clone), silent, NONE_KNOWN)
    return sides.train, sides.held_out


def compared(
    first: tuple[list[Document], list[Document]], then: tuple[list[Document], list[Document]]
) -> Texts:
    """Return the documents to score, given those of both states of the repository."""
    known = {document.digest for part in first for document in part}
    new, unseen = ([each for each in part if each.digest not in known] for part in then)
    trained = {document.name for part in (first[0], then[0]) for document in part}
    return Texts(new, [each for each in first[1] if each.name not in trained], unseen)


def scores(
    options: argparse.Namespace, texts: Texts, packs: dict[str, Path], folder: Path
) -> dict[str, dict[str, float]]:
    """Return the gain of each pack over the base in per cent, for each non-empty text."""
    loaded = load(options.base)
    gains: dict[str, dict[str, float]] = {}
    for name, part in vars(texts).items():
        if not part:
            continue
        batches = rows(part, loaded, options.tokens, folder / "shards" / name)
        base = held_out_loss(loaded.model, batches).loss
        gains[name] = {}
        for kind, path in packs.items():
            module = ExpertModule.from_pack(read_pack(path), loaded.model.dtype)
            with loaded.model.experts.forced(module):
                loss = held_out_loss(loaded.model, batches).loss
            gains[name][kind] = round(100 * (1 - loss / base), 2)
    return gains


def rows(part: Sequence[Document], loaded: Loaded, tokens: int, folder: Path) -> list[Any]:
    """Return packed rows of documents, with at most `tokens` tokens but at least one row."""
    shards = TokenShards.build(part, loaded.tokenizer, folder)
    loader = RowLoader(shards, BATCH_ROWS, ROW_LENGTH, 0)
    return loader.first(max(1, min(loader.num_rows, tokens // ROW_LENGTH))).batches()


class Server:
    """`deepseek serve` in its own process, with the first expert plugged."""

    def __init__(self, base: str) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = str(free.getsockname()[1])
        self.process = subprocess.Popen(
            [*DEEPSEEK, "serve", base, "--experts", "fresh-bench", "--port", port]
        )
        self.expert_server = ExpertServer(f"http://127.0.0.1:{port}")
        while True:
            try:
                self.expert_server.plugged_digest("fresh-bench")
                return
            except DataError:
                if self.process.poll() is not None:
                    raise
                time.sleep(0.5)

    def stop(self) -> None:
        self.process.terminate()
        self.process.wait()


if __name__ == "__main__":
    run_main(main)
