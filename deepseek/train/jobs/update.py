"""`deepseek expert train --update NAME`: continue an expert with what is new in its source.

The source is read again. Documents that earlier runs did not have are new; a changed file is a new
document. Training continues from the expert's weights, on the new documents and about as much known
text, and the gates are calibrated again. Held-out text is chosen by the same rule as before. The
validation text, too, is what is new and about as much known text: on all of it, which is mostly
known, the former expert would be best.

An update has a run folder of its own, in `updates/` of the run that trained the expert.
"""

import json
import shutil
from dataclasses import dataclass, replace
from functools import cached_property, partial, reduce
from hashlib import sha256
from operator import or_
from pathlib import Path
from typing import Any

import torch

from deepseek.checkpoint.store import RUN_STARTED, atomic_write, read_object, write_json
from deepseek.data import RowLoader, TokenShards
from deepseek.data.text.git import find_commit, open_repository
from deepseek.errors import DataError, PackError
from deepseek.model.experts import ExpertModule
from deepseek.packs.listing import read_manifest
from deepseek.packs.manifest import Manifest, Metric
from deepseek.packs.pack import ExpertPack, read_pack
from deepseek.train.gates.calibrate import GateCalibration
from deepseek.train.jobs.arguments import ExpertArguments
from deepseek.train.jobs.expert import ExpertRun
from deepseek.train.jobs.expert_request import ExpertRequest
from deepseek.train.jobs.outcome import Outcome
from deepseek.train.jobs.pack_place import pack_of
from deepseek.train.jobs.plan import TrainingPlan
from deepseek.train.jobs.text_run import Texts, text_inputs
from deepseek.train.loop.loop import Task
from deepseek.train.loop.past_runs import find_run, finished_runs
from deepseek.train.loop.progress import ProgressBar
from deepseek.train.loop.run_folder import with_absolute_models
from deepseek.train.loop.run_lock import run_lock
from deepseek.train.loop.runs import Run, run_once
from deepseek.train.text.corpus import Corpus, KnownDocuments, Source, build_corpus, known_documents
from deepseek.train.text.fresh import fresh
from deepseek.train.text.inputs import text_digest

MINUTES = 1.0
"""Default time budget of an update, in minutes."""

RATE = 0.25
"""Learning rate of an update, as a share of that of the first training, which starts from zero."""


@dataclass(frozen=True)
class TrainedExpert:
    """A finished run of `deepseek expert train` that updates continue.

    Attributes:
        folder: its run folder.
        pack: the pack that it wrote, and that updates replace.
        request: its arguments.
    """

    folder: Path
    pack: Path
    request: ExpertRequest

    @classmethod
    def find(cls, name: str) -> "TrainedExpert":
        """Return the expert of this name.

        Raises:
            DataError: there is no such run, it is not finished or trained no expert, or its pack is
                gone.
        """
        folder = find_run(name)
        pack = pack_of(folder)
        if pack is None:
            raise DataError(
                f"{folder} is no finished run of `deepseek expert train`; complete it first."
            )
        if not pack.is_file():
            raise DataError(f"The expert {name} is gone ({pack}); train it anew.")
        return cls(folder, pack, stored_request(folder / "request.json"))

    @property
    def name(self) -> str:
        return self.request.name

    @property
    def learning_rate(self) -> float:
        """Peak learning rate of its training."""
        config = read_object(self.folder / "training" / "config.json")
        return float(config["optim"]["learning_rate"])

    def state(self) -> str:
        """Return a digest of what the expert's source holds now.

        Raises:
            DataError: the source is gone or cannot be read.
        """
        source = self.request.source
        text = text_digest(source, (self.folder, self.pack))
        return _state(text, _head(source))

    def learnt_states(self) -> frozenset[str]:
        """Return the digests of what the source held at the training and at each update.

        Raises:
            PackError: see `finished_runs`.
        """
        return frozenset(map(_stored_state, self.finished_runs()))

    def finished_runs(self) -> list[Path]:
        """Return the folders of the training and of the finished updates that the pack contains,
        oldest first.

        A pack that was deleted and trained again lacks the updates made before.

        Raises:
            PackError: the pack cannot be read, or another training made it.
        """
        data = read_manifest(self.pack).data
        first, *updates = finished_runs(self.folder)
        if _text_learnt(first) not in data:
            raise PackError(
                f"{self.pack} is not what {self.folder} trained; restore it, or delete it and "
                "train it anew."
            )
        return [first, *(run for run in updates if _text_learnt(run) in data)]


