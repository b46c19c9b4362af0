"""Every argument of every job reaches it from Python, command line and recipe; the cases come from
the declarations.
"""

import inspect
import json
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any, get_args, get_origin

import pytest
import torch

import deepseek
from deepseek.cli import job_command
from deepseek.cli.job_reference import JOBS, PublicJob, page
from deepseek.cli.main import main
from deepseek.errors import ConfigError
from deepseek.evaluate import stage as evaluation
from deepseek.train.jobs import (
    adapt,
    align,
    arguments,
    distill_hash,
    expert,
    expert_request,
    pretrain,
    text_request,
)
from deepseek.train.jobs.declaration import Argument, Declaration, arguments_of
from deepseek.train.jobs.distill_hash_arguments import DistillHashArguments
from deepseek.train.jobs.pretrain_arguments import PretrainArguments
from deepseek.train.jobs.recipe import STAGES, train_recipe
from deepseek.train.loop.runs import Run
from deepseek.train.rl.judge import JUDGES

PRETRAINING = {"name": "x", "domains": {"a": {"folder": "b"}}, "tokens": 5}
"""Valid arguments of a pre-training."""

MODEL_BY_POSITION = {"adapt", "align"}
"""Commands whose model has no option name."""

CALLED = [job for job in JOBS if job.function]
"""Jobs that are functions and commands, not only stages of a recipe."""

TO_BEGIN: dict[str | None, dict[str, Any]] = {
    None: {"run_folder": "/x", "functions": "/code"},
    "train_expert": {"name": "x", "run_folder": "/x", "from_git": "/git"},
    "adapt": {"name": "x", "run_folder": "/x", "from_git": "/git"},
    "align": {"name": "x", "run_folder": "/x"},
    "pretrain": {
        "name": "x",
        "run_folder": "/x",
        "tokens": 1000,
        "domains": {"a": {"folder": "/a"}},
    },
    "distill_hash": {},
}
"""Other arguments that each job gets besides the tested one."""

NEEDED: dict[tuple[str, str], dict[str, Any]] = {("adapt", "rank"): {"mode": "lora"}}
"""Arguments that a tested argument requires, by job and argument."""

Record = list[str]


class SilentProgress(str):
    """A progress bar that says nothing, and whose `repr` is the same in every process."""

    def say(self, message: str) -> None:
        pass


def the_job(function: str) -> PublicJob:
    return next(job for job in JOBS if job.function == function)


