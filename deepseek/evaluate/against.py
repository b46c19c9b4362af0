"""Compare an expert with retrieval and fine-tuning on held-out lines (`deepseek eval --against`).

run folder -> held-out documents -> cases -> rows (base, retrieval, expert, both, LoRA, full) ->
table, JSON, picture

Each computed row is stored under a digest of everything that determines it, so that the same call
resumes.
"""

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from deepseek.checkpoint.hub import resolve
from deepseek.checkpoint.store import canonical_json, read_json, read_object, write_json
from deepseek.data import Document, TokenShards
from deepseek.data.text.decode import decode_documents
from deepseek.device.choose import choose_device
from deepseek.device.names import Dtype
from deepseek.engine.engine import Engine
from deepseek.engine.request import ExpertChoice
from deepseek.engine.start import start_engine
from deepseek.errors import ConfigError, DataError
from deepseek.evaluate.cases import WHAT_IS_ASKED, Case, next_line_cases
from deepseek.evaluate.completion import Completion, CompletionScores, Dials, Writer, score_answers
from deepseek.packs.pack import read_pack
from deepseek.registry import nearest
from deepseek.text.infilling import infill_layout
from deepseek.text.tokenizer import load_tokenizer
from deepseek.train.jobs.equal_time import adapt_for_equal_time, drop_resume_state, shorter_because
from deepseek.train.jobs.expert_index import expert_index, index_source
from deepseek.train.loop.past_runs import find_run, finished_runs, latest_run
from deepseek.train.loop.progress import ProgressBar
from deepseek.train.loop.run_lock import run_lock
from deepseek.train.text.corpus import commits_follow_files

FORMAT = 5
"""Part of the digest of stored rows; increase it when cases, prompts or scores change."""

RIVALS = ("rag", "lora", "full")

FEW_DOCUMENTS = 10
"""Number of documents below which an interval over documents is too narrow."""

LEAST_TIME = 0.7
"""Share of the expert's time below which a rival's training counts as cut short."""


@dataclass(frozen=True)
class Row:
    """One system in the comparison.

    Attributes:
        name: name in the table.
        model: "base", or the rival whose fine-tuned model is used.
        expert: whether the expert is plugged.
        retrieval: whether retrieved passages precede the text.
    """

    name: str
    model: str = "base"
    expert: bool = False
    retrieval: bool = False


BASE = Row("base")
RETRIEVAL = Row("retrieval", retrieval=True)
EXPERT = Row("expert", expert=True)
BOTH = Row("expert + retrieval", expert=True, retrieval=True)
LORA = Row("LoRA", model="lora")
FULL = Row("full fine-tuning", model="full")


def rows_against(rivals: Sequence[str]) -> list[Row]:
    """Return the rows of a table against `rivals`.

    Args:
        rivals: any of "rag", "lora" and "full".

    Raises:
        ConfigError: a rival is unknown; the message names it.
    """
    for rival in rivals:
        if rival not in RIVALS:
            raise ConfigError(
                f"There is no rival {rival!r} to compare with; {nearest(rival, RIVALS)}."
            )
    wanted = {BASE: True, RETRIEVAL: "rag" in rivals, EXPERT: True, BOTH: "rag" in rivals}
    wanted |= {LORA: "lora" in rivals, FULL: "full" in rivals}
    return [row for row, is_wanted in wanted.items() if is_wanted]


@dataclass(frozen=True)
class Result:
    """Scores of all rows on the same cases.

    Attributes:
        name: name of the expert.
        cases: the cases.
        documents: number of held-out documents that the cases come from.
        dials: settings of the prompts.
        scores: scores by row, in the order of the table.
        training_seconds: training time by row, for rows that were trained.
        notes: caveats of the comparison.
    """

    name: str
    cases: Sequence[Case]
    documents: int
    dials: Dials
    scores: dict[str, CompletionScores]
    training_seconds: dict[str, float]
    notes: list[str]

    @property
    def sources(self) -> list[str]:
        """Document that each case comes from."""
        return [case.name for case in self.cases]


