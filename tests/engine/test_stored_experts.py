"""Experts that stay in their files: replies are bit for bit those with all experts in memory, and
the weights in memory stay within their budget.
"""

import errno
import time
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from attached_fixtures import attached
from hypothesis import given, settings
from hypothesis import strategies as st
from pack_fixtures import is_one_sentence
from tiny_families import tiny_family
from tiny_model import tiny_model
from tiny_tokenizer import tiny_tokenizer
from waiting import wait_for

from deepseek.compiled.runner import CompiledRunner
from deepseek.compiled.weights import module_bytes, pack_module
from deepseek.engine.attached_runner import AttachedRunner
from deepseek.engine.engine import Engine
from deepseek.engine.load import Loaded, load
from deepseek.engine.request import ExpertChoice, Request
from deepseek.engine.sampler import Sampling
from deepseek.engine.torch_runner import TorchRunner
from deepseek.errors import ConfigError, PackError
from deepseek.model.experts import ExpertModule
from deepseek.model.experts.arming import Arming, ArmingValue
from deepseek.model.experts.module import read_weights
from deepseek.model.experts.relevance import Relevance
from deepseek.packs.manifest import MOMENTS
from deepseek.packs.pack import ExpertPack, write_pack
from deepseek.packs.pack_file import PackFile
from deepseek.runner import Runner

NAMES = "abcde"
LAYERS = {"a": [3], "b": [1, 2, 3], "c": [2, 3], "d": [1], "e": [3]}
FIELDS = {"num_hidden_layers": 4, "hidden_size": 64, "num_attention_heads": 2, "head_dim": 64}


def compiled(loaded: Loaded) -> Runner:
    return CompiledRunner(loaded.model)


def on_torch(loaded: Loaded) -> Runner:
    return TorchRunner(loaded.model)


def on_stock(loaded: Loaded) -> Runner:
    return AttachedRunner(loaded.model)


RUNNERS = {"compiled": compiled, "torch": on_torch, "attached": on_stock}


def new_model(kind: str) -> Loaded:
    if kind == "attached":
        return Loaded(attached(tiny_family("gemma2")), tiny_tokenizer())
    return tiny_model(num_key_value_heads=1, **FIELDS)


def new_module(loaded: Loaded, name: str) -> ExpertModule:
    """Return a module whose gates fire at many tokens."""
    model = loaded.model
    torch.manual_seed(ord(name))
    hidden_size = model.config.get_text_config().hidden_size
    module = ExpertModule(name, LAYERS[name], hidden_size, 16).requires_grad_(False)
    for layer in module.layers:
        torch.nn.init.normal_(module.at(layer).down_proj, std=0.3)
        row = torch.randn(hidden_size + 1) * 0.3
        module.set_gate(layer, row, moments=torch.randn(MOMENTS, hidden_size) / 4)
    return module


def new_pack(loaded: Loaded, name: str) -> ExpertPack:
    return new_module(loaded, name).to_pack(loaded.model.experts.base, "Apache-2.0")


def size_of(kind: str, *names: str) -> int:
    """Return the bytes of some experts in the form that a runner uses."""
    loaded = new_model(kind)
    modules = [new_module(loaded, name) for name in names]
    return sum(module_bytes(m) if kind == "compiled" else m.nbytes for m in modules)


@contextmanager
def new_engine(kind: str, budget: int | None, plugged: str = "") -> Iterator[Engine]:
    loaded = new_model(kind)
    loaded.model.experts.weight_cache.limit = budget
    # The bits of PyTorch's products depend on the rest of the batch.
    most = 4 if kind == "compiled" else 1
    runner = RUNNERS[kind](loaded)
    with Engine(*loaded, runner, max_running=most, prefill_chunk=8) as engine:
        for name in plugged:
            engine.plug(new_pack(loaded, name))
        yield engine


def request(seed: int, arm: ArmingValue) -> Request:
    ids = tuple((7 * i * i + seed * i) % 80 + 3 for i in range(12 + seed))
    return Request(ids, Sampling(4), ExpertChoice(arm), ignore_end=True, logprobs=2)


def replies(engine: Engine, requests: list[Request]) -> list[object]:
    """Return all events of requests that are submitted at once."""
    generations = [engine.submit(one) for one in requests]
    return [list(generation) for generation in generations]


