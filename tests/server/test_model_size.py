"""Clients get the size of the served model, wherever its weights are held."""

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from fastapi.testclient import TestClient
from safetensors.torch import load_file, save_file
from tiny_expert import save_base, save_expert

from deepseek.compiled.runner import CompiledRunner
from deepseek.device.choose import CPU, choose_dtype
from deepseek.engine.engine import Engine
from deepseek.engine.load import load
from deepseek.engine.memory import memory_need
from deepseek.engine.start import start_engine
from deepseek.kernels.int8 import quantize
from deepseek.model.quantised import is_large, stored_form
from deepseek.server import service
from deepseek.server.app import create_app
from deepseek.server.model_size import model_size
from deepseek.server.settings import Settings


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model that the compiled runner supports."""
    folder = tmp_path_factory.mktemp("wide")
    return save_base(folder, head_dim=64, hidden_size=128, intermediate_size=256)


@pytest.fixture(scope="module")
def nibbles(wide: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same model with 4-bit matrices."""
    folder = tmp_path_factory.mktemp("nibbles")
    shutil.copytree(wide, folder, dirs_exist_ok=True)
    tensors = {}
    for name, tensor in load_file(wide / "model.safetensors").items():
        is_layer = ".layers." in f".{name}" and is_large(name, tuple(tensor.shape))
        tensors |= stored_form(name, quantize(tensor, bits=4)) if is_layer else {name: tensor}
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    return folder


@pytest.fixture(scope="module")
def served(wide: Path) -> Iterator[Engine]:
    """An engine as `deepseek serve` starts it."""
    with start_engine(wide) as engine:
        yield engine


def check_size(engine: Engine, folder: Path, precision: str) -> None:
    """Check a size against the headers of the files, and against the model in memory."""
    size = model_size(engine)
    packed = isinstance(engine.runner, CompiledRunner)
    need = memory_need(folder, choose_dtype("auto", CPU), 0, packed)
    assert size.parameters == load(folder).model.num_parameters() > 400_000
    assert size.nbytes == pytest.approx(need.weights, rel=0.02)
    assert size.precision == precision


def test_matrices_that_stay_in_the_files_count(wide: Path, nibbles: Path, served: Engine) -> None:
    assert isinstance(served.runner, CompiledRunner)
    check_size(served, wide, "int8")
    with start_engine(nibbles) as engine:
        assert isinstance(engine.runner, CompiledRunner)
        check_size(engine, nibbles, "int4")
        assert model_size(engine).nbytes < 0.8 * model_size(served).nbytes


def test_a_model_that_is_not_quantised_has_its_dtype(wide: Path) -> None:
    dtype = str(choose_dtype("auto", CPU)).removeprefix("torch.")
    with start_engine(wide, int8=False) as engine:
        check_size(engine, wide, dtype)


def test_ollama_s_routes_tell_the_size_that_was_counted_at_the_start(
    wide: Path, served: Engine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    served.plug(save_expert(load(wide, dtype="float32"), "one", tmp_path))
    app = create_app(served, Settings(experts_folder=tmp_path))
    monkeypatch.setattr(service, "model_size", None)
    monkeypatch.setattr(type(served.model), "num_parameters", None)
    size = app.state.service.size
    with TestClient(app, "http://localhost") as http:
        models = http.get("/api/tags").json()["models"]
        running = http.get("/api/ps").json()["models"]
        info = http.post("/api/show", json={"name": "smollm2-135m"}).json()["model_info"]
    served.unplug("one")
    assert len(models) == 3
    for model in (*models, *running):
        assert model["size"] == size.nbytes > 400_000
        assert model["details"]["parameter_size"] == f"{size.parameters / 1e6:.1f}M" != "0.0M"
        assert model["details"]["quantization_level"] == "int8"
    assert info["general.parameter_count"] == size.parameters
