"""LSH attention as a function, and inside a small model: training, packed and padded rows, cache,
generation.
"""

from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention
from transformers import DynamicCache

from deepseek import DeepSeekModel, ModelConfig, sparse_attention
from deepseek.errors import ConfigError
from deepseek.kernels.lsh import tiles
from deepseek.model.attention.lsh import LshAttention, RandomHash
from deepseek.model.kv_cache import KVCache


def small_config(**changes: Any) -> ModelConfig:
    shape: dict[str, Any] = {
        "vocab_size": 97,
        "hidden_size": 64,
        "intermediate_size": 64,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 128,
        "initializer_range": 0.15,
        "attention": "lsh",
        "lsh_num_buckets": 6,
        "lsh_probes": 2,
        "lsh_bucket_window": 3,
        "lsh_local_window": 7,
        "lsh_sinks": 2,
        "lsh_exact_layers": [0],
    }
    return ModelConfig(**(shape | changes))


KINDS: dict[str, dict[str, Any]] = {
    "plain": {},
    "rounds": {"lsh_rounds": 2, "lsh_far_field": True},
    "dpe": {"positional_encoding": "dpe", "lsh_rounds": 2},
    "alibi": {"positional_encoding": "alibi"},
}


def small_model(kind: str, **changes: Any) -> DeepSeekModel:
    """Return a model whose score biases, if it has any, are about one nat."""
    torch.manual_seed(0)
    model = DeepSeekModel(small_config(**KINDS[kind], **changes)).eval()
    for name, parameter in model.named_parameters():
        if "score_bias" in name:
            parameter.data.add_(0.01 * torch.randn_like(parameter))
    return model


@pytest.fixture(scope="module")
def model() -> DeepSeekModel:
    return small_model("plain")


@pytest.fixture(scope="module", params=KINDS)
def each_model(request: pytest.FixtureRequest) -> DeepSeekModel:
    return small_model(request.param)


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in ("far_field", "decode"):
        monkeypatch.setattr(f"deepseek.kernels.lsh.{module}.BLOCK", 4)


def tensors(*shape: int, heads: int = 4, groups: int = 2) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    batch, length, width = shape
    sizes = (
        (batch, heads, length, width),
        (batch, groups, length, width),
        (batch, groups, length, width),
    )
    query, key, value = (torch.randn(size, generator=generator) for size in sizes)
    return query, key, value


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize(
    "windows", [{"num_buckets": 1, "bucket_window": 90}, {"local_window": 90}], ids=str
)
def test_looking_everywhere_is_exact_attention(causal: bool, windows: dict[str, int]) -> None:
    query, key, value = tensors(2, 90, 16)
    exact = scaled_dot_product_attention(query, key, value, is_causal=causal, enable_gqa=True)
    out = sparse_attention(query, key, value, causal=causal, exact_tokens=0, **windows)
    torch.testing.assert_close(out, exact, atol=1e-5, rtol=0)


@pytest.mark.parametrize("causal", [True, False])
def test_heads_and_batch_may_be_left_out(causal: bool) -> None:
    options: dict[str, Any] = {
        "num_buckets": 8,
        "causal": causal,
        "local_window": 10,
        "bucket_window": 5,
    }
    options |= {"num_rounds": 2, "exact_tokens": 0}
    query, key, value = tensors(3, 80, 32, heads=1, groups=1)
    whole = sparse_attention(query, key, value, **options)
    assert whole.shape == query.shape
    assert torch.equal(
        whole[:, 0], sparse_attention(query[:, 0], key[:, 0], value[:, 0], **options)
    )
    first = sparse_attention(query[0, 0], key[0, 0], value[0, 0], **options)
    torch.testing.assert_close(whole[0, 0], first, atol=1e-6, rtol=0)


