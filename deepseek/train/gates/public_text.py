"""Statistics of a base model on public text: the background of every gate, computed once per base.

A gate separates its own domain from everything else, and a sample of "everything else" must be
available offline on any machine. Half of it is text sampled from the base, which resembles the
prose, conversations and code of its training. The other half is source files and package
descriptions of the Python installation, one of each kind per package. Conversations are included
(`conversations.py`). Variety matters more than quantity: gates have false positives on kinds of
text that are missing here.
"""

import sysconfig
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from hashlib import sha256
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from deepseek.checkpoint.fingerprint import fingerprint
from deepseek.checkpoint.store import home, load_state, save_state
from deepseek.data import TokenShards
from deepseek.data.text.document import Progress, silent, uniform
from deepseek.data.text.encode import CONTEXT_BIT
from deepseek.data.text.loader import IGNORE, Batch
from deepseek.engine.engine import Engine
from deepseek.engine.request import ExpertChoice, Request
from deepseek.engine.sampler import Sampling
from deepseek.engine.start import quickest_runner
from deepseek.errors import CheckpointError, DataError
from deepseek.model.language_model import LanguageModel
from deepseek.text.tokenizer import document_end_id, encode_plain
from deepseek.train.gates.conversations import conversation_rows
from deepseek.train.gates.inputs import HALF_LIFE, Moments, blend, gate_inputs
from deepseek.train.text.trunk_cache import Stream, run_trunk

VERSION = 6
"""Part of the cache key; increase it when the public text changes."""
ROW_LENGTH = 128
"""Tokens of a public row; each row comes from a different text."""

ROWS_PER_KIND = 80
SAMPLES_PER_OPENING = 10
BATCH_ROWS = 6
STRIDE = 4
"""Stride of the smoothed gate inputs that thresholds are set by; neighbours are nearly equal."""

FILE_KINDS = (
    frozenset({".py"}),
    frozenset(
        {".h", ".hpp", ".c", ".pyx", ".js", ".css", ".html", ".sh", ".json", ".toml", ".yaml"}
    ),
    frozenset({"", ".md", ".rst"}),  # "" for METADATA, a package's description
)

OPENINGS = (
    "",
    "",
    "Chapter I.\n\n",
    "The history of",
    "Once upon a time",
    "Abstract\n\n",
    "She said",
    "It was a",
    "In 18",
    "Dear",
    "The government",
    "How to",
    "## Introduction\n\n",
    "Question:",
    "When I",
    "Most people",
)
"""Prompts of the sampled documents, so that every seed covers stories, reports, letters,
instructions and so on.
"""

SAMPLED_ROWS = len(OPENINGS) * SAMPLES_PER_OPENING
"""Number of rows sampled from the base; they come last."""


@dataclass(frozen=True)
class PublicStatistics:
    """Gate inputs on public text.

    Attributes:
        moments: second moments by layer, over half of the rows.
        sample: smoothed gate inputs `[rows, samples, D]` by layer, over the other half.
        tokens: total number of public tokens.
    """

    moments: dict[int, Moments]
    sample: dict[int, Tensor]
    tokens: int

    def require(self, layers: Iterable[int]) -> None:
        """Raise `DataError` if a layer is missing."""
        missing = sorted(set(layers) - set(self.moments))
        if missing:
            raise DataError(
                f"The public statistics lack layer {missing[0]}; "
                "compute them for the module's layers."
            )


def public_statistics(
    model: LanguageModel,
    tokenizer: PreTrainedTokenizerFast,
    layers: Sequence[int],
    progress: Progress = silent,
) -> PublicStatistics:
    """Return the public statistics of `model` at `layers`, cached in the library's home.

    Args:
        model: base model; experts are switched off.
        tokenizer: tokenizer of the base.
        layers: layers whose gate inputs are needed.
        progress: shows the progress.
    """
    root, name = place(model)
    rows = kept_rows(model, tokenizer, progress)

    def measured() -> dict[str, Tensor]:
        cached_BTD = public_streams(model, tokenizer, min(layers), progress)
        statistics = measure_public(
            model, rows, layers, lambda batch: cached_BTD[batch.row_ids], progress
        )
        moments = {f"moments.{layer}": statistics.moments[layer].second.float() for layer in layers}
        return moments | {
            f"sample.{layer}": statistics.sample[layer].to(torch.bfloat16) for layer in layers
        }

    digest = sha256(str(sorted(layers)).encode()).hexdigest()[:16]
    stored = kept(root / f"layers-{digest}-{HALF_LIFE:g}-{name}", measured)
    return PublicStatistics(
        {layer: Moments(stored[f"moments.{layer}"].double()) for layer in layers},
        {layer: stored[f"sample.{layer}"].float() for layer in layers},
        rows.numel(),
    )


