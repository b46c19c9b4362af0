"""Every implementation of LSH attention agrees with the dense mask and is causal."""

from dataclasses import dataclass, field, replace
from functools import partial
from itertools import product
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from deepseek.kernels.bias.distance import NUM_BUCKETS, distance_buckets
from deepseek.kernels.bias.score_bias import ScoreBias, Visible, reference_attention
from deepseek.kernels.lsh import far_field, strips, tiles
from deepseek.kernels.lsh.attention import likeliest, lsh_attention
from deepseek.kernels.lsh.decode import BucketCache
from deepseek.kernels.lsh.intervals import Windows, document_starts, find_intervals
from deepseek.kernels.lsh.reference import candidate_mask, masked_attention
from deepseek.kernels.numba import amx

BUCKETS, HEADS, GROUPS, WIDTH = 6, 6, 2, 16


@dataclass
class Problem:
    query: Tensor
    key: Tensor
    value: Tensor
    query_codes: Tensor
    key_codes: Tensor
    options: dict[str, Any] = field(default_factory=dict)
    bias: tuple[Tensor, ...] = ()

    @property
    def rounds(self) -> int:
        return self.key_codes.shape[1] // self.key.shape[1]

    def inputs(self, dtype: torch.dtype = torch.float32) -> list[Tensor]:
        """Queries, keys, values, and the table, terms (always fp64) and factors of any bias."""
        parts = (self.query, self.key, self.value, *self.bias)
        keeps = (part.dtype == torch.float64 for part in parts)
        return [
            part.detach().to(part.dtype if keep else dtype).requires_grad_()
            for part, keep in zip(parts, keeps, strict=True)
        ]

    def fast(self, query: Tensor, key: Tensor, value: Tensor, *bias: Tensor) -> Tensor:
        return lsh_attention(
            query,
            key,
            value,
            self.query_codes,
            self.key_codes,
            num_buckets=BUCKETS,
            bias=ScoreBias(*bias) if bias else None,
            **self.options,
        )

    def slow(self, query: Tensor, key: Tensor, value: Tensor, *bias: Tensor) -> Tensor:
        if not bias:
            return masked_attention(query, key, value, self.mask())
        table, term, scale = (part.to(query.dtype) for part in bias)
        length, total = query.shape[2], key.shape[2]
        real = self.options.get("key_mask_BS", torch.ones(len(query), total, dtype=torch.bool))
        rank = real.cumsum(-1)
        bucket = distance_buckets(rank[:, -length:, None] - rank[:, None])[:, None].expand(
            -1, HEADS, -1, -1
        )
        added = table.gather(-1, bucket) + term[:, :, None]
        return masked_attention(query * scale[..., None], key, value, self.mask(), added_BHTS=added)

    def mask(self) -> Tensor:
        return candidate_mask(self.query_codes, self.key_codes, rounds=self.rounds, **self.options)

    def windows(self) -> Windows:
        return Windows(
            self.options["local_window"],
            self.options["sinks"],
            self.options["bucket_window"],
            BUCKETS,
            self.rounds,
            exact=self.options["exact_tokens"],
        )


def problem(
    seed: int,
    total: int,
    length: int,
    packed: bool,
    padded: bool,
    rounds: int = 1,
    biased: bool = False,
    **windows: int,
) -> Problem:
    generator = torch.Generator().manual_seed(seed)
    batch, probes = 2, 3

    def normal(heads: int, size: int) -> Tensor:
        return torch.randn(batch, heads, size, WIDTH, generator=generator)

    options: dict[str, Any] = {"local_window": 9, "sinks": 2, "bucket_window": 5}
    options |= {"exact_tokens": 0} | windows
    if packed:
        options["document_ids_BS"] = (torch.rand(batch, total, generator=generator) < 0.05).cumsum(
            -1
        )
    if padded:
        options["key_mask_BS"] = torch.rand(batch, total, generator=generator) < 0.8
    # Buckets of very different sizes, some empty, some never probed.
    popularity = torch.rand(BUCKETS, generator=generator) ** 3
    key_codes = torch.multinomial(
        popularity, batch * GROUPS * rounds * total, True, generator=generator
    )
    query_codes = (
        torch.rand(batch, HEADS, length, rounds, BUCKETS, generator=generator) + popularity
    ).argsort(-1)
    parts = normal(HEADS, length), normal(GROUPS, total), normal(GROUPS, total)
    terms = torch.rand(batch, HEADS, total, generator=generator, dtype=torch.float64).cumsum(-1)
    table = torch.randn(batch, HEADS, length, NUM_BUCKETS, generator=generator)
    bias = (table, terms, 1 + torch.rand(batch, HEADS, length, generator=generator))
    return Problem(
        *parts,
        query_codes[..., :probes].flatten(-2),
        key_codes.view(batch, -1, total),
        options,
        bias if biased else (),
    )


