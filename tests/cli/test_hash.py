"""`deepseek distill-hash` and `deepseek inspect attention`, from text to picture, and their error
messages.
"""

import shutil
from pathlib import Path

import pytest
import torch

from deepseek.checkpoint.fingerprint import fingerprint
from deepseek.cli.main import main
from deepseek.engine.load import load
from deepseek.model.attention.hash import LinearHash, hash_file, load_hashes, save_hashes
from deepseek.model.attention.lsh import RandomHash
from deepseek.model.config import ModelConfig

Capture = pytest.CaptureFixture[str]
PNG = b"\x89PNG"


def run(*arguments: str) -> int:
    with pytest.raises(SystemExit) as stop:
        main(list(arguments))
    assert isinstance(stop.value.code, int)
    return stop.value.code


@pytest.fixture
def text(tmp_path: Path) -> Path:
    """A folder with one long text."""
    folder = tmp_path / "text"
    folder.mkdir()
    lines = [
        f"line {number} says {number * number % 97} and then something else\n"
        for number in range(400)
    ]
    (folder / "long.txt").write_text("".join(lines))
    return folder


def test_from_text_to_hash_to_picture(
    base_folder: Path, text: Path, tmp_path: Path, capsys: Capture
) -> None:
    path, picture = tmp_path / "hash.safetensors", tmp_path / "recall.png"
    fitted = ("--base", str(base_folder), "--data", str(text), "--texts", "1", "--length", "512")
    assert run("distill-hash", *fitted, "--buckets", "8", "--exact", "1", "--out", str(path)) == 0
    assert capsys.readouterr().out.strip() == str(path)
    # No intermediate state is left behind.
    assert [file.name for file in tmp_path.glob("hash*")] == ["hash.safetensors"]
    assert load_hashes(path, fingerprint(base_folder).weights).keys() == {1, 2}
    looked = (
        "--base",
        str(base_folder),
        "--data",
        str(text),
        "--length",
        "512",
        "--hash",
        str(path),
    )
    assert run("inspect", "attention", str(picture), *looked, "--probes", "2") == 0
    assert picture.read_bytes().startswith(PNG)
    printed = capsys.readouterr().out
    assert all(name in printed for name in ("local", "hash", "best 64"))


def test_a_loaded_model_uses_the_hashes_beside_it(
    base_folder: Path, text: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "base"
    shutil.copytree(base_folder, folder)
    config = ModelConfig(attention="lsh", lsh_exact_layers=[0])
    assert isinstance(load(folder, config=config).model.layers[1].attention.hash, RandomHash)
    fitted = (
        "--base",
        str(folder),
        "--data",
        str(text),
        "--texts",
        "1",
        "--length",
        "512",
        "--exact",
        "1",
    )
    assert run("distill-hash", *fitted) == 0
    attention = load(folder, config=config).model.layers[1].attention
    assert torch.equal(
        attention.hash.key_weight,
        load_hashes(hash_file(folder), fingerprint(folder).weights)[1].key_weight,
    )


def test_mistakes_end_in_one_sentence(
    base_folder: Path, text: Path, tmp_path: Path, capsys: Capture
) -> None:
    base, foreign = ("--base", str(base_folder)), tmp_path / "foreign.safetensors"
    parts = (torch.zeros(2, 8, 8), torch.zeros(2, 8), torch.zeros(4, 8, 8), torch.zeros(4, 8))
    save_hashes(foreign, {1: LinearHash(*parts)}, "another base")
    for arguments, cause in (
        (("distill-hash", *base, "--exact", "3"), "none of the 3 layers"),
        (("distill-hash", *base, "--data", str(tmp_path / "nowhere")), "does not exist"),
        (("distill-hash", *base, "--data", str(text), "--texts", "99"), "99 are needed"),
        (("distill-hash", *base, "--length", "100"), "length"),
        (("inspect", "attention", *base), "deepseek distill-hash"),
        (("inspect", "attention", *base, "--hash", str(foreign)), "another model"),
    ):
        assert run(*arguments) == 2
        said = capsys.readouterr().err.strip().splitlines()
        assert len(said) == 1, said
        assert cause in said[0]
    assert not hash_file(base_folder).exists()
