"""Native experts in the compiled step: routing against the reference router, logits against the
model, and results that are bit for bit independent of batch, chunks and prefix cache.
"""

from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from quantised_twin import quantised_twin
from tiny_mixtures import MIXTURES
from transformers import CONFIG_MAPPING, AutoModelForCausalLM

from deepseek.compiled.abi import ROUTED
from deepseek.compiled.native_experts import choose_dynamic, choose_top
from deepseek.compiled.native_weights import NativeExperts, rules
from deepseek.compiled.runner import CompiledRunner, supports
from deepseek.compiled.support import RULES
from deepseek.kernels.int8 import quantize
from deepseek.model.config import ModelConfig
from deepseek.model.moe.router import DynamicRouter, Router, TopKRouter
from deepseek.model.quantised import keep_matrices, restored, with_large_quantised
from deepseek.model.support import unsupported
from deepseek.model.transformer import DeepSeekModel
from deepseek.runner import Chunk

SHAPE: dict[str, Any] = {
    "vocab_size": 90,
    "hidden_size": 96,
    "intermediate_size": 100,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 64,
    "max_position_embeddings": 256,
    "initializer_range": 0.1,
}
IDS = [(7 * i * i + 3 * i) % 90 for i in range(100)]


def build(kind: str, **changes: Any) -> DeepSeekModel:
    torch.manual_seed(0)
    model = DeepSeekModel(ModelConfig(**SHAPE | MIXTURES[kind] | changes)).eval()
    for module in model.modules():
        if isinstance(module, Router):
            torch.nn.init.normal_(module.weight, std=0.3)
            torch.nn.init.normal_(module.balance.bias, std=0.05)
    return model.requires_grad_(False)


@cache
def compiled(kind: str) -> CompiledRunner:
    return CompiledRunner(build(kind))


def logits(runner: CompiledRunner, ids: list[int] = IDS) -> torch.Tensor:
    return runner.forward([Chunk(runner.start(None, 256), ids, len(ids))]).logits_RV


def separated(values_E: torch.Tensor) -> bool:
    """Whether no two values are so close that rounding could change their order."""
    return bool((values_E.sort().values.diff() > 1e-5).all())


def chosen(router: Router, logits_E: torch.Tensor) -> dict[int, float]:
    """The experts and weights that the compiled step chooses for these router logits."""
    values: dict[str, Any] = dict.fromkeys((buffer.name for buffer in ROUTED.buffers), 0)
    values |= rules(router) | {
        "experts": router.num_experts,
        "threshold": np.array([getattr(router, "threshold", 0)], np.float32),
        "scale": np.array([getattr(router, "scale", 0)], np.float32),
        "bias": router.balance.bias[None].numpy(),
        "temperature": router.balance.temperature[None].numpy(),
    }
    ids = np.zeros(values["slots"], np.int64)
    weights = np.zeros(values["slots"], np.float32)
    choose = choose_dynamic if values["dynamic"] else choose_top
    choose(ROUTED.form(**values), 0, logits_E.numpy(), ids, weights)
    assert (weights[ids == router.num_experts] == 0).all()
    pairs = zip(ids.tolist(), weights.tolist(), strict=True)
    return {expert: weight for expert, weight in pairs if expert < router.num_experts}


def check_choice(router: Router, seed: int) -> None:
    """Compare with the reference on random logits without ties."""
    draw = torch.Generator().manual_seed(seed)
    count = router.num_experts
    router.balance.bias = 0.1 * torch.randn(count, generator=draw)
    router.balance.temperature = torch.rand((), generator=draw) + 0.2
    logits_E = 2 * torch.randn(count, generator=draw)
    sigmoid_E = logits_E.sigmoid() + router.balance.bias
    assume(separated(sigmoid_E) and separated(logits_E.softmax(-1) + router.balance.bias))
    dispatch = router.choose(logits_E[None])
    if dispatch.candidates_NC is not None and isinstance(router, DynamicRouter):
        q_C = (logits_E[dispatch.candidates_NC[0]] / router.balance.temperature).softmax(-1)
        assume(bool(((q_C.cumsum(-1)[:-1] - router.threshold).abs() > 1e-5).all()))
    pairs = zip(dispatch.slots_NA[0].tolist(), dispatch.weights_NA[0].tolist(), strict=True)
    expected = {expert: weight for expert, weight in pairs if expert < count}
    assert chosen(router, logits_E) == pytest.approx(expected, rel=1e-5, abs=1e-9)


