"""Stock models with experts in the engine: chunks, prefix cache, streaming and attribution."""

from typing import Any

import pytest
import torch
from attached_fixtures import attached, plug_random
from tiny_families import FAMILIES, SMALL, tiny_family
from tiny_tokenizer import tiny_tokenizer
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, GPT2Config
from waiting import wait_for

from deepseek.engine import attached_runner
from deepseek.engine.attached_probe import tensor_bytes
from deepseek.engine.attached_runner import AttachedRunner, AttachedState
from deepseek.engine.engine import Engine
from deepseek.engine.request import Request
from deepseek.engine.runners import reference_runner
from deepseek.engine.sampler import Sampling
from deepseek.errors import ConfigError
from deepseek.model.attached.model import AttachedModel, attach
from deepseek.model.attached.traits import traits_of
from deepseek.runner import Chunk, SequenceState

IDS = torch.randint(3, 300, (40,), generator=torch.Generator().manual_seed(1)).tolist()

# Families whose state is not in a stock cache, or that can continue it only token by token.
UNFIT: dict[str, dict[str, Any]] = {
    "bamba": {
        "attn_layer_indices": [1, 3],
        "mamba_d_state": 8,
        "mamba_n_heads": 8,
        "mamba_d_head": 8,
        "mamba_n_groups": 1,
        "mamba_chunk_size": 8,
    },
    "jamba": {
        "attn_layer_period": 2,
        "attn_layer_offset": 1,
        "mamba_dt_rank": 4,
        "mamba_d_state": 8,
        "num_experts": 4,
        "expert_layer_period": 2,
        "use_mamba_kernels": False,
    },
    "minimax": {"num_local_experts": 2, "block_size": 8},
    "openai-gpt": {},
    "recurrent_gemma": {"attention_window_size": 512, "num_hidden_layers": 6},
    "rwkv": {},
}


@pytest.fixture(params=sorted(FAMILIES))
def model(request: pytest.FixtureRequest) -> AttachedModel:
    model = attached(tiny_family(request.param))
    plug_random(model)
    return model


def test_chunks_and_prefixes_give_one_passs_logits(model: AttachedModel) -> None:
    runner = AttachedRunner(model)
    armed = model.experts.armed()
    state = runner.start(armed, 64)
    parts = []
    segments = []
    for start in range(0, 40, 8):
        parts.append(runner.forward([Chunk(state, IDS[start : start + 8], 8, store=[0])]))
        segments.append(parts[-1].segments[0][0])
        assert state.length == start + 8
        assert state.nbytes <= runner.state_bytes(start + 8, armed)
    with torch.no_grad():
        whole = model(torch.tensor([IDS])).logits[0]
    assert torch.allclose(torch.cat([p.logits_RV for p in parts]), whole, rtol=1e-4, atol=1e-4)
    assert {name for part in parts for name in part.experts} == {"code", None}

    # Twice from the same segments: a sequence must not modify the prefix cache.
    for _ in range(2):
        other = runner.start(model.experts.armed(), 64)
        for segment in segments[:3]:
            other.extend(segment)
        again = runner.forward([Chunk(other, IDS[24:32], 8)])
        assert torch.equal(again.logits_RV, parts[3].logits_RV)
        assert again.experts == parts[3].experts


def test_sequences_decode_together_as_alone(model: AttachedModel) -> None:
    """Sequences of several lengths, some with experts, join and leave a batch."""
    plug_random(model, "legal", seed=2)
    runner = AttachedRunner(model)
    choices = ["code", None, ("code", "legal"), "auto"]
    prompts = [IDS[:3], IDS[5:18], IDS[10:31], IDS[2:11]]

    def begin() -> list[SequenceState]:
        states = [runner.start(model.experts.choose(arm), 64) for arm in choices]
        for state, prompt in zip(states, prompts, strict=True):
            runner.forward([Chunk(state, prompt, 0)])
        return states

    together, alone = begin(), begin()
    for step, rows in enumerate([(0, 1, 2, 3)] * 3 + [(0, 2)] * 2 + [(0, 1, 2, 3)] * 2):
        token = IDS[30 + step]
        batch = runner.forward([Chunk(together[row], [token]) for row in rows])
        single = [runner.forward([Chunk(alone[row], [token])]) for row in rows]
        expected = torch.cat([output.logits_RV for output in single])
        assert torch.allclose(batch.logits_RV, expected, rtol=1e-4, atol=1e-4)
        assert batch.experts == tuple(name for output in single for name in output.experts)
    together[1].close()
    last = [runner.forward([Chunk(states[3], [7])]).logits_RV for states in (together, alone)]
    assert torch.allclose(*last, rtol=1e-4, atol=1e-4)
    assert together[3].length == alone[3].length


