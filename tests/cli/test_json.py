"""`--json`: one object per command, with the documented fields."""

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import torch

from deepseek.cli.main import main
from deepseek.cli.shapes import SHAPES, Evaluation
from deepseek.cli.table import evaluation
from deepseek.data.preferences.database import PreferenceDatabase
from deepseek.data.preferences.preference import Preference
from deepseek.evaluate.quality import Comparison
from deepseek.packs.library import experts_folder
from deepseek.packs.manifest import BaseDescription, Manifest, Metric
from deepseek.packs.pack import ExpertPack, write_pack
from deepseek.packs.tensors import DTYPES

Capture = pytest.CaptureFixture[str]
ASKS_A_MODEL = {"eval"}
"""Commands that run a model; only the function that builds their object is tested."""


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A home with an expert, a damaged pack, a model, two runs and two preferences."""
    home = tmp_path / "home"
    monkeypatch.setenv("DEEPSEEK_HOME", str(home))
    base = BaseDescription(name="tiny", weights="a" * 64, tokenizer="", hidden_size=8, num_layers=2)
    manifest = Manifest(
        name="poems",
        base=base,
        layers=(1,),
        width=4,
        dtype="float32",
        licence="MIT",
        metrics={"held-out": Metric(before=3.5, after=2.25)},
    )
    tensors = {
        name: torch.zeros(spec.shape, dtype=DTYPES[spec.dtype])
        for name, spec in manifest.tensors().items()
    }
    path = experts_folder() / "poems.safetensors"
    write_pack(path, ExpertPack.seal(manifest, tensors))
    path.with_name("spoilt.safetensors").write_bytes(path.read_bytes()[:-1])
    model = home / "models" / "tiny"
    model.mkdir(parents=True)
    (model / "config.json").write_text('{"architectures": ["LlamaForCausalLM"]}')
    for name, files in {
        "poems": {"result.json": '{"seconds": 61.5, "after": 2.25, "verdict": "better"}'},
        "half": {"request.json": '{"base": "tiny"}'},
        "odd": {"result.json": "["},
    }.items():
        folder = home / "runs" / name
        folder.mkdir(parents=True)
        for file, text in files.items():
            (folder / file).write_text(text)
    store = PreferenceDatabase(home / "preferences.db")
    for number in range(2):
        prompt = ({"role": "user", "content": f"question {number}"},)
        store.add(Preference(prompt, "yes", "no", source="here", labels=("a",)))
    store.close()
    return home


def output(capsys: Capture, command: str) -> Any:
    """Return the object that a command prints with `--json`."""
    with pytest.raises(SystemExit) as stop:
        main([*command.split(), "--json"])
    printed = capsys.readouterr()
    assert stop.value.code == 0, printed.err
    return json.loads(printed.out)


COMMANDS: dict[str, tuple[str, Callable[[Any], object], object]] = {
    "expert list": (
        "expert list",
        lambda o: [row["name"] for row in o["experts"]],
        ["poems", "spoilt"],
    ),
    "models list": ("models list", lambda o: o["models"][0]["experts"], ["poems"]),
    "runs list": (
        "runs list",
        lambda o: [row["state"] for row in o["runs"]],
        ["unfinished", "damaged", "finished"],
    ),
    "runs show": ("runs show poems", lambda o: o["figures"]["seconds"], 61.5),
    "runs compare": ("runs compare poems half", lambda o: len(o["runs"]), 2),
    "prefs stats": ("prefs stats", lambda o: (o["pairs"], o["labels"]), (2, {"a": 2})),
    "prefs search": ("prefs search question", lambda o: o["pairs"][0]["chosen"], "yes"),
    "plan": (
        "plan deepseek-nano --gpus 4",
        lambda o: [row["gpus"] for row in o["scaling"]],
        [1, 2, 4],
    ),
    "plan --inference": (
        "plan --inference deepseek-nano --length 100 --batch 3",
        lambda o: (o["length"], o["batch"], o["gpus"], o["fits"]),
        (100, 3, 1, True),
    ),
    "claims": ("claims", lambda o: len(o["claims"]) >= 24, True),
    "claims show": ("claims show rlpo", lambda o: o["figures"][0]["source"]["result"], "rlpo"),
    "bench": ("bench", lambda o: "decode" in [row["name"] for row in o["benchmarks"]], True),
}


def test_every_shape_is_tested() -> None:
    assert COMMANDS.keys() | ASKS_A_MODEL == SHAPES.keys()


@pytest.mark.parametrize("command", COMMANDS)
def test_the_output_has_the_documented_shape(command: str, home: Path, capsys: Capture) -> None:
    words, part, expected = COMMANDS[command]
    printed = output(capsys, words)
    jsonschema.validate(printed, SHAPES[command].model_json_schema())
    assert part(printed) == expected


@pytest.mark.parametrize(
    ("command", "key"),
    [("expert list", "experts"), ("models list", "models"), ("runs list", "runs")],
)
def test_an_empty_home_gives_empty_lists(
    command: str, key: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    monkeypatch.setenv("DEEPSEEK_HOME", str(tmp_path))
    printed = output(capsys, command)
    jsonschema.validate(printed, SHAPES[command].model_json_schema())
    assert printed[key] == []


def test_a_spoilt_pack_says_why(home: Path, capsys: Capture) -> None:
    row = output(capsys, "expert list")["experts"][1]
    assert "refused" in row["problem"]
    assert row["kind"] is None


def test_a_figure_that_is_not_finite_is_null(home: Path, capsys: Capture) -> None:
    (home / "runs" / "poems" / "result.json").write_text('{"after": NaN, "before": Infinity}')
    printed = output(capsys, "runs show poems")
    jsonschema.validate(printed, SHAPES["runs show"].model_json_schema())
    assert printed["figures"] == {"after": None, "before": None}


def test_an_evaluation_has_the_documented_shape() -> None:
    rows = [Comparison("poems", 100, 3.0, 2.0, 1.5), Comparison("prose", 50, 3.0, 3.0)]
    shape = evaluation("tiny", ["poems"], rows, (0.1, 0.2), 10)
    printed = json.loads(shape.model_dump_json())
    jsonschema.validate(printed, Evaluation.model_json_schema())
    assert printed["texts"][1] == {
        "text": "prose", "tokens": 50, "base": 3.0, "plugged": 3.0, "alone": None,
    }  # fmt: skip
    assert printed["human_eval"] == {"problems": 10, "base": 0.1, "plugged": 0.2}


def test_eval_against_has_a_file_of_its_own(capsys: Capture) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["eval", "poems", "--against", "rag", "--json"])
    assert stop.value.code == 2
    assert "result.json" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("command", "key", "file"),
    [
        ("expert list", "experts", b"experts/caf\xe9.safetensors"),
        ("models list", "models", b"models/caf\xe9/config.json"),
        ("runs list", "runs", b"runs/caf\xe9/request.json"),
        ("runs list", "runs", b"runs/caf\xe9/result.json"),
    ],
)
def test_a_file_whose_name_is_no_utf_8_is_listed(
    command: str, key: str, file: bytes, home: Path, capsys: Capture
) -> None:
    path = home / os.fsdecode(file)
    path.parent.mkdir(exist_ok=True)
    path.write_text("[")
    assert "caf\ufffd" in [row["name"] for row in output(capsys, command)[key]]
