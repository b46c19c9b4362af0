"""Any value of an argument is accepted, or refused in one sentence that names the argument."""

import math
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from deepseek.cli.job_reference import JOBS
from deepseek.errors import ConfigError
from deepseek.evaluate.stage import EvaluationArguments
from deepseek.packs.manifest import MOMENTS, Manifest
from deepseek.packs.names import RESERVED_NAMES
from deepseek.terminal import is_unicode, visible
from deepseek.train.jobs.arguments import AdaptArguments, AlignArguments, ExpertArguments
from deepseek.train.jobs.declaration import Declaration, arguments_of
from deepseek.train.jobs.distill_hash_arguments import DistillHashArguments
from deepseek.train.jobs.pretrain_arguments import PretrainArguments
from deepseek.train.jobs.recipe import RecipeSettings

TO_BEGIN: dict[type[Declaration], dict[str, Any]] = {
    PretrainArguments: {"name": "x", "tokens": 1000, "domains": {"a": {"folder": "/a"}}},
    ExpertArguments: {"name": "x"},
    AdaptArguments: {"name": "x"},
}

TEXT = st.text(st.characters(exclude_categories=()), max_size=20)
ODD = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.sampled_from([10**400, 2**63, math.nan, math.inf, -0.0, "nan", "\x1b[2J"])
    | st.floats()
    | st.binary(max_size=5)
    | TEXT
    | TEXT.map(Path),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXT, inner, max_size=3),
    max_leaves=5,
)

CASES = [
    (job.arguments, name)
    for job in JOBS
    for name in arguments_of(job.arguments)
    if name != "config"
]


@settings(max_examples=500, deadline=None)
@given(case=st.sampled_from(CASES), value=ODD)
def test_a_value_is_taken_or_refused_in_one_sentence(
    case: tuple[type[Declaration], str], value: Any
) -> None:
    declaration, name = case
    given_values = {**TO_BEGIN.get(declaration, {}), name: value}
    try:
        arguments = declaration.read(**given_values)
    except ConfigError as error:
        message = str(error)
        assert visible(message) == message and len(message) < 1500
        fields = ("model",) if name == "model" else ()
        assert name in message or fields, message
        return
    assert all(is_unicode(text) for text in (str(arguments.as_json()),))


@pytest.mark.parametrize("name", [*sorted(RESERVED_NAMES), "../x", "a/b", "x" * 65, ".hidden", ""])
def test_bad_names_are_refused_at_once(name: str, tmp_path: Path) -> None:
    for declaration in (ExpertArguments, AdaptArguments, AlignArguments, PretrainArguments):
        if not name and declaration in (ExpertArguments, AdaptArguments):
            continue  # the source's name is taken
        if not name and declaration is AlignArguments:
            continue
        with pytest.raises(ConfigError, match="name"):
            declaration.read(**{**TO_BEGIN.get(declaration, {}), "name": name})
    with pytest.raises(ConfigError, match="name"):
        RecipeSettings.read({"name": name, "stages": [{"stage": "eval"}]})
    if name:
        with pytest.raises(ConfigError, match="name"):
            RecipeSettings.read({"name": "x", "stages": [{"stage": "eval", "name": name}]})
        with pytest.raises(ConfigError, match="domains"):
            PretrainArguments.read(**{**TO_BEGIN[PretrainArguments], "domains": {name: {}}})


def test_a_model_cannot_take_the_name_of_a_published_one() -> None:
    for name in ("smollm2-135m", "deepseek-8b"):
        for declaration in (AdaptArguments, AlignArguments, PretrainArguments):
            with pytest.raises(ConfigError, match="is the name of a published model"):
                declaration.read(**{**TO_BEGIN.get(declaration, {}), "name": name})
    assert AdaptArguments.read(name="smollm2-135m", mode="expert").for_expert().name


