"""The compiled runner against the model itself: logits, batches, chunked prompts, stored prefixes,
experts.
"""

import tracemalloc

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from quantised_twin import quantised_twin
from tiny_mixtures import MIXTURES
from tiny_tokenizer import tiny_tokenizer

from deepseek.compiled.abi import PAGE, RECENT
from deepseek.compiled.page_shape import PageShape
from deepseek.compiled.runner import CompiledRunner, supports
from deepseek.compiled.state import CompiledState
from deepseek.compiled.weights import Sites
from deepseek.engine.engine import Engine
from deepseek.engine.prefix import PrefixCache
from deepseek.engine.request import Request
from deepseek.engine.sampler import Sampling
from deepseek.engine.scheduler import MAX_GUESSES
from deepseek.engine.sequence import Lookup
from deepseek.kernels.numba import amx
from deepseek.model.config import ModelConfig
from deepseek.model.experts import ExpertModule
from deepseek.model.experts.armed import ArmedExperts, Roster
from deepseek.model.layer_parts import layer_parts
from deepseek.model.positions.dynamic import DynamicBias
from deepseek.model.transformer import DeepSeekModel
from deepseek.packs.manifest import MOMENTS
from deepseek.runner import Chunk

SHAPE = {
    "vocab_size": 90,
    "hidden_size": 96,
    "intermediate_size": 100,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "max_position_embeddings": 256,
    "initializer_range": 0.1,
}
KINDS = {
    "llama": {},
    "mistral": {"sliding_window": 70, "tie_word_embeddings": False},
    "qwen2": {"attention_bias": True, "sliding_window": 30, "full_attention_layers": [0, 2]},
    "qwen3": {"qk_norm": "head", "head_dim": 128, "attention_output_bias": True},
    "olmoe": {"qk_norm": "width", "attention_bias": True, "clip_qkv": 1.5},
    "one head": {
        "qk_norm": "width",
        "clip_qkv": 1.0,
        "num_attention_heads": 1,
        "num_key_value_heads": 1,
    },
    "alibi": {"positional_encoding": "alibi", "sliding_window": 70},
    "none": {"positional_encoding": "none"},
    "dpe": {"positional_encoding": "dpe", "train_len": 128},
    "dpe, windows": {
        "positional_encoding": "dpe",
        "sliding_window": 30,
        "full_attention_layers": [1],
        "train_len": 64,
        "qk_norm": "head",
    },
    "gemma3": {
        "head_dim": 32,
        "hidden_act": "gelu_pytorch_tanh",
        "post_norms": True,
        "unit_offset_norms": True,
        "scale_embeddings": True,
        "qk_norm": "head",
        "query_pre_attn_scalar": 50,
        "sliding_window": 30,
        "full_attention_layers": [1],
        "local_rope_theta": 100.0,
    },
    "gemma2": {
        "vocab_size": 91,
        "attn_logit_softcapping": 1.0,
        "final_logit_softcapping": 2.0,
        "hidden_act": "gelu_pytorch_tanh",
        "post_norms": True,
        "sliding_window": 30,
        "full_attention_layers": [1],
    },
    "heads of 256": {"head_dim": 256, "num_attention_heads": 2, "num_key_value_heads": 1},
    "heads of 80, dpe": {"head_dim": 80, "positional_encoding": "dpe", "post_norms": True},
}
LSH = {
    "attention": "lsh",
    "lsh_num_buckets": 6,
    "lsh_probes": 2,
    "lsh_bucket_window": 7,
    "lsh_local_window": 20,
    "lsh_exact_layers": [0, 2],
    "lsh_rounds": 3,
}
RUN = {
    "dense": {},
    **MIXTURES,
    "dpe": KINDS["dpe"],
    "alibi": KINDS["alibi"],
    "gemma2": KINDS["gemma2"],
    "gemma3": KINDS["gemma3"],
    "lsh": LSH,
    "lsh, far field": LSH | {"lsh_far_field": True, "lsh_num_buckets": 1},
    "lsh, dpe": LSH | {"lsh_exact_layers": [], "lsh_sinks": 60} | KINDS["dpe"],
}
"""Models for every test of batches, chunks, prefixes and experts."""
IDS = [(7 * i * i + 3 * i) % 90 for i in range(100)]