def training_rows(
    model: LanguageModel, tokenizer: PreTrainedTokenizerFast, progress: Progress = silent
) -> Tensor:
    """Return the public rows `[R, ROW_LENGTH]` not used for thresholds, and rows of the text that
    the model was adapted to.
    """
    return torch.cat(
        [kept_rows(model, tokenizer, progress)[0::2], _adapted_rows(model.experts.base.weights)]
    )


def public_streams(
    model: LanguageModel,
    tokenizer: PreTrainedTokenizerFast,
    first: int,
    progress: Progress = silent,
) -> Tensor:
    """Return the residual stream `[R, ROW_LENGTH, D]` of `training_rows` below the experts of block
    `first`.
    """
    rows = training_rows(model, tokenizer, progress)

    def computed() -> dict[str, Tensor]:
        with model.experts.arming(None):
            parts: list[Tensor] = []
            for batch in public_batches(rows, BATCH_ROWS):
                progress(len(parts) * BATCH_ROWS, len(rows), "trunk (public text)")
                parts.append(run_trunk(model, first, batch).cpu())
        return {"stream": torch.cat(parts)}

    root, name = place(model)
    return kept(root / f"stream-{first}-{len(rows)}-{name}", computed)["stream"]


def remember_adapted(folder: Path, base: Path, shards: TokenShards | None = None) -> None:
    """Store rows of the texts that the model in `folder` was adapted to.

    Experts trained on the model replay them, so that they do not unlearn that text. Gates are not
    calibrated against them: an expert may claim such text.

    Args:
        folder: the adapted model.
        base: the model that it was made from, whose own such rows are stored again.
        shards: training text, of which `ROWS_PER_KIND` rows are stored; None: none.
    """
    rows = _adapted_rows(fingerprint(base).weights)
    if shards is not None:
        starts = np.linspace(
            0, max(0, shards.num_tokens - ROW_LENGTH), ROWS_PER_KIND, dtype=np.int64
        )
        ids_RT = (
            shards.ids_N[(starts[:, None] + np.arange(ROW_LENGTH)) % shards.num_tokens]
            & ~CONTEXT_BIT
        )
        rows = torch.cat([rows, torch.from_numpy(ids_RT.astype(np.int64))])
    save_state(_adapted(fingerprint(folder).weights), {"ids": rows}, {})


def _adapted(weights: str) -> Path:
    return home() / "public" / weights[:32] / "adapted"


def _adapted_rows(weights: str) -> Tensor:
    folder = _adapted(weights)
    return (
        load_state(folder)[0]["ids"]
        if folder.is_dir()
        else torch.empty(0, ROW_LENGTH, dtype=torch.long)
    )


