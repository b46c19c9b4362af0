"""Every public constructor and function with valid and invalid values for each parameter: valid
calls work, and others raise only the documented errors.
"""

import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import strategies as st
from peft import LoraConfig, get_peft_model
from properties.values import Target, check_target
from tiny_expert import save_base, save_expert
from tiny_gguf import tiny_llama
from tiny_model import tiny_model

import deepseek
from deepseek.engine.engine import Engine
from deepseek.engine.load import load
from deepseek.engine.request import ExpertChoice, Grammar, Request
from deepseek.engine.sampler import Sampler, Sampling
from deepseek.model.config import ModelConfig
from deepseek.model.experts import ExpertModule
from deepseek.model.moe.router import DynamicRouter, TopKRouter
from deepseek.model.positions.learned import DynamicPositionalEncoding
from deepseek.packs.library import find_pack
from deepseek.packs.pack import read_pack
from deepseek.packs.policy import PackPolicy
from deepseek.planning import DEVICES, plan, plan_inference
from deepseek.server.settings import Settings
from deepseek.train.jobs.arguments import UNUSED, AdaptArguments, AlignArguments, ExpertArguments
from deepseek.train.jobs.distill_hash_arguments import DistillHashArguments
from deepseek.train.jobs.pretrain_arguments import PretrainArguments
from deepseek.train.loop.optim import OptimConfig
from deepseek.train.rl.rlpo_config import RLPOConfig
from deepseek.train.rl.update import RLPOState, rlpo_update

SCALE = float(os.environ.get("PROPERTY_SCALE", "1"))
"""Factor on the number of cases, about 2,000."""

V = st.just
COUNT = st.integers(1, 4)
RATE = st.floats(0.01, 0.9)
FLAG = st.booleans()
IDS = st.lists(st.integers(0, 290), min_size=1, max_size=5).map(tuple)
NAME = st.sampled_from(["one", "two"])
X = V(torch.randn(2, 5, 16))

SMALL = {
    "vocab_size": st.integers(8, 64),
    "hidden_size": V(32),
    "num_hidden_layers": st.integers(2, 4),
    "num_attention_heads": V(4),
    "num_key_value_heads": st.sampled_from([1, 2, 4, None]),
    "head_dim": st.sampled_from([8, 16, None]),
    "max_position_embeddings": st.integers(8, 64),
}

CONFIG = SMALL | {
    "intermediate_size": COUNT,
    "hidden_act": V("silu"),
    "initializer_range": RATE,
    "rms_norm_eps": RATE,
    "use_cache": FLAG,
    "tie_word_embeddings": FLAG,
    "pad_token_id": st.sampled_from([None, 0]),
    "bos_token_id": st.sampled_from([None, 1]),
    "eos_token_id": st.sampled_from([None, 2, [2, 3]]),
    "attention": V("full"),
    "attention_bias": FLAG,
    "attention_output_bias": FLAG,
    "qk_norm": st.sampled_from(["none", "head", "width"]),
    "clip_qkv": st.sampled_from([None, 0.5]),
    "post_norms": FLAG,
    "unit_offset_norms": FLAG,
    "scale_embeddings": FLAG,
    "query_pre_attn_scalar": st.sampled_from([None, 3, 7.5]),
    "local_rope_theta": V(None),
    "sliding_window": st.sampled_from([None, 3]),
    "full_attention_layers": st.sampled_from([None, [], [0, 1]]),
    "positional_encoding": st.sampled_from(["rope", "alibi", "learned", "none", "dpe"]),
    "rope_parameters": st.sampled_from([None, {"rope_theta": 1e4, "rope_type": "default"}]),
    "num_experts": st.integers(4, 6),
    "expert_dim": COUNT,
    "num_shared_experts": st.integers(0, 2),
    "shared_expert_dim": st.sampled_from([None, 0, 3]),
    "routing_strategy": st.sampled_from(["dense", "dynamic", "topk"]),
    "routing_threshold": RATE,
    "min_experts": V(1),
    "max_experts": st.integers(2, 4),
    "candidate_experts": V(4),
    "expert_sharing": COUNT,
    "target_experts": st.sampled_from([None, 1.5, 2]),
    "router_temperature": st.floats(0.1, 2),
    "router_score": st.sampled_from(["sigmoid", "softmax"]),
    "router_renormalize": FLAG,
    "router_scale": RATE,
    "num_expert_groups": V(1),
    "max_expert_groups": V(1),
    "balance_rate": st.floats(0, 1),
    "dense_layers": st.sampled_from([None, [], [1]]),
    "dtype": st.sampled_from([None, "float32", torch.bfloat16]),
}

