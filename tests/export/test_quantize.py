"""A model written with quantised weights loads like any other, with nearly the same output."""

import copy
import re
import shutil

import pytest
import torch
from tiny_tokenizer import tiny_tokenizer

from deepseek.checkpoint.licence import read_licence, write_card
from deepseek.checkpoint.store import read_object, write_json
from deepseek.compiled.runner import CompiledRunner
from deepseek.engine.load import load
from deepseek.errors import CheckpointError, ConfigError
from deepseek.export import calibrate
from deepseek.export.calibrate import quantise_along, sample
from deepseek.export.estimate import estimate_quantisation, written_bytes
from deepseek.export.export import export_model
from deepseek.export.kept import KeptParts
from deepseek.export.quantize import quantize_model
from deepseek.export.sensitivity import costs
from deepseek.kernels.int8 import quantize
from deepseek.model.config import ModelConfig
from deepseek.model.pretrained import load_stored
from deepseek.model.stored import stored_matrices
from deepseek.model.transformer import DeepSeekModel
from deepseek.packs.manifest import BaseDescription
from deepseek.runner import Chunk
from deepseek.text.tokenizer import load_tokenizer


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    folder, tokenizer = tmp_path_factory.mktemp("source"), tiny_tokenizer()
    torch.manual_seed(0)
    config = ModelConfig(
        vocab_size=len(tokenizer),
        hidden_size=128,
        intermediate_size=192,
        num_hidden_layers=2,
        num_attention_heads=2,
        head_dim=64,
        eos_token_id=tokenizer.eos_token_id,
    )
    DeepSeekModel(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def test_it_is_small_loads_and_agrees(source, tmp_path):
    result = quantize_model(source, tmp_path / "int8")
    assert result.ratio < 0.27
    assert result.divergence < 1e-3
    exact, small = (
        load(source, dtype="float32").model,
        load(tmp_path / "int8", dtype="float32").model,
    )
    ids = torch.tensor([[5, 9, 40, 3, 8]])
    assert (exact(ids).logits - small(ids).logits).norm() < 0.03 * exact(ids).logits.norm()
    torch.testing.assert_close(small.lm_head.weight, small.embed_tokens.weight)
    assert not torch.equal(
        small.embed_tokens.int8.values, quantize(exact.embed_tokens.weight.detach()).values
    )
    logits = []
    # The dtype does not affect the integers.
    for model in (small, load(tmp_path / "int8", dtype="bfloat16").model):
        runner = CompiledRunner(model)
        logits.append(
            runner.forward([Chunk(runner.start(None, 8), ids[0].tolist(), ids.shape[1])]).logits_RV
        )
    assert torch.equal(*logits)


@pytest.mark.parametrize("bits", [8, 5.5])
def test_an_interrupted_call_goes_on_after_its_finished_layers(bits, source, tmp_path, monkeypatch):
    monkeypatch.setenv("DEEPSEEK_HOME", str(tmp_path / "home"))
    quantize_model(source, tmp_path / "whole", bits=bits)
    compute = calibrate.quantised_layer
    layers = []

    def stops_at_the_last(model, hidden_BTD, layer, *rest):
        layers.append(layer)
        if layers == [0, 1]:
            raise KeyboardInterrupt
        return compute(model, hidden_BTD, layer, *rest)

    monkeypatch.setattr(calibrate, "quantised_layer", stops_at_the_last)
    with pytest.raises(KeyboardInterrupt):
        quantize_model(source, tmp_path / "stopped", bits=bits)
    assert not (tmp_path / "stopped").exists()
    monkeypatch.setattr("deepseek.export.quantize.sample", None)  # texts and bits are cached too
    monkeypatch.setattr("deepseek.export.quantize.costs", None)
    quantize_model(source, tmp_path / "stopped", bits=bits)
    assert layers == [0, 1, 1]
    first, second = (tmp_path / name / "model.safetensors" for name in ("whole", "stopped"))
    assert first.read_bytes() == second.read_bytes()
    assert list((tmp_path / "home" / "quantising").iterdir()) == []


def test_what_was_kept_of_other_bits_is_not_taken(source, tmp_path, monkeypatch):
    monkeypatch.setenv("DEEPSEEK_HOME", str(tmp_path / "home"))
    quantize_model(source, tmp_path / "whole", bits=4)
    with monkeypatch.context() as patch:
        patch.setattr("deepseek.export.quantize._divergence", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            quantize_model(source, tmp_path / "stopped", bits=8)
    quantize_model(source, tmp_path / "again", bits=4)
    first, second = (tmp_path / name / "model.safetensors" for name in ("whole", "again"))
    assert first.read_bytes() == second.read_bytes()


def test_what_was_kept_under_another_config_is_not_taken(source, tmp_path, monkeypatch):
    monkeypatch.setenv("DEEPSEEK_HOME", str(tmp_path / "home"))
    base = tmp_path / "base"
    shutil.copytree(source, base)
    with monkeypatch.context() as patch:
        patch.setattr("deepseek.export.quantize._divergence", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            quantize_model(base, tmp_path / "stopped")
    config = read_object(base / "config.json")
    write_json(base / "config.json", config | {"rms_norm_eps": 0.5})
    quantize_model(base, tmp_path / "resumed")
    monkeypatch.setenv("DEEPSEEK_HOME", str(tmp_path / "other"))
    quantize_model(base, tmp_path / "whole")
    first, second = (tmp_path / name / "model.safetensors" for name in ("whole", "resumed"))
    assert first.read_bytes() == second.read_bytes()


def test_the_terms_of_the_base_go_along(source, tmp_path):
    base = tmp_path / "base"
    shutil.copytree(source, base)
    write_card(base, "gemma", "https://example.org/terms", "A model.")
    for name in ("LICENSE.txt", "NOTICE", "GEMMA_TERMS.md"):
        (base / name).write_text(name)
    quantize_model(base, tmp_path / "int8")
    assert read_licence(tmp_path / "int8") == read_licence(base)
    assert read_licence(base).restricted
    for name in ("LICENSE.txt", "NOTICE", "GEMMA_TERMS.md"):
        assert (tmp_path / "int8" / name).read_text() == name
    # A pack made for the quantised model has the licence too.
    assert BaseDescription.of(tmp_path / "int8", "int8").licence == "LicenseRef-Gemma"


@pytest.mark.parametrize("way", ["save", "export", "quantize"])
def test_sampling_values_that_greedy_decoding_does_not_read_stay(way, source, tmp_path):
    """Published models have such values, which Hugging Face refuses to save once it built them."""
    base, out = tmp_path / "base", tmp_path / "out"
    shutil.copytree(source, base)
    settings = {"temperature": 0.6, "top_p": 0.9, "do_sample": False, "eos_token_id": 2}
    write_json(base / "generation_config.json", settings)
    model = load(base, dtype="float32").model
    if way == "save":
        model.save_pretrained(out)
    elif way == "export":
        export_model(base, out, "hf", dtype="float32")
    else:
        quantize_model(base, out)
    assert settings.items() <= read_object(out / "generation_config.json").items()
    written = DeepSeekModel.from_pretrained(out, dtype="float32")
    ids = torch.tensor([[5, 9, 40]])
    for sampled in (None, True):
        texts = []
        for one in (model, written):
            torch.manual_seed(0)
            texts.append(one.generate(ids, max_new_tokens=8, do_sample=sampled))
        # 8 bits change the probabilities a little, and so a drawn token now and then.
        assert torch.equal(*texts) or (sampled and way == "quantize")


def test_mistakes_are_told(source, tmp_path):
    with pytest.raises(ConfigError, match="exists already"):
        quantize_model(source, tmp_path)
    quantize_model(source, tmp_path / "int8")
    with pytest.raises(ConfigError, match="8-bit weights already"):
        quantize_model(tmp_path / "int8", tmp_path / "again")


def test_bits_between_are_those_on_average_and_cost_less_than_4(source, tmp_path):
    torch.manual_seed(2)
    model = load(source, dtype="float32").model
    # One layer has a larger output than the other, so that its matrices get more bits.
    for projection in (model.layers[1].attention.o_proj, model.layers[1].feed_forward.down_proj):
        projection.weight.data *= 4
    model.save_pretrained(tmp_path / "uneven")
    load_tokenizer(source).save_pretrained(tmp_path / "uneven")
    divergences, bits = [], {}
    for mean in (4, 6, 8):
        out = tmp_path / f"of-{mean}"
        divergences.append(quantize_model(tmp_path / "uneven", out, bits=mean).divergence)
        matrices = stored_matrices(load(out, stored=True).model).values()
        bits[mean] = {m.name: m.bits for m in matrices if m.name.startswith("layers.")}
        sizes = {m.name: m.shape[0] * m.shape[1] for m in matrices}
        assert {m.bits for m in matrices if not m.name.startswith("layers.")} == {8}
        average = sum(sizes[name] * found for name, found in bits[mean].items())
        assert average / sum(sizes[name] for name in bits[mean]) <= mean
    assert divergences == sorted(divergences, reverse=True)
    assert set(bits[6].values()) == {4, 8}
    assert len({bits[6][f"layers.1.attention.{one}_proj.weight"] for one in "qkv"}) == 1


@torch.no_grad()
def test_the_estimated_cost_of_4_bits_is_the_measured_divergence(source, tmp_path):
    """Each group alone, quantised to 4 bits, against the divergence after the same first tokens."""
    model = load_stored(DeepSeekModel, source, "float32")
    texts = sample(model, 2000, 2)
    exact = model(texts[:, :1]).logits.double().log_softmax(-1)
    done = dict(quantise_along(model, texts, lambda _: 4, KeptParts(None)))
    for cost in costs(model, texts):
        twin = load(source, dtype="float32").model
        for name in cost.names:
            twin.get_parameter(name).copy_(done[name].float())
        rough = twin(texts[:, :1]).logits.double().log_softmax(-1)
        measured = float((exact.exp() * (exact - rough)).sum(-1).mean())

        assert cost.divergence == pytest.approx(measured, rel=0.2)


@pytest.mark.parametrize("bits", [8, 6, 4])
@pytest.mark.parametrize("experts", [0, 6])
@pytest.mark.parametrize("large", [False, True])
def test_an_estimate_changes_nothing_and_tells_the_size(
    bits, experts, large, source, tmp_path, monkeypatch
):
    monkeypatch.setenv("DEEPSEEK_HOME", str(tmp_path / "home"))
    if large:  # no matrix stays in memory
        monkeypatch.setattr("deepseek.model.stored.KEPT_SHARE", 0)
    base = tmp_path / "base"
    config = ModelConfig.from_pretrained(source)
    DeepSeekModel(
        ModelConfig(**(config.to_dict() | {"num_experts": experts, "expert_dim": 64}))
    ).save_pretrained(base)
    load_tokenizer(source).save_pretrained(base)
    before = sorted(tmp_path.rglob("*"))
    estimate = estimate_quantisation(base, tmp_path / "out", bits=bits)
    assert sorted(tmp_path.rglob("*")) == before
    assert estimate.seconds > 0 and 1e8 < estimate.memory < 1e10
    assert re.fullmatch(
        r"0\.00 GB to write, about \d+\.\d minutes on cpu; memory .* GB", str(estimate)
    )
    size = written_bytes(load_stored(DeepSeekModel, base, "float32"), bits)
    written = quantize_model(base, tmp_path / "out", bits=bits).num_bytes
    # Between 4 and 8 bits, the last group of matrices that still fits ends below the mean.
    assert size == written if bits != 6 else 0.9 * size <= written <= size


def test_an_estimate_is_refused_like_the_quantisation(source, tmp_path):
    with pytest.raises(ConfigError, match="exists already"):
        estimate_quantisation(source, tmp_path)
    quantize_model(source, tmp_path / "int8")
    with pytest.raises(ConfigError, match="8-bit weights already"):
        estimate_quantisation(tmp_path / "int8", tmp_path / "again")
    with pytest.raises(ConfigError, match="at least 4 and at most 8"):
        estimate_quantisation(source, tmp_path / "out", bits=3)


@pytest.mark.parametrize("bits", [3, 8.5, float("nan")])
def test_other_numbers_of_bits_are_refused(source, tmp_path, bits):
    with pytest.raises(ConfigError, match="at least 4 and at most 8"):
        quantize_model(source, tmp_path / "out", bits=bits)
    assert not (tmp_path / "out").exists()


def test_a_checkpoint_without_its_scales_is_refused(source, tmp_path):
    from safetensors.torch import load_file, save_file

    quantize_model(source, tmp_path / "int8")
    path = tmp_path / "int8" / "model.safetensors"
    tensors = load_file(path)
    del tensors["embed_tokens.weight_scale"]
    save_file(tensors, path)
    with pytest.raises(CheckpointError, match="scales"):
        load(tmp_path / "int8")


@torch.no_grad()
@pytest.mark.parametrize("bits", [8, 4])
def test_rounding_suits_what_the_model_meets(source, tmp_path, bits):
    torch.manual_seed(1)
    model = load(source, dtype="float32").model
    words = model.embed_tokens.weight.data
    # Low rank, as in real models.
    words.copy_(torch.randn(len(words), 8) @ torch.randn(8, words.shape[1]) * 0.1)
    model.save_pretrained(tmp_path / "few")
    stored = load_stored(DeepSeekModel, tmp_path / "few", "float32")
    before = torch.get_rng_state()
    texts = sample(stored, 16, 32)
    assert texts.shape == (16, 32) and torch.equal(texts, sample(stored, 16, 32))
    assert torch.equal(torch.get_rng_state(), before)
    done = dict(quantise_along(stored, texts, lambda _: bits, KeptParts(None)))
    assert set(done) == {matrix.name for matrix in stored_matrices(stored).values()}
    ids = sample(stored, 20, 32)[16:]
    exact, errors = model(ids).logits, []
    for suited in (False, True):
        twin = copy.deepcopy(model)
        # Not tied to the embedding.
        twin.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.detach().clone())
        for name, matrix in done.items():
            path = name.removesuffix(".weight").replace("embed_tokens", "lm_head")
            layer = twin.get_submodule(path)
            nearest = quantize(layer.weight.detach(), bits=bits)
            layer.weight.data = (matrix if suited else nearest).float()
        errors.append(float((twin(ids).logits - exact).norm()))
    assert errors[1] < 0.8 * errors[0]