def problems(most: int = 120) -> st.SearchStrategy[Problem]:
    def build(total: int, part: float, **rest: Any) -> Problem:
        return problem(total=total, length=max(1, round(part * total)), **rest)

    windows = {
        "local_window": st.integers(1, 40),
        "sinks": st.integers(0, 5),
        "bucket_window": st.integers(1, 30),
        "exact_tokens": st.sampled_from([0, 0, 1, 20]),
    }
    return st.builds(
        build,
        seed=st.integers(0, 10**6),
        total=st.integers(1, most),
        part=st.sampled_from([1.0, 1.0, 0.4, 0.0]),
        packed=st.booleans(),
        padded=st.booleans(),
        rounds=st.integers(1, 3),
        biased=st.booleans(),
        **windows,
    )


def outcome(way: Any, inputs: list[Tensor]) -> list[Tensor]:
    """Output and gradients of queries, keys and values for a fixed random loss."""
    out = way(*inputs)
    loss = (out.float() * torch.linspace(-1, 1, out.numel()).view_as(out)).sum()
    return [out.detach(), *torch.autograd.grad(loss, inputs)]


@pytest.fixture(params=["strips", "tiles"])
def way(request, monkeypatch):
    """Run a test with the compiled kernels, and with torch's operators as without Numba."""
    if request.param == "tiles":
        monkeypatch.setattr("deepseek.kernels.numba.openmp.runtime", lambda: None)
        monkeypatch.setattr(tiles, "SPAN", 16)
        monkeypatch.setattr(tiles, "QUERIES", 8)
        monkeypatch.setattr(tiles, "SLAB", 1 << 12)
    return request.param


def assert_close(some: list[Tensor], others: list[Tensor], tolerance: float = 1e-5) -> None:
    for one, other in zip(some, others, strict=True):
        torch.testing.assert_close(one.double(), other.double(), atol=tolerance, rtol=tolerance)


@pytest.mark.usefixtures("way")
def test_outputs_and_gradients_are_those_of_the_dense_mask():
    @settings(max_examples=40)
    @given(case=problems())
    def check(case: Problem) -> None:
        assert_close(
            outcome(case.fast, case.inputs()), outcome(case.slow, case.inputs(torch.float64))
        )

    check()


@pytest.mark.usefixtures("way")
@pytest.mark.parametrize("length", [1100, 3])
def test_units_of_work_meet_without_a_seam(length):
    case = problem(
        0,
        1100,
        length,
        packed=True,
        padded=True,
        rounds=2,
        biased=True,
        local_window=40,
        bucket_window=30,
    )
    assert_close(outcome(case.fast, case.inputs()), outcome(case.slow, case.inputs(torch.float64)))


@pytest.mark.usefixtures("way")
@pytest.mark.parametrize("biased", [False, True])
def test_one_bucket_or_a_short_sequence_is_exact_attention(biased):
    for windows in ({"bucket_window": 100}, {"local_window": 100}):
        case = problem(1, 90, 90, packed=False, padded=False, biased=biased, **windows)
        case.query_codes, case.key_codes = (
            torch.zeros_like(case.query_codes[..., :1]),
            torch.zeros_like(case.key_codes),
        )

        def exact(query: Tensor, key: Tensor, value: Tensor, *bias: Tensor) -> Tensor:
            if bias:
                visible = Visible(torch.zeros(1, 90, dtype=torch.long))
                return reference_attention(query, key, value, ScoreBias(*bias), visible)
            return scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=True)

        assert_close(outcome(case.fast, case.inputs()), outcome(exact, case.inputs()))