ROPE = {
    "rope_type": st.sampled_from(["yarn"]),
    "rope_theta": st.floats(2, 1e6),
    "factor": st.floats(1, 32),
    "original_max_position_embeddings": st.integers(1, 64),
    "beta_fast": st.floats(8, 32),
    "beta_slow": st.floats(1, 4),
    "attention_factor": st.sampled_from([None, 1.2]),
    "mscale": st.sampled_from([None, 1.0]),
    "mscale_all_dim": st.sampled_from([None, 1.0]),
    "truncate": FLAG,
}

LLAMA3 = {
    "rope_type": V("llama3"),
    "rope_theta": st.floats(2, 1e6),
    "factor": st.floats(1, 32),
    "low_freq_factor": st.floats(0.5, 1),
    "high_freq_factor": st.floats(2, 4),
    "original_max_position_embeddings": st.integers(1, 64),
}

LSH = {
    "lsh_num_buckets": COUNT,
    "lsh_probes": COUNT,
    "lsh_rounds": COUNT,
    "lsh_bucket_window": COUNT,
    "lsh_local_window": COUNT,
    "lsh_sinks": st.integers(0, 3),
    "lsh_far_field": FLAG,
    "lsh_exact_layers": st.sampled_from([None, [], [0]]),
}

ROUTER = {
    "num_experts": st.integers(4, 6),
    "input_dim": V(16),
    "threshold": RATE,
    "min_experts": V(1),
    "max_experts": st.integers(2, 4),
    "candidates": V(4),
    "balance_rate": st.floats(0, 1),
    "target_experts": st.sampled_from([None, 1.5]),
    "temperature": st.floats(0.1, 2),
}

TOP_K = {
    "num_experts": V(4),
    "input_dim": V(16),
    "top_k": st.integers(1, 2),
    "score": st.sampled_from(["sigmoid", "softmax"]),
    "renormalize": FLAG,
    "groups": V(2),
    "max_groups": st.integers(1, 2),
    "scale": RATE,
    "balance_rate": st.floats(0, 1),
}

HEADS = torch.randn(1, 2, 5, 16)

SPARSE = {
    "query": V(HEADS),
    "key": V(HEADS),
    "value": V(HEADS),
    "num_buckets": COUNT,
    "causal": FLAG,
    "probes": COUNT,
    "num_rounds": COUNT,
    "bucket_window": COUNT,
    "local_window": COUNT,
    "sinks": st.integers(0, 3),
    "hash": V(None),
    "seed": COUNT,
    "far_field": FLAG,
    "scale": st.sampled_from([None, 0.5]),
    "document_ids": st.sampled_from([None, torch.tensor([[0, 0, 1, 1, 1]])]),
    "key_mask": st.sampled_from([None, torch.tensor([[False, True, True, True, True]])]),
}

SAMPLING = {
    "max_new_tokens": COUNT,
    "temperature": st.floats(0, 10),
    "top_k": st.integers(0, 5),
    "top_p": RATE,
    "min_p": RATE,
    "repetition_penalty": st.floats(0.5, 2),
    "presence_penalty": st.floats(-2, 2),
    "frequency_penalty": st.floats(-2, 2),
    "logit_bias": st.dictionaries(st.integers(0, 5), st.floats(-100, 100), max_size=2),
    "seed": st.sampled_from([None, 0, -3, 2**62]),
}

REQUEST = {
    "prompt_ids": IDS,
    "sampling": V(Sampling(max_new_tokens=1)),
    "experts": V(ExpertChoice()),
    "user_ids": st.none() | IDS,
    "document_ids": st.none() | IDS,
    "stop": st.lists(st.text("abc", min_size=1, max_size=3), max_size=2).map(tuple),
    "stop_token_ids": IDS,
    "ignore_end": FLAG,
    "logprobs": st.none() | st.integers(0, 20),
    "prompt_logprobs": FLAG,
    "scored_from": V(1),
    "grammar": st.sampled_from([None, Grammar("regex", "[ab]+")]),
}

