"""Integer inputs of any dtype give the same results as int64 ones."""

import pytest
import torch
from attached_fixtures import attached
from tiny_families import tiny_family
from tiny_model import KINDS, tiny_model
from torch import Tensor

from deepseek.errors import ConfigError
from deepseek.model.passes import begin, resume
from deepseek.model.transformer import DeepSeekModel

DTYPES = (torch.uint8, torch.int8, torch.int16, torch.int32)
IDS = torch.randint(0, 97, (2, 40), generator=torch.Generator().manual_seed(0))


def outputs(model: DeepSeekModel, dtype: torch.dtype) -> list[Tensor]:
    """Return a model's outputs for all kinds of integer inputs of a dtype."""
    ids = IDS.to(dtype)
    # Positions whose products with the factors of dynamic positions overflow 8 bits.
    positions = torch.arange(40).remainder(25)[None].to(dtype)
    mask = (IDS > 3).to(dtype)
    return [
        model(ids, use_cache=False).logits,
        model(ids, position_ids=positions, use_cache=False).logits,
        model(ids, attention_mask=mask, use_cache=False).logits,
        model(ids, logits_to_keep=torch.tensor([0, 7, 39], dtype=dtype)).logits,
        model(ids, labels=ids).loss,
        model.log_probs(ids),
        model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=4, do_sample=False),
    ]


@torch.no_grad()
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_any_dtype_of_integers_gives_the_same(kind: str, dtype: torch.dtype) -> None:
    model = tiny_model(kind).model
    for found, expected in zip(outputs(model, dtype), outputs(model, torch.int64), strict=True):
        assert torch.equal(found.to(expected.dtype), expected)


@torch.no_grad()
@pytest.mark.parametrize("dtype", DTYPES)
def test_an_attached_model_scores_ids_of_any_dtype(dtype: torch.dtype) -> None:
    model = attached(tiny_family("gpt2"))
    positions = torch.arange(40).remainder(25)[None]
    assert torch.equal(model.log_probs(IDS.to(dtype)), model.log_probs(IDS))
    packed = begin(model, IDS, position_ids=positions.to(dtype)).finish()
    assert torch.equal(packed, begin(model, IDS, position_ids=positions).finish())


@pytest.mark.parametrize("dtype", DTYPES)
def test_relevance_reads_ids_that_its_products_fit(dtype: torch.dtype) -> None:
    model = tiny_model().model
    step = begin(model, IDS.to(dtype))
    resumed = resume(model, step.run_to(1), 1, input_ids=IDS.to(dtype))
    for ids in (step.ctx.input_ids_BT, resumed.ctx.input_ids_BT):
        assert ids is not None and ids.dtype == torch.int64 and torch.equal(ids, IDS)


@torch.no_grad()
@pytest.mark.parametrize("dtype", [dtype for dtype in DTYPES if dtype.is_signed])
def test_labels_of_any_dtype_may_be_ignored(dtype: torch.dtype) -> None:
    model = tiny_model().model
    labels = IDS.masked_fill(IDS % 3 == 0, -100)
    assert torch.equal(model(IDS, labels=labels.to(dtype)).loss, model(IDS, labels=labels).loss)


@torch.no_grad()
def test_no_unsigned_label_is_taken_for_the_ignored_one() -> None:
    """-100 in 8 bits is 156."""
    model = tiny_model(vocab_size=200).model
    labels = torch.full((2, 40), 156)
    assert torch.equal(
        model(IDS, labels=labels.to(torch.uint8)).loss, model(IDS, labels=labels).loss
    )
    small = tiny_model(vocab_size=100).model
    with pytest.raises(ConfigError, match="labels holds 156"):
        small(IDS, labels=labels.to(torch.uint8))
