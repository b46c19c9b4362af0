"""Prepare a home of the library for quick runs: tiny models and texts under the names that
benchmarks ask for.

python benchmarks/quick_home.py FOLDER

`deepseek claims run NAME --quick` begins with it. `smollm2-135m` is a random model with a tokenizer
of bytes, each corpus is a part of this package's source, and `corpora/expert.safetensors` is a pack
of a random expert.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))

from tiny_expert import save_base, save_expert

from deepseek.engine.load import load

PACKAGE = Path(__file__).resolve().parents[1] / "deepseek"
CORPORA = (
    "code-a",
    "code-b",
    "code-c",
    "prose",
    "science",
    "public-prose",
    "public-code",
    "final-public-prose",
    "final-public-code",
    "final-octave",
    "final-spanish",
)
FILES, CHARACTERS = 4, 6000
"""Of a corpus; `position_length.py` needs a held-out file of more than 4,096 tokens in the first."""

SHAPE = {
    "vocab_size": 49152,  # benchmarks draw token ids below that of SmolLM2
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 4,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 8192,
}


def prepare(folder: Path) -> None:
    """Write models and texts below a folder."""
    base = save_base(folder / "models" / "smollm2-135m", **SHAPE)
    sources = [path for path in sorted(PACKAGE.rglob("*.py")) if path.stat().st_size > CHARACTERS]
    for number, name in enumerate(CORPORA):
        corpus = folder / "corpora" / name
        corpus.mkdir(parents=True)
        count = FILES if number else 6 * FILES
        for part, path in enumerate(sources[number :: len(CORPORA)][:count]):
            text = path.read_text(encoding="utf-8")[:CHARACTERS]
            # Names decide what is held out, so they are the same whatever the package holds.
            (corpus / f"part_{part}.py").write_text(text, encoding="utf-8")
    save_expert(load(base, dtype="float32"), "expert", folder / "corpora")


if __name__ == "__main__":
    prepare(Path(sys.argv[1]))
