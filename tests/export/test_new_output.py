"""An export replaces nothing that somebody put at its place while it ran."""

from pathlib import Path

import pytest
from tiny_expert import save_base

from deepseek.errors import ConfigError
from deepseek.export import gguf
from deepseek.export.export import FORMATS, export_model
from deepseek.export.graph import Step
from deepseek.export.stock import write_stock
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
