"""The cache of keys, values and states."""

import pytest
import torch
from tiny_model import tiny_model

from deepseek.model.kv_cache import KVCache


@torch.no_grad()
@pytest.mark.parametrize("reserved", [False, True])
@pytest.mark.parametrize("kind", ["dense", "dpe", "lsh"])
def test_a_reset_cache_serves_as_a_new_one(kind: str, reserved: bool) -> None:
    model, tokenizer = tiny_model(kind)
    torch.manual_seed(0)
    first, second = (torch.randint(len(tokenizer), (2, 40)) for _ in range(2))
    used, new = KVCache(), KVCache()
    for cache in (used, new):
        if reserved:
            cache.reserve(len(model.layers), 64)
    # Two documents per row: such a cache cannot be continued; `reset` must clear this state too.
    model(first, position_ids=torch.arange(40).remainder(20)[None], cache=used)
    used.reset()
    assert used.nbytes == 0
    for part in second.split((30, 9, 1), dim=1):
        assert torch.equal(model(part, cache=used).logits, model(part, cache=new).logits)
    assert used.nbytes == new.nbytes > 0
