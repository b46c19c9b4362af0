"""Evaluation as a recipe's stage: held-out loss of texts, and scores of generated code."""

import json
import time
from collections.abc import Callable, Iterable
from dataclasses import asdict
from hashlib import sha256
from itertools import chain
from pathlib import Path
from typing import Any

from pydantic import Field
from pydantic.dataclasses import dataclass as declaration

from deepseek.checkpoint.files import existing_path, located, writable_folder
from deepseek.checkpoint.store import canonical_json, home, read_object, write_json
from deepseek.data.builders.functions import documented_functions
from deepseek.data.text.document import Document
from deepseek.engine.load import load
from deepseek.errors import DataError, TrainError
from deepseek.evaluate.code import (
    bleu_package,
    drawn_functions,
    human_eval_problems,
    pass_at_1,
    score_bodies,
)
from deepseek.evaluate.quality import collected, compare, kept_documents
from deepseek.packs.library import find_pack
from deepseek.packs.pack import read_pack
from deepseek.train.jobs.declaration import DECLARED, job
from deepseek.train.jobs.device_arguments import PrecisionArguments
from deepseek.train.jobs.limits import MAX_COUNT, MAX_TOKENS
from deepseek.train.jobs.recipe import Stage
from deepseek.train.loop.progress import ProgressBar
from deepseek.train.loop.run_lock import run_lock
from deepseek.train.text.corpus import Source, known_documents
from deepseek.train.text.inputs import base_digest, text_digest


@declaration(kw_only=True, frozen=True, config=DECLARED)
class EvaluationArguments(PrecisionArguments):
    """Evaluation"""

    base: str = Field(default="smollm2-135m", kw_only=False)
    """Model to evaluate: a known name, a folder, a GGUF file or a hub id"""

    data: tuple[str | Path, ...] = ()
    """Texts to evaluate on besides public ones: folders, JSONL or Parquet files; default: none"""

    experts: tuple[str, ...] = ()
    """Experts to plug: names or packs; default: none"""

    functions: str | Path | None = None
    """Folder of code whose function bodies are generated and scored by BLEU; default: none"""

    without: tuple[str | Path, ...] = ()
    """Run folders of trainings whose documents are left out of `data` and `functions`; default: in
    a recipe those of the stages before, else none"""

    most_functions: int = Field(default=20, ge=1, le=MAX_COUNT)
    """Maximum functions to generate"""

    human_eval: int = Field(default=0, ge=0, le=164)
    """Number of first HumanEval problems to score by pass@1"""

    tokens: int = Field(default=8192, ge=1, le=MAX_TOKENS)
    """Maximum tokens per text"""

    run_folder: str | Path | None = None
    """Folder of the result; default: `runs/evaluation` in the library's home"""

    quiet: bool = False
    """Show no progress"""

    def check_paths(self) -> None:
        """Raise `UserError` if a text is missing, or the run folder cannot be written."""
        for path in (*self.data, *([self.functions] if self.functions else ())):
            existing_path(located(path))
        if self.run_folder:
            writable_folder(located(self.run_folder))


@job(EvaluationArguments)
def evaluate_stage(arguments: EvaluationArguments) -> None:
    """Evaluate a model and write its figures to `result.json` in the run folder, unless it exists.

    Raises:
        DataError, TrainError, ConfigError, HubError: the message states the cause and the fix.
    """
    folder = writable_folder(located(arguments.run_folder or home() / "runs" / "evaluation"))
    result_file = folder / "result.json"
    with run_lock(folder):
        try:
            inputs = _inputs(arguments)
        except DataError:
            # The texts of finished figures may have been deleted since.
            if result_file.is_file() and read_object(result_file).get(
                "arguments"
            ) == _arguments_as_json(arguments):
                return
            raise
        if not result_file.is_file():
            record = _evaluate(arguments)
            write_json(
                result_file,
                {**record, "arguments": _arguments_as_json(arguments), "inputs": inputs},
            )
        elif read_object(result_file).get("inputs", inputs) != inputs:
            raise TrainError(
                f"{folder} holds the figures of another model, of other texts or other arguments; "
                "give another run_folder, or delete this one."
            )


def _arguments_as_json(arguments: EvaluationArguments) -> dict[str, Any]:
    """Return the arguments as JSON values."""
    return dict(json.loads(canonical_json(arguments.as_json())))


def _inputs(arguments: EvaluationArguments) -> str:
    """Return a digest of everything that determines the figures.

    Raises:
        DataError: a text is gone.
    """
    places = [located(path) for path in (*arguments.data, arguments.functions) if path]
    decisive = {
        **arguments.as_json(),
        "base": base_digest(arguments.base),
        "texts": [text_digest(_source(place)) for place in places],
        "packs": [read_pack(find_pack(name)).manifest.digest for name in arguments.experts],
    }
    return sha256(canonical_json(decisive)).hexdigest()


def _unlearnt_filter(runs: Iterable[Path]) -> Callable[[Document], bool]:
    """Return a function that tells whether no training has learnt a document.

    Args:
        runs: run folders of the trainings; those without a corpus have learnt no documents.
    """
    notes = chain.from_iterable(run.rglob("corpus.json") for run in runs)
    corpora = [known_documents(file.parent) for file in notes]
    names = frozenset[str]().union(*(corpus.train_names for corpus in corpora))
    texts = frozenset[str]().union(*(corpus.learnt for corpus in corpora))

    def is_unlearnt(document: Document) -> bool:
        return document.name not in names and document.text_digest not in texts

    return is_unlearnt


def _source(place: Path) -> Source:
    return Source(folder=place) if place.is_dir() else Source(jsonl=place)


def _evaluate(arguments: EvaluationArguments) -> dict[str, Any]:
    """Return the record of an evaluation."""
    start_time = time.monotonic()
    # Report a missing package before loading a model and scoring texts.
    if arguments.functions:
        bleu_package()
    problems = human_eval_problems(arguments.human_eval) if arguments.human_eval else []
    figures: dict[str, float] = {}
    model, tokenizer = load(
        arguments.base, experts=arguments.experts, device=arguments.device, dtype=arguments.dtype
    )
    with ProgressBar(quiet=arguments.quiet) as progress:
        keep = _unlearnt_filter([existing_path(located(run)) for run in arguments.without])
        with collected(tokenizer, [Path(path) for path in arguments.data], [], keep) as texts:
            for row in compare(model, texts, arguments.tokens, progress):
                figures |= {f"loss.{row.text}": row.before}
                figures |= {f"loss_with_experts.{row.text}": row.after} if arguments.experts else {}
        if arguments.functions:
            code = kept_documents(Path(arguments.functions), keep)
            functions = drawn_functions(documented_functions(code))
            functions = functions[: arguments.most_functions]
            scores = score_bodies(model, tokenizer, functions, progress=progress)
            figures |= {f"bodies.{key}": value for key, value in asdict(scores).items()}
        if problems:
            figures["human_eval.pass_at_1"] = pass_at_1(
                model, tokenizer, problems, progress=progress
            )
    figures["seconds"] = time.monotonic() - start_time
    return {"stage": "eval", "model": arguments.base, "figures": figures, "data": {}}


STAGE = Stage(EvaluationArguments, evaluate_stage)
"""Stage `eval` of a recipe."""