ARMS = st.sampled_from([(), ("a",), ("b",), ("c",), ("d", "e"), ("a", "d"), {"e": 0.5}, "auto"])


@pytest.mark.parametrize("kind", RUNNERS)
def test_an_unplugged_expert_leaves_memory_with_its_last_sequence(kind: str) -> None:
    with new_engine(kind, None, "ab") as engine:
        left = [weakref.ref(one.module) for one in engine.model.experts._state.plugged]
        before = replies(engine, [request(seed, "auto") for seed in (1, 2)])
        running = engine.submit(replace(request(1, "auto"), sampling=Sampling(40)))
        events = iter(running)
        next(events)
        engine.unplug("a")
        engine.unplug("b")
        rest = list(events)
        assert rest[-1].finish_reason == "length" and running.usage.completion_tokens == 40
        del running, events
        patience = time.monotonic() + 5
        while any(module() is not None for module in left) and time.monotonic() < patience:
            time.sleep(0.01)  # the engine's thread may still hold it
        assert [module() for module in left] == [None, None]
        for name in "ab":
            engine.plug(new_pack(engine, name))
        assert replies(engine, [request(seed, "auto") for seed in (1, 2)]) == before


STEPS = st.tuples(
    st.sampled_from(["plug", "unplug", "arm"]),
    st.lists(st.sampled_from(NAMES), min_size=1, max_size=2, unique=True),
    st.lists(ARMS, min_size=1, max_size=4),
)


@pytest.mark.parametrize("kind", RUNNERS)
@settings(max_examples=4)
@given(steps=st.lists(STEPS, min_size=2, max_size=5))
def test_replies_are_those_of_experts_in_memory(
    kind: str, steps: list[tuple[str, list[str], list[ArmingValue]]]
) -> None:
    budget = size_of(kind, "b", "c")
    with new_engine(kind, None, NAMES) as resident, new_engine(kind, budget, NAMES) as stored:
        cache = stored.model.experts.weight_cache
        assert cache.nbytes == 0
        for engine in (resident, stored):
            engine.arm("a")
        for action, names, arms in steps:
            for engine in (resident, stored):
                change(engine, action, names)
            plugged = {info.name for info in stored.experts()}
            possible = [arm for arm in arms if Arming.parse(arm).named.keys() <= plugged]
            requests = [request(seed, arm) for seed, arm in enumerate(possible)]
            assert replies(stored, requests) == replies(resident, requests)
            assert cache.nbytes <= budget and not cache.reserved_bytes


def change(engine: Engine, action: str, names: list[str]) -> None:
    plugged = {info.name for info in engine.experts()}
    if action == "arm":
        engine.arm([name for name in names if name in plugged])
        return
    for name in names:
        if action == "unplug" and name in plugged:
            engine.unplug(name)
        elif action == "plug" and name not in plugged:
            engine.plug(new_pack(Loaded(engine.model, engine.tokenizer), name))


@pytest.mark.parametrize("kind", RUNNERS)
def test_what_was_used_least_recently_leaves(kind: str) -> None:
    with new_engine(kind, size_of(kind, "a", "e"), "ade") as engine:
        cache = engine.model.experts.weight_cache
        loads = []
        for names in ["a", "e", "a", "d", "a", "e"]:
            replies(engine, [request(1, tuple(names))])
            loads.append(cache.loads)
        assert loads == [1, 2, 2, 3, 3, 4]
        assert engine.stats().expert_loads == 4
        assert engine.stats().expert_bytes == cache.nbytes == size_of(kind, "a", "e")
        engine.unplug("e")
        engine.unplug("a")


@pytest.mark.parametrize("kind", RUNNERS)
def test_sizes_are_known_before_the_weights_are_read(kind: str) -> None:
    loaded = new_model(kind)
    for name in NAMES:
        module = new_module(loaded, name)
        assert module.nbytes == module.ffn.nbytes
        assert module_bytes(module) == pack_module(module).nbytes


def test_running_requests_keep_theirs_and_others_wait() -> None:
    with new_engine("compiled", size_of("compiled", "a", "e"), "abcde") as engine:
        cache = engine.model.experts.weight_cache
        arms = [("a",), ("d", "e"), ("a",), ("c",), ("e",), ("d",)]
        asked = [request(seed, arm) for seed, arm in enumerate(arms)]
        assert len(replies(engine, asked)) == len(asked)
        wait_for(lambda: cache.reserved_bytes == 0)
        assert engine.stats().finished == {"length": 6}