def test_gradients_match_finite_differences():
    case = problem(
        2, 7, 5, packed=True, padded=True, rounds=2, biased=True, local_window=3, bucket_window=2
    )
    case.query, case.query_codes = case.query[:1, :2, :, :3], case.query_codes[:1, :2]
    case.key, case.value, case.key_codes = (
        case.key[:1, :1, :, :3],
        case.value[:1, :1, :, :3],
        case.key_codes[:1, :2],
    )
    case.bias = tuple(part[:1, :2] for part in case.bias)
    case.options |= {
        name: part[:1] for name, part in case.options.items() if isinstance(part, Tensor)
    }
    assert torch.autograd.gradcheck(case.fast, case.inputs(torch.float64), fast_mode=True)


@settings(max_examples=1000)
@given(case=problems(), cut=st.floats(0, 1), seed=st.integers(0, 10**6))
def test_nothing_depends_on_later_tokens_to_the_last_bit(case: Problem, cut: float, seed: int):
    total, length = case.key.shape[2], case.query.shape[2]
    other = problem(
        seed, total, length, packed=False, padded=False, rounds=case.rounds, biased=True
    )
    first = round(cut * length)
    dtype = torch.bfloat16 if seed % 2 else torch.float32
    before = case.fast(*case.inputs(dtype))
    names = ("query", "query_codes", "key", "value", "key_codes")
    pairs = [(getattr(case, name), getattr(other, name)) for name in names]
    for mine, new in [*pairs, *zip(case.bias, other.bias, strict=False)]:
        mine[:, :, mine.shape[2] - length + first :] = new[:, :, mine.shape[2] - length + first :]
    after = case.fast(*case.inputs(dtype))
    assert torch.equal(before[:, :, :first], after[:, :, :first])


@given(case=problems())
def test_scanning_finds_the_intervals_that_searching_finds(case: Problem):
    first = document_starts(case.options.get("document_ids_BS"))
    buckets = BucketCache(case.windows())
    buckets.append(case.key_codes, case.options.get("key_mask_BS"), first)
    arguments = (case.query_codes, buckets.codes_BJS, first, case.windows())
    scanned = find_intervals(*arguments)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("deepseek.kernels.numba.openmp.runtime", lambda: None)
        searched = find_intervals(*arguments)
    filled = searched.stop_BHTI > searched.start_BHTI
    assert torch.equal(scanned.stop_BHTI > scanned.start_BHTI, filled)
    for name in ("start_BHTI", "stop_BHTI"):
        assert torch.equal(getattr(scanned, name)[filled], getattr(searched, name)[filled])


@given(case=problems(), cut=st.floats(0, 1))
def test_candidates_of_a_prefix_are_those_in_the_whole(case: Problem, cut: float):
    missing = case.query.shape[2] - max(1, round(cut * case.query.shape[2]))
    total, length = case.key.shape[2] - missing, case.query.shape[2] - missing
    options = {
        name: part[:, :total] if isinstance(part, Tensor) else part
        for name, part in case.options.items()
    }
    prefix = candidate_mask(
        case.query_codes[:, :, :length], case.key_codes[:, :, :total], rounds=case.rounds, **options
    )
    assert torch.equal(prefix, case.mask()[:, :, :length, :total])


