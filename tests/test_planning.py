"""The arithmetic of plans, against manual counts and bounds that must hold."""

from dataclasses import fields

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import deepseek
from deepseek.errors import ConfigError
from deepseek.kernels import int8_layout
from deepseek.kernels.bias.distance import NUM_BUCKETS
from deepseek.kernels.cross_entropy import CHUNK_LOGITS
from deepseek.kernels.lsh.decode import BucketCache
from deepseek.kernels.lsh.far_field import BLOCK
from deepseek.model.attention.lsh import LshAttention
from deepseek.model.config import ModelConfig
from deepseek.model.positions.dynamic import CONTEXTS
from deepseek.model.presets import PRESETS
from deepseek.model.transformer import DeepSeekModel
from deepseek.planning import (
    Architecture,
    Device,
    Shape,
    matrices,
    plan_inference,
    sizes,
    training,
    training_memory,
)
from deepseek.planning.hardware import QUANTISED_BYTES
from deepseek.planning.sizes import parameters, score_bytes

DENSE = {
    "vocab_size": 100,
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "max_position_embeddings": 64,
}

ONE_FLOP = Device(80e9, 1.0, 1e12, 1e12, utilisation=1.0)
"""A device that computes one operation per second."""


def test_shapes_are_those_of_the_model() -> None:
    shape = Shape.of(ModelConfig(**DENSE))
    block = 4 * 16 * 16 + 3 * 16 * 32 + 2 * 16
    assert shape.parameters == shape.active == 100 * 16 + 2 * block + 16
    assert shape.largest_unit == block
    assert Shape.of(ModelConfig(**DENSE, post_norms=True)).largest_unit == block + 2 * 16
    config = ModelConfig(**DENSE, num_experts=8, expert_dim=8, max_experts=2, expert_sharing=2)
    sparse = Shape.of(config)
    assert sparse.parameters == sum(p.numel() for p in DeepSeekModel(config).parameters())
    # One pool; two calls of two experts.
    assert sparse.parameters - sparse.active == 8 * 3 * 16 * 8 - 2 * 2 * 3 * 16 * 8


def test_more_devices_hold_less_and_never_work_better() -> None:
    plan = deepseek.plan("deepseek-8b", 256, tokens=300e9)
    table = plan.table()
    assert [scale.gpus for scale in table] == [1, 2, 4, 8, 16, 32, 64, 128, 256]
    memory, efficiency = [scale.memory for scale in table], [scale.efficiency for scale in table]
    assert memory == sorted(memory, reverse=True) and efficiency == sorted(efficiency, reverse=True)
    assert efficiency[0] == 1.0 and table[0].gathered == table[0].reduced == 0
    total = plan.shape.parameters
    assert table[-1].gathered == pytest.approx(2 * total * 2 * 255 / 256)
    assert plan.memory(256).state == pytest.approx(16 * total / 256)
    assert table[-1].memory == plan.memory(256).total
    assert plan.days == pytest.approx(
        300e9 / (256 * plan.tokens_per_gpu) * table[-1].seconds / 86400
    )


def test_the_largest_preset_is_planned_without_being_built() -> None:
    plan = deepseek.plan("deepseek-175b", 256, device="h200")
    assert 150e9 < plan.shape.parameters < 200e9
    assert plan.at(256).memory < plan.device.memory < plan.at(8).memory
    assert training_memory(plan.config, 4096) >= 16 * plan.shape.parameters


def test_mistakes_name_the_right_word() -> None:
    with pytest.raises(ConfigError, match="perhaps 'deepseek-8b'"):
        deepseek.plan("deepseek-8")
    with pytest.raises(ConfigError, match="device 'h10' is unknown"):
        deepseek.plan("deepseek-nano", device="h10")


def counted(config: ModelConfig) -> int:
    """Return the number of parameters of a model, built on the meta device."""
    with torch.device("meta"):
        return sum(parameter.numel() for parameter in DeepSeekModel(config).parameters())


@pytest.mark.parametrize("preset", PRESETS)
def test_presets_have_the_parameters_of_the_model(preset: str) -> None:
    assert parameters(Architecture.of(preset)).total == counted(ModelConfig.preset(preset))


MIXTURE = {"num_experts": 6, "expert_dim": 5, "max_experts": 2}