@pytest.mark.parametrize(
    "declaration", [ExpertArguments, AdaptArguments, AlignArguments, DistillHashArguments]
)
def test_the_base_may_be_a_path(declaration: type[Declaration], tmp_path: Path) -> None:
    given_values = TO_BEGIN.get(declaration, {})
    arguments = declaration.read(**given_values, base=tmp_path)
    assert arguments == declaration.read(**given_values, base=str(tmp_path))
    assert arguments.base == str(tmp_path)
    with pytest.raises(ConfigError, match=r"base \(.*model.*\) must be a text, not 3"):
        declaration.read(**given_values, base=3)


def test_the_name_of_a_source_is_checked_like_a_given_one(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="'all' is a reserved word"):
        ExpertArguments.read(from_folder=tmp_path / "all")
    with pytest.raises(ConfigError, match="published model"):
        AdaptArguments.read(from_folder=tmp_path / "smollm2-135m.d")
    long = ExpertArguments.read(from_folder=tmp_path / ("x" * 200))
    assert long.named() == "x" * 64


@pytest.mark.parametrize(
    ("declaration", "given_values", "message"),
    [
        (
            ExpertArguments,
            {"from_git": 3},
            "from_git (git repository to learn from, or a folder of one) must be a path",
        ),
        (ExpertArguments, {"width": True}, "width=True must be a number"),
        (ExpertArguments, {"width": 10**5000}, "not <int>"),
        (ExpertArguments, {"minutes": "soon"}, "must be a number, not 'soon'"),
        (ExpertArguments, {"seed": 2**32}, "seed must be less than or equal to 4294967295"),
        (ExpertArguments, {"domain": "a\u202eb"}, "leave control characters out"),
        (ExpertArguments, {"licence": "mine"}, "licence: not an SPDX licence expression"),
        (EvaluationArguments, {"data": [3]}, "each of data (texts to evaluate on besides public"),
        (PretrainArguments, {"domains": {"a": {"folder": 3}}}, "domains.a.folder must be a"),
        (
            PretrainArguments,
            {"domains": {"a": {"weight": math.inf}}},
            "domains.a.weight must be a finite",
        ),
        (PretrainArguments, {"samples": ["\ud800"]}, "samples: '\\ud800' is no Unicode text"),
        (PretrainArguments, {"config": 3}, "config must be a file or a mapping, not 3"),
    ],
    ids=lambda value: "" if isinstance(value, dict) else None,
)
def test_messages_name_the_meaning(
    declaration: type[Declaration], given_values: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError) as error:
        declaration.read(**{**TO_BEGIN.get(declaration, {}), **given_values})
    assert message in str(error.value) and visible(error.value) == str(error.value)


def test_declared_widths_are_those_of_packs() -> None:
    """Widths that the declaration accepts are valid in a manifest too."""
    from deepseek.train.jobs.limits import MAX_WIDTH

    (limit,) = [
        bound.le for bound in Manifest.model_fields["width"].metadata if hasattr(bound, "le")
    ]
    assert limit == MAX_WIDTH and MOMENTS


@pytest.mark.parametrize(
    ("declaration", "name", "about"),
    [
        (ExpertArguments, "row_length", "at least 2, at most 1,048,576; default: 512, or"),
        (ExpertArguments, "learning_rate", "more than 0, at most 10; default: 4e-3 for an expert"),
        (PretrainArguments, "warmup", "less than 1; default: 0.05."),
        (PretrainArguments, "samples", 'default: "The ", "def ".'),
        (PretrainArguments, "model", 'default: {"preset": "deepseek-nano"}.'),
    ],
)
def test_limits_and_defaults_are_shown_as_a_user_writes_them(
    declaration: type[Declaration], name: str, about: str
) -> None:
    assert about in arguments_of(declaration)[name].about


def test_a_number_too_long_to_print_is_refused_like_any_other() -> None:
    with pytest.raises(ConfigError, match="method"):
        AlignArguments.read(method=10**5000)
