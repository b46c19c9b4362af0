"""A new kind of attention, with its own cached state, takes one class and one row in a table."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Self

import pytest
import tiny_model
import torch
from torch import Tensor

import deepseek
from deepseek.engine.engine import Engine
from deepseek.engine.load import Loaded
from deepseek.engine.request import Request
from deepseek.engine.sampler import Sampling
from deepseek.engine.start import quickest_runner
from deepseek.engine.torch_runner import TorchRunner
from deepseek.errors import ConfigError
from deepseek.kernels.bias.score_bias import ScoreBias
from deepseek.model.attention import ATTENTION
from deepseek.model.attention.full import FullAttention
from deepseek.model.config import ModelConfig
from deepseek.model.context import ForwardContext
from deepseek.model.kv_cache import Change, KVCache, layer_state
from deepseek.model.transformer import DeepSeekModel
from deepseek.runner import Chunk

PACKAGE = Path(deepseek.__file__).parent
PROMPT = (5, 17, 80, 20, 33, 9, 8, 7, 6, 5, 4, 3, 11, 12, 13, 14, 15, 16, 17, 18, 19)
BLOCK = 8


@dataclass
class LoudestKeys:
    """The running maximum of each key component, one entry per token: `[B, G, S, K]`."""

    loudest: Tensor | None = None

    @property
    def nbytes(self) -> int:
        return 0 if self.loudest is None else self.loudest.nbytes

    def segment(self, start: int) -> Self:
        return type(self)(None if self.loudest is None else self.loudest[:, :, start:].clone())

    def extend(self, segment: Self) -> None:
        if segment.loudest is not None:
            self.loudest = (
                segment.loudest
                if self.loudest is None
                else torch.cat((self.loudest, segment.loudest), 2)
            )

    def crop(self, length: int) -> None:
        if self.loudest is not None:
            self.loudest = self.loudest[:, :, :length]

    def change_rows(self, change: Change) -> None:
        if self.loudest is not None:
            self.loudest = change(self.loudest)


class LoudAttention(FullAttention):
    """Full attention plus the running maximum of the keys."""

    @classmethod
    def check(cls, config: ModelConfig) -> None:
        if config.sliding_window is not None:
            raise ConfigError("attention='loud' has no sliding window; leave sliding_window out.")

    def state_bytes(self, length: int, itemsize: int) -> int:
        return (
            super().state_bytes(length, itemsize) + self.groups * self.head_dim * itemsize * length
        )

    def attend(
        self,
        query_BHTK: Tensor,
        key_BGSK: Tensor,
        value_BGSK: Tensor,
        plain: tuple[Tensor, Tensor],
        bias: ScoreBias | None,
        ctx: ForwardContext,
    ) -> Tensor:
        attended_BHTK = super().attend(query_BHTK, key_BGSK, value_BGSK, plain, bias, ctx)
        state = layer_state(
            ctx.cache, self.layer_idx, LoudestKeys, LoudestKeys, "Loud attention needs"
        )
        loudest_BGTK = plain[1].cummax(2).values
        if state.loudest is not None:
            loudest_BGTK = torch.maximum(loudest_BGTK, state.loudest[:, :, -1:])
        state.extend(LoudestKeys(loudest_BGTK))
        shared = query_BHTK.shape[1] // self.groups
        return attended_BHTK + loudest_BGTK.repeat_interleave(shared, 1)


@pytest.fixture
def loud(monkeypatch: pytest.MonkeyPatch) -> Loaded:
    monkeypatch.setitem(ATTENTION, "loud", LoudAttention)  # the one row
    monkeypatch.setitem(tiny_model.KINDS, "loud", {"attention": "loud"})
    return tiny_model.tiny_model("loud")


def whole(model: DeepSeekModel, prompt: tuple[int, ...], count: int) -> list[int]:
    """Return the greedy continuation, computed without a cache."""
    ids = list(prompt)
    with torch.no_grad():
        for _ in range(count):
            ids.append(int(model(torch.tensor([ids]), use_cache=False).logits[0, -1].argmax()))
    return ids[len(prompt) :]


def test_the_engine_generates_and_finds_prefixes_again(loud: Loaded) -> None:
    request = Request(PROMPT, Sampling(max_new_tokens=12), ignore_end=True)
    other = replace(request, prompt_ids=(*PROMPT[:17], 40, 41, 42, 43, 44, 45, 46, 47, 48))
    assert isinstance(quickest_runner(loud.model), TorchRunner)
    with Engine(*loud, TorchRunner(loud.model), prefill_chunk=BLOCK) as engine:
        first = [event.token_id for event in engine.submit(request)]
        again = engine.submit(request)
        assert [event.token_id for event in again] == first == whole(loud.model, PROMPT, 12)
        assert again.usage.cached_tokens == (len(PROMPT) - 1) // BLOCK * BLOCK
        branch = engine.submit(other)  # starts with the same blocks and then differs
        assert [event.token_id for event in branch] == whole(loud.model, other.prompt_ids, 12)
        assert branch.usage.cached_tokens == 2 * BLOCK


def test_a_state_in_pieces_goes_on_as_the_whole_one(loud: Loaded) -> None:
    runner = TorchRunner(loud.model)
    original, copied = runner.start(None, 40), runner.start(None, 40)
    for start in range(0, 24, BLOCK):
        chunk = Chunk(original, range(start, start + BLOCK), 0, store=[0])
        segment = runner.forward([chunk]).segments[0][0]
        copied.extend(segment)
        assert 0 < segment.nbytes < copied.nbytes or start == 0
        assert copied.nbytes == original.nbytes == runner.state_bytes(start + BLOCK, None)
    for token in (9, 8, 7):
        expected = runner.forward([Chunk(original, [token])]).logits_RV
        assert torch.equal(runner.forward([Chunk(copied, [token])]).logits_RV, expected)


@torch.no_grad()
def test_a_cache_is_cropped_and_its_rows_are_changed(loud: Loaded) -> None:
    model, ids = loud.model, torch.tensor([PROMPT, PROMPT[::-1]])
    whole_logits = model(ids, use_cache=False).logits
    cache = KVCache()
    model(ids, cache=cache)
    cache.crop(-4)
    torch.testing.assert_close(model(ids[:, -4:], cache=cache).logits, whole_logits[:, -4:])
    cache.crop(-4)
    cache.reorder_cache(torch.tensor([1, 0]))
    torch.testing.assert_close(
        model(ids.flip(0)[:, -4:], cache=cache).logits, whole_logits.flip(0)[:, -4:]
    )


def test_the_config_knows_the_kind_and_asks_it(loud: Loaded) -> None:
    assert ModelConfig.from_dict(loud.model.config.to_dict()).attention == "loud"
    with pytest.raises(ConfigError, match="has no sliding window"):
        ModelConfig(attention="loud", sliding_window=4)
    with pytest.raises(ConfigError, match=r"perhaps 'loud' is meant"):
        ModelConfig(attention="lout")


@pytest.mark.parametrize(
    "name", ["engine/torch_runner.py", "runner.py", "model/kv_cache.py", "model/config.py"]
)
def test_what_serves_every_kind_names_none(name: str) -> None:
    assert "lsh" not in (PACKAGE / name).read_text().lower()