def build(**changes) -> DeepSeekModel:
    torch.manual_seed(0)
    model = DeepSeekModel(ModelConfig(**SHAPE | changes)).eval()
    for name, parameter in model.named_parameters():
        if name.endswith((".bias", "norm.weight")):
            # Factors of norms are about 1.
            mean = float(name.endswith("weight") and not model.config.unit_offset_norms)
            torch.nn.init.normal_(parameter, mean, 0.2)
    for module in model.modules():
        if isinstance(module, DynamicBias):
            for parameter in (module.distance_HN, module.context_HMN, module.decay_H):
                torch.nn.init.normal_(parameter, std=0.01)
            torch.nn.init.normal_(module.length_scale_H, std=0.3)
    return model


@pytest.fixture(scope="module", params=RUN)
def model(request) -> DeepSeekModel:
    return build(**RUN[request.param])


@pytest.fixture(scope="module")
def runner(model) -> CompiledRunner:
    return CompiledRunner(model)


def logits(runner, armed=None, ids=IDS, pieces=(100,)):
    state, rows, start = runner.start(armed, 256), [], 0
    for size in pieces:
        rows.append(runner.forward([Chunk(state, ids[start : start + size], size)]).logits_RV)
        start += size
    return torch.cat(rows)


@pytest.mark.parametrize("part", ["distance_HN", "context_HMN", "decay_H", "length_scale_H"])
@torch.no_grad()
def test_each_part_of_the_dynamic_bias_counts(part):
    model = build(**KINDS["dpe"])
    before = quantised_twin(model)(torch.tensor([IDS])).logits[0]
    for layer in model.layers:
        getattr(layer.attention.score_bias, part).zero_()
    after = quantised_twin(model)(torch.tensor([IDS])).logits[0]
    got = logits(CompiledRunner(model))
    assert distance(got, after) < 0.03
    assert distance(got, before) > 2 * distance(got, after)


def distance(a, b) -> float:
    return float((a - b).norm() / b.norm())


def close(a, b, limit: float, model: DeepSeekModel) -> bool:
    """Whether logits agree. With quantised activations, a mixture may choose another native expert
    at a few tokens where two are close, and LSH attention another bucket.
    """
    buckets = model.config.lsh_num_buckets if model.config.attention == "lsh" else 1
    if not model.sparse_layers and buckets == 1:
        return distance(a, b) < limit
    return bool(((a - b).norm(dim=-1) / b.norm(dim=-1) < limit).float().mean() > 0.8)


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_logits_are_those_of_the_model_with_quantised_weights(kind):
    model = build(**KINDS[kind])
    assert supports(model)
    assert (
        distance(
            logits(CompiledRunner(model)), quantised_twin(model)(torch.tensor([IDS])).logits[0]
        )
        < 0.03
    )


def test_pieces_of_a_prompt_give_the_bits_of_the_whole(runner):
    whole = logits(runner)
    assert torch.equal(logits(runner, pieces=(1, 2, 61, 3, 33)), whole)
    assert torch.equal(logits(runner, pieces=(1,) * 100), whole)


@pytest.mark.skipif(not amx.available(), reason="this processor has no tiles")
def test_without_tiles_only_last_bits_differ(model, runner, monkeypatch):
    monkeypatch.setattr(amx, "available", lambda: False)
    plain = CompiledRunner(model)
    whole = logits(plain)
    assert close(whole, logits(runner), 0.02, model)
    assert torch.equal(logits(plain, pieces=(1, 2, 61, 3, 33)), whole)


def test_a_sequence_has_the_same_bits_in_any_batch(runner):
    whole, states = logits(runner), [runner.start(None, 256) for _ in range(5)]
    for i, state in enumerate(states[1:]):
        runner.forward([Chunk(state, IDS[i : i + 9 * i + 2])])
    for i in range(70):
        extra = [Chunk(state, [i], 0) for state in states[1 : 1 + i % 5]]
        output = runner.forward([*extra, Chunk(states[0], [IDS[i]])])
        assert torch.equal(output.logits_RV[0], whole[i])


