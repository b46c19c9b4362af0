"""Key files: each line is a key and the experts that it may use; anything unclear prevents the
start.
"""

from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from deepseek.errors import ConfigError
from deepseek.server.keys import (
    Experts,
    Permissions,
    permissions_of,
    read_admin_keys,
    read_keys,
    sessions,
)
from deepseek.server.settings import Settings

VARIABLE = "KEY_OF_THE_ENVIRONMENT"
KEYS = st.text(st.characters(codec="ascii", exclude_categories=["C", "Z"]), min_size=1)
NAMES = st.from_regex(r"[A-Za-z0-9][A-Za-z0-9._-]{0,9}", fullmatch=True).filter(
    lambda name: name not in {"all", "auto", "none"}
)
LISTS = st.none() | st.frozensets(NAMES, max_size=4)


def read(file: Path) -> dict[str, Experts]:
    return read_keys(file, VARIABLE, "--api-key-file")


def words(experts: Experts) -> list[str]:
    """Return the words after a key that may use these experts."""
    if experts is None:
        return []
    return sorted(experts) or ["-"]


@given(st.dictionaries(KEYS, LISTS, max_size=8), st.sampled_from([" ", "\t", "  "]))
def test_a_file_gives_its_keys_with_their_experts_or_is_refused(
    tmp_path_factory: pytest.TempPathFactory, keys: dict[str, Experts], space: str
) -> None:
    file = tmp_path_factory.mktemp("keys") / "file"
    lines = [space.join([key, *words(experts)]) for key, experts in keys.items()]
    file.write_text("\n".join(["# key shop", "", *lines]), encoding="utf-8")
    wanted = {key: experts for key, experts in keys.items() if not key.startswith("#")}
    if wanted:
        assert read(file) == wanted
    else:
        with pytest.raises(ConfigError):
            read(file)