def test_a_long_sequence_makes_the_batch_at_most_twice_as_large() -> None:
    model = attached(tiny_family("smollm3"))
    runner = AttachedRunner(model)
    lengths = [3, 40, 5, 4, 17, 3, 20, 2]

    def begin() -> list[AttachedState]:
        states = [runner.start(None, 64) for _ in lengths]
        for state, length in zip(states, lengths, strict=True):
            runner.forward([Chunk(state, IDS[:length], 0)])
        return states

    together = begin()
    alone = begin()
    for token in (5, 6, 7):
        batch = runner.forward([Chunk(state, [token]) for state in together]).logits_RV
        single = [runner.forward([Chunk(state, [token])]).logits_RV for state in alone]
        assert torch.allclose(batch, torch.cat(single), rtol=1e-4, atol=1e-4)
        batches = {id(state.batch): state.batch for state in together if state.batch is not None}
        assert len(batches) > 1
        held = sum(tensor_bytes(batch.cache.layers) for batch in batches.values())
        held += sum(tensor_bytes(s.cache.layers) for s in together if s.batch is None)
        assert held <= 2 * sum(runner.cache_bytes(state.length) for state in together)


def test_without_any_memory_a_batch_ends_and_the_engine_goes_on(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def fail(*_: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")

    def decode(self: AttachedRunner, chunks: list[Chunk]) -> None:
        if chunks[0].state.length < 10:
            return before(self, chunks)
        # Not even a copy of a row fits.
        monkeypatch.setattr(attached_runner, "split_layer", fail)
        return fail()

    before = AttachedRunner._decode
    tokenizer = tiny_tokenizer()
    model = attached(tiny_family("smollm3", vocab_size=len(tokenizer), eos_token_id=None))
    request = Request((5, 6, 7), Sampling(max_new_tokens=20), ignore_end=True)
    with Engine(model, tokenizer) as engine:
        expected = list(engine.submit(request))
        monkeypatch.setattr(AttachedRunner, "_decode", decode)
        for generation in engine.submit_all([request] * 3):
            assert "out of memory" in (list(generation)[-1].error or "")
        wait_for(lambda: engine.stats().reserved_bytes == 0)
        assert list(engine.submit(request)) == expected


@pytest.mark.parametrize("family", ["gemma3_text", "qwen3_5_text", "nemotron_h", "gpt_oss"])
def test_the_engine_streams_what_generate_writes(family: str) -> None:
    tokenizer = tiny_tokenizer()
    model = attached(tiny_family(family, vocab_size=len(tokenizer), eos_token_id=None))
    plug_random(model)
    expected = model.generate(torch.tensor([IDS[:20]]), max_new_tokens=8, do_sample=False)
    assert isinstance(reference_runner(model), AttachedRunner)
    with Engine(model, tokenizer, prefill_chunk=8) as engine:
        request = Request(tuple(IDS[:20]), Sampling(max_new_tokens=8, temperature=0.0))
        for cached in (0, 16):
            generation = engine.submit(request)
            events = list(generation)
            assert [event.token_id for event in events] == expected[0, 20:].tolist()
            assert generation.usage.cached_tokens == cached
        base = engine.embed(IDS)
        engine.arm(None)
        assert engine.embed(IDS) == base
    whole_D = traits_of(model).hidden(torch.tensor([IDS]))[0].float().mean(0)
    whole = torch.nn.functional.normalize(whole_D, dim=0).tolist()
    assert base == pytest.approx(whole, abs=1e-4)  # in chunks as in one pass


def test_the_text_part_of_an_image_model_is_served() -> None:
    """In public Gemma 3 checkpoints, only a nested config describes the text model."""
    tokenizer = tiny_tokenizer()
    text = SMALL | FAMILIES["gemma3_text"] | {"vocab_size": len(tokenizer)}
    vision = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    vision |= {"num_attention_heads": 4, "image_size": 28, "patch_size": 14}
    torch.manual_seed(0)
    config = CONFIG_MAPPING["gemma3"](text_config=text, vision_config=vision, mm_tokens_per_image=4)
    model = attach(AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval())
    ids = torch.tensor([IDS])
    written = model.generate(ids, max_new_tokens=6, do_sample=False, eos_token_id=None)
    with Engine(model, tokenizer) as engine:
        request = Request(tuple(IDS), Sampling(max_new_tokens=6, temperature=0.0), ignore_end=True)
        told = [event.token_id for event in engine.submit(request)]
    assert told == written[0, len(IDS) :].tolist()


def unfit(family: str) -> AttachedModel:
    fields = SMALL | UNFIT[family]
    if family == "bamba":
        del fields["head_dim"]
    torch.manual_seed(0)
    config = CONFIG_MAPPING[family](**fields)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    return attached(model)


@pytest.mark.parametrize("family", UNFIT)
def test_a_family_that_would_lose_its_state_is_refused(family: str) -> None:
    with pytest.raises(ConfigError, match=r"cannot continue a text .* use model\.generate\.$"):
        AttachedRunner(unfit(family))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_state_that_other_texts_change_is_found_in_every_dtype(dtype: torch.dtype) -> None:
    with pytest.raises(ConfigError, match="another text in between changes logits"):
        AttachedRunner(unfit("recurrent_gemma").to(dtype))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_rounding_refuses_no_model(model: AttachedModel, dtype: torch.dtype) -> None:
    AttachedRunner(model.to(dtype))


def test_neither_dropout_nor_autocast_refuses_a_model() -> None:
    config = GPT2Config(vocab_size=300, n_embd=32, n_layer=2, n_head=4)
    model = attached(AutoModelForCausalLM.from_config(config)).train()
    model.transformer.h[0].eval()
    modes = [module.training for module in model.modules()]
    with torch.autocast("cpu"):
        AttachedRunner(model)
    assert [module.training for module in model.modules()] == modes