RLPO = {
    "new_tokens": COUNT,
    "temperature": st.floats(0.1, 2),
    "minibatch": COUNT,
    "epochs": COUNT,
    "gamma": RATE,
    "lam": RATE,
    "clip": RATE,
    "value_clip": RATE,
    "value_weight": RATE,
    "value_rollouts": st.integers(0, 3),
    "beta": RATE,
    "target_kl": st.none() | RATE,
    "kl_stop": RATE,
    "entropy_floor": RATE,
    "replay_routing": FLAG,
}

OPTIM = {
    "learning_rate": RATE,
    "warmup": RATE,
    "final": RATE,
    "weight_decay": RATE,
    "betas": st.tuples(RATE, RATE),
    "clip_norm": RATE,
}

TEXT_JOB = {
    "base": V("smollm2-135m"),
    "name": NAME,
    "from_folder": V("."),
    "held_out": st.floats(0.05, 0.5),
    "held_out_tokens": COUNT,
    "row_length": st.integers(2, 64),
    "batch_rows": st.none() | COUNT,
    "learning_rate": st.none() | RATE,
    "seed": COUNT,
    "quiet": FLAG,
    "dry_run": FLAG,
    "run_folder": V(None),
    "out": V(None),
}

EXPERT_JOB = TEXT_JOB | {
    "layers": st.sampled_from(["all", "last:3", "0-9,20"]),
    "width": st.none() | COUNT,
    "minutes": st.none() | RATE,
    "tokens": st.none() | COUNT,
    "epochs": st.none() | COUNT,
    "split": st.sampled_from(["file", "directory", "time"]),
    "questions": st.none() | RATE,
    "licence": V("Apache-2.0"),
    "domain": NAME,
}

ADAPT_JOB = TEXT_JOB | {
    "mode": st.sampled_from(["last-n", "lora", "full", "expert"]),
    "last": V(3),  # with lora and full only the default is valid
    "rank": V(None),  # likewise with all modes but lora
    "tokens": COUNT,
    "epochs": COUNT,
}

ALIGN_JOB = {
    "base": V("smollm2-135m"),
    "prefs": V(None),
    "name": NAME,
    "method": st.sampled_from(["ppo", "grpo", "gspo"]),
    "reward": V("model"),
    "layers": V("last:6"),
    "rollouts": COUNT,
    "rollout_size": COUNT,
    "learning_rate": RATE,
    "new_tokens": COUNT,
    "temperature": st.floats(0.1, 2),
    "target_kl": RATE,
    "seed": COUNT,
}

RLOO_JOB, DPO_JOB = (
    {name: ALIGN_JOB[name] for name in ALIGN_JOB if name not in UNUSED[method]}
    | {"method": V(method)}
    for method in ("rloo", "dpo")
)

PRETRAIN_JOB = {
    "name": NAME,
    "domains": V({"text": {"folder": ".", "weight": 2.0}}),
    "tokens": COUNT,
    "model": V({"preset": "deepseek-nano"}),
    "vocab_size": st.integers(300, 400),
    "tokenizer": V(None),
    "row_length": st.integers(2, 64),
    "batch_rows": COUNT,
    "accumulate": COUNT,
    "learning_rate": RATE,
    "final_learning_rate": RATE,
    "warmup": RATE,
    "weight_decay": RATE,
    "curriculum": FLAG,
    "held_out": RATE,
    "held_out_tokens": COUNT,
    "evaluate_every": COUNT,
    "checkpoint_every": COUNT,
    "samples": V(("The ",)),
    "licence": V("Apache-2.0"),
    "seed": COUNT,
}

HASH_JOB = {
    "base": V("smollm2-135m"),
    "data": V(()),
    "texts": COUNT,
    "length": st.integers(512, 600),
    "buckets": st.integers(2, 8),
    "window": COUNT,
    "exact": st.integers(0, 3),
    "calibrate_only": FLAG,
    "out": V(None),
    "seed": COUNT,
}