def update_expert(arguments: ExpertArguments) -> Path:
    """Continue a trained expert with what is new in its source, and return the path of its pack.

    The same call resumes an interrupted update. If the source has not changed, nothing is done.

    Args:
        arguments: those of `train_expert`, with `update`.

    Raises:
        DataError: there is no such expert, its source is gone, or its changes hold no new text.
        PackError: the expert's pack cannot be read, or another training made it.
        TrainError: another process trains or updates the expert.
    """
    expert = TrainedExpert.find(arguments.update)
    state = expert.state()
    if state in expert.learnt_states():
        with ProgressBar(quiet=arguments.quiet) as progress:
            progress.say(
                f"nothing is new in the source of {expert.name}; {expert.pack} stays as it is"
            )
        return expert.pack
    request = continued(expert, arguments)
    folder = expert.folder / "updates" / state[:16]
    run = Run(
        request.as_json(),
        expert.pack,
        folder,
        request.quiet,
        request.dry_run,
        lambda: text_inputs(request, (expert.folder, expert.pack)),
        makes_file=True,
    )
    with run_lock(expert.folder):
        if not request.dry_run:
            _drop_other(folder, request, expert)
        pack = run_once(partial(UpdateRun, expert=expert), request, run)
        if not request.dry_run:
            _drop_unfinished(expert)
    return pack


def stored_request(path: Path) -> ExpertRequest:
    """Return the arguments of a training, stored as `request.json`."""
    stored = read_object(path)
    source: dict[str, Any] = stored.pop("source")
    paths = {f"from_{kind}": source[kind] for kind in ("git", "folder", "jsonl", "parquet")}
    text = {"held_out": source["held_out"], "split": source["by"]}
    shares = {"questions": source["questions"], "infill": source.get("infill", 0.0)}
    return ExpertRequest(**stored, **paths, **text, **shares)


def continued(expert: TrainedExpert, arguments: ExpertArguments) -> ExpertRequest:
    """Return the request of an update.

    Args:
        expert: the expert to continue.
        arguments: arguments of the call. Of those that go with `update`, only the dtype falls back
            to that of the training.
    """
    first = expert.request
    rate = arguments.learning_rate or RATE * expert.learning_rate
    asked = replace(
        first,
        minutes=arguments.minutes,
        tokens=arguments.tokens,
        epochs=arguments.epochs,
        learning_rate=rate,
        device=arguments.device,
        dtype=first.dtype if arguments.dtype == "auto" else arguments.dtype,
        quiet=arguments.quiet,
        dry_run=arguments.dry_run,
    )
    if asked.minutes is None and asked.tokens is None:
        return replace(asked, minutes=MINUTES)
    return asked


