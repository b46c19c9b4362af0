"""Gates in closed form: the algebra, what the thresholds guarantee, and independence of other
modules.
"""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from deepseek.checkpoint.store import home
from deepseek.data import Batch
from deepseek.errors import DataError, TrainError
from deepseek.model.experts import ExpertModule
from deepseek.model.experts.gate import RIDGE
from deepseek.model.passes import resume
from deepseek.model.transformer import DeepSeekModel
from deepseek.text.tokenizer import load_tokenizer
from deepseek.train.gates import public_text as public_module
from deepseek.train.gates.calibrate import (
    OwnText,
    calibrate,
    crossed,
    detecting_row,
    factored,
    scores,
    solve_gate,
)
from deepseek.train.gates.inputs import HALF_LIFE, GateInputs, Moments, blend, gate_inputs, smoothed
from deepseek.train.gates.public_text import (
    ROW_LENGTH,
    installed_texts,
    measure_public,
    public_statistics,
    sampled_rows,
)
from deepseek.train.text.trunk_cache import run_trunk

LAYERS = (1, 3)


def cloud(seed: int, centre: float, tokens: int = 4000, width: int = 12) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(tokens, width, generator=generator)
    x[:, seed % width] += centre
    return x


def moments_of(x_ND: Tensor) -> Moments:
    return Moments.of(x_ND[None], torch.ones(1, len(x_ND), dtype=torch.bool))


