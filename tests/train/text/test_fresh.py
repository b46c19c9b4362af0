"""The text of an update: what is new and as much old text, for training and for validation."""

from dataclasses import replace

import pytest

from deepseek.data import Document
from deepseek.errors import DataError
from deepseek.train.text.corpus import KnownDocuments, digests, text_digests
from deepseek.train.text.fresh import LEAST_VALIDATION, fresh

OLD = [Document("a" * 10_000, f"old-{number}") for number in range(40)]
OLD_HELD_OUT = [Document("b" * 1_000, f"held-out-{number}") for number in range(40)]
NEW = [Document("c" * 60_000, "new")]
KNOWN = KnownDocuments(frozenset(digests(OLD)), frozenset(digests(OLD_HELD_OUT)))


def chosen(validation: list[Document]) -> tuple[list[Document], list[Document]]:
    return fresh([*OLD, *NEW], validation, known=KNOWN, seed=0, name="words")


def test_as_much_of_the_past_as_is_new_is_trained_on() -> None:
    train, _ = chosen(OLD_HELD_OUT)
    assert train[0] is NEW[0]
    assert len(train) == 1 + 6
    assert chosen(OLD_HELD_OUT)[0] == train
    with pytest.raises(DataError, match="no new text"):
        fresh(OLD, OLD_HELD_OUT, known=KNOWN, seed=0, name="words")


def test_the_best_state_is_chosen_by_as_much_of_the_past_as_is_new() -> None:
    new = [Document("d" * 6_000, "new-held-out"), Document("e", OLD_HELD_OUT[0].name)]
    _, validation = chosen([*OLD_HELD_OUT[1:], *new])
    assert validation[:2] == new
    assert len(validation) == 2 + 7
    assert set(validation[2:]) <= set(OLD_HELD_OUT[1:])
    _, validation = chosen([*OLD_HELD_OUT, Document("d", "short")])
    assert len(validation) == 1 + LEAST_VALIDATION // 1_000


def test_new_training_text_stands_in_if_none_is_held_out() -> None:
    _, validation = chosen(OLD_HELD_OUT)
    assert validation[0] is NEW[0]
    assert set(validation[1:]) == set(OLD_HELD_OUT)


def test_what_was_held_out_is_new_to_train_on() -> None:
    """Split by time, the held-out documents of one update are training text of the next."""
    train, _ = fresh(OLD_HELD_OUT[:1], OLD_HELD_OUT[1:], known=KNOWN, seed=0, name="words")
    assert train == OLD_HELD_OUT[:1]


def test_a_record_that_has_moved_to_another_line_is_no_new_one() -> None:
    learnt, tested = frozenset(text_digests(OLD)), frozenset(text_digests(OLD_HELD_OUT))
    known = replace(KNOWN, learnt=learnt, tested=tested)
    moved, held_out = (
        [replace(document, name=f"moved-{document.name}") for document in documents]
        for documents in (OLD, OLD_HELD_OUT)
    )
    new = Document("what was not there", "records.jsonl:1")
    train, validation = fresh([new, *moved], held_out, known=known, seed=0, name="words")
    assert train[0] == new and validation[0] == new
    assert {*train[1:]} <= {*moved} and {*validation[1:]} <= {*held_out}
    with pytest.raises(DataError, match="no new text"):
        fresh(moved, held_out, known=known, seed=0, name="words")