@pytest.mark.parametrize("cuts", [(64,), (64, 96), (10, 20, 50), (40, 90)])
def test_a_stored_prefix_gives_the_same_bits(runner, cuts):
    source, state, start = runner.start(None, 256), runner.start(None, 256), 0
    for cut in cuts:
        output = runner.forward([Chunk(source, IDS[start:cut], store=[0])])
        state.extend(output.segments[0][0])
        start = cut
    # The source continues and must not affect the state that took its prefix.
    runner.forward([Chunk(source, [1] * 20)])
    rest = runner.forward([Chunk(state, IDS[start:], 100 - start)]).logits_RV
    assert torch.equal(rest, logits(runner)[start:])
    assert state.nbytes <= runner.state_bytes(256, None)


def experts(model, count: int) -> list[ExpertModule]:
    modules = []
    for seed in range(count):
        module = ExpertModule.beside(model.layers, f"e{seed}", [1, 2][seed % 2 :], 80, seed=seed)
        torch.manual_seed(seed)
        for layer in module.layers:
            torch.nn.init.normal_(module.at(layer).down_proj, std=0.3)
            module.set_gate(layer, torch.randn(97) * 0.3, moments=torch.randn(MOMENTS, 96) * 0.3)
        modules.append(module.requires_grad_(False))
    return modules


def test_a_stored_page_holds_no_other_page_in_memory():
    shape = PageShape(range(30), 3, 64)
    cache = PrefixCache()
    tracemalloc.start()
    try:
        for prompt in range(4):
            state = CompiledState(layer_parts(30, ()), [shape], None, 10 * PAGE)
            state.reserve(PAGE)
            state.advance(PAGE)
            cache.add(bytes([prompt]), state.segment(0, 0, None), 1 << 30)
            state.reserve(9 * PAGE)
            state.close()
        assert cache.nbytes >= 4 * shape.nbytes
        assert tracemalloc.get_traced_memory()[0] < 1.01 * cache.nbytes
        cache.shrink(2 * shape.nbytes + 1000)
        assert tracemalloc.get_traced_memory()[0] < 1.01 * cache.nbytes
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize(
    ("count", "most"), [(1, 5), (3, 2), (0, 0)], ids=["one", "three, two at a token", "forced"]
)
@torch.no_grad()
def test_experts_speak_as_in_the_model(model, runner, count, most):
    modules = tuple(experts(model, max(count, 1)))
    roster = Roster(modules, most if count else None)
    twin = quantised_twin(model)
    twin.experts.armed = lambda: ArmedExperts(roster)
    expected = twin(torch.tensor([IDS]))
    got = logits(runner, ArmedExperts(roster))
    base = logits(runner)
    fired = expected.experts.attribution()[0].sum(-1) > 0
    assert fired.sum() > 5
    assert distance(base[fired], expected.logits[0][fired]) > 0.1
    assert close(got, expected.logits[0], 0.05, model)
    assert torch.equal(logits(runner, ArmedExperts(roster), pieces=(30, 1, 69)), got)
    silent = expected.experts.attribution()[0].sum(-1).cumsum(0) == 0
    assert torch.equal(got[silent], base[silent])
    state = runner.start(ArmedExperts(roster), 256)
    named = runner.forward([Chunk(state, IDS, 100)]).experts
    best = expected.experts.attribution()[0]
    names = [expected.experts.names[int(row.argmax())] if row.max() > 0 else None for row in best]
    assert sum(a == b for a, b in zip(named, names, strict=True)) >= 90


def test_others_in_the_batch_may_have_experts(model, runner):
    roster = Roster(tuple(experts(model, 2)), 5)
    plain, armed = runner.start(None, 256), runner.start(ArmedExperts(roster), 256)
    output = runner.forward([Chunk(armed, IDS, 100), Chunk(plain, IDS, 100)])
    assert torch.equal(output.logits_RV[100:], logits(runner))
    assert torch.equal(output.logits_RV[:100], logits(runner, ArmedExperts(roster)))
    assert output.experts[100:] == (None,) * 100


def test_experts_are_added_in_the_order_of_their_digests(model):
    modules = experts(model, 3)
    for module, digest in zip(modules, "cab", strict=True):
        module.digest = digest
    first, second, third = sorted(modules, key=lambda module: module.digest)
    rosters = [Roster((third,), 5), Roster((second, third), 5), Roster((first, third), 5)]
    sites = Sites(rosters, len(model.layers), model.config.hidden_size)
    for roster in rosters:
        assert sites.members[id(roster)] == sorted(sites.members[id(roster)])


