"""A base folder with odd files or huge numbers is refused in one sentence."""

import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest

from deepseek.cli.main import main
from deepseek.errors import LONGEST, UserError
from deepseek.packs.library import packs_for

Capture = pytest.CaptureFixture[str]


def sentence_of(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    """Return the one-line message with which the command line refuses `words`."""
    with pytest.raises(SystemExit) as stop:
        main(list(words))
    printed = capsys.readouterr().err
    assert stop.value.code == 2, printed
    errors = [line for line in printed.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1, printed
    assert "unexpected" not in errors[0]
    return errors[0]


@pytest.mark.parametrize(
    ("file", "fields"),
    [
        ("config.json", {"model_type": ["llama"]}),
        ("config.json", {"model_type": {"a": 1}}),
        ("config.json", {"model_type": "x" * 100_000}),
        ("config.json", {"hidden_size": "32"}),
        ("config.json", {"num_hidden_layers": 1e30}),
        ("config.json", {"vocab_size": 2**62}),
        ("config.json", {"rope_parameters": [1]}),
        ("generation_config.json", {"eos_token_id": "x"}),
        ("tokenizer.json", {"model": 5}),
        ("tokenizer.json", {"added_tokens": [{"id": 2**40, "content": "x"}]}),
    ],
)
def test_a_field_of_a_wrong_type_is_one_sentence(
    file: str, fields: dict[str, Any], base_folder: Path, tmp_path: Path, capsys: Capture
) -> None:
    folder = tmp_path / "base"
    shutil.copytree(base_folder, folder)
    path = folder / file
    stored = json.loads(path.read_text()) if path.exists() else {}
    path.write_text(json.dumps(stored | fields))
    assert len(sentence_of(capsys, "generate", "hi", "--base", str(folder))) < LONGEST + 20


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("--temperature", "nan"),
        ("--temperature", "inf"),
        ("--seed", str(10**30)),
        ("--seed", "-1"),
        ("--answers", str(10**30)),
    ],
)
def test_numbers_of_the_sampling_have_bounds(
    option: str, value: str, base_folder: Path, tmp_path: Path, capsys: Capture
) -> None:
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text(json.dumps({"prompt": "hi"}) + "\n")
    words = ["prefs", "generate", str(prompts), "--base", str(base_folder)]
    database = ["--database", str(tmp_path / "prefs.db")]
    assert option.strip("-") in sentence_of(capsys, *words, *database, option, value)


def test_a_message_is_bounded_and_keeps_what_to_do() -> None:
    message = str(UserError(f"{'x' * 10_000} is no file; give one file."))
    assert len(message) <= LONGEST + 5
    assert message.endswith("give one file.")


def test_odd_files_among_the_experts_are_left_out(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.safetensors")
    (tmp_path / "dangling.safetensors").symlink_to("nowhere")
    (tmp_path / "loop.safetensors").symlink_to("loop.safetensors")
    (tmp_path / "folder.safetensors").mkdir()
    (tmp_path / "noise.safetensors").write_bytes(b"x" * 100)
    (tmp_path / "\x1b[2Jclear.safetensors").write_bytes(b"y")
    (tmp_path / os.fsdecode(b"\xff.safetensors")).write_bytes(b"z")
    fitting, problems = packs_for("tiny", tmp_path)
    assert fitting == {}
    assert len(problems) == 7