def test_more_than_the_budget_holds_is_one_sentence() -> None:
    with new_engine("compiled", size_of("compiled", "a", "e"), NAMES) as engine:
        with pytest.raises(ConfigError, match="of a, b, c need") as refused:
            engine.submit(request(0, ("a", "b", "c")))
        assert is_one_sentence(str(refused.value))
        replies(engine, [request(0, ("a", "e"))])


def test_auto_takes_the_most_relevant_that_fit() -> None:
    loaded = new_model("compiled")
    experts = loaded.model.experts
    experts.weight_cache.limit = size_of("compiled", "a", "e")
    for place, name in enumerate("ade"):
        module = new_module(loaded, name)
        table_V = torch.full((loaded.model.config.vocab_size,), float(place))
        module.relevance = Relevance(table_V, 0.0, 0.0)
        experts.plug(module.to_pack(experts.base, "Apache-2.0"))
    runner = CompiledRunner(loaded.model)
    ids = list(range(3, 20))
    for how in ({"user_ids": ids}, {"document": ids}):
        chosen = experts.choose("auto", expert_bytes=runner.expert_bytes, **how)
        assert chosen is not None and set(chosen.names) == {"d", "e"}
        named = experts.choose(["auto", "a"], expert_bytes=runner.expert_bytes, **how)
        assert named is not None and set(named.names) == {"a", "e"}
        assert len(experts.choose("auto", **how).names) >= 2


@pytest.fixture
def packs(tmp_path: Path) -> Callable[[str], Path]:
    loaded = new_model("compiled")

    def write(name: str) -> Path:
        path = tmp_path / f"{name}.safetensors"
        write_pack(path, new_pack(loaded, name))
        return path

    return write


def test_a_file_that_is_gone_or_has_a_successor_still_serves(packs: Callable[[str], Path]) -> None:
    with new_engine("compiled", 1 << 20) as engine, new_engine("compiled", None, "ad") as resident:
        gone = packs("a")
        replaced = packs("d")
        engine.plug(gone)
        engine.plug(replaced)
        gone.unlink()
        packs("e").rename(replaced)
        asked = [request(2, ("a",)), request(3, ("d",))]
        assert replies(engine, asked) == replies(resident, asked)


@pytest.mark.parametrize("damage", ["cut short", "one bit", "another pack"])
def test_a_file_that_was_changed_fails_its_own_requests_alone(
    damage: str, packs: Callable[[str], Path]
) -> None:
    path = packs("e")
    other = packs("a").read_bytes()
    with new_engine("compiled", 1 << 20, "d") as engine:
        engine.plug(path)
        before = replies(engine, [request(1, ("d",))])
        content = bytearray(path.read_bytes())
        content[-1] ^= 1
        changed = {"cut short": content[:-9], "one bit": content, "another pack": other}[damage]
        with path.open("r+b") as file:  # in place: the engine's open file sees it
            file.truncate(len(changed))
            file.write(changed)
        failed, spared = replies(engine, [request(0, ("e",)), request(1, ("d",))])
        assert [spared] == before
        (event,) = failed
        assert event.refused and "changed after it was plugged" in event.error
        assert is_one_sentence(event.error)
        assert engine.model.experts.weight_cache.reserved_bytes == 0
        assert [info.name for info in engine.experts()] == ["d", "e"]
        engine.unplug("e")
        engine.plug(packs("e"))
        assert len(replies(engine, [request(0, ("e",))])[0]) == 4


def test_a_disk_that_fails_fails_the_requests_of_its_expert_alone(
    packs: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: object) -> None:
        raise OSError(errno.EIO, "Input/output error")

    with new_engine("compiled", 1 << 20, "d") as engine:
        engine.plug(packs("e"))
        before = replies(engine, [request(1, ("d",))])
        monkeypatch.setattr(PackFile, "read", broken)
        failed, spared = replies(engine, [request(0, ("e",)), request(1, ("d",))])
        assert [spared] == before
        assert "Input/output error" in (failed[-1].error or "")
        monkeypatch.undo()
        assert len(replies(engine, [request(0, ("e",))])[0]) == 4


