"""Adapters and weighted experts in one mixed batch: each reply is as if computed alone."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tiny_adapter import peft_logits, save_adapter, save_llama, write_adapter
from tiny_expert import save_expert
from tiny_families import tiny_family
from tiny_tokenizer import tiny_tokenizer

from deepseek.compiled.runner import CompiledRunner, supports
from deepseek.engine.adapters import import_adapter
from deepseek.engine.engine import Engine
from deepseek.engine.load import Loaded, load
from deepseek.engine.request import ExpertChoice, Request
from deepseek.engine.sampler import Sampling
from deepseek.errors import ConfigError

PROMPT = (5, 9, 40, 3, 8, 11, 7, 30)
NAMES = ("one", "two", "three")


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_llama(tmp_path_factory.mktemp("llama"))


@pytest.fixture(scope="module")
def adapters(llama: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Three adapters as PEFT saves them, by name."""
    folder = tmp_path_factory.mktemp("adapters")
    return {
        name: save_adapter(llama, folder / name, seed, target_modules="all-linear")
        for seed, name in enumerate(NAMES, 1)
    }


@pytest.fixture
def loaded(llama: Path, adapters: dict[str, Path], tmp_path: Path) -> Loaded:
    """The model with the three adapters and two expert modules plugged."""
    loaded = load(llama, dtype="float32")
    for name, adapter in adapters.items():
        pack = import_adapter(adapter, name=name, base=llama, out=tmp_path / f"{name}.safetensors")
        loaded.model.experts.plug(pack)
    for seed, name in enumerate(("code", "zh"), 1):
        loaded.model.experts.plug(save_expert(loaded, name, tmp_path, seed=seed))
    return loaded


def request(arm: object, tokens: int = 12) -> Request:
    return Request(
        PROMPT, Sampling(max_new_tokens=tokens), ExpertChoice(arm), ignore_end=True, logprobs=5
    )


def answers(engine: Engine, choices: list[object]) -> list[list[object]]:
    """Return the events of one request for each choice of experts, all in one batch."""
    generations = [engine.submit(request(arm)) for arm in choices]
    return [
        [(event.token_id, event.logprob, event.expert) for event in generation]
        for generation in generations
    ]


CHOICES: list[object] = [
    ("one",),
    ("two",),
    ("three",),
    (),
    ("code", "zh"),
    ("one", "code"),
    {"one": 0.5, "three": 1.5},
    {"code": 0.3},
]


@pytest.mark.parametrize("compiled", [False, True])
def test_requests_in_one_batch_answer_as_if_alone(compiled: bool, loaded: Loaded) -> None:
    assert supports(loaded.model)
    runner = CompiledRunner(loaded.model) if compiled else None
    with Engine(*loaded, runner) as engine:
        alone = [answers(engine, [choice])[0] for choice in CHOICES]
    with Engine(*loaded, runner) as engine:
        together = answers(engine, CHOICES)
        again = answers(engine, CHOICES)
    texts = [[token for token, _, _ in events] for events in together]
    assert len({tuple(text) for text in texts}) > 5
    for written in (again, alone):
        assert [[(token, name) for token, _, name in events] for events in written] == [
            [(token, name) for token, _, name in events] for events in together
        ]
    for choice, *runs in zip(CHOICES, together, again, alone, strict=True):
        if compiled and not set(NAMES) & set(choice):  # type: ignore[call-overload]
            assert runs[0] == runs[1] == runs[2]
        # The reference runner, which computes adapters, is reproducible up to rounding.
        for (_, first, _), (_, second, _), (_, third, _) in zip(*runs, strict=True):
            assert [second.logprob, third.logprob] == pytest.approx([first.logprob] * 2, abs=1e-4)


