"""Adapters and weighted experts in one mixed batch, each request as if it were alone."""

from pathlib import Path

import pytest
from tiny_adapter import save_adapter, save_llama
from tiny_expert import save_expert

from deepseek.compiled.runner import CompiledRunner, supports
from deepseek.engine.adapters import import_adapter
from deepseek.engine.engine import Engine
from deepseek.engine.load import Loaded, load
from deepseek.engine.request import ExpertChoice, Request
from deepseek.engine.sampler import Sampling

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
        # The reference runner, which computes adapters, agrees with itself up to rounding.
        for (_, first, _), (_, second, _), (_, third, _) in zip(*runs, strict=True):
            assert [second.logprob, third.logprob] == pytest.approx([first.logprob] * 2, abs=1e-4)