POLICY = {
    "signature": st.sampled_from(["any", "signed", "trusted"]),
    "allow": st.sampled_from([None, frozenset({"MIT"})]),
    "deny": V(frozenset()),
    "trusted": V(None),
    "max_bytes": V(4 << 30),
}

PLAN = {
    "model": V("deepseek-nano"),
    "gpus": COUNT,
    "device": st.sampled_from(sorted(DEVICES)),
    "tokens": st.floats(1, 1e12),
    "rows_per_gpu": COUNT,
    "recompute": FLAG,
}

PLAN_INFERENCE = {
    "model": V("deepseek-nano"),
    "gpus": COUNT,
    "device": st.sampled_from(sorted(DEVICES)),
    "length": COUNT,
    "batch": COUNT,
    "dtype": st.sampled_from(["bfloat16", "float32"]),
    "bits": st.sampled_from([None, 4, 8]),
}

MODULE = {"name": NAME, "layers": V([0, 2]), "hidden_size": COUNT, "width": COUNT}


def rope(**parameters: Any) -> None:
    """Build a config with these rotary parameters, and the frequencies."""
    from deepseek.model.positions.rope import Rope

    config = ModelConfig(hidden_size=32, num_attention_heads=4, rope_parameters=parameters)
    assert bool(Rope(config).inv_freq.isfinite().all())


def lsh_config(**fields: Any) -> ModelConfig:
    return ModelConfig(attention="lsh", num_hidden_layers=2, **fields)


def route(x: Any) -> None:
    router = DynamicRouter(4, 16)
    assert bool(router(x).isfinite().all() | ~torch.as_tensor(x).isfinite().all())
    router.route(x)


def encode(x: Any, pos_ids: Any) -> None:
    DynamicPositionalEncoding(16)(x, pos_ids)


PURE = [
    Target("ModelConfig", ModelConfig, CONFIG, 300),
    Target("ModelConfig.rope_parameters", rope, ROPE, 100),
    Target("ModelConfig.rope_parameters.llama3", rope, LLAMA3, 50),
    Target("ModelConfig.lsh", lsh_config, LSH, 50),
    Target("ModelConfig.preset", ModelConfig.preset, {"name": V("deepseek-nano"), **SMALL}, 40),
    Target("DynamicRouter", DynamicRouter, ROUTER, 80),
    Target("DynamicRouter.route", route, {"x": X}, 30),
    Target("TopKRouter", TopKRouter, TOP_K, 60),
    Target(
        "DynamicPositionalEncoding",
        DynamicPositionalEncoding,
        {"d_model": st.sampled_from([2, 16]), "max_len": COUNT},
        40,
    ),
    Target("DynamicPositionalEncoding.forward", encode, {"x": X, "pos_ids": V(torch.arange(5))}),
    Target("sparse_attention", deepseek.sparse_attention, SPARSE, 120),
    Target("Sampling", Sampling, SAMPLING, 100),
    Target("ExpertChoice", ExpertChoice, {"arm": V(("a",)), "deny": V(()), "max_experts": COUNT}),
    Target("Grammar", Grammar, {"kind": V("regex"), "text": V("a")}, 20),
    Target("Request", Request, REQUEST, 100),
    Target("RLPOConfig", RLPOConfig, RLPO, 60),
    Target("OptimConfig", OptimConfig, OPTIM, 40),
    Target("train_expert", ExpertArguments.read, EXPERT_JOB, 100),
    Target("adapt", AdaptArguments.read, ADAPT_JOB, 60),
    Target("align", AlignArguments.read, ALIGN_JOB, 60),
    Target("align by RLOO", AlignArguments.read, RLOO_JOB, 40),
    Target("align by DPO", AlignArguments.read, DPO_JOB, 40),
    Target("pretrain", PretrainArguments.read, PRETRAIN_JOB, 80),
    Target("distill_hash", DistillHashArguments.read, HASH_JOB, 40),
    Target("PackPolicy", PackPolicy, POLICY, 40),
    Target("plan", plan, PLAN, 40),
    Target("plan_inference", plan_inference, PLAN_INFERENCE, 40),
    Target("ExpertModule", ExpertModule, MODULE, 40),
]


