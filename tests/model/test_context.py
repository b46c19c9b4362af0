"""The keys that a query may attend to are the same by mask and by range of slots."""

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
    asked = real[0, past:]  # padding may attend to anything, but not to nothing
    assert torch.equal(told[asked], expected[asked]) and torch.equal(seen[asked], expected[asked])
    assert told.any(-1).all() and seen.any(-1).all()


@given(
    lengths=st.lists(st.integers(1, 6), min_size=1, max_size=4),
    first=st.integers(0, 3),
    holes=st.lists(st.booleans(), min_size=24, max_size=24),
    filler=st.sampled_from([0, 1, 77]),
)
def test_padding_is_of_no_account_for_documents(
    lengths: list[int], first: int, holes: list[bool], filler: int
) -> None:
    plain = torch.cat([torch.arange(length) for length in lengths])
    expected = torch.cat([torch.full((n,), i) for i, n in enumerate(lengths)])
    found = document_ids(plain[None])
    assert (found is None) == (len(lengths) == 1)
    assert found is None or torch.equal(found[0], expected)
    slots = [slot for slot in range(40) if slot >= first and not (slot < 24 and holes[slot])]
    slots = torch.tensor(slots)[: len(plain)]
    length = int(slots[-1]) + 3
    positions = torch.full((1, length), filler)
    positions[0, slots] = plain[: len(slots)]
    real = torch.zeros(1, length, dtype=torch.bool)
    real[0, slots] = True
    found = document_ids(positions, real)
    expected = expected[: len(slots)]
    if found is None:
        assert not expected.any()
    else:
        assert torch.equal(found[0, slots], expected)
    # Positions may also count the padding within a document.
    assert document_ids(torch.arange(length)[None], real) is None