FIELDS: list[dict[str, object]] = [
    *({"positional_encoding": kind} for kind in ("dpe", "learned", "alibi", "none")),
    *({"qk_norm": kind} for kind in ("head", "width")),
    {"attention_bias": True},
    {"attention_output_bias": True},
    {"tie_word_embeddings": False},
    {"head_dim": 6, "num_key_value_heads": 1},
    {"post_norms": True},
    {"attention": "lsh"},
    *({**MIXTURE, "expert_sharing": layers} for layers in (1, 2, 3)),
    *({**MIXTURE, "expert_sharing": layers, "dense_layers": [0]} for layers in (1, 2)),
    {**MIXTURE, "num_shared_experts": 2},
    {**MIXTURE, "num_shared_experts": 2, "shared_expert_dim": 3},
]


@pytest.mark.parametrize("changed", FIELDS, ids=str)
def test_every_parameter_is_counted(changed: dict[str, object]) -> None:
    config = {**DENSE, "num_hidden_layers": 3, **changed}
    assert parameters(Architecture.of(config)).total == counted(ModelConfig(**config))


def test_the_architecture_has_the_defaults_of_the_config() -> None:
    assert Architecture.of(ModelConfig()) == Architecture(
        num_key_value_heads=8, head_dim=64, shared_expert_dim=0
    )
    config = ModelConfig()
    assert all(hasattr(config, field.name) for field in fields(Architecture))


def test_constants_are_those_of_the_kernels() -> None:
    assert (sizes.DISTANCE_BUCKETS, matrices.DISTANCE_CONTEXTS) == (NUM_BUCKETS, CONTEXTS)
    assert training.CHUNK_LOGITS == CHUNK_LOGITS
    for bits, size in QUANTISED_BYTES.items():
        assert size == int8_layout.group_bytes(bits) / (int8_layout.COLUMNS * int8_layout.GROUP)


@given(positions=st.integers(1, 100_000), tied=st.booleans())
def test_a_token_uses_one_learned_position(positions: int, tied: bool) -> None:
    fields = {**DENSE, "max_position_embeddings": positions, "tie_word_embeddings": tied}
    learned, none = (
        parameters(Architecture(**fields, positional_encoding=kind)) for kind in ("learned", "none")
    )
    assert learned.active - none.active == DENSE["hidden_size"]
    assert learned.total - none.total == positions * DENSE["hidden_size"]


@pytest.mark.parametrize(("zero", "bytes_each"), [(0, 16.0), (1, 9.0), (2, 5.5), (3, 2.0)])
def test_each_stage_of_zero_shards_more(zero: int, bytes_each: float) -> None:
    made = deepseek.plan("deepseek-1b", 8, zero=zero)
    assert made.memory(8).state == pytest.approx(bytes_each * made.shape.parameters)


def test_what_is_frozen_has_no_gradients_and_can_be_quantised() -> None:
    whole = deepseek.plan("deepseek-1b", 1).memory(1)
    part = deepseek.plan("deepseek-1b", 1, trained=0.01, bits=4).memory(1)
    assert part.gradients == pytest.approx(0.01 * whole.gradients)
    frozen = whole.weights * 0.99 / 4
    assert 0.53125 * frozen < part.weights - 0.01 * whole.weights < 1.03125 * frozen


@given(zero=st.integers(0, 3), trained=st.floats(0.001, 1))
def test_stages_below_3_gather_only_what_is_trained(zero: int, trained: float) -> None:
    made = deepseek.plan("deepseek-1b", 8, zero=zero, trained=trained)
    share = {0: 0, 3: 2}.get(zero, trained)
    assert made.at(8).gathered == pytest.approx(2 * share * made.shape.parameters * 7 / 8)
    # Without ZeRO, gradients are reduced and gathered (arXiv:1910.02054, section 7.1).
    reduced = trained * made.shape.parameters * 4 * 7 / 8
    assert made.at(8).reduced == pytest.approx(reduced * (1 if zero else 2))


@given(trained=st.floats(0.001, 1), attention=st.sampled_from(["exact", "flash", "lsh"]))
def test_recomputation_costs_one_more_forward_pass(trained: float, attention: str) -> None:
    once, twice = (
        deepseek.plan("deepseek-1b", trained=trained, recompute=recompute, attention=attention)
        for recompute in (False, True)
    )
    prefill = plan_inference("deepseek-1b", attention=attention, device=ONE_FLOP)
    head = 2 * 49152 * 1280  # prefill computes logits for one token, training for all
    assert twice.flops_per_token - once.flops_per_token == pytest.approx(
        prefill.prefill_seconds / prefill.length + head * (1 - 1 / prefill.length)
    )


