"""Commands for data, plans and training: what they print and write, and one-sentence errors."""

import json
from pathlib import Path

import pytest
from tiny_expert import save_base

import deepseek
from deepseek.checkpoint.hub import KNOWN
from deepseek.cli.main import main
from deepseek.data import read_records
from deepseek.export.quantize import quantize_model
from deepseek.model.config import ModelConfig
from deepseek.model.presets import PRESETS


def call(*arguments: str) -> int:
    with pytest.raises(SystemExit) as stop:
        main(list(arguments))
    return int(stop.value.code or 0)


def test_made_text_can_be_trained_on(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "problems.jsonl"
    assert call("data", "mathematics", str(out), "--count", "50") == 0
    assert len(list(read_records(out))) == 50
    assert (
        call(
            "data",
            "code",
            str(Path(__file__).parents[2] / "deepseek" / "data"),
            str(tmp_path / "f.jsonl"),
        )
        == 0
    )
    assert "records in" in capsys.readouterr().out
    assert any("def " in document.text for document in read_records(tmp_path / "f.jsonl"))
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / "a.py").write_text("x = 1\n")
    assert call("data", "code", str(tmp_path / "empty"), str(tmp_path / "g.jsonl")) == 2


def test_a_plan_is_printed_and_written_for_deepspeed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "ds.json"
    assert call("plan", "deepseek-8b", "--gpus", "256", "--deepspeed", str(path)) == 0
    printed = capsys.readouterr().out
    assert "on 256 h100: " in printed and "efficiency" in printed and printed.count("%") == 10
    config = json.loads(path.read_text())
    assert config["zero_optimization"]["stage"] == 3 and config["train_batch_size"] == 512


def test_a_plan_of_a_model_folder_is_that_of_its_config(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base = save_base(tmp_path / "base")
    assert call("plan", str(base), "--inference", "--bits", "8", "--json") == 0
    planned = json.loads(capsys.readouterr().out)
    model = deepseek.load(base).model
    # What the tied head shares with the embedding is one parameter.
    assert planned["parameters"] == sum(part.numel() for part in model.parameters())
    assert (planned["model"], planned["weight_bits"]) == (str(base), 8)
    assert planned["length"] == model.config.max_position_embeddings


@pytest.mark.parametrize("bits", [8, 4])
def test_a_plan_of_a_quantised_model_has_its_bits(
    bits: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    fields = {"num_experts": 4, "expert_dim": 256, "hidden_size": 64, "intermediate_size": 128}
    base = save_base(tmp_path / "base", **fields)
    out = tmp_path / "quantised"
    quantize_model(base, out, bits=bits)
    assert call("plan", str(out), "--inference", "--json") == 0
    assert json.loads(capsys.readouterr().out)["weight_bits"] == bits
    assert call("plan", str(out), "--trained", "0.1", "--json") == 0
    assert json.loads(capsys.readouterr().out)["fits"]
    assert call("plan", str(out)) == 2
    assert f"{bits}-bit weights, which cannot be trained" in capsys.readouterr().err
    assert call("plan", str(out), "--inference", "--bits", str(12 - bits)) == 2
    assert f"has {bits}-bit weights; leave it out" in capsys.readouterr().err


def test_a_plan_names_the_numbers_of_devices_that_do_not_suffice(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert call("plan", "deepseek-8b", "--json") == 0
    rows = json.loads(capsys.readouterr().out)["scaling"]
    assert [row["fits"] for row in rows] == [row["memory"] <= 80e9 for row in rows]
    assert {row["fits"] for row in rows} == {True, False}
    assert call("plan", "deepseek-8b") == 0
    assert capsys.readouterr().out.count("too much") == sum(not row["fits"] for row in rows)


def test_the_help_of_plan_names_every_preset(capsys: pytest.CaptureFixture[str]) -> None:
    assert call("plan", "--help") == 0
    words = capsys.readouterr().out.replace(",", " ").split()
    assert [name for name in PRESETS if name not in words] == []


def test_the_help_of_pull_names_every_known_model(capsys: pytest.CaptureFixture[str]) -> None:
    assert call("pull", "--help") == 0
    words = capsys.readouterr().out.replace(",", " ").split()
    assert [name for name in KNOWN if name not in words] == []


@pytest.mark.parametrize(("profile", "fields"), [("code", 3), ("long", 3), ("small", 0)])
def test_a_profile_names_fields_that_a_preset_takes(
    profile: str, fields: int, capsys: pytest.CaptureFixture[str]
) -> None:
    assert call("plan", "deepseek-nano", "--profile", profile, "--json") == 0
    printed = json.loads(capsys.readouterr().out)
    config = ModelConfig.preset("deepseek-nano", **printed["fields"])
    assert len(printed["fields"]) == fields
    if profile == "long":
        assert printed["length"] == config.max_position_embeddings == 131_072


@pytest.mark.parametrize("option", ["--memory", "--teraflops", "--bandwidth", "--tokens"])
@pytest.mark.parametrize("amount", ["-5", "0", "nan", "inf", "-inf"])
@pytest.mark.parametrize("use", [[], ["--inference"], ["--profile", "small"]])
def test_no_plan_for_impossible_hardware(
    option: str, amount: str, use: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert call("plan", *use, option, amount) == 2
    output = capsys.readouterr()
    assert output.out == ""
    assert f"{option} {amount} is impossible; give a number of more than 0." in output.err


@pytest.mark.parametrize("option", ["--teraflops", "--bandwidth"])
def test_a_plan_for_hardware_of_any_speed_is_printed(option: str) -> None:
    assert call("plan", "--inference", option, "1e-300") == 0


@pytest.mark.parametrize(
    ("words", "complaint"),
    [
        (("pretrain", "--config", "nowhere.yaml"), "nowhere.yaml does not exist"),
        (("train", "nowhere.yaml"), "nowhere.yaml does not exist"),
        (("adapt",), "no text to learn from"),
        (("plan", "deepseek-9b"), "perhaps 'deepseek-8b'"),
        (("plan", "owner/model"), "fetch or convert it first with `deepseek pull owner/model`"),
        (("plan", "x.gguf"), "fetch or convert it first with `deepseek pull x.gguf`"),
        (("plan", "--profile", "code", "--deepspeed", "x.json"), "--deepspeed configures training"),
        (
            ("plan", "--bits", "4"),
            "--bits quantises frozen weights (--trained below 1), and all are",
        ),
        (("runs", "show", "nothing"), "There is no run 'nothing'"),
    ],
)
def test_a_mistake_is_one_sentence(
    words: tuple[str, ...], complaint: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert call(*words) == 2
    assert complaint in capsys.readouterr().err
