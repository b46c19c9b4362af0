"""Python code as rows of token ids for small models: training windows and held-out test rows
(`position_length.py`).
"""

from collections import Counter
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path

import torch
from torch import Tensor

from deepseek.checkpoint.hub import resolve
from deepseek.text.tokenizer import encode_plain, load_tokenizer

SHORT = 1024  # tokens per training row
BATCH = 1
VOCAB = 2048
UNKNOWN = 0  # id of all rare tokens, which are never targets
END = 1  # end-of-file id
HELD_OUT = 0.1  # of the files


@dataclass(frozen=True)
class Corpus:
    """Tokens of the code.

    Attributes:
        stream: ids of the training files, one after another.
        rows: test rows from held-out files that are long enough, `[N, T + 1]`.
        ends_line: whether each id contains a line end, `[VOCAB]`.
    """

    stream: Tensor
    rows: Tensor
    ends_line: Tensor


def read_corpus(folders: list[Path], test_rows: int, length: int) -> Corpus:
    """Return the tokens of the code, with test rows of `length + 1` tokens."""
    files = sorted(path for folder in folders for path in folder.rglob("*.py"))
    tokenizer = load_tokenizer(resolve("smollm2-135m"))
    texts = encode_plain(tokenizer, [path.read_text(errors="replace") for path in files])
    held = [
        int(sha256(path.name.encode()).hexdigest(), 16) % 1000 < 1000 * HELD_OUT for path in files
    ]
    known = Counter(
        i for ids, out in zip(texts, held, strict=True) if not out for i in ids
    ).most_common(VOCAB - 2)
    new_id = {old: new for new, (old, _) in enumerate(known, start=2)}
    mapped = [torch.tensor([new_id.get(i, UNKNOWN) for i in ids] + [END]) for ids in texts]
    stream = torch.cat([ids for ids, out in zip(mapped, held, strict=True) if not out])
    long = [ids for ids, out in zip(mapped, held, strict=True) if out and len(ids) > length]
    rows = [
        ids[start : start + length + 1]
        for ids in long
        for start in range(0, len(ids) - length, SHORT)
    ]
    chosen = torch.randperm(len(rows), generator=torch.Generator().manual_seed(0))[:test_rows]
    ends_line = torch.zeros(VOCAB, dtype=torch.bool)
    for old, new in new_id.items():
        ends_line[new] = "\n" in tokenizer.decode([old])
    return Corpus(stream, torch.stack([rows[i] for i in chosen]), ends_line)


class Windows:
    """Random rows `[B, 1025]` of the stream, the same for all rivals with a seed."""

    def __init__(self, stream: Tensor, seed: int) -> None:
        self.stream = stream
        self.seed = seed
        self.count = 0  # number of batches drawn so far

    def next(self) -> Tensor:
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + self.count)
        self.count += 1
        starts = torch.randint(len(self.stream) - SHORT, (BATCH, 1), generator=generator)
        return self.stream[starts + torch.arange(SHORT + 1)]

    def state(self) -> dict[str, int]:
        return {"count": self.count}

    def load(self, state: dict[str, int]) -> None:
        self.count = state["count"]
