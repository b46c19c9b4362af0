"""The model, its experts, the engine and training on an accelerator, compared with the CPU.

`pytest -m gpu` runs them if there is a CUDA device; otherwise they are skipped.
`pytest -m gpu --device cpu` runs them on the CPU, `--device fakegpu` on a fake GPU (`fake_gpu.py`),
which shows that no tensor is on the wrong device.
"""

import re
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path

import fake_gpu
import numpy as np
import pytest
import torch
from tiny_expert import save_base, save_expert
from torch import Tensor
from train.conftest import sentence

from deepseek import sparse_attention
from deepseek.data import Batch, Document, RowLoader, TokenShards
from deepseek.device.choose import choose_device
from deepseek.device.memory import free_memory, peak_memory
from deepseek.engine.engine import Engine
from deepseek.engine.load import Loaded, load
from deepseek.engine.request import Request
from deepseek.engine.sampler import Sampling
from deepseek.engine.start import start_engine
from deepseek.engine.torch_runner import TorchRunner
from deepseek.errors import DeviceError
from deepseek.kernels.cross_entropy import CandidateHead
from deepseek.model.experts import ExpertModule
from deepseek.runner import Chunk, RunnerOutput
from deepseek.train.gates.inputs import blend, gate_inputs
from deepseek.train.jobs.adapt import LastLayersTask, stream_into
from deepseek.train.jobs.arguments import ExpertArguments
from deepseek.train.jobs.expert_task import ExpertTask
from deepseek.train.jobs.language import LanguageTask
from deepseek.train.loop.loop import Task
from deepseek.train.loop.losses import held_out_loss
from deepseek.train.loop.optim import OptimConfig, adamw, clip_gradients
from deepseek.train.loop.runs import Run, run_once
from deepseek.train.rl.rlpo_config import RLPOConfig
from deepseek.train.rl.rollout import Responses
from deepseek.train.rl.update import RLPOState, rlpo_update
from deepseek.train.text import trunk_cache
from deepseek.train.text.trunk_cache import TrunkCache, run_trunk

pytestmark = pytest.mark.gpu

IDS = torch.arange(1, 25).view(2, 12)
LENGTH = 16
MOE = {"num_experts": 4, "max_experts": 3, "expert_dim": 16, "routing_strategy": "dynamic"}