def public_rows(
    model: LanguageModel, tokenizer: PreTrainedTokenizerFast, progress: Progress = silent
) -> Tensor:
    """Return token ids `[R, ROW_LENGTH]`, every row from a different text."""
    installed = [
        torch.tensor(cut_rows(tokenizer, texts, ROWS_PER_KIND)) for texts in installed_texts()
    ]
    # Conversations have their rows for fitting at even places, so an even number precedes them.
    rows = torch.cat(installed)
    rows = rows[: len(rows) // 2 * 2]
    conversations = conversation_rows(model, tokenizer, ROW_LENGTH, progress)
    return torch.cat([rows, conversations, sampled_rows(model, tokenizer, progress)])


def cut_rows(
    tokenizer: PreTrainedTokenizerFast, texts: Iterable[str], most: int
) -> list[list[int]]:
    """Return the first `ROW_LENGTH` ids of the first `most` texts that have as many."""
    rows: list[list[int]] = []
    for text in texts:
        ids = encode_plain(tokenizer, [text[: 20 * ROW_LENGTH]])[0]
        if len(ids) >= ROW_LENGTH:
            rows.append(ids[:ROW_LENGTH])
        if len(rows) == most:
            break
    return rows


def installed_texts() -> list[Iterator[str]]:
    """Return texts of the Python installation by kind of file: one file per ending and package.

    Files at the top of the standard library are excluded, so that they remain unseen for
    evaluation.
    """
    found: list[dict[tuple[str, str], Path]] = [{} for _ in FILE_KINDS]
    for name in ("stdlib", "purelib"):
        root = Path(sysconfig.get_path(name))
        for path in (*root.glob("*/*"), *root.glob("*/*/*")):
            key = (path.relative_to(root).parts[0], path.suffix)
            for files, endings in zip(found, FILE_KINDS, strict=True):
                if path.suffix in endings and key[0] != "site-packages":
                    files[key] = min(path, files.get(key, path), key=pseudorandom)
    return [_middles(sorted(files.values(), key=pseudorandom)) for files in found]


def sampled_rows(
    model: LanguageModel, tokenizer: PreTrainedTokenizerFast, progress: Progress = silent
) -> Tensor:
    """Return ids `[R, ROW_LENGTH]` of documents sampled from the model, the same at every call."""
    end = document_end_id(tokenizer)
    rows = []
    openings = encode_plain(tokenizer, OPENINGS) * SAMPLES_PER_OPENING
    sampling = Sampling(ROW_LENGTH, temperature=1.0, top_k=100, logit_bias={end: -100.0})
    with Engine(model, tokenizer, quickest_runner(model), max_waiting=len(openings)) as engine:
        generations = [
            engine.submit(
                Request(
                    (end, *ids), replace(sampling, seed=seed), ExpertChoice(()), ignore_end=True
                )
            )
            for seed, ids in enumerate(openings)
        ]
        for done, (ids, events) in enumerate(zip(openings, generations, strict=True)):
            progress(done, len(openings), "public text")
            rows.append([*ids, *(event.token_id for event in events)][:ROW_LENGTH])
    # No row is complete if the model's context is shorter.
    whole = [row for row in rows if len(row) == ROW_LENGTH]
    return torch.tensor(whole, dtype=torch.long).view(-1, ROW_LENGTH)


def measure_public(
    model: LanguageModel,
    rows: Tensor,
    layers: Sequence[int],
    stream: Stream | None = None,
    progress: Progress = silent,
) -> PublicStatistics:
    """Return statistics of the bare model: moments over even rows, sample over odd rows.

    Args:
        model: base model.
        rows: token ids `[R, T]`.
        layers: layers whose gate inputs are needed.
        stream: gives the residual stream of the even rows, numbered from 0, below `layers`; None:
            compute it.
        progress: shows the progress.
    """
    moments = {layer: Moments.none(model.config.hidden_size) for layer in layers}
    sample: dict[int, list[Tensor]] = {layer: [] for layer in layers}
    half = (len(rows) + 1) // 2
    halves = [public_batches(rows[start::2], BATCH_ROWS) for start in (0, 1)]
    with model.experts.arming(None):
        for done, inputs in enumerate(gate_inputs(model, halves[0], layers, stream)):
            for layer, layer_inputs in inputs.items():
                moments[layer] += blend(layer_inputs)
            progress(min(half, (done + 1) * BATCH_ROWS), len(rows), "public statistics")
        for done, inputs in enumerate(gate_inputs(model, halves[1], layers)):
            for layer, layer_inputs in inputs.items():
                sample[layer].append(layer_inputs.smooth_BTD[:, 1::STRIDE].cpu())
            scored = half + (done + 1) * BATCH_ROWS
            progress(min(len(rows), scored), len(rows), "public statistics")
    return PublicStatistics(
        moments, {layer: torch.cat(parts) for layer, parts in sample.items()}, rows.numel()
    )


def public_batches(rows: Tensor, size: int) -> Iterator[Batch]:
    """Yield batches of `size` rows `[R, T]`, each row a separate document."""
    for start in range(0, len(rows), size):
        ids = rows[start : start + size]
        labels = torch.cat([ids[:, 1:], torch.full_like(ids[:, :1], IGNORE)], dim=1)
        positions = torch.arange(ids.shape[1]).repeat(len(ids), 1)
        yield Batch(ids, labels, positions, torch.arange(start, start + len(ids)))


def place(model: LanguageModel) -> tuple[Path, str]:
    """Return the cache folder of a base, and the cache key describing how the text was made."""
    name = f"built-in-v{VERSION}-{str(model.dtype).removeprefix('torch.')}"
    return home() / "public" / model.experts.base.weights[:32], name


def kept_rows(
    model: LanguageModel, tokenizer: PreTrainedTokenizerFast, progress: Progress
) -> Tensor:
    """Return the public rows `[R, ROW_LENGTH]` of a base, cached in the library's home."""
    root, name = place(model)
    return kept(root / f"rows-{name}", lambda: {"ids": public_rows(model, tokenizer, progress)})[
        "ids"
    ]


def kept(folder: Path, compute: Callable[[], dict[str, Tensor]]) -> dict[str, Tensor]:
    """Return the tensors cached in `folder`; compute and store them if missing or damaged."""
    if folder.is_dir():
        try:
            return load_state(folder)[0]
        except CheckpointError:
            pass  # damaged; overwritten below
    tensors = compute()
    save_state(folder, tensors, {})
    return tensors


def pseudorandom(path: Path) -> float:
    """Return a number in [0, 1) to draw files by, which depends on the end of the path alone."""
    return uniform("/".join(path.parts[-3:]))


def _middles(paths: list[Path]) -> Iterator[str]:
    """Yield each file's text from the first line break after a third of it; many files start with
    the same licence text.
    """
    for path in paths:
        if (
            path.is_file()
            and path.stat().st_size < 1_000_000
            and (path.suffix or path.name == "METADATA")
        ):
            text = path.read_text(encoding="utf-8", errors="ignore")
            yield text[text.find("\n", len(text) // 3) + 1 :]
