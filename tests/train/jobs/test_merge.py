"""Merging two experts: the fit is exact where possible, the gain on both texts is kept, and what
cannot be merged is refused with a reason.
"""

import random
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from deepseek.checkpoint.store import home
from deepseek.cli.main import main
from deepseek.errors import ConfigError, DataError
from deepseek.model.experts.layer import ExpertLayer
from deepseek.packs.library import experts_folder
from deepseek.packs.pack import ExpertPack, read_pack
from deepseek.train.jobs import merge
from deepseek.train.jobs.expert import train_expert
from deepseek.train.jobs.merge import estimate_merge, merge_experts, merged_pack
from deepseek.train.jobs.merge_fit import Units
from deepseek.train.jobs.update import TrainedExpert

WIDTH = 6
DIALS: dict[str, Any] = {
    "width": 24,
    "tokens": 3000,
    "epochs": 4,
    "row_length": 32,
    "batch_rows": 4,
    "learning_rate": 1e-2,
    "held_out_tokens": 400,
    "quiet": True,
}
WORDS = {
    "greek": "alpha beta gamma delta epsilon zeta eta theta iota kappa",
    "stars": "sirius vega rigel deneb altair spica antares pollux castor regulus",
}


def new_layer(seed: int) -> ExpertLayer:
    torch.manual_seed(seed)
    layer = ExpertLayer(8, WIDTH).requires_grad_(False)
    torch.nn.init.normal_(layer.down_proj)
    return layer


def error(layer: ExpertLayer, texts: list[tuple[ExpertLayer, torch.Tensor]]) -> float:
    return float(sum((layer(x_ND) - own(x_ND)).square().mean() for own, x_ND in texts))


@settings(max_examples=20)
@given(seed=st.integers(0, 1000))
def test_the_fit_is_exact_for_one_and_better_the_wider_for_two(seed: int) -> None:
    first, second = new_layer(seed), new_layer(seed + 1)
    x_ND = torch.randn(400, 8) + 1
    other_ND = torch.randn(400, 8) - 1
    alone = Units.of([first, second])
    alone.add(x_ND, first(x_ND), 1 / 400)
    torch.testing.assert_close(alone.fit(2 * WIDTH)(x_ND), first(x_ND), rtol=0.02, atol=0.02)
    both = Units.of([first, second])
    both.add(x_ND, first(x_ND), 1 / 800)
    both.add(other_ND, second(other_ND), 1 / 800)
    texts = [(first, x_ND), (second, other_ND)]
    errors = [error(both.fit(width).requires_grad_(False), texts) for width in (2, 6, 12, 20)]
    assert errors[0] >= errors[2] and errors[1] >= errors[2]
    assert errors[3] == pytest.approx(errors[2], rel=1e-3)
    # In least squares over both texts, neither expert nor their sum is better.
    rivals = [first, second, lambda x_ND: first(x_ND) + second(x_ND)]
    assert all(errors[2] <= error(rival, texts) * 1.01 for rival in rivals)


