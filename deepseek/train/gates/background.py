"""Background of an expert's relevance tables: public text of many kinds, cached once per base.

It has more text than the calibration of gates, since only tokens are needed: hundreds of source
files and package descriptions of the Python installation, besides the public rows, everyday
conversations in fifteen languages and the commonest words of these. Pairs of tokens are rarer than
tokens and need more text: some files of every installed package. A quarter of the packages are not
counted; passages of them show how high code of other projects scores.
"""

import sysconfig
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import chain
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from deepseek.data.builders.everyday import Conversation
from deepseek.data.text.document import Progress, silent
from deepseek.model.experts.relevance import PASSAGE
from deepseek.model.language_model import LanguageModel
from deepseek.packs.manifest import PAIR_SLOTS
from deepseek.text.tokenizer import encode_plain
from deepseek.train.gates.conversations import (
    conversation_halves,
    expected_frequencies,
    without_reserved,
)
from deepseek.train.gates.languages import language_counts
from deepseek.train.gates.public_text import SAMPLED_ROWS, kept, kept_rows, place, pseudorandom
from deepseek.train.gates.relevance import Background, count_pairs

LARGEST = 1_000_000
"""Maximum size of a file to read, in bytes."""

FILES = 800
"""Number of source files, spread evenly over the installed packages."""

FILES_OF_A_PACKAGE = 6
"""Maximum number of source files per folder of a package."""
CHARACTERS = 3000
"""Characters from the middle of one file."""

PACKAGE_FILES = 40
"""Maximum number of source files per package whose pairs are counted."""
PACKAGE_CHARACTERS = 8000
"""Characters read from the beginning of each of these files."""
UNCOUNTED = 4
"""One package in this many is not counted; its passages are scored instead."""
LATER = 512
"""Where the second passage of a document begins, in tokens."""
PACKAGE_PASSAGES = 10
"""Maximum number of passages of an uncounted package."""


def background(
    model: LanguageModel, tokenizer: PreTrainedTokenizerFast, progress: Progress = silent
) -> Background:
    """Return the background of a base, cached in the library's home.

    Reserved conversations are not counted, as they show how often an expert is admitted to a chat.
    """
    rows = without_reserved(kept_rows(model, tokenizer, progress), tokenizer)
    root, name = place(model)
    # The key "words" of earlier versions holds counts without languages.
    stored = kept(root / f"words-2-{name}", lambda: _measured(model, tokenizer, rows, progress))
    chats = stored["chats"].long().split(stored["lengths"].tolist())
    paired = kept(root / f"pairs-{name}", lambda: _measured_pairs(tokenizer, rows, progress))
    passages = [paired[f"passages.{kind}"].long() for kind in ("rows", "code", "descriptions")]
    return Background(
        stored["counts"].float(),
        chats,
        paired["counts"].float(),
        tuple(ids_NT for ids_NT in passages if len(ids_NT)),
    )


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
    languages_LV = language_counts(tokenizer, size, list(expected))
    return {
        "counts": torch.cat([torch.stack(counts), languages_LV]),
        "chats": torch.cat(chats).int(),
        "lengths": torch.tensor([len(ids) for ids in chats]),
    }


def _measured_pairs(
    tokenizer: PreTrainedTokenizerFast, rows_RT: Tensor, progress: Progress
) -> dict[str, Tensor]:
    code = torch.zeros(PAIR_SLOTS, dtype=torch.long, device="cpu")
    passages: list[Tensor] = []
    packages = installed_packages()
    for number, files in enumerate(packages):
        progress(number, len(packages), "pairs of tokens (installed packages)")
        documents = _encoded(tokenizer, _beginnings(files[:PACKAGE_FILES]))
        if number % UNCOUNTED == 0:
            passages += _passages(documents)[:PACKAGE_PASSAGES]
        else:
            for ids_N in documents:
                code += count_pairs(ids_N)
    described = _encoded(tokenizer, descriptions())
    of_rows, of_descriptions = (
        sum((count_pairs(ids_N) for ids_N in documents), torch.zeros_like(code))
        for documents in (rows_RT, described)
    )
    found = {"rows": list(rows_RT), "code": passages, "descriptions": described}
    kinds = [counts for counts in (of_rows, code, of_descriptions) if counts.any()]
    return {"counts": torch.stack(kinds).int()} | {
        f"passages.{kind}": _stacked(_passages(documents)) for kind, documents in found.items()
    }


def _passages(documents: Iterable[Tensor]) -> list[Tensor]:
    """Return the full passages of each document that begin at its start and at token `LATER`."""
    return [
        ids_N[start : start + PASSAGE]
        for ids_N in documents
        for start in (0, LATER)
        if len(ids_N) >= start + PASSAGE
    ]


def _stacked(passages: Sequence[Tensor]) -> Tensor:
    return (
        torch.stack([*passages]).int()
        if passages
        else torch.empty(0, PASSAGE, dtype=torch.int, device="cpu")
    )


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
    folders = _source_files(lambda parts: parts[:2] if len(parts) > 2 else parts[:1])
    files = chain.from_iterable(paths[:FILES_OF_A_PACKAGE] for paths in folders)
    yield from _middles(sorted(files, key=pseudorandom)[:FILES])


def installed_packages() -> list[list[Path]]:
    """Return the source files of each package of the Python installation, in pseudorandom order."""
    return _source_files(lambda parts: parts[:1])


def _source_files(folder: Callable[[tuple[str, ...]], tuple[str, ...]]) -> list[list[Path]]:
    """Return the source files of the Python installation in groups.

    Args:
        folder: gives the group of a file by the parts of its relative path.

    Returns:
        The files of each group in pseudorandom order, the groups sorted.
    """
    folders: dict[tuple[str, ...], list[Path]] = {}
    for name in ("stdlib", "purelib"):
        root = Path(sysconfig.get_path(name))
        for path in root.rglob("*.py"):
            parts = path.relative_to(root).parts
            if len(parts) > 1 and parts[0] != "site-packages":
                folders.setdefault(folder(parts), []).append(path)
    return [sorted(paths, key=pseudorandom) for _, paths in sorted(folders.items())]


def _beginnings(paths: Iterable[Path]) -> Iterator[str]:
    for path in paths:
        if path.is_file() and path.stat().st_size < LARGEST:
            text = path.read_text(encoding="utf-8", errors="ignore")[:PACKAGE_CHARACTERS]
            if text.strip():
                yield text


def descriptions() -> Iterator[str]:
    """Yield the middles of the packages' descriptions."""
    yield from _middles(sorted(Path(sysconfig.get_path("purelib")).glob("*.dist-info/METADATA")))


def _middles(paths: Sequence[Path]) -> Iterator[str]:
    for path in paths:
        if path.is_file() and path.stat().st_size < LARGEST:
            text = path.read_text(encoding="utf-8", errors="ignore")
            middle = text[len(text) // 3 :][:CHARACTERS]
            if middle.strip():
                yield middle