@pytest.fixture(scope="module")
def device(request: pytest.FixtureRequest) -> Iterator[str]:
    """The device to test on."""
    wanted = str(request.config.getoption("--device"))
    if wanted.startswith("cuda") and not torch.cuda.is_available():
        pytest.skip("there is no CUDA device")
    with pytest.MonkeyPatch.context() as patch:
        if wanted == fake_gpu.NAME:
            # The fake GPU has no own generator.
            patch.setattr(torch, "Generator", lambda *_: fake_gpu.generator())
            wanted = "auto"
        yield wanted


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small base and an expert `one` for it."""
    place = save_base(tmp_path_factory.mktemp("gpu") / "base")
    save_expert(load(place, device="cpu"), "one", place.parent)
    return place


@pytest.fixture
def loaded(folder: Path, device: str) -> Loaded:
    return load(folder, dtype="float32", device=device)


@pytest.fixture(scope="module")
def rows(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> RowLoader:
    """Packed rows of sentences."""
    documents = [Document(sentence(seed, 12), f"d{seed}") for seed in range(12)]
    tokenizer = load(folder, device="cpu").tokenizer
    shards = TokenShards.build(documents, tokenizer, tmp_path_factory.mktemp("shards"))
    return RowLoader(shards, 2, LENGTH, seed=0)


def on_processor(folder: Path, **given: object) -> Loaded:
    return load(folder, dtype="float32", device="cpu", **given)  # type: ignore[arg-type]


def logits_of(loaded: Loaded) -> Tensor:
    with torch.no_grad():
        return loaded.model(IDS.to(loaded.model.device)).logits.float().cpu()


def assert_near(found: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(found.float().cpu(), expected.float(), atol=1e-4, rtol=1e-4)


def losses_of_steps(task: Task[Batch], batch: Batch, steps: int = 8) -> list[float]:
    """Return the losses of some optimizer steps on one batch."""
    optimizer = adamw(task.parameters, OptimConfig(learning_rate=1e-2))
    losses = []
    for _ in range(steps):
        loss = task.loss(batch, 0).loss
        optimizer.zero_grad()
        loss.backward()
        clip_gradients(task.parameters.values(), 1.0)
        optimizer.step()
        losses.append(float(loss.detach()))
    return losses


def test_the_model_is_where_it_was_asked_for(loaded: Loaded, device: str) -> None:
    place = choose_device(device)
    assert loaded.model.device == place
    assert {parameter.device for parameter in loaded.model.parameters()} == {place}
    assert peak_memory(place) >= 0
    assert free_memory(place) > 1 << 20


@pytest.mark.parametrize("changes", [{}, MOE, {"positional_encoding": "dpe"}])
def test_a_forward_pass_gives_the_logits_of_the_processor(
    tmp_path: Path, device: str, changes: dict[str, object]
) -> None:
    base = save_base(tmp_path / "base", **changes)
    loaded = load(base, dtype="float32", device=device)
    assert_near(logits_of(loaded), logits_of(on_processor(base)))


def test_bf16_stays_near(folder: Path, device: str) -> None:
    rounded = logits_of(load(folder, dtype="bfloat16", device=device))
    exact = logits_of(on_processor(folder))
    assert float((rounded - exact).abs().mean()) < 0.05 * float(exact.abs().mean())


@pytest.mark.parametrize("num_rounds", [1, 2])
@pytest.mark.parametrize("exact_tokens", [0, 40])
def test_sparse_attention_hashes_on_the_device(
    device: str, num_rounds: int, exact_tokens: int
) -> None:
    query, key, value = (torch.randn(1, heads, 64, 16) for heads in (4, 2, 2))
    place = choose_device(device)
    options: dict[str, int] = {"num_rounds": num_rounds, "exact_tokens": exact_tokens}
    options |= {"num_buckets": 4, "probes": 2, "bucket_window": 3, "local_window": 5}
    found = sparse_attention(query.to(place), key.to(place), value.to(place), **options)
    assert found.device == place
    assert_near(found, sparse_attention(query, key, value, **options))


def test_an_expert_is_plugged_and_leaves_no_trace(folder: Path, loaded: Loaded) -> None:
    before = logits_of(loaded)
    loaded.model.experts.plug(folder.parent / "one.safetensors")
    plugged = logits_of(loaded)
    assert not torch.equal(plugged, before)
    assert_near(
        plugged, logits_of(on_processor(folder, experts=[folder.parent / "one.safetensors"]))
    )
    loaded.model.experts.unplug("one")
    assert torch.equal(logits_of(loaded), before)


def test_generate_writes_the_text_of_the_processor(folder: Path, loaded: Loaded) -> None:
    written = [
        one.model.generate(IDS[:1].to(one.model.device), max_new_tokens=6, do_sample=False).cpu()
        for one in (loaded, on_processor(folder))
    ]
    assert torch.equal(*written)


def test_requests_are_served_together(folder: Path, loaded: Loaded) -> None:
    sampling = Sampling(max_new_tokens=6, temperature=0.0)
    requests = [Request(tuple(ids.tolist()), sampling, ignore_end=True) for ids in IDS]
    written = []
    for one in (loaded, on_processor(folder)):
        one.model.experts.plug(folder.parent / "one.safetensors")
        with Engine(one.model, one.tokenizer) as engine:
            streams = [engine.submit(request) for request in requests]
            written.append([[event.token_id for event in stream] for stream in streams])
            assert len(engine.embed([1, 2, 3])) == one.model.config.hidden_size
        one.model.experts.unplug("one")
    assert written[0] == written[1]


def test_the_engine_starts_there(folder: Path, device: str) -> None:
    with start_engine(folder, device=device) as engine:
        assert engine.model.device == choose_device(device)


def test_held_out_loss_is_that_of_the_processor(
    folder: Path, loaded: Loaded, rows: RowLoader
) -> None:
    expected = held_out_loss(on_processor(folder).model, rows.batches())
    assert held_out_loss(loaded.model, rows.batches()).loss == pytest.approx(expected.loss, 1e-4)


@pytest.mark.parametrize("share", [0.25, 0.0], ids=["on the device", "on the host"])
def test_the_trunk_cache_returns_what_was_computed(
    loaded: Loaded, rows: RowLoader, tmp_path: Path, share: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(trunk_cache, "DEVICE_SHARE", share)
    model = loaded.model
    width = model.config.hidden_size
    ids = np.arange(3)
    cache = TrunkCache(tmp_path, {"base": "b"}, ids, LENGTH, width, torch.float32)
    cache.fill(rows, partial(run_trunk, model, 1), 2, lambda *_: None)
    cache.place(model.device)
    batch = rows.rows([2, 0])
    found = cache.read(batch.row_ids)
    assert found.device == (model.device if share else torch.device("cpu"))
    assert_near(found, run_trunk(model, 1, batch).cpu())


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_an_expert_learns(
    folder: Path, device: str, rows: RowLoader, tmp_path: Path, dtype: str
) -> None:
    model = load(folder, dtype=dtype, device=device).model.requires_grad_(False)
    module = ExpertModule.beside(model.layers, "new", [1, 2], 16, seed=0)
    batch = rows.rows([0, 1])
    candidates = batch.labels[batch.labels >= 0].unique()
    head = CandidateHead(model.lm_head.weight, candidates, 16, 0, dtype=model.dtype)
    stream = partial(run_trunk, model, 1)
    task = ExpertTask(model, module, head, stream=stream, held_out=[batch], held_out_stream=stream)
    before = task.evaluate()["held_out_loss"]
    losses = losses_of_steps(task, batch)
    assert losses[-1] < losses[0]
    assert task.evaluate()["held_out_loss"] < before
    assert {parameter.device for parameter in module.parameters()} == {model.device}


def test_gate_inputs_are_those_of_the_processor(
    folder: Path, loaded: Loaded, rows: RowLoader
) -> None:
    found, expected = (
        next(iter(gate_inputs(one.model, [rows.rows([0, 1])], [1, 2])))
        for one in (loaded, on_processor(folder))
    )
    for layer in (1, 2):
        assert_near(found[layer].smooth_BTD, expected[layer].smooth_BTD)
        torch.testing.assert_close(
            blend(found[layer]).second, blend(expected[layer]).second, atol=1e-2, rtol=1e-3
        )


def test_a_mixture_is_scored(tmp_path: Path, device: str, rows: RowLoader) -> None:
    model = load(save_base(tmp_path / "base", **MOE), dtype="float32", device=device).model
    batch = rows.rows([0, 1])
    task = LanguageTask(model.train(), {"text": [batch]})
    figures = task.evaluate()
    assert 0 < figures["held_out_loss"] < 20 and figures["held_out_max_violation"] >= 0
    assert task.loss_on([batch]) == pytest.approx(figures["held_out_loss"], rel=1e-4)


@pytest.mark.parametrize("mode", ["last-n", "full"])
def test_an_adaptation_learns(loaded: Loaded, rows: RowLoader, mode: str) -> None:
    model = loaded.model
    batch = rows.rows([0, 1])
    if mode == "full":
        assert losses_of_steps(LanguageTask(model.train(), {"text": [batch]}), batch)[-1] < 4.0
        return
    model.requires_grad_(False)
    candidates = batch.labels[batch.labels >= 0].unique()
    head = CandidateHead(model.lm_head.weight, candidates, 16, 0)
    stream = partial(stream_into, model, 2)
    losses = losses_of_steps(LastLayersTask(model, 2, head, stream, [batch], stream), batch)
    assert losses[-1] < losses[0]


@pytest.mark.parametrize("changes", [{}, MOE], ids=["dense", "mixture"])
def test_alignment_makes_a_step(tmp_path: Path, device: str, changes: dict[str, object]) -> None:
    def even(responses: Responses) -> Tensor:
        return (responses.mask_BT * (responses.targets_BT % 2 == 0)).sum(1)

    model = load(save_base(tmp_path / "base", **changes), dtype="float32", device=device).model
    config = RLPOConfig(new_tokens=3, minibatch=4, epochs=1, value_rollouts=0)
    state = RLPOState(model, even, config)
    metrics = rlpo_update(model, even, {"prompts": [[3, 4]] * 8}, state=state)
    assert metrics["skipped"] == 0
    assert torch.isfinite(torch.tensor([metrics["loss"], metrics["kl"]])).all()


def test_a_request_that_does_not_fit_loses_nothing_else(
    folder: Path, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It fails with one sentence; the engine, its experts and the next request are unaffected."""
    request = Request(tuple(range(1, 9)), Sampling(max_new_tokens=4), ignore_end=True)
    long = Request(tuple(range(1, 31)), Sampling(max_new_tokens=4), ignore_end=True)
    pack = folder.parent / "one.safetensors"
    with start_engine(str(folder), experts=[pack], device=device, dtype="float32") as engine:
        before = [event.token_id for event in engine.submit(request)]
        place = choose_device(device)
        forward = TorchRunner.forward

        def hungry(runner: TorchRunner, chunks: Sequence[Chunk]) -> RunnerOutput:
            if sum(len(chunk.ids) for chunk in chunks) > 20:
                torch.empty(1 << 50, device=place)
            return forward(runner, chunks)

        monkeypatch.setattr(TorchRunner, "forward", hungry)
        last = list(engine.submit(long))[-1]
        assert last.finish_reason == "error"
        assert last.error is not None
        assert re.fullmatch(r"the device is out of memory \(.*\); send .*--cache-gib", last.error)
        assert [event.token_id for event in engine.submit(request)] == before
        assert [expert.name for expert in engine.experts()] == ["one"]


class Hungry:
    """A job that needs more memory than any device has."""

    def __init__(self, request: ExpertArguments, folder: Path, **_: object) -> None:
        self.device = choose_device(request.device)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "finished part").touch()

    def run(self) -> None:
        torch.empty(1 << 50, device=self.device)

    def estimate(self) -> str:
        torch.empty(1 << 50, device=self.device)
        return ""


def test_out_of_memory_is_one_sentence_and_nothing_is_lost(device: str, tmp_path: Path) -> None:
    request = ExpertArguments.read(name="x", from_folder=tmp_path, device=device)
    places = (tmp_path / "made", tmp_path / "run")

    def run(dry_run: bool) -> None:
        run_once(Hungry, request, Run(request.as_json(), *places, quiet=True, dry_run=dry_run))

    with pytest.raises(DeviceError, match=r"out of memory.*--batch-rows.*--layers last:3\.$"):
        run(dry_run=False)
    assert (tmp_path / "run" / "finished part").exists()
    assert not (tmp_path / "made").exists()
    with pytest.raises(DeviceError, match=r"out of memory.*; take fewer --batch-rows"):
        run(dry_run=True)