def test_a_byte_order_mark_is_no_part_of_the_first_key(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("one shop\n", encoding="utf-8-sig")
    assert read(tmp_path / "file") == {"one": frozenset({"shop"})}


def test_the_key_of_the_environment_is_added_and_may_use_all(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("one shop\n# two\nthree\n")
    monkeypatch.setenv(VARIABLE, " four ")
    assert read(tmp_path / "file") == {"one": frozenset({"shop"}), "three": None, "four": None}
    assert read_keys(None, VARIABLE, "--api-key-file") == {"four": None}


@pytest.mark.parametrize(
    ("content", "complaint"),
    [
        ("secret shop\nsecret german\n", "line 2: this key has other experts"),
        ("secret shop\nsecret\n", "line 2: this key has other experts"),
        ("secret\nsecret -\n", "line 2: this key has other experts"),
        ("# first\n\nsecret ../shop\n", "line 3: '../shop' is no name of an expert"),
        ("secret shop,german\n", "'shop,german' is no name of an expert"),
        ("secret all\n", "'all' is no name of an expert"),
        ("secret - shop\n", "'-' is no name of an expert"),
        ("secret shop # of the shop\n", "'#' is no name of an expert"),
        ("of-the-environment shop\n", "line 1: this key has other experts"),
    ],
)
def test_an_unclear_line_is_refused_without_showing_its_key(
    content: str, complaint: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(VARIABLE, "of-the-environment")
    file = tmp_path / "file"
    file.write_text(content)
    with pytest.raises(ConfigError) as refusal:
        read(file)
    assert complaint in str(refusal.value)
    assert "secret" not in str(refusal.value)
    assert "of-the-environment" not in str(refusal.value)


UNSENDABLE = st.tuples(
    st.text(st.characters(codec="ascii", exclude_categories=["C", "Z"])),
    st.characters(codec="utf-8", min_codepoint=0x80, exclude_categories=["C", "Z"])
    | st.sampled_from("\x01\x08\x7f\u200b"),
).map("".join)


@given(key=UNSENDABLE, experts=LISTS)
def test_a_key_that_no_header_can_carry_is_refused_without_showing_it(
    tmp_path_factory: pytest.TempPathFactory, key: str, experts: Experts
) -> None:
    file = tmp_path_factory.mktemp("keys") / "file"
    file.write_text(" ".join([f"k{key}", *words(experts)]), encoding="utf-8")
    with pytest.raises(ConfigError, match="line 1: the key has characters") as refusal:
        read(file)
    assert f"k{key}" not in str(refusal.value)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(VARIABLE, f"k{key}")
        with pytest.raises(ConfigError, match=f"{VARIABLE}: the key has characters") as refusal:
            read_keys(None, VARIABLE, "--api-key-file")
    assert f"k{key}" not in str(refusal.value)


def test_the_same_line_twice_is_one_key(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("one shop german\none german shop\n")
    assert read(tmp_path / "file") == {"one": frozenset({"shop", "german"})}


def test_administrators_may_use_all(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_text("one\ntwo\n")
    assert read_admin_keys(file, VARIABLE, "--admin-key-file") == {"one", "two"}
    file.write_text("one\ntwo shop\n")
    with pytest.raises(ConfigError, match=r"--admin-key-file .* administrators may use all"):
        read_admin_keys(file, VARIABLE, "--admin-key-file")


@pytest.mark.parametrize("admin_keys", [frozenset(), frozenset({"user", "limited"})])
def test_a_limited_key_is_a_users_and_no_administrators(admin_keys: frozenset[str]) -> None:
    api_keys = frozenset({"user"}) | admin_keys
    with pytest.raises(ConfigError, match="once, for users or for administrators"):
        Settings(
            api_keys=api_keys, admin_keys=admin_keys, key_experts={"limited": frozenset({"shop"})}
        )


@pytest.mark.parametrize("field", ["api_keys", "admin_keys"])
@pytest.mark.parametrize(
    ("value", "complaint"),
    [
        ("sk-s3cret", "is a str, not a collection of keys"),
        (b"sk-s3cret", "is a bytes, not"),
        ({"sk-s3cret": ["shop"]}, "is a dict, not"),
        (None, "is a NoneType, not"),
        ({""}, "a key is empty"),
        ({" sk-s3cret"}, "white space"),
        ({None}, "is no text"),
        ({"sk-s3cret\u00e9"}, "the key has characters"),
    ],
)
def test_settings_hold_keys_and_nothing_else(field: str, value: Any, complaint: str) -> None:
    """One text would make each of its characters a key, and an empty key opens the server."""
    with pytest.raises(ConfigError) as refusal:
        Settings(**{field: value})
    assert str(refusal.value).startswith(field)
    assert complaint in str(refusal.value)
    assert "s3cret" not in str(refusal.value)


@pytest.mark.parametrize(
    ("value", "complaint"),
    [
        ({"s3cret": "shop"}, "must be a list of texts"),
        ({"s3cret": None}, "must be a list of texts"),
        ({"s3cret": [""]}, "holds an empty text"),
        ([("s3cret", ["shop"])], "is a list, not a mapping"),
    ],
)
def test_settings_hold_names_of_experts_by_key(value: Any, complaint: str) -> None:
    with pytest.raises(ConfigError, match=rf"^key_experts.*{complaint}") as refusal:
        Settings(api_keys=frozenset({"s3cret"}), key_experts=value)
    assert "s3cret" not in str(refusal.value)


def test_settings_take_any_collection_of_keys() -> None:
    collections: Any = {"api_keys": ["a", "b"], "key_experts": {"a": ["shop"]}, "admin_keys": {"c"}}
    settings = Settings(**collections)
    assert settings.api_keys == frozenset({"a", "b"})
    assert settings.key_experts == {"a": frozenset({"shop"})}
    assert settings.admin_keys == frozenset({"c"})


@given(st.lists(st.builds(Permissions, st.sampled_from(["admin", "user"]), LISTS), max_size=8))
def test_a_session_stands_for_one_set_of_permissions(several: list[Permissions]) -> None:
    known = sessions("secret", several)
    assert len({cookie for cookie, _ in known}) == len(known) == len(set(several))
    for cookie, permissions in known:
        assert permissions_of(cookie, known) == permissions
        # Another replica accepts the session too, if it has the same secret.
        assert (cookie, permissions) in sessions("secret", reversed(several))
        assert permissions_of(cookie, sessions("other", several)) is None