@pytest.fixture
def record(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Record:
    """Record what jobs would do, instead of doing it."""
    monkeypatch.setenv("DEEPSEEK_HOME", str(tmp_path))
    seen: Record = []

    def instead(result: Any) -> Callable[..., Any]:
        def call(*given: object, **named: object) -> Any:
            seen.append(f"{given} {named}")
            return result

        return call

    def run_once(job: object, request: Any, run: Run) -> Path:
        seen.append(f"{request.device} {replace(run, inputs=dict)}")  # the device is not stored
        return Path("made")

    def progress_bar(quiet: bool) -> AbstractContextManager[str]:
        seen.append(f"quiet={quiet}")
        return nullcontext(SilentProgress("progress"))

    monkeypatch.setattr(arguments.RunArguments, "check_paths", lambda _: None)
    monkeypatch.setattr(evaluation.EvaluationArguments, "check_paths", lambda _: None)
    monkeypatch.setattr(evaluation, "_inputs", lambda _: "")  # it reads texts and packs
    for module in (adapt, align, expert, pretrain):
        monkeypatch.setattr(module, "run_once", run_once)
    monkeypatch.setattr(expert_request, "resolve", Path)
    monkeypatch.setattr(text_request, "resolve", Path)
    monkeypatch.setattr(text_request, "context_in", lambda _: 2048)
    monkeypatch.setattr(expert_request, "layers_in", lambda _: tuple(range(30)))
    monkeypatch.setattr(job_command, "fetch", lambda _: None)
    for name, result in {
        "load": (None, None),
        "collected": nullcontext("texts"),
        "compare": [],
        "existing_path": "/x",
        "_unlearnt_filter": None,
        "kept_documents": None,
        "documented_functions": None,
        "drawn_functions": range(100),
        "bleu_package": None,
        "score_bodies": None,
        "human_eval_problems": ["a problem"],
        "pass_at_1": 0.5,
        "write_json": None,
    }.items():
        monkeypatch.setattr(evaluation, name, instead(result))
    monkeypatch.setattr(evaluation, "asdict", lambda _: {})
    monkeypatch.setattr(evaluation, "time", SimpleNamespace(monotonic=lambda: 0.0))
    monkeypatch.setattr(evaluation, "ProgressBar", progress_bar)
    for name, result in {
        "resolve": tmp_path / "base",
        "load": (SimpleNamespace(layers=range(30)), None),
        "documents_at": [],
        "long_texts": torch.zeros(1, dtype=torch.long),
        "fingerprint": SimpleNamespace(weights=""),
        "estimated": "an estimate",
        "distill_hashes": {},
        "save_hashes": None,
    }.items():
        monkeypatch.setattr(distill_hash, name, instead(result))
    monkeypatch.setattr(distill_hash, "ProgressBar", progress_bar)
    monkeypatch.setattr(distill_hash, "shutil", SimpleNamespace(rmtree=lambda _: None))
    return seen


def by_python(job: PublicJob, given: dict[str, Any]) -> None:
    function = getattr(deepseek, job.function) if job.function else evaluation.evaluate_stage
    function(**given)


def by_command(job: PublicJob, given: dict[str, Any]) -> None:
    assert job.command
    words = job.command.split()
    for name, value in given.items():
        option = f"--{name.replace('_', '-')}"
        if name == "base" and job.command in MODEL_BY_POSITION:
            words.append(value)
        elif isinstance(value, bool):
            words += [option] if value else []
        elif isinstance(value, tuple):
            words += [f"{option}={part}" for part in value]
        else:
            words.append(f"{option}={json.dumps(value) if isinstance(value, dict) else value}")
    with pytest.raises(SystemExit) as stop:
        main(words)
    assert stop.value.code == 0


def by_recipe(job: PublicJob, given: dict[str, Any]) -> None:
    values = {
        name: list(value) if isinstance(value, tuple) else value for name, value in given.items()
    }
    train_recipe(
        {"name": "recipe", "stages": [{"stage": job.stage, "with": values}]},
        {"eval": evaluation.STAGE},
    )


def another_value(argument: Argument) -> Any:
    """Return a value of an argument that is not its default."""
    fitting = [
        value
        for value in (*(argument.declared.examples or ()), *argument.choices)
        if value != argument.default
    ]
    if fitting:
        return fitting[0]
    if get_origin(argument.kind) is tuple:
        return (f"/one/{argument.name}", f"/two/{argument.name}")
    if argument.kind in (int, float):
        return (
            (argument.default or 6) + 1 if argument.kind is int else (argument.default or 0.5) / 2
        )
    return {bool: True, str: f"another-{argument.name}", Path: f"/another/{argument.name}"}[
        argument.kind
    ]


def cases() -> list[Any]:
    """Return pairs of a job and one of its arguments, except `config`, which only holds others, and
    `update`, which excludes most others (see `test_update.py`).
    """
    pairs = [(job, argument) for job in JOBS for argument in arguments_of(job.arguments).values()]
    return [
        pytest.param(*pair, id=f"{pair[0].function or pair[0].stage}-{pair[1].name}")
        for pair in pairs
        if pair[1].name not in ("config", "update")
    ]


@pytest.mark.parametrize(("job", "argument"), cases())
def test_an_argument_reaches_its_job(job: PublicJob, argument: Argument, record: Record) -> None:
    given = TO_BEGIN[job.function] | NEEDED.get((job.function, argument.name), {})
    by_python(job, given)
    without = record.copy()
    changed = {**given, argument.name: another_value(argument)}
    record.clear()
    by_python(job, changed)
    with_it = record.copy()
    assert with_it != without
    for way in [by_command] * bool(job.command) + [by_recipe] * bool(job.stage):
        record.clear()
        way(job, changed)
        assert record == with_it, way.__name__


@pytest.mark.parametrize(
    "name", sorted(arguments_of(arguments.AdaptArguments).keys() - {"mode", "rank"})
)
def test_an_argument_of_adapt_reaches_the_expert_of_mode_expert(name: str, record: Record) -> None:
    given = {**TO_BEGIN["adapt"], "mode": "expert"}
    by_python(the_job("adapt"), given)
    without = record.copy()
    for way in (by_python, by_command):
        record.clear()
        way(
            the_job("adapt"),
            {**given, name: another_value(arguments_of(arguments.AdaptArguments)[name])},
        )
        assert record != without, f"{name} is dropped {way.__name__}"


def test_mode_expert_keeps_learning_rate_and_batch_rows(record: Record) -> None:
    """Regression: both were silently dropped."""
    options = (
        "--mode",
        "expert",
        "--from-git",
        "/git",
        "--learning-rate",
        "0.0123",
        "--batch-rows",
        "17",
    )
    with pytest.raises(SystemExit):
        main(["adapt", *options])
    assert "'learning_rate': 0.0123" in record[0] and "'batch_rows': 17" in record[0]


@pytest.mark.parametrize("job", CALLED, ids=lambda job: job.function)
def test_a_function_shows_its_arguments(job: PublicJob) -> None:
    function = getattr(deepseek, job.function)
    assert inspect.signature(function).parameters.keys() == arguments_of(job.arguments).keys()
    assert inspect.signature(function).return_annotation is Path
    for argument in arguments_of(job.arguments).values():
        assert f"    {argument.name}: {argument.about}\n" in function.__doc__


@pytest.mark.parametrize("job", CALLED, ids=lambda job: job.function)
def test_help_lists_every_option(job: PublicJob, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main([*job.command.split(), "--help"])
    shown = capsys.readouterr().out
    for name in arguments_of(job.arguments):
        assert f"--{name.replace('_', '-')}" in shown or (name == "base" and "MODEL" in shown)


@pytest.mark.parametrize(("job", "argument"), cases())
def test_an_argument_is_described_with_its_default(job: PublicJob, argument: Argument) -> None:
    description = argument.declared.description or ""
    assert len(description) > 5 and not description.endswith(".")
    named = "default" in argument.about or isinstance(argument.default, bool)
    assert named, f"the docstring of {argument.name} must say what is taken by default"


@pytest.mark.parametrize("job", CALLED, ids=lambda job: job.function)
def test_a_misspelt_argument_is_one_sentence_with_the_right_one(
    job: PublicJob, record: Record, capsys: pytest.CaptureFixture[str]
) -> None:
    wrong = {**TO_BEGIN[job.function], "sead": 1}
    for way in (by_python, *([by_recipe] if job.stage else [])):
        with pytest.raises(ConfigError, match="'sead' is no field here; perhaps 'seed' is meant"):
            way(job, wrong)
    with pytest.raises(SystemExit) as stop:
        main([*job.command.split(), "--sead", "1"])
    assert stop.value.code == 2
    assert "--seed" in capsys.readouterr().err
    assert record == []


@pytest.mark.parametrize(
    ("declaration", "given", "message"),
    [
        (
            arguments.AdaptArguments,
            {"name": "x", "mode": "lorra"},
            "mode 'lorra' is unknown; perhaps 'lora' is meant",
        ),
        (
            arguments.ExpertArguments,
            {"name": "x", "width": 0},
            "width must be greater than or equal to 1",
        ),
        (
            arguments.ExpertArguments,
            {"name": "x", "layers": "top"},
            "layers='top' is not understood; write all, last",
        ),
        (
            arguments.ExpertArguments,
            {"name": "x", "minutes": float("inf")},
            "minutes must be a finite number",
        ),
        (arguments.ExpertArguments, {}, "no text to learn from; give from_git"),
        (
            arguments.AlignArguments,
            {"layers": "0-2"},
            "layers='0-2' are not the last layers, which alone can be aligned; write all or last:N",
        ),
        (
            arguments.AlignArguments,
            {"method": "dpo", "reward": "clean"},
            "reward has no effect with method dpo; leave it out, or take method ppo or grpo or gspo "
            "or rloo.",
        ),
        (
            arguments.AlignArguments,
            {"method": "dpo", "target_kl": 6},
            "target_kl has no effect with method dpo; leave it out, or take method ppo or grpo or gspo.",
        ),
        *(
            (
                arguments.AlignArguments,
                {"method": "dpo", name: 2},
                f"{name} has no effect with method dpo; leave it out, or take method ppo or grpo or "
                "gspo or rloo.",
            )
            for name in ("new_tokens", "temperature")
        ),
        (
            arguments.AlignArguments,
            {"method": "rloo", "target_kl": 6},
            "target_kl has no effect with method rloo",
        ),
        (
            arguments.AlignArguments,
            {"reward": "foo"},
            "reward 'foo' is unknown; valid: clean, model, varied, willing.",
        ),
        (PretrainArguments, {"name": "x", "domains": {"a": {}}}, "tokens is missing; give it"),
        (
            PretrainArguments,
            {**PRETRAINING, "dtype": "float16"},
            "dtype=float16 has too small a range",
        ),
        (arguments.ExpertArguments, {"update": "x", "dtype": "float16"}, "dtype=float16 has"),
        (PretrainArguments, {**PRETRAINING, "samples": [""]}, "samples: a prompt is empty"),
        (
            PretrainArguments,
            {**PRETRAINING, "model": {"max_position_embeddings": 256}, "row_length": 512},
            "row_length=512 is impossible; the model has a context of 256 tokens",
        ),
        (PretrainArguments, {"name": "x", "tokens": 5}, "domains is missing; give it"),
    ],
)
def test_a_wrong_value_is_one_sentence(
    declaration: type[Declaration], given: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError) as error:
        declaration.read(**given)
    assert str(error.value).startswith(message) and "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("--method dpo --reward clean", "--reward has no effect with method dpo; leave it out"),
        ("--method rloo --target-kl 6", "--target-kl has no effect with method rloo; leave it out"),
    ],
)
def test_a_command_refuses_what_its_method_would_ignore(
    options: str, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["align", "x", *options.split()])
    assert stop.value.code == 2
    assert message in " ".join(capsys.readouterr().err.split())


