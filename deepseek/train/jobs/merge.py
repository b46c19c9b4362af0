"""`deepseek expert merge A B`: merge two experts into one.

Both were trained on the same base, and their run folders hold their text. Each merged layer has the
hidden units of both and one output matrix, fitted by ridge regression to A's output on A's text and
to B's output on B's text. Unlike the sum of A and B, it does not add A's output on B's text. For a
smaller width, the units that contribute least are dropped and the matrix is fitted again. The gates
are calibrated on both texts, and both held-out texts are scored.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from deepseek.checkpoint.hub import resolve
from deepseek.data import Batch, RowLoader, TokenShards
from deepseek.data.text.encode import CONTEXT_BIT
from deepseek.device.choose import choose_device, choose_dtype
from deepseek.device.estimate import Estimate
from deepseek.device.names import Dtype
from deepseek.errors import ConfigError, PackError
from deepseek.model.experts import ExpertModule
from deepseek.model.language_model import LanguageModel, load_language_model
from deepseek.packs.library import SUFFIX, check_free, experts_folder
from deepseek.packs.manifest import HELD_OUT, Manifest, Metric
from deepseek.packs.names import valid_name
from deepseek.packs.pack import ExpertPack, read_pack, write_pack
from deepseek.text.tokenizer import load_tokenizer
from deepseek.train.gates.background import background
from deepseek.train.gates.calibrate import calibrate
from deepseek.train.gates.public_text import public_statistics
from deepseek.train.jobs.estimate import of_passes
from deepseek.train.jobs.expert import CALIBRATION_TOKENS, RELEVANCE_TOKENS, UNSEEN_TOKENS
from deepseek.train.jobs.merge_fit import fitted
from deepseek.train.jobs.update import TrainedExpert
from deepseek.train.loop.losses import held_out_loss
from deepseek.train.loop.progress import ProgressBar
from deepseek.train.text.corpus import known_documents, whole_text


@dataclass(frozen=True)
class Score:
    """Losses on one expert's held-out text, in nats per token.

    Attributes:
        base, alone, merged: by the base, by the expert, and by the merged expert.
        documents: number of held-out documents.
        learnt: how many of them the other expert was trained on; the merged one has seen these.
    """

    base: float
    alone: float
    merged: float
    documents: int
    learnt: int


@dataclass(frozen=True)
class Merged:
    """A merged expert.

    Attributes:
        pack: its file.
        scores: name of each of the two experts -> losses on its held-out text.
    """

    pack: Path
    scores: dict[str, Score]

    def report(self) -> list[str]:
        """Return one line per text with the verdicts on the merged expert and on its own expert."""
        lines = []
        for name, score in self.scores.items():
            merged = Metric(before=score.base, after=score.merged).verdict
            alone = Metric(before=score.base, after=score.alone).verdict
            line = f"held-out text of {name}: {merged}; {name} alone: {alone}"
            if score.learnt:
                line += (
                    f"; the other expert has learnt {score.learnt} of its {score.documents} "
                    "documents, so the merged one looks better than it is"
                )
            lines.append(line)
        return lines


class Part:
    """One of the experts to merge, with its text.

    Args:
        name: its name.
        model: the base, which both have in common.

    Attributes:
        learnt: digests of the texts that the expert has learnt.
        tested: digests of the texts that its last run has held out.

    Raises:
        DataError: there is no such finished run, or an earlier version made it.
        PackError: the pack belongs to another base, or holds no expert module.
    """

    def __init__(self, name: str, model: LanguageModel) -> None:
        self.expert = TrainedExpert.find(name)
        pack = read_pack(self.expert.pack, base=model.experts.base)
        if not isinstance(pack.manifest, Manifest):
            raise PackError(f"{name} is an adapter, and only experts can be merged; name another.")
        self.name = pack.manifest.name
        self.manifest = pack.manifest
        self.module = ExpertModule.from_pack(pack, torch.float32, model.device)
        self._corpora = [run / "corpus" for run in self.expert.finished_runs()]
        known = [known_documents(corpus) for corpus in self._corpora]
        self.learnt = frozenset[str]().union(*(run.learnt for run in known))
        self.tested = known[-1].tested

    def rows(self, part: str, tokens: int) -> list[Batch]:
        """Return rows of all text that the expert was trained on ("train"), or of the "validation"
        or "held-out" text of its last run.

        An update's validation text may be training text, so its held-out text is used instead.
        """
        corpora = self._corpora if part == "train" else self._corpora[-1:]
        if part == "validation" and len(self._corpora) > 1:
            part = "held-out"
        request = self.expert.request
        rows: list[Batch] = []
        for corpus in corpora:
            shards = TokenShards(corpus / part)
            loader = RowLoader(shards, request.batch_rows, request.row_length, request.seed)
            count = max(1, tokens // len(corpora) // request.row_length)
            rows += loader.with_targets().first(count).batches()
        return rows

    @cached_property
    def ids_N(self) -> Tensor:
        """Token ids of the training text, for the relevance table."""
        texts = [whole_text(corpus).ids_N for corpus in reversed(self._corpora)]
        return torch.from_numpy(np.concatenate(texts)[:RELEVANCE_TOKENS] & ~CONTEXT_BIT).long()


def merge_experts(
    first: str,
    second: str,
    out: str,
    width: int | None = None,
    quiet: bool = True,
    *,
    device: str = "auto",
    dtype: Dtype = "auto",
) -> Merged:
    """Merge two trained experts of the same base into a third one, and write its pack.

    Args:
        first, second: names of the experts.
        out: name of the merged one.
        width: width of its expert layers; default: that of both together.
        quiet: show no progress.
        device: where to compute.
        dtype: precision of the base; "auto": that in which the first expert was trained.

    Returns:
        The pack, and the held-out losses.

    Raises:
        ConfigError: `out` is not a valid name, or is taken, if only by what a removed expert left,
            such as its run; both experts are the same; the width is more than that of both
            together; or a pack of that name has appeared meanwhile.
        DeviceError: there is no such device, or it cannot compute in that precision.
        DataError: there is no such expert, or its run folder is gone.
        PackError: the experts have different bases, or one is an adapter.
    """
    task = MergeTask.of(first, second, out, width, device, dtype)
    model, parts = task.model, task.parts
    with ProgressBar(quiet=quiet) as progress:
        tokens = CALIBRATION_TOKENS // len(parts)
        texts = [(part.module, part.rows("train", tokens)) for part in parts]
        module = fitted(model, texts, out, task.width, progress)
        progress.say("calibrating the gates")
        tokenizer = load_tokenizer(task.folder)
        calibrate(
            model,
            module,
            rows_of(parts, "train", CALIBRATION_TOKENS),
            rows_of(parts, "validation", UNSEEN_TOKENS),
            public_statistics(model, tokenizer, module.layers, progress=progress),
            words=background(model, tokenizer, progress),
            own_kinds=[part.ids_N for part in parts],
            progress=progress,
        )
        progress.say("scoring the held-out texts")
        others = zip(parts, reversed(parts), strict=True)
        scores = {part.name: scored(model, part, other, module) for part, other in others}
    write_pack(task.path, merged_pack(model, module, parts, scores), new=True)
    return Merged(task.path, scores)


def estimate_merge(
    first: str,
    second: str,
    out: str,
    width: int | None = None,
    *,
    device: str = "auto",
    dtype: Dtype = "auto",
) -> Estimate:
    """Return what the same call of `merge_experts` will take, without changing anything; public
    text, which is read once for each base, is not counted.

    Raises:
        ConfigError, DeviceError, DataError, PackError: as `merge_experts`.
    """
    task = MergeTask.of(first, second, out, width, device, dtype)
    held_out = [
        batch
        for part in task.parts
        for batch in part.rows("held-out", part.expert.request.held_out_tokens)
    ]
    train = rows_of(task.parts, "train", CALIBRATION_TOKENS)
    validation = rows_of(task.parts, "validation", UNSEEN_TOKENS)
    return of_passes(task.model, [(train, 2), (validation, 1), (held_out, 3)])


@dataclass(frozen=True)
class MergeTask:
    """Two experts that can be merged, and what is to become of them.

    Attributes:
        path: file of the merged expert.
        folder: folder of the base.
        model: the base.
        parts: the two experts.
        width: width of the merged expert's layers.
    """

    path: Path
    folder: Path
    model: LanguageModel
    parts: list[Part]
    width: int

    @classmethod
    def of(
        cls, first: str, second: str, out: str, width: int | None, device: str, dtype: Dtype
    ) -> "MergeTask":
        """Return the task of a call of `merge_experts`, with its arguments and errors."""
        path = experts_folder() / f"{_checked_name(out)}{SUFFIX}"
        check_free(out)
        if first == second:
            raise ConfigError(f"Both experts are {first}; name two different ones.")
        place = choose_device(device)
        request = TrainedExpert.find(first).request
        precision = choose_dtype(request.dtype if dtype == "auto" else dtype, place)
        folder = resolve(request.base)
        model = load_language_model(folder, dtype=precision, device=place)
        model.requires_grad_(False)
        parts = [Part(name, model) for name in (first, second)]
        most = sum(part.manifest.width for part in parts)
        width = most if width is None else width
        if not 1 <= width <= most:
            raise ConfigError(f"width={width} must be 1 to {most}, the width of both together.")
        return cls(path, folder, model, parts, width)


def _checked_name(name: str) -> str:
    try:
        return valid_name(name)
    except ValueError as error:
        raise ConfigError(f"out: {error}.") from None


def rows_of(parts: Sequence[Part], name: str, tokens: int) -> list[Batch]:
    """Return rows of a part of each expert's corpus, equally many tokens of each."""
    rows: list[Batch] = []
    for part in parts:
        rows += part.rows(name, tokens // len(parts))
    return rows


def scored(model: LanguageModel, part: Part, other: Part, module: ExpertModule) -> Score:
    """Return the losses on an expert's held-out text.

    Args:
        model: the base.
        part: the expert.
        other: the expert that it was merged with.
        module: the merged expert.
    """
    batches = part.rows("held-out", part.expert.request.held_out_tokens)
    with model.experts.arming(None):
        base = held_out_loss(model, batches).loss
    with model.experts.forced(part.module):
        alone = held_out_loss(model, batches).loss
    with model.experts.forced(module):
        merged = held_out_loss(model, batches).loss
    return Score(base, alone, merged, len(part.tested), len(part.tested & other.learnt))


def merged_pack(
    model: LanguageModel, module: ExpertModule, parts: Sequence[Part], scores: dict[str, Score]
) -> ExpertPack:
    """Return the merged module as a pack, with licences, domains and data digests of both."""
    manifests = [part.manifest for part in parts]
    licences = dict.fromkeys(manifest.licence for manifest in manifests)
    data: dict[str, None] = {}
    for manifest in manifests:
        data |= dict.fromkeys(manifest.data)
    metrics = {
        f"{HELD_OUT} of {name}": Metric(before=score.base, after=score.merged)
        for name, score in scores.items()
    }
    metrics[HELD_OUT] = Metric(
        before=sum(score.base for score in scores.values()) / len(scores),
        after=sum(score.merged for score in scores.values()) / len(scores),
    )
    return module.to_pack(
        model.experts.base,
        next(iter(licences))
        if len(licences) == 1
        else " AND ".join(f"({one})" for one in licences),
        domain="; ".join(manifest.domain for manifest in manifests if manifest.domain)[:200],
        data=tuple(data),
        metrics=metrics,
    )