@pytest.fixture(scope="module")
def trained(tiny_base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two experts on texts of different words; returns the base."""
    for name, words in WORDS.items():
        folder = tmp_path_factory.mktemp(name)
        for number in range(40):
            draw = random.Random(number)
            text = draw.choices(words.split(), k=90)
            (folder / f"{number}.txt").write_text(" ".join([*text, str(number)]))
        layers = "last:2" if name == "greek" else "last:1"
        train_expert(str(tiny_base), name=name, from_folder=folder, layers=layers, **DIALS)
    return tiny_base


@pytest.mark.slow
def test_both_texts_keep_their_gain(trained: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        main(["expert", "merge", "greek", "stars", "--out", "both"])
    assert end.value.code == 0
    out = capsys.readouterr().out.splitlines()
    assert out[0] == str(experts_folder() / "both.safetensors")
    assert out[1].startswith("held-out text of greek: better by")
    assert "greek alone: better by" in out[1] and out[2].startswith("held-out text of stars:")
    manifest = read_pack(Path(out[0])).manifest
    parts = [read_pack(experts_folder() / f"{name}.safetensors").manifest for name in WORDS]
    assert manifest.layers == (2, 3) and manifest.width == 48
    assert set(manifest.data) == {*parts[0].data, *parts[1].data}
    for name, part in zip(WORDS, parts, strict=True):
        gain = manifest.metrics[f"held-out of {name}"].gain
        assert gain > 0.7 * part.metrics["held-out"].gain > 0
    assert manifest.helps and manifest.vocabulary
    (experts_folder() / "both.safetensors").unlink()


def test_it_can_be_as_narrow_as_one(trained: Path) -> None:
    merged = merge_experts("greek", "stars", "narrow", width=24)
    assert read_pack(merged.pack).manifest.width == 24
    assert all(score.merged < score.base for score in merged.scores.values())
    merged.pack.unlink()


def test_a_dry_run_estimates_and_changes_nothing(
    trained: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = sorted(home().rglob("*"))
    with pytest.raises(SystemExit) as stop:
        main(["expert", "merge", "greek", "stars", "--out", "tried", "--dry-run"])
    assert stop.value.code in (0, None)
    said = re.search(
        r"([\d,]+) tokens in all passes, about \d+\.\d minutes", capsys.readouterr().out
    )
    assert said and int(said[1].replace(",", "")) > 2 * 2000
    assert sorted(home().rglob("*")) == before
    with pytest.raises(ConfigError, match="1 to 48"):
        estimate_merge("greek", "stars", "wide", width=49)


def test_what_the_other_expert_has_learnt_is_said(trained: Path) -> None:
    """Same texts, other split: each was trained on what the other held out."""
    texts = TrainedExpert.find("greek").request.from_folder
    train_expert(str(trained), name="again", from_folder=texts, seed=1, **DIALS)
    merged = merge_experts("greek", "again", "twice")
    assert all(0 < score.learnt <= score.documents for score in merged.scores.values())
    assert "has learnt" in merged.report()[0] and "better than it is" in merged.report()[1]
    apart = merge_experts("greek", "stars", "apart")
    assert not any(score.learnt for score in apart.scores.values())
    assert "learnt" not in " ".join(apart.report())


def test_an_expert_that_takes_the_name_meanwhile_stays(
    trained: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = experts_folder() / "late.safetensors"

    def pack(*parts: Any) -> ExpertPack:
        path.write_text("mine")
        return merged_pack(*parts)

    monkeypatch.setattr(merge, "merged_pack", pack)
    with pytest.raises(ConfigError, match=r"late\.safetensors was put there"):
        merge_experts("greek", "stars", "late", width=24)
    assert path.read_text() == "mine"
    path.unlink()


@pytest.mark.parametrize("rest", ["runs/left", "experts/left.index", "experts/left.prompts.json"])
def test_what_an_expert_left_is_not_taken_for_that_of_the_merged(
    rest: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """If its run were resumed, it would replace the merged pack; its held-out text differs."""
    monkeypatch.setenv("DEEPSEEK_HOME", str(tmp_path))
    (tmp_path / rest).mkdir(parents=True)
    with pytest.raises(ConfigError, match=rf"{rest} exists already .* choose another name"):
        merge_experts("greek", "stars", "left")


def test_what_cannot_be_merged_is_said(trained: Path) -> None:
    with pytest.raises(ConfigError, match="is no name"):
        merge_experts("one", "two", "../three")
    with pytest.raises(ConfigError, match="already"):
        merge_experts("greek", "stars", "greek")
    with pytest.raises(ConfigError, match="1 to 48"):
        merge_experts("greek", "stars", "wide", width=49)
    with pytest.raises(DataError, match="no run"):
        merge_experts("greek", "moons", "other")
    with pytest.raises(ConfigError, match="Both experts are greek"):
        merge_experts("greek", "greek", "other")
    copied = shutil.copy(
        experts_folder() / "greek.safetensors", experts_folder() / "lone.safetensors"
    )
    with pytest.raises(DataError, match="The expert lone has no run folder"):
        merge_experts("greek", "lone", "other")
    Path(copied).unlink()
    corpus = home() / "runs" / "stars" / "corpus"
    away = corpus.rename(corpus.with_name("away"))
    try:
        with pytest.raises(DataError):
            merge_experts("greek", "stars", "other")
    finally:
        shutil.move(away, corpus)
    assert not (experts_folder() / "other.safetensors").exists()
