"""Every positional encoding in a small model: cache, padding, documents, gradients, files, and what
is refused.
"""

import copy
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from deepseek import DeepSeekModel, DynamicPositionalEncoding, ModelConfig
from deepseek.errors import ConfigError
from deepseek.kernels.bias.distance import NUM_BUCKETS
from deepseek.model.kv_cache import KVCache
from deepseek.model.passes import begin
from deepseek.model.positions import POSITIONS
from deepseek.model.positions.alibi import slopes

KINDS = sorted(POSITIONS)


def small_config(**changes: Any) -> ModelConfig:
    shape: dict[str, Any] = {
        "vocab_size": 97,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 128,
        "initializer_range": 0.15,
    }
    return ModelConfig(**(shape | changes))


def small_model(kind: str, **changes: Any) -> DeepSeekModel:
    """Return a model with one encoding; dynamic parameters, if any, are far from zero."""
    torch.manual_seed(0)
    model = DeepSeekModel(small_config(positional_encoding=kind, **changes)).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "score_bias" in name:
                parameter.add_(0.01 * torch.randn_like(parameter))  # biases of about a nat
    return model


def ids_of(batch: int, length: int) -> torch.Tensor:
    return torch.randint(0, 97, (batch, length), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("changes", [{}, {"sliding_window": 9, "full_attention_layers": [1]}])
@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_cached_steps_equal_one_forward(kind: str, changes: dict[str, Any]) -> None:
    model, ids, cache = small_model(kind, **changes), ids_of(2, 48), KVCache()
    parts = [model(ids[:, a:b], cache=cache).logits for a, b in pairwise([0, 17, 18, 19, 40, 48])]
    torch.testing.assert_close(torch.cat(parts, dim=1), model(ids).logits, atol=1e-5, rtol=0)


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_padding_changes_nothing(kind: str) -> None:
    model, ids = small_model(kind), ids_of(2, 48)
    mask = torch.ones_like(ids)
    mask[0, :13] = 0
    left = model(ids, attention_mask=mask).logits[:1, 13:]
    torch.testing.assert_close(left, model(ids[:1, 13:]).logits, atol=1e-5, rtol=0)
    right = model(ids, attention_mask=mask.flip(-1)).logits[:1, :35]
    torch.testing.assert_close(right, model(ids[:1, :35]).logits, atol=1e-5, rtol=0)


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_generation_goes_on_after_padding_on_the_right(kind: str) -> None:
    model, ids, cache = small_model(kind), ids_of(2, 48), KVCache()
    mask = torch.ones_like(ids)
    mask[0, 20:40] = 0
    model(ids[:, :40], attention_mask=mask[:, :40], cache=cache)
    positions = (mask.cumsum(-1) - 1)[:, 40:]
    found = model(ids[:, 40:], attention_mask=mask, position_ids=positions, cache=cache).logits[:1]
    alone = model(torch.cat((ids[:1, :20], ids[:1, 40:]), dim=1)).logits[:, 20:]
    torch.testing.assert_close(found, alone, atol=1e-5, rtol=0)


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_packed_documents_do_not_see_each_other(kind: str) -> None:
    model, ids = small_model(kind), ids_of(1, 48)
    packed = model(ids, position_ids=torch.cat((torch.arange(25), torch.arange(23)))[None]).logits
    torch.testing.assert_close(packed[:, :25], model(ids[:, :25]).logits, atol=1e-5, rtol=0)
    torch.testing.assert_close(packed[:, 25:], model(ids[:, 25:]).logits, atol=1e-5, rtol=0)


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=10)
@given(
    lengths=st.lists(st.integers(1, 12), min_size=1, max_size=4),
    padding=st.lists(st.integers(0, 3), min_size=5, max_size=5),
    window=st.none() | st.just(5),
    filler=st.sampled_from([0, 1, 99]),
)
@torch.no_grad()
def test_packed_documents_with_padding_do_not_see_each_other(
    kind: str, lengths: list[int], padding: list[int], window: int | None, filler: int
) -> None:
    model = small_model(kind, sliding_window=window, full_attention_layers=[1] if window else None)
    positions, documents = [filler] * padding[0], []
    for length, more in zip(lengths, padding[1:], strict=False):
        documents.append(slice(len(positions), len(positions) + length))
        positions += [*range(length), *[filler] * more]
    ids, mask = ids_of(1, len(positions)), torch.zeros(1, len(positions), dtype=torch.long)
    for document in documents:
        mask[:, document] = 1
    place = torch.tensor([positions])
    packed = model(ids, attention_mask=mask, position_ids=place).logits
    for document in documents:
        alone = model(ids[:, document]).logits
        torch.testing.assert_close(packed[:, document], alone, atol=2e-5, rtol=0)


