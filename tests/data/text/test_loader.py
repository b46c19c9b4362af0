"""Rows: every target once per epoch, documents separated, and the same order after a resume."""

import time
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tiny_tokenizer import tiny_tokenizer

from deepseek.data import Batch, Document, RowLoader, TokenShards
from deepseek.data.text.document import conversation
from deepseek.data.text.encode import CONTEXT_BIT
from deepseek.data.text.loader import IGNORE
from deepseek.errors import DataError

ASK, ANSWER = (
    {"role": "user", "content": "what is the value?"},
    {"role": "assistant", "content": "the router"},
)
DOCUMENTS = [
    Document("the value of the expert\n" * 9, "long"),
    Document("a", "short"),
    Document("the model returns the router " * 2, "middle"),
    conversation([ASK, ANSWER, ASK, ANSWER], "chat", "chat"),
    Document("b", "last"),
]


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> TokenShards:
    return TokenShards.build(DOCUMENTS, tiny_tokenizer(), tmp_path_factory.mktemp("shards") / "s")


def oracle(shards: TokenShards) -> list[tuple[int, int, int]]:
    """For each stored token: its id, the next target in its document or IGNORE, and its position in
    the document.
    """
    table = []
    for start, stop in zip(shards.offsets[:-1].tolist(), shards.offsets[1:].tolist(), strict=True):
        ids = shards.ids_N[start:stop].astype(np.int64)
        for place in range(stop - start):
            target = int(ids[place + 1]) if place + 1 < stop - start else IGNORE
            context = target != IGNORE and target & int(CONTEXT_BIT)
            table.append(
                (int(ids[place]) & ~int(CONTEXT_BIT), IGNORE if context else target, place)
            )
    return table


def equal(left: Batch, right: Batch) -> bool:
    names = ("input_ids", "labels", "position_ids", "row_ids")
    return all(torch.equal(getattr(left, name), getattr(right, name)) for name in names)


@given(length=st.integers(1, 300))
def test_rows_hold_every_token_with_its_target_and_place(shards: TokenShards, length: int) -> None:
    loader = RowLoader(shards, 1, length)
    whole = loader.rows(np.arange(loader.num_rows))
    expected = oracle(shards)
    ids, labels, positions = (
        t.flatten().tolist() for t in (whole.input_ids, whole.labels, whole.position_ids)
    )
    count = min(len(expected), len(ids))
    assert count >= len(expected) - 1  # the very last token predicts nothing
    for place, (identity, target, position) in enumerate(expected[:count]):
        assert (ids[place], labels[place]) == (identity, target)
        assert positions[place] == min(position, place % length)
    assert set(ids[count:]) <= {0}
    assert set(labels[count:]) <= {IGNORE}
    assert positions[count:] == list(range(len(ids) - count))


@given(length=st.integers(1, 300), rows=st.integers(1, 5), seed=st.integers(0, 2**40))
def test_an_epoch_shows_every_row_once(
    shards: TokenShards, length: int, rows: int, seed: int
) -> None:
    loader = RowLoader(shards, rows, length, seed)
    shown = torch.cat(
        [loader.next().row_ids for _ in range(-(-2 * loader.num_rows // rows))]
    ).tolist()
    for epoch in range(2):
        part = shown[epoch * loader.num_rows : (epoch + 1) * loader.num_rows]
        assert sorted(part) == list(range(loader.num_rows))
    assert loader.cursor >= 2 * loader.num_rows


@given(
    steps=st.integers(0, 40),
    more=st.integers(1, 20),
    rows=st.integers(1, 4),
    seed=st.integers(0, 99),
)
def test_resuming_anywhere_equals_not_stopping(
    shards: TokenShards, steps: int, more: int, rows: int, seed: int
) -> None:
    whole = RowLoader(shards, rows, 16, seed)
    for _ in range(steps):
        whole.next()
    # As it would come back from JSON.
    state = {name: int(str(value)) for name, value in whole.state().items()}
    resumed = RowLoader(TokenShards(shards.folder), rows, 16, seed)
    resumed.load(state)
    assert all(equal(whole.next(), resumed.next()) for _ in range(more))
    assert whole.state() == resumed.state()


def test_a_row_by_its_id_is_the_row_of_the_batch(shards: TokenShards) -> None:
    loader = RowLoader(shards, 3, 16)
    batch = loader.next()
    assert batch.input_ids.shape == batch.labels.shape == batch.position_ids.shape == (3, 16)
    assert {
        batch.input_ids.dtype,
        batch.labels.dtype,
        batch.position_ids.dtype,
        batch.row_ids.dtype,
    } == {torch.int64}
    for place, row in enumerate(batch.row_ids.tolist()):
        single = loader.rows(row)
        assert torch.equal(single.input_ids[0], batch.input_ids[place])
        assert torch.equal(single.labels[0], batch.labels[place])


@pytest.mark.parametrize("length", [1, 2, 3, 5, 16, 1000])
def test_rows_without_a_target_can_be_left_out(shards: TokenShards, length: int) -> None:
    every = RowLoader(shards, 2, length)
    has_target = [bool((every.row(row)[1] != IGNORE).any()) for row in range(every.num_rows)]
    assert not all(has_target) or length > 5
    assert every.with_targets().row_ids.tolist() == np.flatnonzero(has_target).tolist()


def test_a_text_without_any_target_is_refused(tmp_path: Path) -> None:
    shards = TokenShards.build([conversation([ASK], "c", "c")], tiny_tokenizer(), tmp_path / "s")
    with pytest.raises(DataError, match="nothing to predict"):
        RowLoader(shards, 1, 4).with_targets()


def test_more_rows_than_there_are_come_once(shards: TokenShards) -> None:
    loader = RowLoader(shards, 2, 16)
    assert sorted(loader.first(1000).row_ids.tolist()) == list(range(loader.num_rows))


def test_batches_are_full_even_of_a_tiny_corpus(tmp_path: Path) -> None:
    shards = TokenShards.build([Document("the", "d")], tiny_tokenizer(), tmp_path / "s")
    loader = RowLoader(shards, 4, 64)
    assert loader.num_rows == 1
    assert loader.next().row_ids.tolist() == [0, 0, 0, 0]


def test_a_state_of_another_run_is_refused(shards: TokenShards, tmp_path: Path) -> None:
    state = RowLoader(shards, 2, 16, seed=1).state()
    other = TokenShards.build(DOCUMENTS[:2], tiny_tokenizer(), tmp_path / "s")
    for loader, what in [
        (RowLoader(shards, 2, 16, seed=2), "seed"),
        (RowLoader(shards, 2, 32, seed=1), "length"),
        (RowLoader(other, 2, 16, seed=1), "tokens"),
    ]:
        with pytest.raises(DataError, match=f"other {what}"):
            loader.load(state)


def test_impossible_rows_are_refused(shards: TokenShards) -> None:
    with pytest.raises(DataError, match="at least 1"):
        RowLoader(shards, 0, 16)
    loader = RowLoader(shards, 1, 16)
    with pytest.raises(DataError, match="Row ids must lie"):
        loader.rows([loader.num_rows])


def test_the_time_of_a_row_does_not_grow_with_the_number_of_documents(
    shards: TokenShards, monkeypatch: pytest.MonkeyPatch
) -> None:
    loader = RowLoader(shards, 1, 16)
    monkeypatch.setattr(shards, "offsets", np.arange(4_000_000, dtype="<u8"))
    begin = time.process_time()
    for first in range(500):
        assert loader.starts(first, 16).all()
    assert time.process_time() - begin < 0.5
