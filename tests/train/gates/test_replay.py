"""Replay of public text while an expert is trained: which rows, when, and to what effect."""

from pathlib import Path

import pytest
import torch

from deepseek.data.text.loader import IGNORE
from deepseek.model.transformer import DeepSeekModel
from deepseek.text.tokenizer import load_tokenizer
from deepseek.train.gates import public_text
from deepseek.train.gates.replay import SHARE, Replay
from deepseek.train.text.trunk_cache import run_trunk


@pytest.fixture
def replay(tiny_base: Path, monkeypatch: pytest.MonkeyPatch) -> Replay:
    rows = torch.randint(
        0, 300, (24, public_text.ROW_LENGTH), generator=torch.Generator().manual_seed(0)
    )
    monkeypatch.setattr(public_text, "kept_rows", lambda *_: rows)
    monkeypatch.setattr(public_text, "kept", lambda _, compute: compute())
    model = DeepSeekModel.from_pretrained(tiny_base, dtype="float32").requires_grad_(False)
    return Replay.beside(model, load_tokenizer(tiny_base), 2, own_tokens=2048)


def test_a_step_has_its_share_and_depends_on_nothing_else(replay: Replay) -> None:
    batch, stream_BTD = replay.at(3)
    tokens = batch.input_ids.numel()
    assert tokens / (tokens + 2048) == pytest.approx(SHARE, abs=0.02)
    again, again_BTD = replay.at(3)
    assert torch.equal(batch.input_ids, again.input_ids) and torch.equal(stream_BTD, again_BTD)
    assert not torch.equal(batch.input_ids, replay.at(2)[0].input_ids)


def test_every_row_comes_before_one_comes_twice(replay: Replay) -> None:
    steps = len(replay.rows.row_ids) // replay.per_step
    seen = torch.cat([replay.at(step)[0].input_ids for step in range(steps)])
    assert len(seen.unique(dim=0)) == len(seen)


def test_streams_belong_to_their_rows(replay: Replay, tiny_base: Path) -> None:
    model = DeepSeekModel.from_pretrained(tiny_base, dtype="float32").requires_grad_(False)
    batch, stream_BTD = replay.at(1)
    assert torch.allclose(run_trunk(model, 2, batch), stream_BTD, atol=1e-5)
    assert (
        torch.equal(batch.labels[:, :-1], batch.input_ids[:, 1:])
        and (batch.labels[:, -1] == IGNORE).all()
    )


def test_rows_that_set_thresholds_are_never_trained_on(replay: Replay) -> None:
    rows = torch.randint(
        0, 300, (24, public_text.ROW_LENGTH), generator=torch.Generator().manual_seed(0)
    )
    trained = {tuple(row.tolist()) for row in replay.rows.input_ids}
    assert trained == {tuple(row.tolist()) for row in rows[0::2]}
