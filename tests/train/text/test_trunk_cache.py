"""The trunk cache: same values as the whole model, resumed after interruptions, refused after any
change.
"""

import errno
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor
from train.conftest import sentence

from deepseek.data import Batch, Document, RowLoader, TokenShards
from deepseek.errors import TrainError
from deepseek.model.transformer import DeepSeekModel
from deepseek.text.tokenizer import load_tokenizer
from deepseek.train.loop.packed import resume_rows
from deepseek.train.text.trunk_cache import TrunkCache, run_trunk

LAYER, LENGTH, WIDTH = 2, 16, 32
KEY = {"base": "b", "shards": "s", "layer": LAYER, "computed": "torch.float32"}


@pytest.fixture(scope="module")
def model(tiny_base: Path) -> DeepSeekModel:
    return DeepSeekModel.from_pretrained(tiny_base, dtype=torch.float32).requires_grad_(False)


@pytest.fixture(scope="module")
def loader(tiny_base: Path, tmp_path_factory: pytest.TempPathFactory) -> RowLoader:
    documents = [Document(sentence(seed, 12), f"d{seed}") for seed in range(12)]
    shards = TokenShards.build(
        documents, load_tokenizer(tiny_base), tmp_path_factory.mktemp("shards")
    )
    return RowLoader(shards, 2, LENGTH, seed=0)


def open_cache(
    folder: Path, rows: int, dtype: torch.dtype = torch.float32, **key: object
) -> TrunkCache:
    return TrunkCache(
        folder / "cache", KEY | key, np.arange(rows)[::-1].copy(), LENGTH, WIDTH, dtype
    )


def nothing(_done: int, _total: int) -> None: ...


@pytest.mark.usefixtures("fp32")
@pytest.mark.parametrize("layer", [0, 1, 3])
def test_trunk_and_the_rest_are_the_model(
    model: DeepSeekModel, loader: RowLoader, layer: int
) -> None:
    batch = loader.rows([0, 3])
    whole = model(batch.input_ids, position_ids=batch.position_ids, use_cache=False).logits
    split = resume_rows(model, batch, run_trunk(model, layer, batch), layer).logits()
    assert (batch.position_ids == 0).sum() > 2, "rows should hold several documents"
    torch.testing.assert_close(split, whole, rtol=0, atol=1e-6)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 0.0), (torch.bfloat16, 2**-8)])
def test_what_is_read_is_what_was_computed(
    model: DeepSeekModel, loader: RowLoader, tmp_path: Path, dtype: torch.dtype, tolerance: float
) -> None:
    cache = open_cache(tmp_path, 7, dtype)
    cache.fill(loader, lambda batch: run_trunk(model, LAYER, batch), 3, nothing)
    batch = loader.rows([5, 0, 6])
    expected = torch.cat([run_trunk(model, LAYER, loader.rows(row)) for row in (5, 0, 6)])
    torch.testing.assert_close(
        cache.read(batch.row_ids).float(), expected, rtol=tolerance, atol=1e-6
    )
    assert (tmp_path / "cache" / "hidden.bin").stat().st_size == cache.num_bytes


class Stopping:
    """A trunk that fails after some batches."""

    def __init__(self, after: int) -> None:
        self.after, self.seen = after, list[int]()

    def __call__(self, batch: Batch) -> Tensor:
        if len(self.seen) >= self.after:
            raise KeyboardInterrupt
        self.seen += batch.row_ids.tolist()
        return batch.row_ids[:, None, None].expand(-1, LENGTH, WIDTH).float()


@pytest.mark.parametrize("gone", ["hidden.bin", "done.bin", "key.json"])
def test_a_cache_of_which_a_part_was_deleted_is_filled_again(
    loader: RowLoader, tmp_path: Path, gone: str
) -> None:
    open_cache(tmp_path, 4).fill(loader, Stopping(after=100), 2, nothing)
    (tmp_path / "cache" / gone).unlink()
    cache = open_cache(tmp_path, 4)
    cache.fill(loader, Stopping(after=100), 2, nothing)
    assert cache.read(torch.tensor([3, 1]))[:, 0, 0].tolist() == [3, 1]


def test_an_interrupted_fill_goes_on_where_it_was(loader: RowLoader, tmp_path: Path) -> None:
    first, second = Stopping(after=4), Stopping(after=100)
    with pytest.raises(KeyboardInterrupt):
        open_cache(tmp_path, 9).fill(loader, first, 2, nothing)
    cache = open_cache(tmp_path, 9)
    cache.fill(loader, second, 2, nothing)
    assert sorted(first.seen + second.seen) == list(range(9)), "each row is computed once"
    assert cache.read(torch.arange(9))[:, 3, 3].tolist() == list(range(9))


@pytest.mark.parametrize("field", ["base", "shards", "layer", "computed"])
def test_another_key_begins_an_empty_cache(loader: RowLoader, tmp_path: Path, field: str) -> None:
    open_cache(tmp_path, 4).fill(loader, Stopping(100), 2, nothing)
    assert open_cache(tmp_path, 4).done.all()
    assert not open_cache(tmp_path, 4, **{field: "other"}).done.any()


def test_a_full_disk_is_one_sentence_and_loses_nothing(
    loader: RowLoader, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = open_cache(tmp_path, 6)
    cache.fill(loader, Stopping(100), 2, nothing)
    cache.done[4:] = False
    with monkeypatch.context() as patch:

        def full(_slots: object, _stream: object) -> None:
            raise OSError(errno.ENOSPC, "No space left on device")

        patch.setattr(cache, "_write", full)
        with pytest.raises(TrainError, match=r"is full \(0 MB are needed"):
            cache.fill(loader, Stopping(100), 2, nothing)
    assert open_cache(tmp_path, 6).done.all()