@settings(max_examples=30)
@given(case=problems(60), start=st.integers(0, 60))
def test_decoding_looks_at_the_same_keys_and_computes_the_same(case: Problem, start: int):
    if "document_ids_BS" in case.options or case.query.shape[2] != case.key.shape[2]:
        case = problem(
            start, 50, 50, packed=False, padded=True, rounds=case.rounds, biased=bool(case.bias)
        )
    whole, mask = case.fast(case.query, case.key, case.value, *case.bias), case.mask()
    real = case.options.get("key_mask_BS", torch.ones(case.key_codes[:, 0].shape, dtype=torch.bool))
    buckets, total = BucketCache(case.windows()), case.key.shape[2]
    if 0 < start < total:
        buckets.append(case.key_codes[:, :, :start], real[:, :start])
    for t in range(start, total):
        one = slice(t, t + 1)
        buckets.append(case.key_codes[:, :, one], real[:, one])
        position, valid = buckets.candidates(case.query_codes[:, :, one])
        found = torch.zeros(mask.shape[0], GROUPS, HEADS // GROUPS, total + 1, dtype=torch.bool)
        seen = torch.where(valid, position, total).unflatten(2, (HEADS // GROUPS, -1)).flatten(3)
        assert all(
            len(set(row)) == len(row)
            for row in (seen + (seen == total) * torch.arange(seen.shape[-1]))
            .flatten(0, 2)
            .tolist()
        )
        found = found.scatter_(3, seen, True).flatten(1, 2)[..., :total]
        found[..., max(0, t + 1 - buckets.windows.local) : t + 1] |= real[
            :, None, max(0, t + 1 - buckets.windows.local) : t + 1
        ]
        assert torch.equal(found[real[:, t]], mask[:, :, t][real[:, t]])
        out = buckets.attend(
            case.query[:, :, one],
            case.key[:, :, : t + 1],
            case.value[:, :, : t + 1],
            case.query_codes[:, :, one],
            bias=ScoreBias(
                case.bias[0][:, :, one], case.bias[1][..., : t + 1], case.bias[2][..., one]
            )
            if case.bias
            else None,
        )
        torch.testing.assert_close(
            out[real[:, t]], whole[:, :, one][real[:, t]], atol=1e-5, rtol=1e-5
        )


def test_the_cache_of_buckets_follows_its_sequences():
    case = problem(3, 60, 60, packed=False, padded=True, rounds=2)
    real, picked = case.options["key_mask_BS"], torch.tensor([1, 1, 0])
    buckets, expected = BucketCache(case.windows()), BucketCache(case.windows())
    buckets.append(case.key_codes[:, :, :50], real[:, :50])
    buckets.candidates(case.query_codes[:, :, 49:50])
    buckets.crop(40)
    buckets.append(case.key_codes[:, :, 40:41], real[:, 40:41])
    buckets.change_rows(lambda part: part[picked])
    expected.append(case.key_codes[picked][:, :, :41], real[picked][:, :41])
    for t in range(41, 60):
        for one in (buckets, expected):
            one.append(case.key_codes[picked][:, :, t : t + 1], real[picked][:, t : t + 1])
        query = (
            case.query[picked][:, :, t : t + 1],
            case.key[picked][:, :, : t + 1],
            case.value[picked][:, :, : t + 1],
        )
        codes = case.query_codes[picked][:, :, t : t + 1]
        assert torch.equal(
            buckets.attend(*query, codes, 0.25), expected.attend(*query, codes, 0.25)
        )


@pytest.mark.usefixtures("way")
def test_padding_gives_zeros_and_gets_no_gradient():
    case = problem(4, 50, 50, packed=False, padded=True, biased=True)
    idle = ~case.options["key_mask_BS"]
    case.key[idle[:, None].expand(-1, GROUPS, -1)] = 1e4
    out, *grads = outcome(case.fast, case.inputs())
    for part in (out, *grads):
        assert torch.isfinite(part).all()
        assert not part.transpose(1, 2)[idle].any()


@pytest.mark.usefixtures("way")
def test_values_in_16_bits_are_those_values_in_fp32_also_under_autocast():
    @settings(max_examples=20)
    @given(case=problems())
    def check(case: Problem) -> None:
        inputs = case.inputs()
        rounded = [part.detach().bfloat16() if n == 2 else part for n, part in enumerate(inputs)]
        mixed = [part.detach().requires_grad_() for part in rounded]
        wide = [part.detach().to(whole.dtype) for part, whole in zip(mixed, inputs, strict=True)]
        expected = outcome(case.fast, [part.requires_grad_() for part in wide])
        with torch.autocast("cpu", torch.bfloat16):
            found = outcome(case.fast, mixed)
        assert found[0].dtype == torch.float32 and found[3].dtype == torch.bfloat16
        expected[3] = expected[3].bfloat16()
        for one, other in zip(found, expected, strict=True):
            assert torch.equal(one, other)

    check()


@pytest.fixture(params=["tiles of AMX", "vectors", "tiles in torch"])
def bf16_way(request, monkeypatch):
    """Run a test in bf16 with the compiled kernels' two kinds of products, and with torch."""
    if request.param == "tiles in torch":
        monkeypatch.setattr("deepseek.kernels.numba.openmp.runtime", lambda: None)
    elif request.param == "vectors":
        monkeypatch.setattr("deepseek.kernels.numba.amx.available", lambda: False)
    elif not amx.available():
        pytest.skip("this processor has no AMX")
    monkeypatch.setattr(strips, "multiplies_fast", lambda: True)


def relative_errors(results: list[Tensor], exact: list[Tensor]) -> list[float]:
    """Root mean square errors, relative to one plus the root mean square."""
    return [
        float((one - other).double().norm() / (other.double().norm() + other.numel() ** 0.5))
        for one, other in zip(results, exact, strict=True)
    ]


@pytest.mark.usefixtures("bf16_way")
def test_bfloat16_is_as_exact_as_bfloat16_can_be():
    @settings(max_examples=40)
    @given(case=problems())
    def check(case: Problem) -> None:
        inputs = case.inputs(torch.bfloat16)
        exact = [part.detach().double().requires_grad_() for part in inputs]
        results = outcome(case.fast, inputs)
        kept = (part.dtype == torch.float64 for part in inputs)
        for one, keeps in zip(results[1:], kept, strict=True):
            assert one.dtype == (torch.float64 if keeps else torch.bfloat16)
        # Half a unit of bf16's last place is 0.002; a gradient accumulates several roundings.
        assert max(relative_errors(results, outcome(case.slow, exact))) < 0.01

    check()


@pytest.mark.usefixtures("bf16_way")
@pytest.mark.parametrize("length", [600, 3])
def test_units_of_work_meet_without_a_seam_in_bf16(length):
    windows = {"local_window": 40, "bucket_window": 30}
    case = problem(0, 600, length, True, True, rounds=2, biased=True, **windows)
    inputs = case.inputs(torch.bfloat16)
    exact = [part.detach().double().requires_grad_() for part in inputs]
    errors = relative_errors(outcome(case.fast, inputs), outcome(case.slow, exact))
    assert max(errors) < 0.01


@pytest.mark.parametrize("threads", [2, 3])
def test_any_number_of_threads_computes_the_same(threads):
    case = problem(6, 2100, 2100, packed=False, padded=False, biased=True)
    expected, before = outcome(case.fast, case.inputs()), torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        results = outcome(case.fast, case.inputs())
    finally:
        torch.set_num_threads(before)
    assert torch.equal(results[0], expected[0])
    assert_close(results, expected)


def test_documents_are_runs_of_equal_ids():
    starts = document_starts(torch.tensor([[7, 7, 3, 3, 3, 7], [1, 1, 1, 1, 1, 1]]))
    assert starts is not None
    assert starts.tolist() == [[0, 0, 2, 2, 2, 5], [0] * 6]


def far_field_oracle(case: Problem, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Attention over candidates and summaries, written down query by query."""
    mask, (length, total) = case.mask(), (query.shape[2], key.shape[2])
    real = case.options.get("key_mask_BS", torch.ones(len(query), total, dtype=torch.bool))
    starts = document_starts(case.options.get("document_ids_BS", torch.zeros(len(query), total)))
    assert starts is not None
    out = torch.zeros_like(query)
    for b, h, t in product(range(len(query)), range(HEADS), range(length)):
        i, g = total - length + t, h * GROUPS // HEADS
        blocks = torch.tensor([max(0, i + 1 - case.options["local_window"]) // far_field.BLOCK])
        keys, values = list(key[b, g][mask[b, h, t]]), list(value[b, g][mask[b, h, t]])
        weights = [1.0] * len(keys)
        for first, last in torch.stack(far_field.edges(blocks, int(blocks)), -1)[0].tolist():
            block = slice(first * far_field.BLOCK, last * far_field.BLOCK)
            if real[b, block].any() and real[b, i] and block.start >= starts[b, i]:
                keys.append(key[b, g, block][real[b, block]].mean(0))
                values.append(value[b, g, block][real[b, block]].mean(0))
                weights.append(float(real[b, block].sum()))
        if keys:
            scores = torch.stack(keys) @ query[b, h, t] * WIDTH**-0.5 + torch.tensor(weights).log()
            out[b, h, t] = scores.softmax(-1) @ torch.stack(values)
    return out


@pytest.fixture
def small_blocks(monkeypatch):
    monkeypatch.setattr(far_field, "BLOCK", 4)
    monkeypatch.setattr("deepseek.kernels.lsh.decode.BLOCK", 4)


@pytest.mark.usefixtures("way", "small_blocks")
@pytest.mark.parametrize(
    ("length", "packed", "padded"), [(60, False, False), (60, True, True), (13, False, True)]
)
def test_the_far_field_is_what_it_says(length, packed, padded):
    case = problem(7, 60, length, packed=packed, padded=padded, far_field=True, sinks=0)
    slow = Problem(
        **{
            name: getattr(case, name)
            for name in ("query", "key", "value", "query_codes", "key_codes")
        }
    )
    slow.options = {name: value for name, value in case.options.items() if name != "far_field"}
    way = partial(far_field_oracle, slow)
    assert_close(outcome(case.fast, case.inputs()), outcome(way, case.inputs(torch.float64)))


@pytest.mark.usefixtures("small_blocks")
def test_the_far_field_is_causal_and_the_same_in_decoding():
    case = problem(8, 80, 80, packed=False, padded=False, far_field=True)
    whole = case.fast(case.query, case.key, case.value)
    buckets, turned = BucketCache(replace(case.windows(), far_field=True)), False
    for t in [*range(50), *range(40, 80)]:
        one = slice(t, t + 1)
        if t < buckets.length:
            buckets.crop(t)
            buckets.change_rows(lambda part: part.flip(0))
            turned = True
        parts = (
            case.key_codes[:, :, one],
            case.query[:, :, one],
            case.key[:, :, : t + 1],
            case.value[:, :, : t + 1],
            case.query_codes[:, :, one],
        )
        codes, *parts = (part.flip(0) for part in parts) if turned else parts
        buckets.append(codes)
        out = buckets.attend(*parts)
        torch.testing.assert_close(
            out.flip(0) if turned else out, whole[:, :, one], atol=1e-5, rtol=1e-5
        )
    for part in (case.query, case.key, case.value):
        part[:, :, 50:] = torch.randn_like(part[:, :, 50:])
    assert torch.equal(case.fast(case.query, case.key, case.value)[:, :, :50], whole[:, :, :50])


@given(
    rows=st.integers(1, 70),
    buckets=st.integers(1, 70),
    probes=st.integers(1, 40),
    seed=st.integers(0, 10**6),
)
def test_the_likeliest_buckets_are_those_that_sorting_finds(
    rows: int, buckets: int, probes: int, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    scores = torch.stack([torch.randperm(buckets, generator=generator).float()] * rows)
    scores = scores.roll(seed, -1) - buckets / 2
    probes = min(probes, buckets)
    best = scores.argsort(-1, descending=True)[..., :probes]
    assert torch.equal(likeliest(scores.view(1, rows, buckets), probes)[0], best)
