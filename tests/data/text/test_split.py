"""Held-out text: disjoint, stable when files are added, by folder, by time."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from deepseek.data import Document, split
from deepseek.data.text.document import LEAST_HELD_OUT, Lots, highest_lot
from deepseek.errors import DataError

names = st.lists(st.text("abc/", min_size=1, max_size=8), min_size=2, max_size=40, unique=True)


def documents(names: list[str]) -> list[Document]:
    return [Document("x", name, time=index) for index, name in enumerate(names)]


@given(names, st.floats(0.01, 0.99), st.sampled_from(["file", "time"]), st.integers(0, 5))
def test_both_sides_have_something_and_together_everything(
    names: list[str], share: float, by: str, seed: int
) -> None:
    whole = documents(names)
    train, held_out = split(whole, share, by, seed)
    assert train and held_out
    assert sorted([*train, *held_out], key=lambda d: d.time) == whole


@given(names, names, st.floats(0.01, 0.99), st.integers(0, 5))
def test_files_are_on_both_sides_whatever_commits_draw(
    names: list[str], commits: list[str], share: float, seed: int
) -> None:
    changes = [Document("x", f"repo@{name}", "commit") for name in commits]
    for side in split([*documents(names), *changes], share, "file", seed):
        assert any(document.kind != "commit" for document in side)


def test_adding_files_moves_no_other() -> None:
    whole = documents([f"repo/file{number}.py" for number in range(1000)])
    _, few = split(whole[:500], 0.1)
    _, many = split(whole, 0.1)
    assert [document for document in many if document.time < 500] == few
    assert 70 < len(many) < 130


def test_another_seed_holds_out_other_files() -> None:
    whole = documents([f"repo/file{number}.py" for number in range(1000)])
    first, second = ({d.name for d in split(whole, 0.1, seed=seed)[1]} for seed in (0, 1))
    assert len(first & second) < 30


def test_folders_stay_together() -> None:
    whole = documents([f"repo/{folder}/{file}.py" for folder in range(50) for file in range(4)])
    train, held_out = split(whole, 0.2, by="directory")
    folders = [{d.name.rsplit("/", 1)[0] for d in side} for side in (train, held_out)]
    assert not folders[0] & folders[1]
    assert len(folders[1]) > 3


@given(
    st.lists(st.integers(0, 20), min_size=2, max_size=40).filter(lambda times: len(set(times)) > 1),
    st.floats(0.05, 0.95),
)
def test_the_held_out_documents_are_all_later(times: list[int], share: float) -> None:
    whole = [Document("x", str(index), time=time) for index, time in enumerate(times)]
    train, held_out = split(whole, share, by="time")
    assert max(d.time for d in train) < min(d.time for d in held_out)


def test_the_share_by_time_is_the_one_asked_for() -> None:
    train, held_out = split(documents([str(number) for number in range(200)]), 0.1, by="time")
    assert (len(train), len(held_out)) == (180, 20)


@pytest.mark.parametrize(
    ("whole", "share", "by", "cause"),
    [
        (documents(["a"]), 0.1, "file", "1 document cannot"),
        (documents(["a", "b"]), 0.0, "file", "between 0 and 1"),
        (documents(["a", "b"]), 1.0, "file", "between 0 and 1"),
        (
            [Document("x", "a", time=3), Document("y", "b", time=3)],
            0.5,
            "time",
            "no different times",
        ),
        (documents(["d/a", "d/b"]), 0.5, "directory", "Of 2 documents"),
    ],
)
def test_an_impossible_split_says_why(
    whole: list[Document], share: float, by: str, cause: str
) -> None:
    with pytest.raises(DataError, match=cause):
        split(whole, share, by)


LOTS = st.floats(min_value=0, max_value=1, exclude_max=True)


@given(
    sizes=st.dictionaries(LOTS, st.integers(0, 10**7), min_size=2, max_size=40),
    share=st.floats(0.01, 0.9),
)
def test_the_highest_lot_leaves_text_on_both_sides(sizes: dict[float, int], share: float) -> None:
    lots = sorted(sizes)
    usual = min(max(share, lots[0]), lots[-2])
    limit = highest_lot(sizes, share)
    assert lots[0] <= limit <= max(lots[-2], usual) < lots[-1]
    wanted = share * sum(sizes.values())

    def text(limit: float) -> int:
        return sum(size for lot, size in sizes.items() if lot <= limit)

    if text(usual) >= LEAST_HELD_OUT * wanted:
        assert limit == usual
    else:
        nearest = min(abs(text(lot) - wanted) for lot in lots[:-1])
        assert abs(text(limit) - wanted) == nearest


def test_a_small_source_holds_out_its_share_of_text_whatever_the_lots() -> None:
    documents = [Document("x" * 1000, f"{number}.py") for number in range(20)]
    for seed in range(50):
        _, held_out = split(documents, 0.1, seed=seed)
        assert len(held_out) >= 1
        assert sum(len(document.text) for document in held_out) >= 0.05 * 20_000


def test_one_tiny_file_is_not_all_that_is_held_out() -> None:
    lots = Lots("file", 0)
    names = sorted((f"{number}.py" for number in range(200)), key=lots.draw)
    tiny, *others = [names[0], *(name for name in names if lots.draw(name) > 0.1)]
    documents = [Document("x" * 100, tiny), *(Document("x" * 5000, name) for name in others)]
    _, held_out = split(documents, 0.1)
    share = len("".join(document.text for document in held_out)) / (5000 * len(others))
    assert share == pytest.approx(0.1, abs=0.01)
