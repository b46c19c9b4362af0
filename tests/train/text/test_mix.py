"""The mix: shares, easy rows first, every row once per epoch, resumption; which rows are easy."""

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tiny_tokenizer import tiny_tokenizer

from deepseek.data import Document, RowLoader, TokenShards
from deepseek.errors import DataError
from deepseek.train.text.mix import EASY_TEXT, Domain, MixedRows, Order, easiest_first, malformed

LENGTH = 16


@pytest.fixture(scope="module")
def domains(tmp_path_factory: pytest.TempPathFactory) -> list[Domain]:
    folder = tmp_path_factory.mktemp("shards")
    made = []
    for name, count, weight in (("a", 40, 3.0), ("b", 25, 1.0)):
        documents = [Document(f"{name} number {i} " * 12, f"{name}{i}") for i in range(count)]
        loader = RowLoader(TokenShards.build(documents, tiny_tokenizer(), folder / name), 4, LENGTH)
        made.append(Domain(name, loader, loader, weight))
    return made


@given(num_rows=st.integers(1, 200), easy=st.integers(0, 300), seed=st.integers(0, 9))
def test_every_row_comes_before_any_comes_again_in_the_main_phase(
    num_rows: int, easy: int, seed: int
) -> None:
    order = Order(num_rows, easy, seed)
    first = [order.row(place) for place in range(easy)]
    most_easy = max(1, round(EASY_TEXT * num_rows))
    assert all(row < most_easy for row in first)
    unseen = num_rows - len(set(first))
    main = [order.row(easy + place) for place in range(unseen + num_rows)]
    assert sorted({*first, *main[:unseen]}) == list(range(num_rows)), (
        "what the easy phase left comes first"
    )
    assert sorted(main[unseen:]) == list(range(num_rows)), "then come whole epochs"


def test_domains_keep_their_shares_in_every_stretch(domains: list[Domain]) -> None:
    mix = MixedRows(domains, 4, 0, 0)
    for start in range(0, 2000, 100):
        share = np.mean(mix.domains_at(start, start + 100) == 0)
        assert share == pytest.approx(0.75, abs=0.03)


@pytest.mark.parametrize("easy", [0, 40])
def test_the_stream_goes_on_where_its_state_was_taken(domains: list[Domain], easy: int) -> None:
    mix = MixedRows(domains, 4, easy, 5)
    for _ in range(7):
        mix.next()
    state = mix.state()
    expected = [mix.next() for _ in range(8)]
    again = MixedRows(domains, 4, easy, 5)
    again.load(state)
    for batch in expected:
        assert torch.equal(again.next().input_ids, batch.input_ids)
    with pytest.raises(DataError, match="another curriculum"):
        MixedRows(domains, 4, easy + 1, 5).load(state)


def test_only_the_rows_of_a_restricted_loader_are_drawn(domains: list[Domain]) -> None:
    """This is how rows without a target are left out (`RowLoader.with_targets`)."""
    ids = np.array([1, 4, 5, 9])
    whole = domains[0].train
    part = RowLoader(whole.shards, 4, LENGTH, chosen=ids)
    mix = MixedRows([Domain("a", part, part, 1.0)], 4, 0, 0)
    drawn = [row for _ in range(5) for row in mix.next().row_ids.tolist()]
    assert sorted(drawn) == sorted(ids.tolist() * 5)
    with pytest.raises(DataError, match="another rows of a"):
        mix.load(MixedRows([Domain("a", whole, whole, 1.0)], 4, 0, 0).state() | {"place": 0})


def test_well_formed_text_counts_as_easy() -> None:
    prose = "The cat sat on the mat. It was warm there. The dog came in and lay down by the fire. "
    documents = [
        Document("x = (1, 2\n" * 30, "broken.py", "code"),
        Document("def f(x):\n    return x + 1\n" * 4, "good.py", "code"),
        Document("".join(chr(33 + (i * 7919) % 90) for i in range(900)), "noise.txt"),
        Document(
            prose + "She read him the letter from his brother in the south. " + prose, "prose.txt"
        ),
    ]
    names = [document.name for document in easiest_first(documents)]
    assert names[-1] == "broken.py" and names.index("prose.txt") < names.index("noise.txt")
    assert malformed(Document("int f() { return 1; }", "f.c", "code")) == 0.0
    assert malformed(Document("int f() { return (1; }", "f.c", "code")) == 1.0
    assert easiest_first([]) == []


@given(st.lists(st.sampled_from(["x = (1\n", "x = 1\n", "y = [f(a)]\n"]), max_size=12))
def test_malformed_code_comes_last(texts: list[str]) -> None:
    documents = [
        Document(text * (1 + number), f"{number}.py", "code") for number, text in enumerate(texts)
    ]
    found = [malformed(document) for document in easiest_first(documents)]
    assert found == sorted(found)


def test_sorting_by_ease_loses_nothing(tmp_path: Path) -> None:
    documents = [Document(f"text {i} " * (i + 1), f"{i}") for i in range(20)]
    assert sorted(d.name for d in easiest_first(documents)) == sorted(d.name for d in documents)