def test_the_start_of_a_text_is_attended_exactly_whatever_follows() -> None:
    query, key, value = tensors(2, 120, 16)
    options: dict[str, Any] = {"num_buckets": 8, "local_window": 6, "bucket_window": 4, "seed": 1}
    exact = scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=True)
    assert torch.equal(sparse_attention(query, key, value, **options), exact)
    out = sparse_attention(query, key, value, exact_tokens=50, **options)
    torch.testing.assert_close(out[:, :, :50], exact[:, :, :50], atol=1e-5, rtol=0)
    sparse = sparse_attention(query, key, value, exact_tokens=0, **options)
    torch.testing.assert_close(out[:, :, 50:], sparse[:, :, 50:], atol=1e-5, rtol=0)
    # The same from the kernel, which is used instead of torch's with masks or past keys.
    documents = torch.zeros(2, 120, dtype=torch.long)
    packed = sparse_attention(query, key, value, exact_tokens=50, document_ids=documents, **options)
    torch.testing.assert_close(packed, out, atol=1e-5, rtol=0)
    last = sparse_attention(query[:, :, 30:], key, value, exact_tokens=50, **options)
    torch.testing.assert_close(last, out[:, :, 30:], atol=1e-5, rtol=0)


def test_without_causality_a_query_also_looks_ahead() -> None:
    query, key, value = tensors(1, 60, 16)
    options = {"num_buckets": 4, "probes": 2, "local_window": 5, "bucket_window": 6}
    ahead = sparse_attention(
        query.flip(2), key.flip(2), value.flip(2), causal=False, sinks=0, **options
    ).flip(2)
    torch.testing.assert_close(
        sparse_attention(query, key, value, causal=False, sinks=0, **options), ahead
    )


def test_any_hash_may_name_the_buckets() -> None:
    class Parity:
        """Two buckets, by parity of the position; a query probes its own position's."""

        def key_codes(self, key_BGSK: Tensor) -> Tensor:
            return torch.arange(key_BGSK.shape[2]).remainder(2).expand(key_BGSK.shape[:3])

        def query_codes(self, query_BHTK: Tensor, probes: int) -> Tensor:
            return self.key_codes(query_BHTK)[..., None]

    query, key, value = tensors(1, 40, 16)
    out = sparse_attention(
        query,
        key,
        value,
        num_buckets=2,
        local_window=1,
        bucket_window=40,
        sinks=0,
        probes=1,
        hash=Parity(),
        exact_tokens=0,
    )
    distance = torch.arange(40)[:, None] - torch.arange(40)
    expected = scaled_dot_product_attention(
        query, key, value, attn_mask=(distance >= 0) & (distance % 2 == 0), enable_gqa=True
    )
    torch.testing.assert_close(out, expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"key": (1, 3, 40, 16)}, "do not fit each other"),
        ({"query": (1, 4, 41, 16)}, "a key for every query"),
        ({"causal": False, "query": (1, 4, 30, 16)}, "a key for every query"),
        ({"query": (1, 1, 4, 40, 16)}, "2 or 3 or 4 dimensions"),
        ({"num_buckets": 0}, "num_buckets=0 must be"),
        ({"num_rounds": 0}, "num_rounds=0 must be"),
        ({"far_field": True, "exact_tokens": 5}, "exact_tokens=5 contradicts"),
    ],
    ids=str,
)
def test_a_contradiction_is_a_clear_error(change: dict[str, Any], told: str) -> None:
    query, key, value = tensors(1, 40, 16)
    given = {"query": query, "key": key, "value": value}
    given |= {
        name: torch.zeros(value) if isinstance(value, tuple) else value
        for name, value in change.items()
    }
    with pytest.raises(ConfigError, match=told):
        sparse_attention(**given)