@pytest.mark.parametrize("target", PURE, ids=lambda target: target.name)
def test_only_documented_errors(target: Target) -> None:
    check_target(target, SCALE)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_base(tmp_path_factory.mktemp("base"))


@pytest.fixture(scope="module")
def pack(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    loaded = load(base, dtype="float32")
    return save_expert(loaded, "one", tmp_path_factory.mktemp("packs"))


@pytest.fixture(scope="module")
def engine(base: Path, pack: Path) -> Iterator[Engine]:
    with Engine(*load(base, experts=[pack], dtype="float32"), max_waiting=10_000) as engine:
        yield engine


def test_model_and_expert_set(engine: Engine, pack: Path) -> None:
    model = engine.model
    ids = torch.tensor([[1, 2, 3, 4, 5], [5, 6, 7, 8, 9]])
    forward = {
        "input_ids": V(ids),
        "attention_mask": st.sampled_from([None, torch.ones_like(ids), torch.ones(2, 5)]),
        "position_ids": st.sampled_from([None, torch.arange(5)[None], torch.arange(5)]),
    }
    scored = forward | {"labels": V(ids), "logits_to_keep": V(0)}
    last = forward | {"logits_to_keep": st.sampled_from([0, 1, torch.tensor([0, 3])])}
    embeds = {"inputs_embeds": V(torch.randn(2, 5, 32)), "position_ids": V(torch.arange(5)[None])}
    choice = {"arm": V(("one",)), "deny": V(()), "max_experts": COUNT, "user_ids": IDS}

    def forced(module: Any) -> None:
        with model.experts.forced(module):
            pass

    def arming(names: Any) -> None:
        with model.experts.arming(names):
            pass

    def plug(source: Any) -> None:
        model.experts.plug(source)
        model.experts.unplug("one")

    names = {"names": st.sampled_from(["auto", "one", ["one"], None])}
    targets = [
        Target("forward.labels", model, scored, 80),
        Target("forward.last", model, last, 60),
        Target("forward.embeds", model, embeds, 40),
        Target("log_probs", model.log_probs, {"input_ids": V(ids)}, 30),
        Target("arm", model.experts.arm, names, 30),
        Target("arming", arming, names, 20),
        Target("forced", forced, {"module": V("one")}, 20),
        Target("manifest", model.experts.manifest, {"name": V("one")}, 20),
        Target("choose", model.experts.choose, choice, 40),
        Target("relevance", model.experts.relevance, {"ids": IDS}, 30),
    ]
    with torch.no_grad():
        for target in targets:
            check_target(target, SCALE)
    model.experts.unplug("one")
    check_target(Target("plug", plug, {"source": V(str(pack)) | V(pack)}, 30), SCALE)
    model.experts.plug(pack)


def test_attach() -> None:
    model = tiny_llama()

    def both(model: Any) -> None:
        deepseek.attach(model)
        deepseek.detach(model)

    check_target(Target("attach", both, {"model": V(model)}, 30), SCALE)


def test_engine(engine: Engine) -> None:
    def submit(**fields: Any) -> None:
        for _ in engine.submit(Request(**fields)):
            pass

    loaded = tiny_model()
    limits = {
        "cache_bytes": V(1 << 20),
        "max_running": COUNT,
        "max_waiting": COUNT,
        "prefill_chunk": COUNT,
    }

    def start(**dials: Any) -> None:
        Engine(*loaded, **dials).close()

    def sample(**fields: Any) -> None:
        token = Sampler(Sampling(**fields), (1, 2)).next_token(
            torch.linspace(-3, 3, 64).numpy().copy()
        )
        assert 0 <= token < 64

    for target in [
        Target("submit", submit, REQUEST, 80),
        Target("embed", engine.embed, {"ids": IDS}, 30),
        Target("Engine", start, limits, 20),
        Target("Sampler", sample, SAMPLING, 60),
    ]:
        check_target(target, SCALE)
    assert engine.drain(timeout=60)


def test_rlpo_update() -> None:
    model = tiny_model("dmoe").model
    generator = torch.Generator().manual_seed(0)

    def reward(responses: Any) -> torch.Tensor:
        return torch.rand(len(responses.real_BS), generator=generator)

    config = RLPOConfig(new_tokens=2, minibatch=2, epochs=1, entropy_floor=0.0)
    state = RLPOState(model, reward, config)

    def update(prompts: Any) -> None:
        metrics = rlpo_update(model, reward, {"prompts": prompts}, state=state)
        assert all(value == value for value in metrics.values())

    def whole(data_batch: Any) -> None:
        rlpo_update(model, reward, data_batch, state=state)

    def scored(scores: Any) -> None:
        def given(responses: Any) -> Any:
            return scores

        other = RLPOState(model, given, config)
        rlpo_update(model, given, {"prompts": [[1], [2]]}, state=other)

    def start(**options: Any) -> None:
        RLPOState(model, reward, config, **options)

    prompts = st.sampled_from([[[1, 2], [3]], torch.tensor([[1, 2], [3, 4]]), ([5],)])
    options = {
        "layers": V("last:1"),
        "ends": st.sampled_from([(2,), None]),
        "seed": COUNT,
        "optim": V(None),
    }
    for target in [
        Target("rlpo_update", update, {"prompts": prompts}, 30),
        Target("rlpo_update.data_batch", whole, {"data_batch": V({"prompts": [[1]]})}, 20),
        Target("reward", scored, {"scores": st.sampled_from([[0.5, 1], torch.zeros(2)])}, 20),
        Target("RLPOState", start, options, 15),
    ]:
        check_target(target, SCALE)


def test_files_and_folders(base: Path, pack: Path, tmp_path: Path) -> None:
    def open_base(**arguments: Any) -> None:
        load(**arguments)

    loading = {
        "name": V(base) | V(str(base)),
        "experts": V(()) | V([pack]),
        "config": V(None) | V(ModelConfig(routing_threshold=0.5)),
        "dtype": st.sampled_from(["auto", "float32", torch.float32]),
        "device": st.sampled_from(["auto", "cpu"]),
    }
    reading = {"path": V(pack) | V(str(pack)), "policy": V(PackPolicy()), "base": V(None)}
    adapter = tmp_path / "adapter"
    lora = LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM")
    get_peft_model(load(base, dtype="float32").model, lora).save_pretrained(adapter)
    importing = {
        "folder": V(adapter) | V(str(adapter)),
        "name": V("lora"),
        "base": V(base) | V(str(base)),
        "licence": V("Apache-2.0"),
        "domain": V(""),
        "auto": V(False),
        "key": V(None),
        "out": V(tmp_path / "lora.safetensors"),
    }
    for target in [
        Target("import_adapter", deepseek.import_adapter, importing, 30),
        Target("load", open_base, loading, 30),
        Target("read_pack", read_pack, reading, 40),
        Target("find_pack", find_pack, {"name_or_path": V(pack) | V(str(pack))}, 30),
    ]:
        check_target(target, SCALE)


def test_settings(tmp_path: Path) -> None:
    fields = {
        "host": V("127.0.0.1"),
        "port": V(0),
        "hosts": V(frozenset()),
        "api_keys": V(frozenset({"key"})),
        "admin_keys": V(frozenset()),
        "max_body": COUNT,
        "max_upload": COUNT,
        "request_seconds": RATE,
        "answer_tokens": COUNT,
    }
    check_target(Target("Settings", Settings, fields, 40), SCALE)


COVERED = {target.name.partition(".")[0] for target in PURE} | {
    "DeepSeekModel",  # test_model_and_expert_set
    "Engine",
    "ExpertSet",
    "Generation",  # made by Engine.submit
    "Settings",
    "create_app",  # takes a Settings
    "errors",
    "import_adapter",  # test_files_and_folders
    "load",
    "rlpo_update",
    "serve",  # takes a Settings, and the arguments of load and Engine
    "__version__",
    "attach",  # test_attach
    "detach",
}


def test_every_public_name_has_a_target() -> None:
    pages = Path(__file__).parents[2] / "docs" / "reference" / "api.md"
    listed = {
        name.rpartition(".")[2] for name in re.findall(r"^::: (\S+)$", pages.read_text(), re.M)
    }
    assert (listed | set(deepseek.__all__)) - COVERED == set()
