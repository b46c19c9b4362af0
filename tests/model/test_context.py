"""What a query may see is said alike by a mask and by one run of slots."""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from deepseek.model.context import attention_mask, document_ids, visible


@settings(max_examples=100)
@given(
    length=st.integers(1, 12),
    past=st.integers(0, 12),
    left=st.integers(0, 5),
    right=st.integers(0, 5),
    hole=st.booleans(),
    window=st.none() | st.integers(1, 8),
    cut=st.none() | st.integers(1, 11),
)
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
    slots, own = torch.arange(total), torch.arange(past, total)[:, None]
    expected = (slots <= own) & real[0] & ((own - slots < window) if window else True)
    if documents is not None:
        expected = expected & (documents[0, :, None] == documents[0])
    rows = (length, past, padding, documents, window, torch.device("cpu"))
    mask, seen = attention_mask(*rows), visible(*rows).mask(total)[0]
    told = (slots <= own) if mask is None else mask[0, 0]
    asked = real[0, past:]  # what padding itself sees is of no account, as long as it is something
    assert torch.equal(told[asked], expected[asked]) and torch.equal(seen[asked], expected[asked])
    assert told.any(-1).all() and seen.any(-1).all()
