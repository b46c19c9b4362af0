"""Suggestions for unknown names: the nearest valid one, if it is near enough."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from deepseek.cli.main import COMMANDS
from deepseek.errors import ConfigError
from deepseek.registry import nearest, pick

NAMES = ["deepseek-175b", "deepseek-1b", "deepseek-29m", "deepseek-8b", "deepseek-nano"]


@pytest.mark.parametrize(
    ("name", "names", "meant"),
    [
        ("8b", ["deepseek-8b"], "deepseek-8b"),
        ("nano", NAMES, "deepseek-nano"),
        ("Deepseek-8B", NAMES, "deepseek-8b"),
        ("deepseek-8", NAMES, "deepseek-8b"),
        ("smol", ["gemma3-270m", "smollm2-135m"], "smollm2-135m"),
        ("gema3", ["gemma3-270m", "smollm2-135m"], "gemma3-270m"),
        ("quantise", COMMANDS, "quantize"),
        ("model", COMMANDS, "models"),
        ("evaluate", COMMANDS, "eval"),
        ("distil", COMMANDS, "distill-hash"),
    ],
)
def test_the_nearest_name_is_meant(name: str, names: list[str], meant: str) -> None:
    assert nearest(name, names).startswith(f"perhaps '{meant}' is meant")


@pytest.mark.parametrize("name", ["list", "bert-base-uncased", "", "x", "finetune"])
def test_what_is_like_nothing_gets_the_list(name: str) -> None:
    assert nearest(name, NAMES) == f"valid: {', '.join(NAMES)}"


def test_a_name_is_listed_once() -> None:
    assert nearest("", ["b", "a", "b"]) == "valid: a, b"


@given(st.text(max_size=12))
def test_a_suggestion_is_a_valid_name(name: str) -> None:
    hint = nearest(name, NAMES)
    assert hint.startswith("valid: ") or hint.split("'")[1] in NAMES


def test_pick_refuses_with_a_suggestion() -> None:
    with pytest.raises(ConfigError, match="preset 'nano' is unknown; perhaps 'deepseek-nano'"):
        pick(dict.fromkeys(NAMES, 1), "nano", "preset")