def rows(low: int, high: int, seed: int, count: int = 12, length: int = 64) -> Iterator[Batch]:
    """Yield batches of rows with two packed documents each, with token ids in [low, high)."""
    generator = torch.Generator().manual_seed(seed)
    positions = torch.cat([torch.arange(length // 2)] * 2).expand(2, length)
    for index in range(count):
        ids = torch.randint(low, high, (2, length), generator=generator)
        yield Batch(ids, ids, positions, torch.arange(2) + 2 * index)


@pytest.fixture(scope="module")
def model(tiny_base: Path) -> DeepSeekModel:
    return DeepSeekModel.from_pretrained(tiny_base, dtype="float32").requires_grad_(False)


@pytest.fixture(scope="module")
def public(model: DeepSeekModel) -> public_module.PublicStatistics:
    ids = torch.cat([batch.input_ids for batch in rows(160, 320, seed=9, count=20)])
    return measure_public(model, ids, LAYERS)


def module_on(model: DeepSeekModel, name: str = "own") -> ExpertModule:
    module = ExpertModule.beside(model.layers, name, LAYERS, width=16)
    torch.manual_seed(3)
    for layer in LAYERS:
        torch.nn.init.normal_(module.at(layer).down_proj, std=0.05)
    return module


def test_the_detecting_row_is_ridge_regression_on_plus_and_minus_one() -> None:
    own, other = cloud(0, 1.0), cloud(1, 1.0, tokens=1000)
    first, second = moments_of(own), moments_of(other)
    row = detecting_row(first, second)
    x = torch.cat([torch.cat([own, other]), torch.ones(5000, 1)], dim=1).double()
    share = torch.cat([torch.full((4000,), 1 / 4000), torch.full((1000,), 1 / 1000)]).double()
    target = torch.cat([torch.ones(4000), -torch.ones(1000)]).double()
    penalty = RIDGE * (first.mean_second + second.mean_second).diagonal().mean()
    gradient = x.T @ (share * (x @ row - target)) + penalty * row
    assert gradient.abs().max() < 1e-6


def test_factors_and_what_they_leave_make_up_the_covariance() -> None:
    mixed = cloud(0, 1.0, width=16) @ torch.randn(
        16, 16, generator=torch.Generator().manual_seed(1)
    )
    mean, left, *factors = factored(moments_of(mixed))
    covariance = torch.cov(mixed.double().T, correction=0)
    found = left.diag() + torch.stack(factors).T @ torch.stack(factors)
    assert torch.allclose(mean, mixed.double().mean(0), atol=1e-5)
    assert torch.allclose(found.diagonal(), covariance.diagonal(), rtol=1e-4)
    assert (found - covariance).norm() < 0.3 * covariance.norm()  # the largest 8 of 16 directions
    narrow = moments_of(cloud(0, 1.0, width=6))  # fewer directions than factors: exact
    rows = torch.stack(list(factored(narrow)[2:]))
    whole = narrow.mean_second[:-1, :-1] - torch.outer(narrow.mean[:-1], narrow.mean[:-1])
    assert torch.allclose(rows.T @ rows, whole, atol=1e-6)


@pytest.mark.parametrize("alpha", [0.01, 0.05])
def test_threshold_and_scale_are_what_they_say(alpha: float) -> None:
    own, sample = cloud(1, 3.0), cloud(2, 0.0).view(40, 100, 12)
    gate = solve_gate(
        OwnText(moments_of(own), cloud(13, 3.0)), moments_of(cloud(3, 0.0)), sample, alpha
    )
    detect = (scores(sample, gate.weight) - gate.threshold) / gate.scale
    assert float((detect > 0).float().mean()) == pytest.approx(alpha, abs=1e-3)
    assert float(
        ((scores(cloud(13, 3.0), gate.weight) - gate.threshold) / gate.scale).median()
    ) == pytest.approx(1.0)
    assert gate.false_positives == pytest.approx(alpha, abs=0.6 * alpha)


def test_false_positives_are_measured_on_rows_that_set_no_threshold() -> None:
    scores_RS = torch.rand(10, 100, generator=torch.Generator().manual_seed(0))
    scores_RS[0::2] += (
        5  # one half lies entirely above the other, so thresholds of the low half fail on it
    )
    assert crossed(scores_RS, 0.01) == pytest.approx(0.5)


def test_smoothed_inputs_forget_and_restart_with_documents() -> None:
    x = torch.randn(1, 6, 3)
    found = smoothed(x, torch.tensor([[0, 1, 2, 3, 0, 1]]))
    keep = 0.5 ** (1 / HALF_LIFE)
    weights = torch.tensor([keep**2, keep, 1.0])  # the first token of a document does not count
    assert torch.allclose(found.smooth_BTD[0, 3], weights @ x[0, 1:4] / weights.sum(), atol=1e-6)
    assert torch.allclose(found.smooth_BTD[0, 5], x[0, 5])
    assert found.real_BT.tolist() == [[False, True, True, True, False, True]]


def test_streams_computed_before_give_the_same_inputs(model: DeepSeekModel) -> None:
    (batch,) = list(rows(0, 320, 5, count=1))[:1]
    (computed,) = gate_inputs(model, [batch], (2, 3))
    (read,) = gate_inputs(model, [batch], (2, 3), lambda one: run_trunk(model, 2, one))
    for layer in (2, 3):
        assert torch.equal(computed[layer].x_BTD, read[layer].x_BTD)


def test_moments_count_what_they_saw() -> None:
    x = torch.randn(2, 5, 3)
    found = blend(GateInputs(x, x, torch.ones(2, 5, dtype=torch.bool)))
    assert found.count == pytest.approx(10)
    assert torch.allclose(found.mean[:-1].float(), x.flatten(0, 1).mean(0), atol=1e-6)
    assert torch.equal((found + Moments.none(3)).second, found.second)


@pytest.mark.usefixtures("fp32")
def test_gate_inputs_are_what_the_experts_see(model: DeepSeekModel) -> None:
    batch = next(rows(0, 8, seed=0))
    inputs = next(gate_inputs(model, [batch], LAYERS))
    hidden = model(
        batch.input_ids, position_ids=batch.position_ids, output_hidden_states=True
    ).hidden_states
    step = resume(model, hidden[3], 3, position_ids=batch.position_ids)
    assert torch.allclose(inputs[3].x_BTD, step.gate_input(), atol=1e-5)


def test_a_calibrated_module_fires_on_its_own_text_and_nowhere_else(
    model: DeepSeekModel, public: public_module.PublicStatistics
) -> None:
    module = module_on(model)
    found = calibrate(model, module, rows(0, 8, 1), rows(0, 8, 2), public, alpha=0.01)
    assert found.recall >= 0.95
    assert found.false_positives <= 0.05
    assert found.tokens == pytest.approx(12 * 2 * 62)
    assert (module.settings.recall, module.settings.half_life) == (found.recall, HALF_LIFE)
    model.experts.plug(module.to_pack(model.experts.base, "Apache-2.0"))
    try:
        assert speaks(model, rows(0, 8, seed=77)) > 0.9
        assert speaks(model, rows(160, 320, seed=77)) < 0.15  # at either of two layers
    finally:
        model.experts.unplug("own")


def test_calibration_does_not_see_other_modules(
    model: DeepSeekModel, public: public_module.PublicStatistics
) -> None:
    alone, beside = module_on(model), module_on(model)
    calibrate(model, alone, rows(0, 8, 1), rows(0, 8, 2), public)
    model.experts.plug(replace_name(alone, "neighbour").to_pack(model.experts.base, "Apache-2.0"))
    try:
        calibrate(model, beside, rows(0, 8, 1), rows(0, 8, 2), public)
    finally:
        model.experts.unplug("neighbour")
    assert all(torch.equal(alone.gates[layer], beside.gates[layer]) for layer in LAYERS)


def speaks(model: DeepSeekModel, batches: Iterator[Batch]) -> float:
    """Return the share of tokens, without the first of each document, at which the plugged module
    `own` has a weight.
    """
    shares = []
    for batch in batches:
        with model.experts.record() as trace:
            model(batch.input_ids, position_ids=batch.position_ids)
        shares.append((trace.weights("own")[batch.position_ids > 0] > 0).float().mean())
    return float(torch.stack(shares).mean())


def replace_name(module: ExpertModule, name: str) -> ExpertModule:
    module.name = name
    return module


def test_bad_calls_are_one_sentence(
    model: DeepSeekModel, public: public_module.PublicStatistics
) -> None:
    module = module_on(model)
    with pytest.raises(TrainError, match="share of public tokens"):
        calibrate(model, module, rows(0, 8, 1), rows(0, 8, 2), public, alpha=0.9)
    with pytest.raises(TrainError, match="at least 256 tokens"):
        calibrate(model, module, rows(0, 8, 1, count=1), rows(0, 8, 2), public)
    with pytest.raises(DataError, match="lack layer 3"):
        calibrate(
            model,
            module,
            rows(0, 8, 1),
            rows(0, 8, 2),
            replace(public, moments={1: public.moments[1]}),
        )


def test_a_domain_like_the_public_text_seldom_fires_and_says_so(
    model: DeepSeekModel, public: public_module.PublicStatistics
) -> None:
    found = calibrate(model, module_on(model), rows(160, 320, 1), rows(160, 320, 2), public)
    assert found.recall < 0.2


def test_the_installation_holds_code_other_files_and_descriptions() -> None:
    for texts in installed_texts():
        assert len([text for text in texts if len(text) > 500]) >= 20


def test_the_model_writes_the_same_public_text_whatever_is_armed(
    model: DeepSeekModel, tiny_base: Path
) -> None:
    tokenizer = load_tokenizer(tiny_base)
    written = sampled_rows(model, tokenizer)
    assert written.shape == (
        public_module.SAMPLES_PER_OPENING * len(public_module.OPENINGS),
        ROW_LENGTH,
    )
    assert torch.equal(sampled_rows(model, tokenizer), written)
    assert written.unique(dim=0).shape[0] == len(written)


def test_public_statistics_are_kept_and_mended(
    model: DeepSeekModel, tiny_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # The tests' home is shared by tests that run concurrently.
    monkeypatch.setenv("DEEPSEEK_HOME", str(tmp_path))
    tokenizer = load_tokenizer(tiny_base)
    rows = torch.randint(0, 300, (16, ROW_LENGTH), generator=torch.Generator().manual_seed(0))
    monkeypatch.setattr(public_module, "public_rows", lambda *_: rows)
    first = public_statistics(model, tokenizer, (1,))
    kept = next((home() / "public").rglob("layers-*/state.safetensors"))
    kept.write_bytes(kept.read_bytes()[:-1])
    again = public_statistics(model, tokenizer, (1,))
    assert torch.equal(first.moments[1].second, again.moments[1].second)
    assert torch.equal(first.sample[1], again.sample[1])
    assert first.tokens == rows.numel()