@settings(max_examples=10, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(cuts=st.lists(st.integers(1, 47), max_size=30), seed=st.integers(0, 1000))
def test_cached_steps_equal_one_forward(
    each_model: DeepSeekModel, cuts: list[int], seed: int
) -> None:
    model = each_model
    ids = torch.randint(0, 97, (2, 48), generator=torch.Generator().manual_seed(seed))
    mask = torch.ones(2, 48, dtype=torch.long)
    mask[1, : seed % 12] = 0
    cache = KVCache()
    with torch.no_grad():
        parts = [
            model(ids[:, a:b], attention_mask=mask[:, :b], cache=cache).logits
            for a, b in pairwise([0, *sorted(set(cuts)), 48])
        ]
        whole = model(ids, attention_mask=mask).logits
    real = mask.bool()
    torch.testing.assert_close(torch.cat(parts, dim=1)[real], whole[real], atol=1e-4, rtol=0)


@torch.no_grad()
@pytest.mark.parametrize(
    "kind", [kind for kind in KINDS if kind != "rounds"]
)  # with several rounds, blocks start at fixed slots of a row
def test_padding_and_packing_change_nothing(kind: str) -> None:
    model = small_model(kind)
    ids = torch.randint(0, 97, (1, 60))
    padded = torch.cat((torch.zeros(1, 9, dtype=torch.long), ids), 1)
    mask = (torch.arange(69) >= 9).long()[None]
    torch.testing.assert_close(
        model(padded, attention_mask=mask).logits[:, 9:], model(ids).logits, atol=1e-4, rtol=0
    )
    positions = torch.cat((torch.arange(35), torch.arange(25)))[None]
    packed = model(ids, position_ids=positions).logits
    torch.testing.assert_close(packed[:, :35], model(ids[:, :35]).logits, atol=1e-4, rtol=0)
    torch.testing.assert_close(packed[:, 35:], model(ids[:, 35:]).logits, atol=1e-4, rtol=0)
    mask = torch.ones_like(ids)
    mask[:, 30:35] = mask[:, 50:] = 0
    padded = model(ids, attention_mask=mask, position_ids=positions).logits
    torch.testing.assert_close(padded[:, :30], model(ids[:, :30]).logits, atol=1e-4, rtol=0)
    torch.testing.assert_close(padded[:, 35:50], model(ids[:, 35:50]).logits, atol=1e-4, rtol=0)


@torch.no_grad()
def test_later_tokens_never_change_earlier_ones(each_model: DeepSeekModel) -> None:
    model = each_model
    ids = torch.randint(0, 97, (1, 60))
    changed = ids.clone()
    changed[:, 30:] = (changed[:, 30:] + 1) % 97
    torch.testing.assert_close(
        model(ids).logits[:, :30], model(changed).logits[:, :30], atol=1e-5, rtol=0
    )


@torch.no_grad()
def test_generation_with_and_without_cache(each_model: DeepSeekModel) -> None:
    model = each_model
    ids = torch.randint(0, 97, (2, 20))
    mask = torch.ones_like(ids)
    mask[0, :5] = 0
    options: dict[str, Any] = {
        "attention_mask": mask,
        "max_new_tokens": 12,
        "do_sample": False,
        "pad_token_id": 0,
    }
    for beams in (1, 3):
        cached = model.generate(ids, num_beams=beams, **options)
        assert torch.equal(cached, model.generate(ids, num_beams=beams, use_cache=False, **options))


@torch.no_grad()
def test_the_cache_can_be_cut_back_and_changed_row_by_row(each_model: DeepSeekModel) -> None:
    model = each_model
    ids = torch.randint(0, 97, (2, 30))
    cache, longer = KVCache(), torch.cat((ids, torch.randint(0, 97, (2, 3))), 1)
    model(longer, cache=cache)
    cache.crop(-3)
    cache.batch_repeat_interleave(2)
    cache.batch_select_indices(torch.tensor([3, 0]))
    cache.reorder_cache(torch.tensor([1, 0]))
    token = torch.tensor([[5], [6]])
    torch.testing.assert_close(
        model(token, cache=cache).logits,
        model(torch.cat((ids, token), 1)).logits[:, -1:],
        atol=1e-4,
        rtol=0,
    )


@pytest.mark.parametrize("kind", KINDS)
def test_every_weight_learns_and_checkpointing_changes_nothing(kind: str) -> None:
    model = small_model(kind).train()
    ids = torch.randint(0, 97, (2, 40))
    model(ids, labels=ids).loss.backward()
    grads = {name: part.grad.clone() for name, part in model.named_parameters()}
    assert all(grad.any() for grad in grads.values())
    model.zero_grad()
    model.activation_checkpointing_enable()
    model(ids, labels=ids).loss.backward()
    for name, part in model.named_parameters():
        torch.testing.assert_close(part.grad, grads[name], msg=name)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("head_dim", [16, 20])  # the kernels take multiples of 16
@pytest.mark.parametrize("compiled", [False, True])
def test_every_weight_learns_under_autocast(
    kind: str, head_dim: int, compiled: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not compiled:
        monkeypatch.setattr("deepseek.kernels.lsh.attention._kernels", lambda _: tiles)
    model = small_model(kind, head_dim=head_dim).train()
    ids = torch.randint(0, 97, (2, 40))
    exact = model(ids, labels=ids).loss
    exact.backward()
    grads = {name: part.grad for name, part in model.named_parameters()}
    model.zero_grad()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = model(ids, labels=ids).loss
    loss.backward()
    torch.testing.assert_close(loss, exact, atol=0.05, rtol=0)
    found, right = (
        torch.cat([part.flatten() for part in some])
        for some in ([part.grad for part in model.parameters()], list(grads.values()))
    )
    assert torch.cosine_similarity(found, right, dim=0) > 0.9


@torch.no_grad()
def test_where_all_layers_are_exact_it_is_the_full_model(
    model: DeepSeekModel, tmp_path: Path
) -> None:
    model.save_pretrained(tmp_path)
    ids = torch.randint(0, 97, (2, 40))
    again = DeepSeekModel.from_pretrained(tmp_path, dtype=torch.float32)
    assert torch.equal(again(ids).logits, model(ids).logits)
    full = DeepSeekModel.from_pretrained(
        tmp_path, config=ModelConfig(attention="full"), dtype=torch.float32
    )
    exact = DeepSeekModel.from_pretrained(
        tmp_path, config=ModelConfig(lsh_exact_layers=[0, 1, 2]), dtype=torch.float32
    )
    assert torch.equal(full(ids).logits, exact(ids).logits)
    assert not torch.allclose(full(ids).logits, model(ids).logits, atol=1e-3)


@torch.no_grad()
def test_dynamic_positions_at_their_start_change_nothing(model: DeepSeekModel) -> None:
    ids = torch.randint(0, 97, (2, 60))
    dynamic = DeepSeekModel(small_config(positional_encoding="dpe")).eval()
    dynamic.load_state_dict(model.state_dict(), strict=False)
    assert torch.equal(dynamic(ids).logits, model(ids).logits)
    with torch.enable_grad():  # on the training path
        torch.testing.assert_close(dynamic(ids).logits, model(ids).logits, atol=1e-5, rtol=0)


def test_a_long_cache_is_decoded_under_autocast(model: DeepSeekModel) -> None:
    """The scores have autocast's dtype, the query has not."""
    ids = torch.arange(1, 91)[None] % 97
    with torch.no_grad():
        cache = model(ids[:, :-1], use_cache=True).past_key_values
        with torch.autocast("cpu", dtype=torch.bfloat16):
            logits = model(ids[:, -1:], past_key_values=cache).logits
    exact = model(ids).logits[:, -1:]
    torch.testing.assert_close(logits.float(), exact, atol=0.1, rtol=0.1)


@pytest.mark.parametrize("length", [5, 40, 90])
@pytest.mark.parametrize("dials", [{}, {"far_field": True}, {"causal": False}], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_autocast_changes_no_dtype_and_no_bit(
    length: int, dials: dict[str, Any], dtype: torch.dtype
) -> None:
    query, key, value = (part.to(dtype) for part in tensors(1, length, 16))
    exact = {} if dials else {"exact_tokens": 40}
    out = sparse_attention(query, key, value, local_window=8, **exact, **dials)
    with torch.autocast("cpu", torch.bfloat16):
        mixed = sparse_attention(query, key, value, local_window=8, **exact, **dials)
    assert mixed.dtype == dtype
    assert torch.equal(mixed, out)


def test_layers_are_exact_where_the_config_says_so() -> None:
    layers = DeepSeekModel(small_config(lsh_exact_layers=None)).layers
    assert [block.attention.exact for block in layers] == [True, True, False]
    assert isinstance(layers[2].attention, LshAttention)
    assert isinstance(layers[2].attention.hash, RandomHash)


def test_what_does_not_go_together_is_told(model: DeepSeekModel) -> None:
    with pytest.raises(ConfigError, match="sliding_window=8 contradicts attention='lsh'"):
        small_config(sliding_window=8)
    with pytest.raises(ConfigError, match="lsh_rounds=0 must be a whole number from 1"):
        small_config(lsh_rounds=0)
    with pytest.raises(ConfigError, match="lsh_probes=0 must be a whole number from 1"):
        small_config(lsh_probes=0)
    with pytest.raises(ConfigError, match=r"LSH attention needs deepseek.model.KVCache"):
        model(torch.randint(0, 97, (1, 20)), cache=DynamicCache())
