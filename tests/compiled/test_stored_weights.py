"""The compiled runner with weights that stay in their files, with 8, 4 or mixed bits: logits,
batches, chunked prompts, stored prefixes, experts, and whole generations by the engine.
"""

from pathlib import Path

import pytest
import torch
from tiny_expert import save_base, save_expert
from tiny_mixtures import MIXTURES

from deepseek.compiled.packing import pack_matrices
from deepseek.compiled.runner import CompiledRunner
from deepseek.compiled.weights import matrices_of
from deepseek.engine.load import load
from deepseek.engine.memory import memory_need
from deepseek.engine.request import Request
from deepseek.engine.sampler import Sampling
from deepseek.engine.start import start_engine
from deepseek.errors import DeviceError
from deepseek.export.quantize import quantize_model
from deepseek.kernels.int8_layout import GROUP_BYTES, GROUP_BYTES_4
from deepseek.model.pretrained import load_stored
from deepseek.model.transformer import DeepSeekModel
from deepseek.runner import Chunk

IDS = [(7 * i * i + 3 * i) % 90 for i in range(60)]
SHAPE = {"hidden_size": 128, "intermediate_size": 192, "head_dim": 64, "initializer_range": 0.1}


@pytest.fixture(scope="module")
def plain(tmp_path_factory) -> Path:
    return save_base(tmp_path_factory.mktemp("plain"), **SHAPE)


@pytest.fixture(scope="module", params=[8, 6, 4])
def folder(request, plain, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("quantised") / f"int{request.param}"
    quantize_model(plain, out, bits=request.param)
    return out


@pytest.fixture(scope="module")
def runner(folder) -> CompiledRunner:
    return CompiledRunner(load_stored(DeepSeekModel, folder))


def logits(runner, pieces=(60,)):
    state, rows, start = runner.start(None, 64), [], 0
    for size in pieces:
        rows.append(runner.forward([Chunk(state, IDS[start : start + size], size)]).logits_RV)
        start += size
    return torch.cat(rows)


@torch.no_grad()
def test_logits_are_those_of_the_dequantised_model(folder, runner):
    model = DeepSeekModel.from_pretrained(folder, dtype="float32")
    expected = model(torch.tensor([IDS])).logits[0]
    found = logits(runner)
    assert (found - expected).norm() < 0.03 * expected.norm()
    # The same integers packed from a model in memory give bit-identical logits.
    assert torch.equal(logits(CompiledRunner(model)), found)


def test_plain_weights_are_packed_from_their_files_as_from_memory(plain):
    stored = CompiledRunner(load_stored(DeepSeekModel, plain, "float32"))
    loaded = CompiledRunner(DeepSeekModel.from_pretrained(plain, dtype="float32"))
    torch.testing.assert_close(logits(stored), logits(loaded), rtol=1e-3, atol=1e-3)


def test_pieces_and_batches_do_not_change_a_bit(runner):
    whole = logits(runner)
    assert torch.equal(logits(runner, (1, 2, 30, 3, 24)), whole)
    assert torch.equal(logits(runner, (1,) * 60), whole)
    states = [runner.start(None, 64) for _ in range(9)]
    for i in range(20):
        chunks = [Chunk(state, [IDS[i]]) for state in states[: 1 + i % 9]]
        assert torch.equal(runner.forward(chunks).logits_RV[0], whole[i])


def test_a_stored_prefix_gives_the_same_bits(runner):
    source, state = runner.start(None, 64), runner.start(None, 64)
    output = runner.forward([Chunk(source, IDS[:40], store=[0])])
    state.extend(output.segments[0][0])
    rest = runner.forward([Chunk(state, IDS[40:], 20)]).logits_RV
    assert torch.equal(rest, logits(runner)[40:])


def test_an_engine_plugs_and_unplugs_an_expert(folder, tmp_path):
    pack = save_expert(load(folder, dtype="float32"), "always", tmp_path)
    request = Request(tuple(IDS[:20]), Sampling(12), ignore_end=True)
    with start_engine(folder) as engine:
        assert isinstance(engine.runner, CompiledRunner)
        before = [event.token_id for event in engine.submit(request)]
        engine.plug(pack)
        events = list(engine.submit(request))
        assert {event.expert for event in events} == {"always"}
        engine.unplug("always")
        assert [event.token_id for event in engine.submit(request)] == before
        assert len(engine.embed(IDS[:20])) == SHAPE["hidden_size"]


def test_packed_matrices_have_the_bits_of_the_checkpoint(folder):
    bits = int(folder.name.removeprefix("int"))
    sources = matrices_of(load_stored(DeepSeekModel, folder))
    sizes = {key: matrix.nbytes for key, matrix in pack_matrices(sources).items()}
    groups = SHAPE["hidden_size"] // 64
    wide = sources["out", 0][0].bits == 8
    assert sizes["out", 0] % ((GROUP_BYTES if wide else GROUP_BYTES_4) * groups) == 0
    found = {source.bits for key, (source, *_) in sources.items() if key[0] != "embed_tokens"}
    assert found == ({4, 8} if bits == 6 else {bits})
    assert sources["embed_tokens", 0][0].bits == 8
    need = memory_need(folder, torch.float32, 0, packed=True)
    assert abs(need.weights - sum(sizes.values())) < 0.1 * need.weights


def test_routed_experts_count_as_loaded_and_as_packed(tmp_path):
    fields = MIXTURES["dynamic"] | {"hidden_size": 64, "expert_dim": 128, "head_dim": 32}
    folder = save_base(tmp_path / "base", **fields)
    runner = CompiledRunner(load_stored(DeepSeekModel, folder, "float32"))
    loaded = sum(weight.nbytes for weight in runner.model.parameters())
    need = memory_need(folder, torch.float32, 0, packed=True)
    assert abs(need.weights - loaded - runner.weight_bytes) < 0.1 * need.weights


def test_what_does_not_fit_is_refused_before_it_is_loaded(plain, monkeypatch):
    reports: list[str] = []
    with start_engine(plain, cache_bytes=1 << 20, report=reports.append):
        assert "for keys and values" in reports[0]
    monkeypatch.setattr("deepseek.engine.memory.free_memory", lambda _: 1 << 20)
    monkeypatch.setattr("deepseek.engine.start.load", None)
    with pytest.raises(DeviceError, match=r"needs .* GiB .* are free; take"):
        start_engine(plain)