@torch.no_grad()
def test_a_cache_of_packed_documents_is_not_continued() -> None:
    model, ids = small_model("rope"), ids_of(1, 30)
    place = torch.cat((torch.arange(10), torch.arange(15)))[None]

    def refused(cache: KVCache, first: int, **more: Any) -> None:
        with pytest.raises(ConfigError, match="a cache of its own"):
            model(ids[:, first:], cache=cache, **more)

    packed = KVCache()
    model(ids[:, :25], position_ids=place, cache=packed)
    refused(packed, 25)
    refused(copy.deepcopy(packed), 25, position_ids=torch.arange(15, 20)[None])
    cache = KVCache()
    model(ids[:, :10], position_ids=place[:, :10], cache=cache)
    refused(cache, 10, position_ids=torch.arange(20)[None])  # a new document at the first new token
    refused(cache, 20, position_ids=(torch.arange(10, 20) % 15)[None])  # or among the new tokens
    whole = model(ids).logits
    again = model(ids[:, 10:], position_ids=torch.arange(10, 30)[None], cache=cache).logits
    torch.testing.assert_close(again, whole[:, 10:], atol=1e-5, rtol=0)
    packed.crop(-25)
    model(ids[:, :20], cache=packed)
    torch.testing.assert_close(
        model(ids[:, 20:], cache=packed).logits, whole[:, 20:], atol=1e-5, rtol=0
    )


@pytest.mark.parametrize("filler", [0, 1])
@torch.no_grad()
def test_a_padded_row_is_read_in_pieces_with_positions(filler: int) -> None:
    """Chunk by chunk, as generation in `transformers` does."""
    model, ids = small_model("rope"), ids_of(2, 30)
    mask = torch.ones_like(ids)
    mask[0, :13] = 0
    place = (mask.cumsum(-1) - 1).masked_fill(mask == 0, filler)
    for bounds in ([0, 5, 13, 14, 30], [0, 13, 30], [0, 20, 21, 30]):
        cache, parts = KVCache(), []
        for a, b in pairwise(bounds):
            given = {"attention_mask": mask[:, :b], "position_ids": place[:, a:b]}
            parts.append(model(ids[:, a:b], cache=cache, **given).logits)
        found = torch.cat(parts, dim=1)
        torch.testing.assert_close(found[:1, 13:], model(ids[:1, 13:]).logits, atol=1e-5, rtol=0)
        torch.testing.assert_close(found[1:], model(ids[1:]).logits, atol=1e-5, rtol=0)


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_beams_reorder_the_cache_and_files_keep_every_bit(kind: str, tmp_path: Path) -> None:
    model, ids = small_model(kind), ids_of(2, 10)
    options: dict[str, Any] = {
        "num_beams": 3,
        "max_new_tokens": 8,
        "do_sample": False,
        "pad_token_id": 0,
    }
    assert torch.equal(
        model.generate(ids, **options), model.generate(ids, use_cache=False, **options)
    )
    model.save_pretrained(tmp_path)
    again = DeepSeekModel.from_pretrained(tmp_path, dtype=torch.float32)
    assert torch.equal(again(ids).logits, model(ids).logits)