class UpdateRun(ExpertRun):
    """One update of an expert in its run folder.

    Args:
        expert: the expert to continue.
    """

    may_choose_rows = False  # the expert's training has chosen

    def __init__(
        self,
        request: ExpertRequest,
        folder: Path,
        out: Path,
        progress: ProgressBar,
        *,
        expert: TrainedExpert,
    ) -> None:
        self.earlier_data: tuple[str, ...] = ()
        super().__init__(request, folder, out, progress)
        self.expert = expert
        # The update replaces the pack; a resumed one finds the former pack here.
        self.former_path = folder / "before.safetensors"
        former = self.former_path if self.former_path.is_file() else out
        pack = read_pack(former, base=self.model.experts.base)
        if not isinstance(pack.manifest, Manifest) or (
            (pack.manifest.layers, pack.manifest.width)
            != (tuple(self.module.layers), request.width)
        ):
            raise PackError(
                f"{former} is not what {expert.folder} trained; restore it, or train it anew."
            )
        self.earlier_data = pack.manifest.data
        self.weights = ExpertModule.from_pack(pack, torch.float32, self.device).state_dict()

    @cached_property
    def known(self) -> KnownDocuments:
        """Documents of the expert's training and of its updates."""
        runs = [known_documents(run / "corpus") for run in self.expert.finished_runs()]
        return reduce(or_, runs)

    def run(self) -> dict[str, Any]:
        """Run all stages; add the number of this update, from 1, to the figures."""
        return {**super().run(), "update": len(self.expert.finished_runs())}

    def corpora(self) -> list[Path]:
        """Return this update's corpus, and those of the earlier runs, the latest first."""
        earlier = [run / "corpus" for run in self.expert.finished_runs()]
        return [*super().corpora(), *reversed(earlier)]

    def corpus(self) -> Corpus:
        """Return the corpus of new and replayed documents; only the first call reads the source."""
        name = self.request.name
        corpus = build_corpus(
            self.request.source,
            self.tokenizer,
            self.folder / "corpus",
            self.progress,
            partial(fresh, known=self.known, seed=self.request.seed, name=name),
            validation=True,
            known=self.known,
        )
        self.progress.say(corpus.report)
        if not self.former_path.is_file():
            with atomic_write(self.former_path) as temporary:
                shutil.copyfile(self.out, temporary)
        return corpus

    def loop(self, task: Task[Any], text: RowLoader, plan: TrainingPlan, test: Any) -> Outcome:
        """Continue from the expert's weights; the report still compares with the base."""
        base = self.folder / "base.json"
        former = self.folder / "former.json"
        if not base.is_file():
            self.progress.say("scoring the base and the expert")
            write_json(base, {"loss": test()})  # a new module outputs zeros
        self.module.load_state_dict(self.weights)
        if not former.is_file():
            write_json(former, {"loss": test()})
        return super().loop(task, text, plan, test)

    def calibrate(self, texts: Texts, plan: TrainingPlan) -> GateCalibration:
        """Calibrate the gates, checked on the reported held-out text: the validation text is mostly
        new, and may be training text (see `fresh`).
        """
        return super().calibrate(replace(texts, validation=texts.held_out), plan)

    def pack(self, held_out: Metric, data: tuple[str, ...], commit: str | None) -> ExpertPack:
        """Return the module as a pack that names the text of all its trainings."""
        all_data = tuple(dict.fromkeys((*self.earlier_data, *data)))
        return super().pack(held_out, all_data, commit)


def _head(source: Source) -> str:
    """Return the latest commit of a source's repository; "" without one."""
    return str(find_commit(open_repository(source.git), "HEAD").id) if source.git else ""


def _state(text: str, commit: str) -> str:
    return sha256(f"{text} {commit}".encode()).hexdigest()


def _stored_state(run: Path) -> str:
    """Return the digest of what the source held when a run read it."""
    inputs: dict[str, str] = read_object(run / RUN_STARTED).get("inputs", {})
    commit = read_object(run / "corpus" / "corpus.json").get("commit")
    return _state(inputs.get("text", ""), commit or "")


def _text_learnt(run: Path) -> str:
    """Return the digest of a run's training text, as its pack states it."""
    return TokenShards(run / "corpus" / "train").digest


def _drop_other(folder: Path, request: ExpertRequest, expert: TrainedExpert) -> None:
    """Delete an unfinished update that was begun with other arguments, such as fewer minutes, and a
    finished one that is not in the pack.
    """
    begun = folder / RUN_STARTED
    if not begun.is_file():
        return
    if (folder / "result.json").is_file():
        if folder not in expert.finished_runs():
            shutil.rmtree(folder)
        return
    before = read_object(begun).get("request")
    now = json.loads(json.dumps(request.as_json()))
    if not isinstance(before, dict) or with_absolute_models(before) != now:
        shutil.rmtree(folder)


def _drop_unfinished(expert: TrainedExpert) -> None:
    """Delete interrupted updates, and those that are not in the pack: a later update supersedes
    them.
    """
    finished = expert.finished_runs()
    for folder in (expert.folder / "updates").iterdir():
        if folder.is_dir() and folder not in finished:
            shutil.rmtree(folder, ignore_errors=True)