def test_the_peak_is_in_the_backward_pass_or_in_the_step() -> None:
    few, many = (
        deepseek.plan(
            "deepseek-nano", 1, rows_per_gpu=1, length=n, recompute=False, precision="float32"
        ).memory(1)
        for n in (1, 2048)
    )
    assert few.peak == few.state + few.update
    passes = many.activations + many.attention + many.logits
    assert many.peak == many.weights + many.optimiser + passes


def test_an_update_takes_two_tensors_on_a_processor_and_all_on_a_gpu() -> None:
    fields = {**DENSE, "num_experts": 8, "expert_dim": 8, "max_experts": 2}
    made = {
        device: deepseek.plan(fields, 1, device=device).memory(1) for device in ("laptop", "h100")
    }
    largest = max(p.numel() for p in DeepSeekModel(ModelConfig(**fields)).parameters())
    assert made["laptop"].update == 2 * 4 * largest
    assert made["h100"].update == 4 * Shape.of(fields).parameters
    assert made["laptop"].activations < made["h100"].activations


def test_keys_spread_over_as_many_devices_as_there_are_groups() -> None:
    numbers = (1, 2, 3, 8)
    heads = {"num_attention_heads": 4, "num_key_value_heads": 4}
    plans = {gpus: plan_inference({**DENSE, **heads}, gpus) for gpus in numbers}
    keys = {gpus: made.memory.keys_values for gpus, made in plans.items()}
    assert keys[1] == 2 * keys[2] == 2 * keys[3] == 4 * keys[8]  # one of three has two groups


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"num_key_value_heads": 1, "lsh_rounds": 2, "lsh_exact_layers": []},
        {"lsh_bucket_window": 2, "lsh_sinks": 6, "lsh_exact_layers": [0]},
        {"lsh_far_field": True, "lsh_exact_layers": [0]},
    ],
)
def test_lsh_attention_caches_codes_and_rings_beside_keys_and_values(
    changes: dict[str, object],
) -> None:
    config = ModelConfig(**{**DENSE, "num_hidden_layers": 4, "attention": "lsh", **changes})
    layers = [LshAttention(config, layer) for layer in range(4)]
    buckets = sum(
        BucketCache.most_bytes(layer.windows, layer.groups, layer.head_dim, 200)
        for layer in layers
        if not layer.exact
    )
    assert buckets > 0
    lsh, flash = (
        plan_inference(config, length=200, batch=3, attention=attention).memory.keys_values
        for attention in ("lsh", "flash")
    )
    assert lsh - flash == 3 * buckets
    assert lsh == 3 * sum(layer.state_bytes(200, 2) for layer in layers)
    assert sizes.FAR_FIELD_BLOCK == BLOCK


def test_inference_reads_what_a_token_uses() -> None:
    hardware = Device(80e9, 1e15, 1e12, 1e12, utilisation=1.0, bandwidth=1e12, bandwidth_share=1.0)
    made = plan_inference(DENSE, device=hardware, length=64, batch=2)
    model = Shape.of(DENSE)
    keys = 2 * 2 * 16 * 2  # layers, keys and values, width, bytes of bf16
    assert made.memory.weights == 2 * model.parameters
    assert made.memory.keys_values == keys * 64 * 2
    assert made.token_seconds == pytest.approx((2 * model.active + keys * 64 * 2) / 1e12)
    head = 100 * 16
    assert made.prefill_seconds == pytest.approx(
        (64 * (2 * (model.active - head) + 4 * 2 * 16 * 64 / 2) + 2 * head) / 1e15
    )


@given(length=st.integers(1, 64), vocabulary=st.integers(1, 10_000), tied=st.booleans())
def test_prefill_computes_the_logits_of_one_token(length: int, vocabulary: int, tied: bool) -> None:
    fields = {**DENSE, "tie_word_embeddings": tied}
    small, large = (
        plan_inference({**fields, "vocab_size": size}, device=ONE_FLOP, length=length)
        for size in (vocabulary, 2 * vocabulary)
    )
    assert large.prefill_seconds - small.prefill_seconds == pytest.approx(2 * 16 * vocabulary)


