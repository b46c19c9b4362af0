"""Exporting and quantising never replace files that appeared meanwhile, and remove leftovers of
killed attempts.
"""

import errno
import shutil
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path

import pytest
from safetensors import SafetensorError
from tiny_expert import save_base

from deepseek.checkpoint.output import new_file, new_folder
from deepseek.checkpoint.store import temporary_path
from deepseek.errors import ConfigError, TrainError
from deepseek.export import gguf, quantize
from deepseek.export.export import FORMATS, export_model
from deepseek.export.graph import Step
from deepseek.export.quantize import quantize_model
from deepseek.export.stock import write_stock
from deepseek.model.pretrained import load_stored
from deepseek.model.transformer import DeepSeekModel


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_base(tmp_path_factory.mktemp("base"))


def test_a_folder_that_appears_meanwhile_stays(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"

    def write(model: DeepSeekModel, folder: Path, dtype: str) -> Step:
        out.mkdir()
        (out / "precious.txt").write_text("mine")
        return write_stock(model, folder)

    monkeypatch.setitem(FORMATS, "hf", FORMATS["hf"]._replace(write=write))
    with pytest.raises(ConfigError, match="choose another path"):
        export_model(base, out, "hf")
    assert [path.name for path in out.iterdir()] == ["precious.txt"]
    assert list(tmp_path.iterdir()) == [out]


def test_a_folder_that_appears_while_a_model_is_quantised_stays(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "int8"
    leftover = temporary_path(out)
    leftover.mkdir()

    def divergence(*_: object) -> float:
        assert not leftover.exists()
        with pytest.raises(ConfigError, match="being written by another process"):
            quantize_model(base, out)
        out.mkdir()
        (out / "precious.txt").write_text("mine")
        return 0.0

    monkeypatch.setattr(quantize, "is_large", lambda *_: True)  # this model's matrices are small
    monkeypatch.setattr(quantize, "_write_weights", lambda *_: None)
    monkeypatch.setattr(quantize, "load_stored", lambda *_: load_stored(DeepSeekModel, base))
    monkeypatch.setattr(quantize, "_divergence", divergence)
    with pytest.raises(ConfigError, match="choose another path"):
        quantize_model(base, out)
    assert [path.name for path in out.iterdir()] == ["precious.txt"]
    assert list(tmp_path.iterdir()) == [out]


def test_a_file_that_appears_meanwhile_stays(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out.gguf"

    def difference(*_: Path) -> float:
        out.write_text("mine")
        return 0.0

    monkeypatch.setattr(gguf, "_difference", difference)
    with pytest.raises(ConfigError, match="choose another path"):
        export_model(base, out, "gguf")
    assert out.read_text() == "mine"
    assert list(tmp_path.iterdir()) == [out]


def test_all_that_a_killed_export_leaves_is_removed_by_the_next(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    place, kept = tmp_path / "place", tmp_path / "kept"
    out = place / "out.gguf"

    def interrupted(*_: Path) -> float:
        shutil.copytree(place, kept)  # what a kill at this point would leave
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(gguf, "_difference", interrupted)
        export_model(base, out, "gguf")
    assert list(place.iterdir()) == []
    shutil.copytree(kept, place, dirs_exist_ok=True)
    assert len(list(place.iterdir())) == 3  # the file, the folder for the comparison, the lock
    export_model(base, out, "gguf")
    assert list(place.iterdir()) == [out]


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.ENOSPC, "No space left on device"),
        OSError("16384 requested and 14752 written"),  # numpy
        SafetensorError(
            "Error while serializing: I/O error: No space left on device (os error 28)"
        ),
    ],
)
@pytest.mark.parametrize("new", [new_file, new_folder])
def test_a_full_disk_is_told(
    error: Exception, new: Callable[[Path], AbstractContextManager[Path]], tmp_path: Path
) -> None:
    told = r"The disk of .*out is full, and nothing was written there; free some of it, and repeat"
    with pytest.raises(TrainError, match=told), new(tmp_path / "out"):
        raise error
    assert list(tmp_path.iterdir()) == []