def test_a_refused_pack_changes_nothing(packs: Callable[[str], Path]) -> None:
    path = packs("e")
    path.write_bytes(path.read_bytes()[:-1])
    with new_engine("compiled", 1 << 20, "d") as engine:
        with pytest.raises(PackError, match="is refused"):
            engine.plug(path)
        with pytest.raises(PackError, match="plugged already"):
            engine.plug(packs("d"))
        assert [info.name for info in engine.experts()] == ["d"]


def test_without_an_engine_experts_are_read_where_their_gates_fire() -> None:
    resident = new_model("torch")
    stored = new_model("torch")
    stored.model.experts.weight_cache.limit = size_of("torch", "b")
    for loaded in (resident, stored):
        for name in NAMES:
            loaded.model.experts.plug(new_pack(loaded, name))
    ids = torch.arange(3, 40)[None]
    for dtype in (torch.float32, torch.bfloat16):
        for arm in ["auto", "a", ("b", "d"), None]:
            both = [loaded.model.to(dtype) for loaded in (resident, stored)]
            for model in both:
                model.experts.arm(arm)
            with torch.no_grad():
                expected, logits = (model(ids).logits for model in both)
            assert torch.equal(expected, logits)
            cache = stored.model.experts.weight_cache
            assert cache.nbytes <= cache.limit
    for model in both:
        model.experts.arm("auto")
    generated = [m.generate(ids, max_new_tokens=5, pad_token_id=0) for m in both]
    assert torch.equal(*generated)


def test_one_that_is_larger_than_the_budget_is_one_sentence() -> None:
    loaded = new_model("torch")
    loaded.model.experts.weight_cache.limit = 1000
    loaded.model.experts.plug(new_pack(loaded, "b"))
    with loaded.model.experts.forced("b"), pytest.raises(ConfigError, match="of b need") as refused:
        loaded.model(torch.arange(3, 20)[None])
    assert is_one_sentence(str(refused.value))


@pytest.mark.parametrize("limit", [None, 1 << 30])
def test_a_budget_that_is_lifted_holds_for_experts_that_are_stored_already(limit) -> None:
    loaded = new_model("torch")
    experts = loaded.model.experts
    experts.weight_cache.limit = 1 << 20
    for name in ("a", "b"):
        experts.plug(new_pack(loaded, name))
    ids = torch.arange(3, 20)[None]
    with experts.forced("a"), torch.no_grad():
        expected = loaded.model(ids).logits
    experts.weight_cache.limit = limit
    for plugged in experts._state.plugged:
        experts.weight_cache._forms.pop(plugged.module, None)
    for name in ("b", "a"):
        with experts.forced(name), torch.no_grad():
            logits = loaded.model(ids).logits
    assert torch.equal(logits, expected)


def test_plugging_does_the_same_whatever_is_plugged(monkeypatch: pytest.MonkeyPatch) -> None:
    """Work that depends on the whole set of experts is deferred to the first request after it."""
    loaded = new_model("torch")
    experts = loaded.model.experts
    experts.weight_cache.limit = 1 << 20
    asked = []
    weight = Arming.weight
    monkeypatch.setattr(Arming, "weight", lambda *a: asked.append(a) or weight(*a))
    counts = []
    for number in range(40):
        module = new_module(loaded, "a")
        module.name = f"a{number}"
        experts.plug(module.to_pack(experts.base, "Apache-2.0"))
        counts.append(len(asked))
    assert counts == list(range(1, 41))
    assert [info.name for info in experts.list()] == sorted(f"a{n}" for n in range(40))


def test_the_budget_is_an_option_of_load(base_folder: Path, packs: Callable[[str], Path]) -> None:
    loaded = load(base_folder, expert_bytes=1 << 20)
    assert loaded.model.experts.weight_cache.limit == 1 << 20
    with pytest.raises(ConfigError, match="expert_bytes"):
        load(base_folder, expert_bytes=0)


def test_a_module_reads_its_weights_under_inference_as_otherwise() -> None:
    loaded = new_model("torch")
    loaded.model.experts.weight_cache.limit = 1 << 20
    loaded.model.experts.plug(new_pack(loaded, "a"))
    module = loaded.model.experts.choose("a").roster.modules[0]
    with torch.inference_mode():
        weights = module.form(read_weights)
    assert not any(parameter.is_inference() for parameter in weights.parameters())
