"""Held-out loss of a model without and with plugged experts, and the texts to measure it on."""

import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from transformers import PreTrainedTokenizerFast

from deepseek.checkpoint.files import located
from deepseek.checkpoint.store import home, read_object
from deepseek.data import Batch, Progress, RowLoader, TokenShards
from deepseek.data.text.document import Document, silent
from deepseek.data.text.public import public_documents, read_documents
from deepseek.device.estimate import Estimate
from deepseek.errors import CheckpointError, DataError
from deepseek.model.language_model import LanguageModel
from deepseek.packs.manifest import PackManifest
from deepseek.train.jobs.estimate import of_passes
from deepseek.train.loop.losses import held_out_loss
from deepseek.train.loop.past_runs import finished_runs, latest_run

ROW_LENGTH = 512
BATCH_ROWS = 4


@dataclass(frozen=True)
class Comparison:
    """Mean loss on one text, in nats per token.

    Attributes:
        text: name of the text.
        tokens: number of predicted tokens.
        before: loss of the base alone.
        after: loss with the plugged experts, as their gates decide.
        alone: loss with the text's own expert forced on at every token; None without such an
            expert.
    """

    text: str
    tokens: int
    before: float
    after: float
    alone: float | None = None

    @property
    def change(self) -> float:
        """Relative change of the loss; negative is better."""
        return self.after / self.before - 1.0

    @property
    def gain_kept(self) -> float | None:
        """Share of the own expert's stand-alone gain that the plugged set reaches; None without a
        gain.
        """
        if self.alone is None or self.alone >= self.before:
            return None
        return (self.before - self.after) / (self.before - self.alone)


@dataclass(frozen=True)
class ReportedRows:
    """The packed rows on which a training reported its losses.

    Attributes:
        row_length: tokens per row.
        batch_rows: rows per batch.
        seed: seed of their order.
        rows: number of rows.
    """

    row_length: int
    batch_rows: int
    seed: int
    rows: int

    @staticmethod
    def of(run: Path) -> "ReportedRows | None":
        """Return the rows of a run, None if it has planned none yet."""
        try:
            request = read_object(run / "request.json")
            plan = read_object(run / "plan.json")["plan"]
            return ReportedRows(
                row_length=int(request["row_length"]),
                batch_rows=int(request["batch_rows"]),
                seed=int(request["seed"]),
                rows=int(plan["held_out_rows"]),
            )
        except (CheckpointError, KeyError, TypeError, ValueError):
            return None


@dataclass(frozen=True)
class HeldOutText:
    """Text to evaluate on.

    Attributes:
        name: name of the text.
        shards: its tokens.
        expert: the plugged expert of its domain; None: there is none.
        reported: rows on which that expert's training reported its losses; None: not known.
    """

    name: str
    shards: TokenShards
    expert: str | None = None
    reported: ReportedRows | None = None

    def batches(self, max_tokens: int, as_reported: bool = False) -> list[Batch]:
        """Return packed rows, the same at every call.

        Args:
            max_tokens: approximate maximum number of tokens.
            as_reported: take exactly the rows that the training reported on, where they are known.
        """
        if as_reported and self.reported is not None:
            rows = self.reported
            loader = RowLoader(self.shards, rows.batch_rows, rows.row_length, seed=rows.seed)
            return loader.with_targets().first(rows.rows).batches()
        loader = RowLoader(self.shards, BATCH_ROWS, ROW_LENGTH, seed=0).with_targets()
        return loader.first(max(1, max_tokens // ROW_LENGTH)).batches()


def compare(
    model: LanguageModel,
    texts: Sequence[HeldOutText],
    max_tokens: int,
    progress: Progress = silent,
    as_reported: bool = True,
) -> Iterator[Comparison]:
    """Yield for each text the loss of the base, of the plugged set, and of its own expert alone.

    Args:
        model: the model with its experts.
        texts: the texts.
        max_tokens: approximate maximum number of tokens per text.
        progress: shows the progress.
        as_reported: measure an expert's text on exactly the rows that its training reported on, so
            that both name the same loss of the base.
    """
    for num_done, text in enumerate(texts):
        progress(num_done, len(texts), "evaluating")
        batches = text.batches(max_tokens, as_reported)
        with model.experts.arming(None):
            before = held_out_loss(model, batches)
        after = held_out_loss(model, batches)
        alone_loss = None
        if text.expert is not None:
            with model.experts.forced(text.expert):
                alone_loss = held_out_loss(model, batches).loss
        yield Comparison(text.name, before.tokens, before.loss, after.loss, alone_loss)
    progress(len(texts), len(texts), "evaluating")


def estimated(
    model: LanguageModel, texts: Sequence[HeldOutText], max_tokens: int, as_reported: bool = True
) -> Estimate:
    """Return what `compare` will take with the same arguments."""
    return of_passes(
        model,
        [
            (text.batches(max_tokens, as_reported), 2 if text.expert is None else 3)
            for text in texts
        ],
    )


def held_out_folder(expert: str) -> Path:
    """Return the folder of a trained expert's held-out text, as of its last update."""
    return latest_run(home() / "runs" / expert) / "corpus" / "held-out"


def trained_here(manifest: PackManifest) -> bool:
    """Return whether a run of this home trained a pack; True if no run has its name.

    A pack from elsewhere may have the name of an expert that was trained here, whose held-out text
    is not from the pack's domain.

    Args:
        manifest: manifest of the pack.
    """
    runs = finished_runs(home() / "runs" / manifest.name)
    texts = [run / "corpus" / "train" for run in runs]
    digests = {TokenShards(text).digest for text in texts if text.is_dir()}
    return not digests or not digests.isdisjoint(manifest.data)


def expert_texts(names: Sequence[str], plugged_names: Sequence[str]) -> list[HeldOutText]:
    """Return the held-out texts of trained experts, for those that still have a run folder."""
    return [
        HeldOutText(
            name,
            TokenShards(held_out_folder(name)),
            name if name in plugged_names else None,
            ReportedRows.of(latest_run(home() / "runs" / name)),
        )
        for name in names
        if held_out_folder(name).is_dir()
    ]


def kept_documents(path: Path, keep: Callable[[Document], bool]) -> list[Document]:
    """Return the documents of a text that are kept.

    Args:
        path: a folder or a file, in which `~` is the home folder.
        keep: whether to keep a document.

    Raises:
        DataError: none is kept.
    """
    documents = list(read_documents(located(path)))
    selection = [document for document in documents if keep(document)]
    if documents and not selection:
        raise DataError(
            f"Every document of {path} was trained on; give text that no training has seen."
        )
    return selection


@contextmanager
def collected(
    tokenizer: PreTrainedTokenizerFast,
    paths: Sequence[Path],
    experts: list[HeldOutText],
    keep: Callable[[Document], bool] = lambda _: True,
) -> Iterator[list[HeldOutText]]:
    """Yield the experts' texts, public ones and those at `paths`, tokenised in a temporary
    folder.

    Args:
        tokenizer: tokenizer of the model.
        paths: texts to add, in which `~` is the home folder. Each is named by its path as given,
            since published results must not name folders of this machine.
        experts: texts that are tokenised already.
        keep: whether to take a document of a text at `paths`; default: all.

    Raises:
        DataError: no document of a text is taken.
    """
    sources = {str(path): kept_documents(path, keep) for path in paths} | public_documents()
    with tempfile.TemporaryDirectory(prefix="deepseek-eval-") as folder:
        built_texts = [
            HeldOutText(name, TokenShards.build(documents, tokenizer, Path(folder) / str(number)))
            for number, (name, documents) in enumerate(sources.items())
        ]
        yield experts + built_texts