class Against:
    """A finished expert run, with cases from its held-out text.

    Args:
        name: name of the expert.
        count: maximum number of cases.
        seed: seed of the choice of cases.
        dials: settings of the prompts; default: `Dials()`.
        device: where rows are computed and rivals trained; "auto": where the expert was trained, if
            this machine has it.
        dtype: precision of both.

    Raises:
        DataError: there is no finished run of this name, or its held-out text has no suitable line.
    """

    def __init__(
        self,
        name: str,
        count: int = 200,
        seed: int = 0,
        dials: Dials | None = None,
        *,
        device: str = "auto",
        dtype: Dtype = "auto",
    ) -> None:
        self.dtype = dtype
        self.run = find_run(name)
        self.dials = dials or Dials()
        self.seed = seed
        self.folder = self.run / "against"
        if not (self.run / "result.json").is_file():
            raise DataError(
                f"The run {name!r} is not finished; complete `deepseek expert train` first."
            )
        self.record = read_object(self.run / "result.json")
        if "pack" not in self.record:
            raise DataError(
                f"The run {name!r} made no expert; name a run of `deepseek expert train`."
            )
        self.request = read_object(self.run / "request.json")
        self.device = self._device(device)
        self.name = str(self.request["name"])
        self.base = str(self.request["base"])
        self.tokenizer = load_tokenizer(resolve(self.base))
        self.held_out = TokenShards(latest_run(self.run) / "corpus" / "held-out")
        documents = list(decode_documents(self.held_out, self.tokenizer))
        self.cases = next_line_cases(self._eligible(documents), count, seed)
        if not self.cases:
            raise DataError(
                f"The held-out text of {name!r} has no line to ask for, which is {WHAT_IS_ASKED}; "
                "train the expert on longer documents."
            )

    def compare(self, rivals: Sequence[str], quiet: bool = False) -> Result:
        """Return the scores of all rows, and write them to `result.json` in `folder`.

        Rivals are trained, and rows computed, only if missing.

        Args:
            rivals: any of "rag", "lora" and "full".
            quiet: show no progress.

        Raises:
            TrainError: another process compares the same expert.
            DataError: LoRA or full fine-tuning is asked for and the expert has been updated.
        """
        rows = rows_against(rivals)
        if any(row.model != "base" for row in rows) and latest_run(self.run) != self.run:
            raise DataError(
                f"{self.name} has been updated, but LoRA and full fine-tuning would learn the text "
                "of its first training alone; compare with rag, or train the expert anew."
            )
        with run_lock(self.folder):
            return self._compare(rows, quiet)

    def _compare(self, rows: Sequence[Row], quiet: bool) -> Result:
        """Return the scores of `rows`, and write them to the folder, whose lock is held."""
        scores: dict[str, CompletionScores] = {}
        for model in dict.fromkeys(row.model for row in rows):
            rows_of_model = [row for row in rows if row.model == model]
            if model != "base" and not self._is_scored(rows_of_model):
                adapt_for_equal_time(
                    self.run,
                    "lora" if model == "lora" else "full",
                    self._rival(model),
                    quiet,
                    device=str(self.device),
                    dtype=self.dtype,
                )
            scores |= self._scores(rows_of_model, quiet)
            if model != "base":
                # Gigabytes after full fine-tuning, and not needed once the answers are stored.
                drop_resume_state(self._rival(model))
        documents = len({case.name for case in self.cases})
        ordered = {row.name: scores[row.name] for row in rows}
        seconds = self._training_seconds(rows)
        notes = self._notes() + self._unequal(rows, seconds)
        result = Result(self.name, self.cases, documents, self.dials, ordered, seconds, notes)
        write_json(self.folder / "result.json", as_json(result))
        return result

    def _device(self, asked: str) -> torch.device:
        """Return where to compute: with "auto" where the expert was trained, as its time is the
        budget of LoRA and full fine-tuning, unless this machine lacks that.
        """
        if asked == "auto":
            with suppress(ConfigError):
                return choose_device(self._trained_on)
        return choose_device(asked)

    @property
    def _trained_on(self) -> str:
        """Type of the device that the expert was trained on."""
        return str(self.record.get("device", "cpu")).split(":")[0]

    def _rival(self, model: str) -> Path:
        """Return the folder of LoRA or full fine-tuning."""
        return self.folder / (model if self.dtype == "auto" else f"{model}-{self.dtype}")

    def _eligible(self, documents: Sequence[Document]) -> list[Document]:
        """Return the documents that cases may come from.

        Commits are excluded unless the run was split by time: they show lines of other held-out
        files again, and in runs of earlier versions lines that were trained on.
        """
        by_time = self.request["source"]["by"] == "time"
        return [document for document in documents if by_time or document.kind != "commit"]

    def _notes(self) -> list[str]:
        notes = []
        source = self.request["source"]
        runs = finished_runs(self.run)
        follows = all(commits_follow_files(run / "corpus") for run in runs)
        if source["git"] and source["by"] != "time" and not follows:
            notes.append(
                "The expert was also trained on commits that changed held-out files, retrieval was "
                "not; for a clean comparison train it anew, or with --split time."
            )
        if not infill_layout(self.tokenizer).has_tokens:
            notes.append("The base has no tokens for fill-in-the-middle.")
        documents = len({case.name for case in self.cases})
        if documents < FEW_DOCUMENTS:
            notes.append(
                f"All lines come from {documents} documents, so that the intervals of differences "
                "are too narrow; hold out more of the text for better ones."
            )
        return notes

    def _unequal(self, rows: Sequence[Row], seconds: Mapping[str, float]) -> list[str]:
        """Return caveats on rivals trained on another device, or for much less time."""
        whole = seconds[EXPERT.name]
        notes = []
        for row in rows:
            if row.model == "base":
                continue
            if self.device.type != self._trained_on:
                notes.append(
                    f"{row.name} had the seconds of the expert on another device: it was trained "
                    f"on {self.device.type}, the expert on {self._trained_on}."
                )
            if seconds[row.name] < LEAST_TIME * whole:
                notes.append(
                    f"{row.name} took {seconds[row.name]:.0f} s of the expert's {whole:.0f} s: "
                    f"{shorter_because(self._rival(row.model))}."
                )
        return notes

    def _scores(self, rows: Sequence[Row], quiet: bool) -> dict[str, CompletionScores]:
        """Return the scores of rows that share a model, loading it only if a row is missing."""
        answers = {row: self._stored(row) for row in rows}
        missing = [row for row, row_answers in answers.items() if row_answers is None]
        if missing:
            with self._engine(missing) as engine, ProgressBar(quiet=quiet) as progress:
                for row in missing:
                    answers[row] = self._answer(row, engine, progress)
        return {
            row.name: score_answers(self.cases, row_answers)
            for row, row_answers in answers.items()
            if row_answers is not None
        }

    def _is_scored(self, rows: Sequence[Row]) -> bool:
        """Return whether a rival's training is finished and the answers of its rows are stored."""
        folder = self._rival(rows[0].model)
        is_finished = all((folder / name).is_file() for name in ("effort.json", "result.json"))
        return is_finished and all(self._path(row).is_file() for row in rows)

    def _answer(self, row: Row, engine: Engine, progress: ProgressBar) -> list[Completion]:
        """Compute and store the answers of a row."""
        index = expert_index(self.name, self.run, self.tokenizer) if row.retrieval else None
        choice = ExpertChoice((self.name,) if row.expert else ())
        writer = Writer(engine, choice, index, self.dials)
        answers = list(writer.answers(self.cases, progress, row.name))
        write_json(
            self._path(row),
            {"row": asdict(row), "answers": [answer.as_json() for answer in answers]},
        )
        return answers

    def _stored(self, row: Row) -> list[Completion] | None:
        path = self._path(row)
        return (
            [Completion(**answer) for answer in read_json(path)["answers"]]
            if path.is_file()
            else None
        )

    def _path(self, row: Row) -> Path:
        """Return the file of a row, whose name is a digest of everything that determines it."""
        key: dict[str, Any] = {
            "format": FORMAT,
            "row": asdict(row),
            "dials": asdict(self.dials),
            "base": self.base,
        }
        key |= {"held_out": self.held_out.digest, "seed": self.seed, "cases": len(self.cases)}
        if self.dtype != "auto":
            key["dtype"] = self.dtype
        if self.device.type != "cpu":
            key["device"] = self.device.type
        if row.expert:
            key["expert"] = read_pack(Path(self.record["pack"])).manifest.digest
        if row.retrieval:
            key["train"] = index_source(self.run)
        if row.model != "base":
            key["effort"] = read_json(self._rival(row.model) / "effort.json")
        return self.folder / "rows" / f"{hashlib.sha256(canonical_json(key)).hexdigest()[:24]}.json"

    @contextmanager
    def _engine(self, rows: Sequence[Row]) -> Iterator[Engine]:
        """Yield a serving engine for rows that share a model."""
        model = rows[0].model
        experts = [Path(self.record["pack"])] if any(row.expert for row in rows) else []
        name = self.base if model == "base" else self._rival(model) / "model"
        with start_engine(name, experts=experts, device=self.device, dtype=self.dtype) as engine:
            yield engine

    def _training_seconds(self, rows: Sequence[Row]) -> dict[str, float]:
        seconds = {EXPERT.name: float(self.record["seconds"])}
        for row in rows:
            if row.model != "base":
                figures = read_json(self._rival(row.model) / "result.json")["figures"]
                seconds[row.name] = float(figures["seconds"])
        return seconds


def as_json(result: Result) -> dict[str, Any]:
    """Return a result as JSON values."""
    counts = {"expert": result.name, "cases": len(result.cases), "documents": result.documents}
    rows = {name: asdict(scores) for name, scores in result.scores.items()}
    circumstances = {
        "dials": asdict(result.dials),
        "training_seconds": result.training_seconds,
        "notes": result.notes,
    }
    return {**counts, **circumstances, "rows": rows}
