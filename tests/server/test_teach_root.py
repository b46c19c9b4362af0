"""Nothing outside the teach root is read: anything that leads outside, at any depth, is refused."""

import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pygit2
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from deepseek.server.errors import ApiError
from deepseek.server.routes.teach import Teacher
from deepseek.server.settings import Settings
from deepseek.server.teach_root import below, listing

SECRET = b"a text outside"
Change = Callable[[Path, Path], object]


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A teach root beside the repository `outside`, where the server was started."""
    pygit2.init_repository(tmp_path / "outside").create_blob(SECRET)
    (tmp_path / "root").mkdir()
    monkeypatch.chdir(tmp_path)
    return tmp_path / "root"


def text(root: Path, path: str, *, is_repository: bool) -> Path:
    service: Any = SimpleNamespace(settings=Settings(teach_root=root))
    return Teacher.text(SimpleNamespace(service=service), path, is_repository=is_repository)  # type: ignore[arg-type]


def refused(root: Path, path: str, *, is_repository: bool) -> bool:
    """Whether a path is refused in one sentence that reveals no folder of the server."""
    try:
        text(root, path, is_repository=is_repository)
    except ApiError as error:
        return error.status == 400 and str(root.parent) not in error.message
    return False


def named(name: str | bytes) -> Change:
    """Return a change that sets an alternate for a repository's objects."""

    def change(own: Path, outside: Path) -> None:
        line = name if isinstance(name, bytes) else name.format(outside=outside).encode()
        (own / "objects" / "info" / "alternates").write_bytes(line + b"\n")

    return change


def moved(own: Path, outside: Path) -> None:
    own.rename(outside / "moved")


def pointed(own: Path, outside: Path) -> None:
    moved(own, outside)
    own.write_text(f"gitdir: {outside / 'moved'}\n")


def pointed_relatively(own: Path, outside: Path) -> None:
    moved(own, outside)
    own.write_text(f"gitdir: {os.path.relpath(outside / 'moved', own.parent)}\n")


def linked(own: Path, outside: Path) -> None:
    moved(own, outside)
    own.symlink_to(outside / "moved")


def through_a_folder(own: Path, outside: Path) -> None:
    """If split at its form feed, the name would seem to stay inside."""
    (own.parent / "\x0cd").mkdir()
    named("../.././\x0cd/../../../outside/.git/objects")(own, outside)


def chained(own: Path, outside: Path) -> None:
    other = own.parent.parent / "other"
    pygit2.init_repository(other)
    named("{outside}/.git/objects")(other / ".git", outside)
    named(f"{other}/.git/objects")(own, outside)


def linked_objects(own: Path, outside: Path) -> None:
    (own / "objects").rename(own / "old")
    (own / "objects").symlink_to(outside / ".git" / "objects")


def looped(own: Path, outside: Path) -> None:
    (own / "objects" / "info" / "alternates").symlink_to("alternates")
    (own / "objects" / "aa").symlink_to("aa")


WAYS_OUT: dict[str, Change] = {
    "no .git, a parent has one": moved,
    ".git file": pointed,
    "relative .git file": pointed_relatively,
    "linked .git": linked,
    "linked objects": linked_objects,
    "linked pack": lambda own, outside: (own / "objects" / "pack" / "a.pack").symlink_to(outside),
    "common folder": lambda own, outside: (own / "commondir").write_text(f"{outside}/.git\n"),
    "alternates": named("{outside}/.git/objects"),
    "relative alternates": named("./../../../../outside/.git/objects"),
    "alternates from the working folder": named("outside/.git/objects"),
    "alternates after a comment": named("# a\n\n{outside}/.git/objects"),
    "alternates with a form feed": through_a_folder,
    "alternates of alternates": chained,
    "alternates with a NUL": named(b"a\0b"),
    "alternates too long": named("/a" * 5000),
    "undecodable alternates": named(b"/\xff\xfe/objects"),
    "loop of links": looped,
}


@pytest.mark.parametrize("way", WAYS_OUT)
def test_a_repository_that_leads_out_is_refused(way: str, root: Path) -> None:
    pygit2.init_repository(root / "one")
    assert text(root, "one", is_repository=True) == root / "one"
    WAYS_OUT[way](root / "one" / ".git", root.parent / "outside")
    assert refused(root, "one", is_repository=True)


@pytest.mark.parametrize(
    "way", ["alternates from the working folder", "alternates with a form feed"]
)
def test_such_a_repository_does_read_outside(way: str, root: Path) -> None:
    """Otherwise the test above would prove nothing."""
    pygit2.init_repository(root / "one")
    WAYS_OUT[way](root / "one" / ".git", root.parent / "outside")
    assert pygit2.hash(SECRET) in pygit2.Repository(str(root / "one"))


def test_folders_that_no_training_enters_may_lead_out(root: Path) -> None:
    for name in ("src", ".venv/bin", "node_modules/.bin"):
        (root / "project" / name).mkdir(parents=True)
    (root / "project" / ".venv" / "bin" / "python").symlink_to("/usr/bin/env")
    (root / "project" / "node_modules" / ".bin" / "tool").symlink_to(root.parent / "outside")
    assert text(root, "project", is_repository=False) == root / "project"
    (root / "project" / "src" / "more").symlink_to(root.parent / "outside")
    assert refused(root, "project", is_repository=False)


def test_a_store_inside_is_allowed(root: Path) -> None:
    for name in ("one", "two"):
        pygit2.init_repository(root / name)
    for line in ("{0}/two/.git/objects", "../../../two/.git/objects"):
        named(line.format(root))(root / "one" / ".git", root)
        assert text(root, "one", is_repository=True) == root / "one"


NAMES = st.sampled_from(["a", "b", "caf\u00e9", b"\xff".decode(errors="surrogateescape"), " ", "~"])


def two_links(place: Path, outside: Path) -> None:
    place.with_name("first").symlink_to(outside)
    place.symlink_to("first")


OUT: dict[str, Callable[[Path, Path], object]] = {
    "file": lambda place, outside: place.symlink_to(outside / ".git" / "HEAD"),
    "folder": lambda place, outside: place.symlink_to(outside),
    "relative": lambda place, outside: place.symlink_to(os.path.relpath(outside, place.parent)),
    "loop": lambda place, _: place.symlink_to(place.name),
    "two links": two_links,
}


@settings(max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    folders=st.lists(NAMES, max_size=4), way=st.sampled_from(sorted(OUT)), climb=st.integers(0, 5)
)
def test_a_link_at_any_depth_leads_nowhere(
    root: Path, folders: list[str], way: str, climb: int
) -> None:
    top = Path(tempfile.mkdtemp(dir=root))
    place = top.joinpath(*folders)
    place.mkdir(parents=True, exist_ok=True)
    assert text(root, top.name, is_repository=False) == top
    OUT[way](place / "link", root.parent / "outside")
    assert refused(root, top.name, is_repository=False)
    inside = "/".join([top.name, *folders])
    for path in (
        f"{inside}/link",
        f"{inside}{'/..' * (len(folders) + 2 + climb)}",
        f"{inside}/link/x",
    ):
        with pytest.raises(ApiError):
            below(root, path)
    shown = listing(root, place)
    assert not {"link", "first"} & {folder["name"] for folder in shown["folders"]}


@pytest.mark.parametrize(
    "path", ["a" * 5000, "a/" * 3000, "\0", "\udc80", "\ud800", "~", "/", "//x"]
)
def test_a_path_that_cannot_be_is_refused(path: str, root: Path) -> None:
    for is_repository in (False, True):
        assert refused(root, path, is_repository=is_repository)
