"""YAML with false tags, or with aliases that expand to too many values."""

import time
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from deepseek.checkpoint.licence import Licence, read_licence
from deepseek.errors import ConfigError
from deepseek.train.jobs.yaml_file import MAX_VALUES, parse_yaml, read_file, read_mapping


@pytest.mark.parametrize(
    "text", ["a: !!timestamp x", "a: !!int x", "a: !!binary é", "a: !!float x", "a: 2001-99-99"]
)
def test_a_tag_that_does_not_fit_its_value_is_one_sentence(text: str, tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError, match=r"run\.yaml"):
        read_file(path)


def bomb(levels: int, width: int, mapping: bool) -> str:
    """Return YAML whose last field expands to `width ** levels` values."""
    lines = ["v0: &v0 x"]
    for level in range(1, levels + 1):
        named = [f"*v{level - 1}"] * width
        parts = [f"k{place}: {name}" for place, name in enumerate(named)] if mapping else named
        inner = ", ".join(parts)
        lines.append(f"v{level}: &v{level} " + (f"{{{inner}}}" if mapping else f"[{inner}]"))
    return "\n".join(lines)


@settings(max_examples=25)
@given(levels=st.integers(1, 60), width=st.integers(2, 9), mapping=st.booleans())
def test_a_bomb_is_refused_before_it_is_unfolded(levels: int, width: int, mapping: bool) -> None:
    text = bomb(levels, width, mapping)
    started = time.process_time()
    if width**levels > MAX_VALUES:
        with pytest.raises(ValueError, match="stands for more than"):
            parse_yaml(text)
        with pytest.raises(ConfigError, match="is not a mapping"):
            read_mapping(text)
    elif width**levels * 4 < MAX_VALUES:
        assert len(parse_yaml(text)) == levels + 1
    assert time.process_time() - started < 2


@pytest.mark.parametrize("opening", ["[", "{", "- ", "[{a: ", "a: [[[[{b: "])
def test_what_is_nested_too_deeply_is_refused_at_once(opening: str, tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text(opening * 100_000)
    started = time.process_time()
    with pytest.raises(ConfigError, match="YAML"):
        read_file(path)
    assert time.process_time() - started < 2
    assert parse_yaml("a: " + "[" * 90 + "]" * 90) is not None


@pytest.mark.parametrize("text", ["a: &a [*a]", "a: &a {b: *a}", "a: &a [&b [*a]]"])
def test_a_value_that_holds_itself_is_refused(text: str, tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError, match="stands for more than"):
        read_file(path)


@pytest.mark.parametrize(
    "fields",
    [
        bomb(30, 9, mapping=False) + "\nlicense: mit\nlicense_link: *v30",
        bomb(30, 9, mapping=True) + "\nlicense: *v30",
        "license: 2001-99-99",
        "license: !!timestamp x",
        "license: " + "[" * 1500,
        "license: mit\nlicense_link: &a [*a]",
    ],
)
def test_a_model_card_cannot_hold_up_a_load(fields: str, tmp_path: Path) -> None:
    (tmp_path / "README.md").write_text(f"---\n{fields}\n---\n# Model\n")
    started = time.process_time()
    licence = read_licence(tmp_path)
    assert licence == Licence() or (licence.name, licence.link) == ("MIT", "")
    assert time.process_time() - started < 2