def test_each_request_of_a_batch_has_its_own_weight(
    llama: Path, adapters: dict[str, Path], tmp_path: Path
) -> None:
    """Also in bf16, where multiplying by fp32 factors would change the dtype."""
    loaded = load(llama, dtype="bfloat16")
    pack = import_adapter(adapters["one"], name="one", base=llama, out=tmp_path / "one.safetensors")
    loaded.model.experts.plug(pack)
    choices: list[object] = [{"one": 0.25}, {"one": 1.75}, ("one",), ()]
    with Engine(*loaded) as engine:
        alone = [answers(engine, [choice])[0][0] for choice in choices]
        together = [events[0] for events in answers(engine, choices)]
    for (_, first, _), (_, second, _) in zip(alone, together, strict=True):
        assert second.logprob == pytest.approx(first.logprob, abs=0.05)
    assert len({round(first.logprob, 2) for _, first, _ in alone}) == 4


def test_a_batch_agrees_with_peft(loaded: Loaded, llama: Path, adapters: dict[str, Path]) -> None:
    """Prompt log probabilities of three concurrent requests, each with its own adapter."""
    with Engine(*loaded, CompiledRunner(loaded.model)) as engine:
        generations = [
            engine.submit(replace(request((name,), 1), prompt_logprobs=True)) for name in NAMES
        ]
        for generation in generations:
            assert list(generation)
        reported = [generation.prompt_logprobs for generation in generations]
    ids = torch.tensor([PROMPT])
    for name, logprobs in zip(NAMES, reported, strict=True):
        logs = peft_logits(llama, adapters[name], ids)[0, :-1].log_softmax(-1)
        expected = logs.gather(1, ids[0, 1:, None])[:, 0]
        ours = torch.tensor([entry.logprob for entry in logprobs if entry is not None])
        assert (ours - expected).abs().max() <= 1e-4


def test_a_prefix_is_reused_by_the_same_adapter_and_weight_only(loaded: Loaded) -> None:
    prompt = tuple(range(3, 40))
    cached = []
    with Engine(*loaded, CompiledRunner(loaded.model), prefill_chunk=8) as engine:
        for arm in (("one",), ("one",), {"one": 1.0}, {"one": 0.5}, ("two",), ()):
            generation = engine.submit(replace(request(arm, 1), prompt_ids=prompt))
            assert list(generation)
            cached.append(generation.usage.cached_tokens)
    assert cached == [0, 32, 32, 0, 0, 0]


def test_weights_out_of_range_are_refused() -> None:
    with pytest.raises(ConfigError, match="above 0 and at most 2"):
        ExpertChoice({"one": 3.0})


def test_an_adapter_of_latent_attention_changes_its_own_request_alone(tmp_path: Path) -> None:
    """`kv_b_proj` reads the latents of all tokens of a sequence, not only those of the new one."""
    tokenizer = tiny_tokenizer()
    tiny_family("deepseek_v3", vocab_size=len(tokenizer)).save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    loaded = load(tmp_path / "base", dtype="float32")
    layers = {
        name: (layer.in_features, layer.out_features)
        for name, layer in loaded.model.named_modules()
        if name.endswith("kv_b_proj")
    }
    adapter = write_adapter(tmp_path / "adapter", layers)
    out = tmp_path / "one.safetensors"
    pack = import_adapter(adapter, name="one", base=tmp_path / "base", out=out)
    loaded.model.experts.plug(pack)
    choices: list[object] = [(), ("one",), {"one": 0.5}]
    with Engine(*loaded) as engine:
        alone = [answers(engine, [choice])[0] for choice in choices]
        together = answers(engine, choices)
    for one, other in zip(alone, together, strict=True):
        assert [event[0] for event in one] == [event[0] for event in other]
        expected = [event[1].logprob for event in one]
        assert [event[1].logprob for event in other] == pytest.approx(expected, abs=1e-4)
    assert len({tuple(event[0] for event in events) for events in alone}) > 1


def test_a_pack_may_be_named_from_the_home_folder(
    llama: Path, adapters: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    path = Path("~/four.safetensors")
    pack = import_adapter(adapters["one"], name="four", base=llama, out=path)
    assert pack == tmp_path / "four.safetensors"
    model = load(llama, dtype="float32", experts=[str(path)]).model
    assert model.experts.plug(path, in_place=True).name == "four"
