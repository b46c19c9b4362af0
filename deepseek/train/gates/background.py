"""Background of an expert's relevance table: public text of many kinds, cached once per base.

It has more text than the calibration of gates, since only tokens are needed: hundreds of source
files and package descriptions of the Python installation, besides the public rows and everyday
conversations in fifteen languages.
"""

import sysconfig
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from deepseek.data.builders.everyday import Conversation
from deepseek.data.text.document import Progress, silent, uniform
from deepseek.model.language_model import LanguageModel
from deepseek.text.tokenizer import encode_plain
from deepseek.train.gates.conversations import conversation_halves, expected_frequencies
from deepseek.train.gates.public_text import SAMPLED_ROWS, kept, kept_rows, place
from deepseek.train.gates.relevance import Background

FILES = 800
"""Number of source files, spread evenly over the installed packages."""

FILES_OF_A_PACKAGE = 6
"""Most source files of one folder of a package."""
CHARACTERS = 3000
"""Characters from the middle of one file."""


def background(
    model: LanguageModel, tokenizer: PreTrainedTokenizerFast, progress: Progress = silent
) -> Background:
    """Return the background of a base, cached in the library's home."""
    rows = kept_rows(model, tokenizer, progress)
    root, name = place(model)
    stored = kept(root / f"words-{name}", lambda: _measured(model, tokenizer, rows, progress))
    chats = stored["chats"].long().split(stored["lengths"].tolist())
    return Background(stored["counts"].float(), chats)


def _measured(
    model: LanguageModel, tokenizer: PreTrainedTokenizerFast, rows_RT: Tensor, progress: Progress
) -> dict[str, Tensor]:
    fitted, reserved = conversation_halves()
    kinds = [
        list(rows_RT[:-SAMPLED_ROWS]),
        list(rows_RT[-SAMPLED_ROWS:]),
        _encoded(tokenizer, installed_source()),
        _encoded(tokenizer, descriptions()),
    ]
    size = model.config.vocab_size
    counts = [
        torch.cat(documents).bincount(minlength=size).float() for documents in kinds if documents
    ]
    expected = expected_frequencies(model, tokenizer, fitted, progress)
    for language, frequency_V in expected.items():
        of_language = [conversation for conversation in fitted if conversation.language == language]
        observed_V = torch.cat(_messages(tokenizer, of_language)).bincount(minlength=size).float()
        # Expected frequencies weigh as much as observed ones: they cover the words that the few
        # messages lack.
        counts.append(observed_V + observed_V.sum() * frequency_V)
    chats = _messages(tokenizer, reserved)
    return {
        "counts": torch.stack(counts),
        "chats": torch.cat(chats).int(),
        "lengths": torch.tensor([len(ids) for ids in chats]),
    }


def _messages(
    tokenizer: PreTrainedTokenizerFast, conversations: Sequence[Conversation]
) -> list[Tensor]:
    return _encoded(tokenizer, ["\n".join(conversation.turns) for conversation in conversations])


def _encoded(
    tokenizer: PreTrainedTokenizerFast, texts: Iterator[str] | Sequence[str]
) -> list[Tensor]:
    return [torch.tensor(ids) for ids in encode_plain(tokenizer, list(texts)) if ids]


def installed_source() -> Iterator[str]:
    """Yield the middles of source files of the Python installation, a few per folder of a package.

    Modules at the top of the standard library are excluded, so that they remain unseen for
    evaluation.
    """
    folders: dict[tuple[str, ...], list[Path]] = {}
    for name in ("stdlib", "purelib"):
        root = Path(sysconfig.get_path(name))
        for path in root.rglob("*.py"):
            parts = path.relative_to(root).parts
            if len(parts) > 1 and parts[0] != "site-packages":
                folders.setdefault(parts[:2] if len(parts) > 2 else parts[:1], []).append(path)
    files = [
        path
        for _, paths in sorted(folders.items())
        for path in sorted(paths, key=lambda path: uniform("/".join(path.parts[-3:])))[
            :FILES_OF_A_PACKAGE
        ]
    ]
    files.sort(key=lambda path: uniform("/".join(path.parts[-3:])))
    yield from _middles(files[:FILES])


def descriptions() -> Iterator[str]:
    """Yield the middles of the packages' descriptions."""
    yield from _middles(sorted(Path(sysconfig.get_path("purelib")).glob("*.dist-info/METADATA")))


def _middles(paths: Sequence[Path]) -> Iterator[str]:
    for path in paths:
        if path.is_file() and path.stat().st_size < 1_000_000:
            text = path.read_text(encoding="utf-8", errors="ignore")
            middle = text[len(text) // 3 :][:CHARACTERS]
            if middle.strip():
                yield middle