@pytest.mark.parametrize("bucket_window", [1, 96, 4096])
@pytest.mark.parametrize(
    ("device", "precision", "copies"),
    [
        ("laptop", "float32", 0),
        ("h100", "float32", 4 * 20),
        ("h100", "bfloat16", 4 * 20),
        ("laptop", "mixed", 6 * 20 + 4 * 4),
        ("h100", "mixed", 6 * 20 + 4 * 4),
    ],
)
def test_lsh_attention_keeps_codes_and_copies_but_no_scores(
    device: str, precision: str, copies: int, bucket_window: int
) -> None:
    model = {**PRESETS["deepseek-8b"], "lsh_bucket_window": bucket_window}
    flash, lsh = (
        deepseek.plan(
            model, device=device, precision=precision, attention=attention, recompute=False
        )
        for attention in ("flash", "lsh")
    )
    # 30 of 32 layers; 20 heads of 4 probes, 4 groups with capacity to double; heads of 128.
    token = 30 * (4 * (20 * 4 + 2 * 4) + copies * 128)
    more = lsh.memory(8).attention - flash.memory(8).attention
    assert more == pytest.approx(token * lsh.tokens_per_gpu)


def test_lsh_attention_holds_no_scores_in_inference() -> None:
    exact, flash, lsh = (
        plan_inference("deepseek-8b", attention=attention).memory.attention
        for attention in ("exact", "flash", "lsh")
    )
    assert lsh - flash == pytest.approx(4 * (20 * 4 + 2 * 4) * 8192 * 30 / 32)
    assert exact == 4 * 20 * 512 * 8192


@given(batch=st.integers(1, 4096), gpus=st.integers(1, 8))
def test_every_device_has_the_residual_stream_of_all_tokens(batch: int, gpus: int) -> None:
    made = plan_inference({**DENSE, "num_key_value_heads": 2}, gpus, length=64, batch=batch)
    tokens = max(64, batch)
    shared = tokens * 3 * 32 * 2 + 4 * 100 * batch
    assert made.memory.activations == pytest.approx(tokens * 4 * 16 * 2 + shared / gpus)


def test_the_widest_layer_of_a_mixture_decides_the_activations() -> None:
    mixture = {**DENSE, "num_experts": 4, "expert_dim": 8, "max_experts": 2}
    memory = [
        plan_inference({**mixture, "dense_layers": dense, "intermediate_size": width}, length=64)
        .memory.activations
        for dense, width in (((), 512), ((0,), 512), ((0,), 8))
    ]  # fmt: skip
    assert memory[1] - memory[0] == pytest.approx(64 * 3 * (512 - 16) * 2)
    assert memory[2] == memory[0]


def test_fewer_bits_need_less_and_lsh_grows_slower() -> None:
    plans = [plan_inference("deepseek-8b", gpus).memory.total for gpus in (1, 2, 8)]
    assert plans == sorted(plans, reverse=True)
    small = [plan_inference("deepseek-8b", bits=bits, length=2048) for bits in (None, 8, 4)]
    weights = [made.memory.weights for made in small]
    assert weights == sorted(weights, reverse=True)
    assert small[1].memory.total < 12e9, "an 8B model in 8 bits fits 12 GB"
    near, far = (plan_inference("deepseek-8b", length=n, attention="lsh") for n in (2**16, 2**18))
    exact = [plan_inference("deepseek-8b", length=n) for n in (2**16, 2**18)]
    grown = far.token_seconds - near.token_seconds
    assert grown < 0.2 * (exact[1].token_seconds - exact[0].token_seconds)


def test_the_numbers_of_the_article_come_from_the_scores_of_one_long_row() -> None:
    """docs/how-to/planning.md: 1.2 TB with every score; 480 GB with 1,746 keys a query."""
    model = Architecture.of("deepseek-175b")
    weights = 2 * parameters(model).total
    length = 12_087
    scores = score_bytes(model, length, 1, "exact")
    assert weights + scores == pytest.approx(1.2e12, rel=1e-3)
    assert weights + scores * 1_746 / length == pytest.approx(480e9, rel=1e-3)
    ours = weights + scores * model.candidates(length) / length
    assert ours / (weights + scores) == pytest.approx(0.329, abs=0.001)


@pytest.mark.parametrize("options", [{"attention": "sparse"}, {"bits": 3}, {"dtype": "int8"}])
def test_wrong_words_of_inference_are_refused(options: dict[str, object]) -> None:
    with pytest.raises(ConfigError):
        plan_inference("deepseek-nano", **options)  # type: ignore[arg-type]