@settings(max_examples=60)
@given(st.data(), st.integers(2, 40), st.integers(0, 10**6))
@torch.no_grad()
def test_dynamic_routing_is_that_of_the_reference(data: Any, count: int, seed: int) -> None:
    candidates = data.draw(st.integers(1, count))
    most = data.draw(st.integers(1, candidates))
    router = DynamicRouter(
        count,
        8,
        threshold=data.draw(st.sampled_from([0.1, 0.5, 0.7, 1.0])),
        min_experts=data.draw(st.integers(1, most)),
        max_experts=most,
        candidates=candidates,
    )
    check_choice(router, seed)


@settings(max_examples=60)
@given(st.data(), st.integers(1, 6), st.integers(1, 7), st.integers(0, 10**6))
@torch.no_grad()
def test_top_k_routing_is_that_of_the_reference(
    data: Any, groups: int, size: int, seed: int
) -> None:
    max_groups = data.draw(st.integers(1, groups))
    router = TopKRouter(
        groups * size,
        8,
        top_k=data.draw(st.integers(1, max_groups * size)),
        score=data.draw(st.sampled_from(["softmax", "sigmoid"])),
        renormalize=data.draw(st.booleans()),
        groups=groups,
        max_groups=max_groups,
        scale=data.draw(st.sampled_from([1.0, 2.5])),
    )
    check_choice(router, seed)


@pytest.mark.parametrize("kind", MIXTURES)
@torch.no_grad()
def test_logits_are_those_of_the_model_with_quantised_weights(kind: str) -> None:
    runner = compiled(kind)
    assert supports(runner.model)
    expected = quantised_twin(runner.model)(torch.tensor([IDS])).logits[0]
    distances = (logits(runner) - expected).norm(dim=-1) / expected.norm(dim=-1)
    # With quantised activations, another expert may be chosen at a few tokens where two are close.
    assert distances.median() < 0.03
    assert (distances < 0.05).float().mean() > 0.8


FAMILY: dict[str, Any] = {
    "vocab_size": 90,
    "hidden_size": 64,
    "intermediate_size": 80,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 64,
    "initializer_range": 0.1,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": None,
    "num_experts": 8,
    "num_local_experts": 8,
    "num_experts_per_tok": 3,
    "moe_intermediate_size": 48,
}


