"""What a query may see is the same whether it is told as a mask or as one run of slots."""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from deepseek.model.context import attention_mask, document_ids, visible


@settings(max_examples=100)
@given(
    length=st.integers(1, 12), past=st.integers(0, 12), left=st.integers(0, 5), right=st.integers(0, 5),
    hole=st.booleans(), window=st.none() | st.integers(1, 8), cut=st.none() | st.integers(1, 11),
)  # fmt: skip
def test_runs_of_slots_are_the_mask(
    length: int, past: int, left: int, right: int, hole: bool, window: int | None, cut: int | None
) -> None:
    positions, total = torch.arange(past, past + length)[None], past + length
    real = torch.ones(1, total, dtype=torch.bool)
    real[:, :left] = real[:, total - right :] = False
    real[:, total // 2] &= not hole
    padding = None if bool(real.all()) else real
    documents = None
    if cut is not None and padding is None and past == 0:
        documents = document_ids(torch.where(positions >= cut, positions - cut, positions))
    seen = visible(positions, past, padding, documents, window)
    slots, own = torch.arange(total), torch.arange(past, total)[:, None]
    found = (slots <= own) & (slots >= seen.first_BT[..., None])
    if seen.real_BS is not None:
        found = (found & seen.real_BS[:, None]) | (slots == own)
    mask = attention_mask(length, past, padding, documents, window, torch.device("cpu"))
    expected = (slots <= own)[None] if mask is None else mask[:, 0]
    asked = real[:, past:]  # what padding itself sees is of no account
    assert torch.equal(found[asked], expected.expand_as(found)[asked])
