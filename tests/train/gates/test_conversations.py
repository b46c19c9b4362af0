"""Everyday conversations as public text: every language counts, and each message is read alone."""

import pytest
import torch
from tiny_model import tiny_model

from deepseek.data.builders.everyday import Conversation
from deepseek.data.text.document import silent
from deepseek.text.tokenizer import document_end_id, encode_plain
from deepseek.train.gates import background
from deepseek.train.gates.conversations import (
    conversation_halves,
    conversation_rows,
    expected_frequencies,
    opening,
    without_reserved,
)
from deepseek.train.gates.relevance import log_odds


def test_both_halves_have_every_language_and_share_no_message() -> None:
    fitted, reserved = conversation_halves()
    assert {one.language for one in fitted} == {one.language for one in reserved}
    assert not {one.turns for one in fitted} & {one.turns for one in reserved}


def test_messages_read_side_by_side_are_read_as_alone() -> None:
    model, tokenizer = tiny_model()
    messages = [
        Conversation("en", "a", ("hello there", "and?")),
        Conversation("de", "b", ("guten Tag",)),
    ]
    messages += [Conversation("en", "c", ("what is a cat " * 4,))]
    found = expected_frequencies(model, tokenizer, messages)
    for language in ("en", "de"):
        total_V = torch.zeros(model.config.vocab_size)
        for message in messages:
            if message.language == language:
                text = "\n".join(message.turns)
                ids = [document_end_id(tokenizer), *encode_plain(tokenizer, [text])[0]][:64]
                total_V += model(torch.tensor([ids]), use_cache=False).logits[0].softmax(-1).sum(0)
        torch.testing.assert_close(found[language], total_V / total_V.sum(), atol=1e-6, rtol=1e-4)


def test_a_context_no_longer_than_a_row_gives_no_rows() -> None:
    model, tokenizer = tiny_model()
    assert conversation_rows(model, tokenizer, 64).shape == (0, 64)


def test_a_kind_of_public_text_may_be_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    """For example, Debian's own Python has no package descriptions."""
    monkeypatch.setattr(background, "descriptions", lambda: iter(()))
    monkeypatch.setattr(background, "installed_packages", list)
    _, tokenizer = tiny_model()
    rows = torch.randint(5, 60, (6, 128))
    counts_GS = background._measured_pairs(tokenizer, rows, silent)["counts"]
    assert len(counts_GS) == 1
    evidence_S = log_odds(counts_GS, counts_GS, 1e-2, 100.0, 1.0)
    assert evidence_S.isfinite().all()


def test_reserved_messages_are_in_no_row_that_is_counted() -> None:
    model, tokenizer = tiny_model()
    rows = conversation_rows(model, tokenizer, 32)
    counted = without_reserved(rows, tokenizer)
    fitted, reserved = (
        {tuple(opening(tokenizer, conversation.turns[0])[:32]) for conversation in half}
        for half in conversation_halves()
    )
    begun = {tuple(row[: len(first)]) for row in counted.tolist() for first in fitted | reserved}
    assert not begun & (reserved - fitted)
    assert begun & fitted
    assert 0 < len(counted) < len(rows)


def test_rows_begin_as_a_chat_does() -> None:
    model, tokenizer = tiny_model()
    rows = conversation_rows(model, tokenizer, 32)
    assert rows.shape[1] == 32 and len(rows) > 100
    first = opening(tokenizer, conversation_halves()[0][0].turns[0])[:32]
    assert rows[0, : len(first)].tolist() == first