@pytest.mark.parametrize("family", ["mixtral", "olmoe", "qwen3_moe"])
@torch.no_grad()
def test_checkpoints_of_other_families_agree_with_transformers(family: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    fields = dict(FAMILY)
    if family == "olmoe":  # its head widths add up to the hidden size
        fields |= {"hidden_size": 128, "clip_qkv": 1.5}
        del fields["head_dim"]
    config = CONFIG_MAPPING[family](**fields)
    reference = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    reference.save_pretrained(tmp_path)
    runner = CompiledRunner(DeepSeekModel.from_pretrained(tmp_path, dtype="float32"))
    expected = reference(torch.tensor([IDS])).logits[0]
    distances = (logits(runner) - expected).norm(dim=-1) / expected.norm(dim=-1)
    assert distances.median() < 0.04
    assert (distances < 0.08).float().mean() > 0.8


@pytest.mark.parametrize("name", ["deepseek-29m", "deepseek-1b", "deepseek-8b", "deepseek-175b"])
def test_our_presets_are_computed(name: str) -> None:
    assert unsupported(ModelConfig.preset(name), RULES) is None


@pytest.mark.parametrize(
    ("kind", "change"),
    [
        ("dynamic", {"routing_threshold": 0.2}),
        ("dynamic", {"min_experts": 3}),
        ("dynamic", {"max_experts": 1}),
        ("dynamic", {"candidate_experts": 4}),
        ("dynamic", {"router_temperature": 2.0}),
        ("dynamic", {"expert_sharing": 2}),
        ("dynamic", {"dense_layers": [1]}),
        ("mixtral", {"router_renormalize": False}),
        ("mixtral", {"max_experts": 1}),
        ("mixtral", {"routing_strategy": "dense"}),
        ("deepseek_v3", {"router_scale": 1.0}),
        ("deepseek_v3", {"router_score": "softmax"}),
        ("deepseek_v3", {"max_expert_groups": 4}),
    ],
    ids=lambda value: value if isinstance(value, str) else "-".join(value),
)
def test_every_rule_of_routing_changes_the_logits(kind: str, change: dict[str, Any]) -> None:
    changed = logits(CompiledRunner(build(kind, **change)))
    assert not torch.equal(changed, logits(compiled(kind)))


def test_the_balance_bias_changes_the_logits() -> None:
    model = build("dynamic")
    for module in model.modules():
        if isinstance(module, Router):
            module.balance.bias.neg_()
    assert not torch.equal(logits(CompiledRunner(model)), logits(compiled("dynamic")))


def test_a_shared_pool_is_packed_once() -> None:
    shared = NativeExperts(build("shared pools")).nbytes  # one pool for three layers
    own = NativeExperts(build("shared pools", expert_sharing=1)).nbytes
    assert 3 * shared == own > 0


@torch.no_grad()
def test_experts_of_an_8_bit_checkpoint_are_packed_as_they_are_stored() -> None:
    model = build("dynamic", hidden_size=128, expert_dim=64)
    tensors, matrices = restored(with_large_quantised(model.own_tensors()))
    loaded = build("dynamic", hidden_size=128, expert_dim=64)
    loaded.load_state_dict(tensors, strict=False)
    keep_matrices(loaded, matrices)
    assert torch.equal(logits(CompiledRunner(loaded)), logits(CompiledRunner(model)))


@torch.no_grad()
def test_experts_with_4_bits_take_half_the_memory_and_give_the_same_bits() -> None:
    model = build("dynamic", hidden_size=128, expert_dim=64)
    pools = {name: weight for name, weight in model.named_parameters() if weight.dim() == 3}
    four = {name: quantize(weight, bits=4) for name, weight in pools.items()}
    for name, weight in pools.items():
        weight.data.copy_(four[name].float())
    keep_matrices(model, four)
    packed_in_4_bits = CompiledRunner(model)
    memory = NativeExperts(model).nbytes
    keep_matrices(model, {name: replace(matrix, bits=8) for name, matrix in four.items()})
    assert torch.equal(logits(packed_in_4_bits), logits(CompiledRunner(model)))
    assert 0 < memory < 0.52 * NativeExperts(model).nbytes


@cache
def whole_logits(kind: str) -> torch.Tensor:
    return logits(compiled(kind))


@pytest.mark.parametrize("threads", [1, 3, 5])
@pytest.mark.parametrize("kind", ["dynamic", "qwen3_moe"])
def test_bits_do_not_depend_on_the_number_of_threads(kind: str, threads: int) -> None:
    expected = whole_logits(kind)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        assert torch.equal(logits(compiled(kind)), expected)
        state = compiled(kind).start(None, 256)
        steps = [compiled(kind).forward([Chunk(state, [token])]).logits_RV for token in IDS[:20]]
    finally:
        torch.set_num_threads(before)
    assert torch.equal(torch.cat(steps), expected[:20])


@settings(max_examples=40)
@given(
    st.sampled_from(sorted(MIXTURES)),
    st.sets(st.integers(1, 99), max_size=6),
    st.sets(st.integers(1, 99), max_size=3),
    st.lists(st.tuples(st.integers(0, 40), st.integers(1, 40)), max_size=5),
)
def test_bits_depend_on_neither_batch_nor_pieces_nor_prefix_cache(
    kind: str, cuts: set[int], stored: set[int], others: list[tuple[int, int]]
) -> None:
    runner = compiled(kind)
    source = runner.start(None, 256)
    state = runner.start(None, 256)
    beside = [Chunk(runner.start(None, 256), IDS[low : low + count], 0) for low, count in others]
    start = 0
    for stop in sorted(cuts | stored | {100}):
        piece = IDS[start:stop]
        if stop in stored:  # computed by another sequence and reused
            output = runner.forward([*beside, Chunk(source, piece, store=[0])])
            state.extend(output.segments[-1][0])
        else:
            output = runner.forward([*beside, Chunk(state, piece, len(piece))])
            assert torch.equal(output.logits_RV, whole_logits(kind)[start:stop])
            runner.forward([Chunk(source, piece)])
        beside = []
        start = stop