@pytest.mark.parametrize("kind", KINDS)
def test_order_matters_and_every_weight_learns(kind: str) -> None:
    model, ids = small_model(kind, train_len=16 if kind == "dpe" else None), ids_of(1, 40)
    swapped = ids[:, [1, 0, *range(2, 40)]]
    assert (model(ids).logits - model(swapped).logits)[:, -1].abs().max() > 1e-6
    model(ids, labels=ids).loss.backward()
    assert not [name for name, parameter in model.named_parameters() if not parameter.grad.any()]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("removed", [1, 10, 30])
@torch.no_grad()
def test_a_cache_can_be_shortened(kind: str, removed: int) -> None:
    model, ids, cache = small_model(kind), ids_of(1, 30), KVCache()
    model(ids, cache=cache)
    cache.crop(-removed)
    again = model(ids[:, 30 - removed :], cache=cache).logits
    torch.testing.assert_close(again, model(ids).logits[:, 30 - removed :], atol=1e-5, rtol=0)


def test_dynamic_positions_start_as_rope_and_learn_from_there(tmp_path: Path) -> None:
    rope, ids = small_model("rope"), ids_of(2, 40)
    rope.save_pretrained(tmp_path)
    choice = ModelConfig(positional_encoding="dpe", train_len=16)
    model = DeepSeekModel.from_pretrained(tmp_path, config=choice, dtype=torch.float32)
    with torch.no_grad():
        assert torch.equal(model(ids).logits, rope(ids).logits)
    # The training path.
    torch.testing.assert_close(model(ids).logits, rope(ids).logits, atol=1e-5, rtol=0)
    model(ids, labels=ids).loss.backward()
    for block in model.layers:
        bias = block.attention.score_bias
        assert all(
            p.grad.any()
            for p in (bias.distance_HN, bias.context_HMN, bias.decay_H, bias.length_scale_H)
        )


@pytest.mark.parametrize("reserved", [False, True])
def test_a_cache_without_gradients_is_continued_with_them(reserved: bool) -> None:
    """A zero bias is computed only if gradients are needed."""
    torch.manual_seed(0)
    model = DeepSeekModel(small_config(positional_encoding="dpe")).eval()
    ids, cache = ids_of(2, 20), KVCache()
    if reserved:
        cache.reserve(3, 32)
    parts = []
    for start, stop, gradients in ((0, 8, False), (8, 12, True), (12, 15, False), (15, 20, True)):
        with torch.set_grad_enabled(gradients):
            parts.append(model(ids[:, start:stop], cache=cache).logits)
    found = torch.cat(parts, dim=1)
    torch.testing.assert_close(found, model(ids).logits, atol=1e-5, rtol=0)
    found.square().mean().backward()
    bias = model.layers[1].attention.score_bias
    assert bias.decay_H.grad.any() and bias.distance_HN.grad.any()


def test_dynamic_positions_survive_checkpointing_of_activations() -> None:
    model, ids = small_model("dpe").train(), ids_of(2, 30)
    model(ids, labels=ids).loss.backward()
    expected = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
    model.zero_grad()
    model.activation_checkpointing_enable()
    model(ids, labels=ids).loss.backward()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, expected[name], msg=name)


@torch.no_grad()
def test_dynamic_positions_in_bf16() -> None:
    model, ids = small_model("dpe"), ids_of(2, 40)
    expected = model(ids).logits
    found = nn.Module.to(model, torch.bfloat16)(ids).logits.float()
    assert (found - expected).abs().mean() < 0.05 * expected.abs().mean()


@pytest.mark.parametrize("kind", ["alibi", "dpe"])
@torch.no_grad()
def test_biases_in_bf16_around_padding_between_tokens(kind: str) -> None:
    model, ids = small_model(kind), ids_of(2, 40)
    mask = torch.ones_like(ids)
    mask[:, 9:14] = 0
    real = mask[0].bool()
    expected = model(ids, attention_mask=mask).logits[:, real]
    found = nn.Module.to(model, torch.bfloat16)(ids, attention_mask=mask).logits[:, real].float()
    assert (found - expected).abs().mean() < 0.05 * expected.abs().mean()