@pytest.mark.parametrize("right", range(1, RECENT))
def test_what_was_taken_back_leaves_no_trace_in_gates(model, runner, right):
    armed = ArmedExperts(Roster(tuple(experts(model, 3)), 2))
    whole, state = logits(runner, armed), runner.start(armed, 256)
    runner.forward([Chunk(state, IDS[:41])])
    runner.forward([Chunk(state, [*IDS[41 : 41 + right], *[3] * (RECENT - right)], RECENT)])
    state.rewind(41 + right)
    twin = runner.start(armed, 256)
    twin.extend(state.segment(0, 0, None))
    for one in (state, twin):
        assert torch.equal(
            runner.forward([Chunk(one, IDS[41 + right :], 59 - right)]).logits_RV,
            whole[41 + right :],
        )


@settings(max_examples=15, deadline=None)
@given(st.sampled_from(list(RUN)), st.lists(st.integers(1, 70), min_size=1, max_size=6), st.data())
def test_bits_depend_on_neither_pieces_nor_batch_nor_prefix(kind, sizes, data):
    runner = CompiledRunner(build(**RUN[kind]))
    whole = logits(runner)
    stored = data.draw(st.integers(0, 99))
    state = runner.start(None, 256)
    if stored:
        source = runner.start(None, 256)
        runner.forward([Chunk(source, IDS[:stored])])
        state.extend(source.segment(0, 0, None))
    others = [runner.start(None, 256) for _ in range(data.draw(st.integers(0, 3)))]
    start = stored
    for size in sizes:
        ids = IDS[start : start + size]
        if not ids:
            break
        batch = [*(Chunk(other, [size, 1][: 1 + size % 2]) for other in others)]
        place = data.draw(st.integers(0, len(batch)))
        batch.insert(place, Chunk(state, ids, len(ids)))
        rows = runner.forward(batch).logits_RV[place : place + len(ids)]
        assert torch.equal(rows, whole[start : start + len(ids)])
        start += len(ids)


@pytest.mark.parametrize("kind", ["dense", "dynamic", "dpe", "lsh"])
@pytest.mark.parametrize("count", [0, 2], ids=["base", "experts"])
def test_guesses_change_no_token_and_no_probability(monkeypatch, count, kind):
    tokenizer = tiny_tokenizer()
    model = build(vocab_size=len(tokenizer), eos_token_id=tokenizer.eos_token_id, **RUN[kind])
    if count:
        armed = ArmedExperts(Roster(tuple(experts(model, count)), 2))
        monkeypatch.setattr(type(model.experts), "choose", lambda *_, **__: armed)
    runner, pattern = CompiledRunner(model), (5, 9, 40, 3, 8) * 8
    requests = [
        Request(pattern, Sampling(60), ignore_end=True, logprobs=2),
        Request((7,), Sampling(150, temperature=0.3, top_k=3, seed=1), ignore_end=True),
        Request(
            pattern,
            Sampling(40, temperature=1.0, seed=2, frequency_penalty=0.5),
            prompt_logprobs=True,
        ),
        Request(pattern, Sampling(60), stop_token_ids=tuple(range(0, len(tokenizer), 9))),
    ]
    written, steps = [], []
    for most in (0, MAX_GUESSES):
        monkeypatch.setattr("deepseek.engine.scheduler.MAX_GUESSES", most)
        with Engine(model, tokenizer, runner) as engine:
            generations = [list(engine.submit(request)) for request in requests]
            written.append((generations, engine.stats().completion_tokens))
            steps.append(engine.stats().steps)
    assert written[0] == written[1]
    # How many drafted tokens are right depends on how often the random model repeats itself.
    assert steps[1] < (0.8 if kind == "dense" else 1) * steps[0]
    assert steps[0] <= written[0][1]


def test_guesses_are_what_followed_the_same_words():
    lookup = Lookup([1, 2, 3, 4, 1, 2])
    assert lookup.guess(7) == [3]
    lookup.judge(1)
    assert lookup.guess(2) == [3, 4]
    assert lookup.guess(7) == [3, 4, 1]  # one was right: draft more
    lookup.judge(0)
    assert lookup.guess(7) == [3]  # none was right: draft fewer
    lookup.judge(3)
    lookup.push(9)
    assert lookup.guess(7) == []
    for token in (1, 2):
        lookup.push(token)
    assert lookup.guess(7) == [9, 1, 2]  # the latest continuation
    assert lookup.guess(-1) == []