def test_the_rewards_are_a_model_and_the_judges() -> None:
    assert set(get_args(arguments.Reward)) == {"model", *JUDGES}


def test_arguments_beside_a_configuration_win(record: Record, tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text(json.dumps({**TO_BEGIN["pretrain"], "batch_rows": 3, "seed": 5}))
    by_python(the_job("pretrain"), {"config": path, "seed": 6})
    by_command(the_job("pretrain"), {"config": path, "seed": 6})
    assert "'batch_rows': 3" in record[0] and "'seed': 6" in record[0]
    assert record[0] == record[1]


TEXT_KEYS = "base source tokens epochs row_length batch_rows learning_rate held_out_tokens seed"


@pytest.mark.parametrize(
    ("function", "module", "keys"),
    [
        ("train_expert", expert, f"{TEXT_KEYS} name layers width minutes licence domain"),
        ("adapt", adapt, f"{TEXT_KEYS} mode last"),
        (
            "align",
            align,
            "base prefs method reward layers rollouts rollout_size learning_rate new_tokens temperature target_kl seed",
        ),
    ],
)
def test_the_stored_request_has_the_keys_that_runs_were_started_with(
    function: str, module: ModuleType, keys: str, record: Record, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A run started by an older version resumes only if its `request.json` is the same."""
    stored: dict[str, Any] = {}
    monkeypatch.setattr(module, "run_once", lambda _, request, run: stored.update(run.stored))
    by_python(the_job(function), TO_BEGIN[function])
    assert stored.keys() == set(keys.split())
    if "source" in stored:
        assert stored["source"].keys() == {
            "git",
            "folder",
            "jsonl",
            "parquet",
            "held_out",
            "by",
            "seed",
            "questions",
        }


@pytest.mark.parametrize(
    ("declaration", "given", "field"),
    [
        (arguments.ExpertArguments, {"name": "x", "from_git": "/git"}, "base"),
        (arguments.AdaptArguments, {"name": "x", "from_git": "/git"}, "base"),
        (arguments.AlignArguments, {}, "base"),
        (PretrainArguments, PRETRAINING, "tokenizer"),
    ],
)
def test_a_local_model_is_stored_by_its_absolute_path(
    declaration: type[Declaration],
    given: dict[str, Any],
    field: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    (tmp_path / "m").mkdir()
    monkeypatch.chdir(tmp_path)
    for name, stored in {"m": str(tmp_path / "m"), "owner/m": "owner/m"}.items():
        assert declaration.read(**given, **{field: name}).as_json()[field] == stored


def test_every_stage_and_declaration_is_in_the_table_of_jobs() -> None:
    stages = STAGES | {"eval": evaluation.STAGE}
    assert {job.stage: job.arguments for job in JOBS if job.stage} == {
        name: stage.arguments for name, stage in stages.items()
    }
    declared = [
        one
        for one in [*vars(arguments).values(), DistillHashArguments, PretrainArguments]
        if isinstance(one, type) and issubclass(one, Declaration)
    ]
    groups = {base for one in declared for base in one.__bases__}
    assert {job.arguments for job in CALLED} == set(declared) - groups


def test_the_reference_page_is_up_to_date() -> None:
    path = Path(__file__).parents[3] / "docs" / "reference" / "arguments.md"
    command = "python -m deepseek.cli.job_reference docs/reference/arguments.md"
    assert path.read_text(encoding="utf-8") == page(), f"write it anew: {command}"


def test_the_type_of_each_argument_can_be_an_option() -> None:
    for job in CALLED:
        for argument in arguments_of(job.arguments).values():
            found = job_command.annotation(argument, job.arguments, positional=False)
            assert get_args(found)[1].help == argument.about