@torch.no_grad()
def test_far_distances_share_what_half_the_training_length_learned() -> None:
    bias = small_model("dpe", train_len=16).layers[0].attention.score_bias
    table = bias._table(torch.randn(1, 5, 32))
    assert table.shape == (1, 4, 5, NUM_BUCKETS)
    assert torch.equal(table[..., 8:], table[..., 8:9].expand(-1, -1, -1, NUM_BUCKETS - 8))
    assert not torch.equal(table[..., 7], table[..., 8])


def test_alibi_slopes_are_those_of_the_paper() -> None:
    assert slopes(8) == [2**-i for i in range(1, 9)]
    assert len(set(slopes(12))) == 12 and slopes(12)[8] == 2**-0.5


@torch.no_grad()
def test_alibi_adds_its_slope_times_distance() -> None:
    model, ids = small_model("alibi", num_hidden_layers=1), ids_of(1, 20)
    attention, x = model.layers[0].attention, torch.randn(1, 20, 32)
    ctx = begin(model, ids).ctx
    inputs = attention.inputs(x, ctx)
    query, key, value = (
        inputs.query_BHTK,
        inputs.key_BGTK.repeat_interleave(2, 1),
        inputs.value_BGTK.repeat_interleave(2, 1),
    )
    distance = torch.arange(20) - torch.arange(20)[:, None]
    scores = query @ key.mT / 8**0.5 + torch.tensor(slopes(4))[:, None, None] * distance
    weights = scores.masked_fill(distance > 0, -torch.inf).softmax(-1)
    expected = attention.o_proj((weights @ value).transpose(1, 2).flatten(2))
    torch.testing.assert_close(attention(x, ctx), expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    ("fields", "told"),
    [
        ({"positional_encoding": "rop"}, "perhaps 'rope' is meant"),
        (
            {
                "positional_encoding": "alibi",
                "rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4},
            },
            "rotates nothing",
        ),
        (
            {
                "positional_encoding": "dpe",
                "rope_parameters": {"rope_type": "yarm", "rope_theta": 1e4},
            },
            "'yarn' is meant",
        ),
        ({"train_len": 64}, "only 'dpe' has one"),
        ({"local_rope_theta": 1e4}, "needs a sliding_window"),
        (
            {"local_rope_theta": 1e4, "sliding_window": 8, "positional_encoding": "alibi"},
            "positional_encoding 'rope' or 'dpe'",
        ),
        ({"positional_encoding": "dpe", "train_len": 512}, "max_position_embeddings=128"),
        (
            {"positional_encoding": "dpe", "attention": "lsh", "lsh_far_field": True},
            "lsh_far_field=True contradicts positional_encoding='dpe'",
        ),
    ],
)
def test_contradictory_choices_are_refused(fields: dict[str, Any], told: str) -> None:
    with pytest.raises(ConfigError, match=told):
        small_config(**fields)


def test_learned_positions_end_with_a_clear_error() -> None:
    with pytest.raises(ConfigError, match="max_position_embeddings=128"):
        small_model("learned")(ids_of(1, 129))


def test_additive_form() -> None:
    torch.manual_seed(0)
    dpe = DynamicPositionalEncoding(16, max_len=32)
    x, pos_ids = torch.randn(2, 40, 16), torch.arange(40).expand(2, 40)
    out = dpe(x, pos_ids)
    assert out.shape == x.shape
    # Sinusoids continue beyond max_len.
    assert not torch.equal(out[:, 38] - x[:, 38], out[:, 39] - x[:, 39])
    out.square().sum().backward()
    assert all(parameter.grad.any() for parameter in dpe.parameters())
    with pytest.raises(ConfigError, match="d_model=7"):
        DynamicPositionalEncoding(7)


@pytest.mark.parametrize("positions", [[0, -1], [0.0, 1.0], [True, False]])
def test_the_additive_form_refuses_what_is_no_position(positions):
    with pytest.raises(ConfigError, match="pos_ids"):
        DynamicPositionalEncoding(8)(torch.zeros(1, 2, 8), torch.tensor(positions))
