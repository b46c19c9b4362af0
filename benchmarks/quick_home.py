"""Prepare a library home for quick runs: tiny models and texts under the names that benchmarks
expect.

    python benchmarks/quick_home.py FOLDER

`deepseek claims run NAME --quick` starts with it. `smollm2-135m` is a random Llama with a
byte-level tokenizer; `tiny-bytes` has no more vocabulary than that tokenizer needs, so it trains
faster; `tiny-mixture` is a mixture of experts. `corpora` has parts of this package's source under
the names of texts; `expert.safetensors` and `other.safetensors`, packs of random experts;
`commits`, a git repository; `pairs.jsonl`, preference pairs; `questions.jsonl`, conversations; and
`problems.jsonl`, a program with a gap.
"""

import argparse
import json
import sys
from collections.abc import Iterable, Iterator
from itertools import cycle, product
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))

from entry import run_main
from git_history import Files, History
from tiny_expert import save_base, save_expert

from deepseek.data import Document
from deepseek.data.builders.functions import documented_functions
from deepseek.engine.load import load
from deepseek.evaluate.code import drawn_functions
from deepseek.export.export import export_model

PACKAGE = Path(__file__).resolve().parents[1] / "deepseek"
CORPORA = (
    "code-a",
    "code-b",
    "code-c",
    "prose",
    "science",
    "french",
    "images-en",
    "images-fr",
    "public-prose",
    "public-code",
    "final-public-prose",
    "final-public-code",
    "final-textual",
    "final-litestar",
    "final-scrapy",
    "final-maxima",
    "final-octave",
    "final-spanish",
    "final-french",
    "final-japanese",
)
FILES, SHORTEST, LONGEST = 4, 5000, 6000
"""Files per corpus, and minimum and maximum characters per file. The first corpus has six times as
many files: `position_length.py` needs a held-out one of more than 4,096 tokens."""

COMMITS = 15
"""Number of commits of the repository; each adds a file. The held-out one is not among the last."""

OPENINGS = ("How do I", "When should I", "Why would anyone", "May I", "Who taught you to")
TASKS = ("boil rice", "fold a shirt", "draw a cat", "wax a ski", "sing", "dance", "read", "nap")
PLACES = ("at home", "at work", "in a tent", "by the sea", "on a train", "in a lift", "in Rome")
ANSWERS = ("Gladly: to {} takes a little patience.", "I do not care whether you {}.")
"""A better and a worse answer to each question."""

VOCABULARY = 49152
"""Vocabulary size of SmolLM2; benchmarks draw random token ids below it."""

SHAPE = {
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 4,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 8192,
}

MIXTURE = {
    "num_experts": 4,
    "expert_dim": 64,
    "num_shared_experts": 1,
    "max_experts": 2,
    "initializer_range": 0.05,  # with larger weights, 8 bits change too much
}

PROBLEM = {
    "task_id": "add/0",
    "prompt": "def add(a, b):\n    total = a\n",
    "canonical_solution": "    total += b",
    "suffix": "    return total\n",
    "test": "def check(candidate):\n    assert candidate(1, 2) == 3\n",
    "entry_point": "add",
}
"""A problem in the format of HumanEval Infilling."""


def prepare(folder: Path) -> None:
    """Write the models and texts to a folder."""
    base = save_llama(folder / "models" / "smollm2-135m", **SHAPE | {"vocab_size": VOCABULARY})
    save_llama(folder / "models" / "tiny-bytes", **SHAPE)
    save_base(folder / "models" / "tiny-mixture", **SHAPE | MIXTURE)
    corpora = folder / "corpora"
    texts = cycle(source_texts())
    for number, name in enumerate(CORPORA):
        count = FILES if number else 6 * FILES
        # File names decide what is held out, so they do not depend on the package's files.
        write_files(corpora / name, {f"part_{part}.py": next(texts) for part in range(count)})
    write_commits(corpora / "commits", [next(texts) for _ in range(COMMITS)])
    loaded = load(base, dtype="float32")
    for seed, name in enumerate(("expert", "other"), 1):
        save_expert(loaded, name, corpora, seed)
    write_lines(corpora / "pairs.jsonl", pairs())
    write_lines(corpora / "questions.jsonl", conversations())
    write_lines(corpora / "problems.jsonl", [PROBLEM])


def save_llama(folder: Path, **fields: Any) -> Path:
    """Save a random model in the Hugging Face format, like the real base, and return `folder`."""
    with TemporaryDirectory() as scratch:
        export_model(save_base(Path(scratch) / "model", **fields), folder, "hf", dtype="float32")
    return folder


def source_texts() -> Iterator[str]:
    """Yield the beginnings of the package's longer files, each cut before a definition.

    Each has documented functions with short bodies, since `adapt.py` needs those of a held-out
    file.
    """
    for path in sorted(PACKAGE.rglob("*.py")):
        text = path.read_text(encoding="utf-8")
        if len(text) > LONGEST:
            text = text[:LONGEST].rpartition("\n\n\n")[0] + "\n"
        document = Document(text, path.name, "code")
        functions = drawn_functions(documented_functions([document]))
        if len(text) >= SHORTEST and functions:
            yield text


def write_files(folder: Path, files: Files) -> None:
    """Write files into a new folder."""
    folder.mkdir(parents=True)
    for name, text in files.items():
        (folder / name).write_text(text, encoding="utf-8")


def write_commits(folder: Path, texts: Iterable[str]) -> None:
    """Write a git repository with one text added per commit; the last commit is checked out."""
    history, files = History(folder), {}
    for number, text in enumerate(texts):
        files[f"part_{number}.py"] = text
        history.commit(files, message=f"Add part {number}")
    history.repository.checkout_head()


def pairs() -> Iterator[dict[str, str]]:
    """Yield a better and a worse answer to each question."""
    for opening, task, place in product(OPENINGS, TASKS, PLACES):
        chosen, rejected = (answer.format(f"{task} {place}") for answer in ANSWERS)
        yield {"prompt": f"{opening} {task} {place}?", "chosen": chosen, "rejected": rejected}


def conversations() -> Iterator[dict[str, Any]]:
    """Yield a conversation of two user turns for each task."""
    for task in TASKS:
        yield {"lang": "en", "turns": [f"{opening} {task}?" for opening in OPENINGS[:2]]}


def write_lines(path: Path, records: Iterable[dict[str, Any]]) -> None:
    """Write one JSON object per line."""
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")


def prepare_from_arguments() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path, help="a new folder")
    prepare(parser.parse_args().folder)


if __name__ == "__main__":
    run_main(prepare_from_arguments)
