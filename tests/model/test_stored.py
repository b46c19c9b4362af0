"""Matrices that stay in their files: the same model, layer by layer, for all checkpoints."""

import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_expert import save_base

from deepseek.checkpoint.stream import FILE_BYTES, TensorFiles, TensorWriter
from deepseek.engine.load import load
from deepseek.errors import CheckpointError, ConfigError
from deepseek.export.quantize import quantize_model
from deepseek.model.config import ModelConfig
from deepseek.model.pretrained import load_stored
from deepseek.model.stored import StoredEmbedding, StoredLinear, stored_matrices
from deepseek.model.transformer import DeepSeekModel

IDS = torch.tensor([[5, 9, 40, 3, 8, 5]])


@pytest.fixture(scope="module")
def plain(tmp_path_factory) -> Path:
    return save_base(tmp_path_factory.mktemp("plain"), hidden_size=64)


@pytest.fixture(scope="module")
def int8(plain, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("int8") / "model"
    quantize_model(plain, out)
    return out


@pytest.fixture(scope="module", params=[None, 8, 6, 4], ids=["plain", "8 bits", "6 bits", "4 bits"])
def folder(request, plain, int8, tmp_path_factory) -> Path:
    if request.param is None:
        return plain
    if request.param == 8:
        return int8
    out = tmp_path_factory.mktemp("int4") / "model"
    quantize_model(plain, out, bits=request.param)
    return out


@pytest.mark.parametrize("keeps", [True, False])
@torch.no_grad()
def test_a_stored_model_computes_what_a_loaded_one_does(folder, keeps):
    stored = load_stored(DeepSeekModel, folder, "float32")
    for matrix in stored_matrices(stored).values():
        matrix.keeps = keeps
    loaded = DeepSeekModel.from_pretrained(folder, dtype="float32")
    for _ in range(2):  # with `keeps`, from memory the second time
        assert torch.equal(stored(IDS).logits, loaded(IDS).logits)


@pytest.mark.parametrize("keeps", [True, False])
@torch.no_grad()
def test_an_embedding_keeps_its_scale_and_a_head_of_its_own_is_stored(tmp_path, keeps):
    folder = save_base(tmp_path / "base", scale_embeddings=True, tie_word_embeddings=False)
    stored = load_stored(DeepSeekModel, folder, "float32")
    for matrix in stored_matrices(stored).values():
        matrix.keeps = keeps
    loaded = DeepSeekModel.from_pretrained(folder, dtype="float32")
    assert stored.lm_head.stored is not stored.embed_tokens.stored
    assert torch.equal(stored(IDS).logits, loaded(IDS).logits)


def test_a_stored_model_is_not_saved(folder, tmp_path):
    """Its state dict lacks the matrices, which the written folder would lack too."""
    with pytest.raises(ConfigError, match=f"still in the files of {folder}; copy that folder"):
        load_stored(DeepSeekModel, folder).save_pretrained(tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_stored_model_takes_no_other_config(plain):
    with pytest.raises(ConfigError, match="leave config out"):
        load(plain, stored=True, config=ModelConfig())


def test_every_linear_layer_is_stored(folder):
    stored = load_stored(DeepSeekModel, folder)
    assert isinstance(stored.embed_tokens, StoredEmbedding)
    assert stored.lm_head.stored is stored.embed_tokens.stored
    layers = [m for m in stored.modules() if isinstance(m, torch.nn.Linear)]
    assert len(layers) == 3 * 7 + 1
    assert all(isinstance(layer, StoredLinear) for layer in layers)
    assert not [name for name, _ in stored.named_parameters() if "norm" not in name]


def test_a_checkpoint_that_is_deleted_is_still_read(tmp_path):
    folder = save_base(tmp_path / "base")
    stored = load_stored(DeepSeekModel, folder, "float32")
    for matrix in stored_matrices(stored).values():
        matrix.keeps = False
    logits = stored(IDS).logits
    (folder / "model.safetensors").unlink()
    assert torch.equal(stored(IDS).logits, logits)


def test_a_checkpoint_that_is_cut_short_while_it_is_read_is_refused(tmp_path):
    folder = save_base(tmp_path / "base")
    stored = load_stored(DeepSeekModel, folder)
    file = folder / "model.safetensors"
    with open(file, "r+b") as opened:
        opened.truncate(file.stat().st_size // 2)
    with pytest.raises(CheckpointError, match="cut short"):
        [matrix.tensor() for matrix in stored_matrices(stored).values()]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda tensors: tensors.pop("layers.0.attention.q_proj.weight_scale"), "no scales"),
        (lambda tensors: tensors.pop("layers.0.attention.q_proj.weight_int8"), "lacks|unknown"),
        (
            lambda tensors: tensors.update(
                {"layers.0.attention.q_proj.weight_int8": torch.zeros(8, 64, dtype=torch.int8)}
            ),
            "no scales",
        ),
        (
            lambda tensors: tensors.update(
                {"layers.0.attention.q_proj.weight_scale": torch.zeros(64, 1, dtype=torch.int32)}
            ),
            "dtype",
        ),
        (
            lambda tensors: tensors.update(
                {
                    "layers.0.attention.q_proj.weight_int8": torch.zeros(64, 128, dtype=torch.int8),
                    "layers.0.attention.q_proj.weight_scale": torch.zeros(64, 2).bfloat16(),
                }
            ),
            "do not fit",
        ),
    ],
    ids=["no scales", "no values", "other rows", "whole scales", "wider than the model"],
)
def test_a_quantised_checkpoint_that_lies_is_refused(int8, tmp_path, change, message):
    shutil.copytree(int8, tmp_path / "int8")
    file = tmp_path / "int8" / "model.safetensors"
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file)
    with pytest.raises(CheckpointError, match=message):
        stored = load_stored(DeepSeekModel, tmp_path / "int8")
        [matrix.tensor() for matrix in stored_matrices(stored).values()]


def test_a_tensor_of_an_unknown_dtype_is_refused(tmp_path):
    folder = save_base(tmp_path / "base")
    file = folder / "model.safetensors"
    save_file({name: t.to(torch.float8_e4m3fn) for name, t in load_file(file).items()}, file)
    with pytest.raises(CheckpointError, match="dtype F8"):
        TensorFiles(folder)


def test_tensors_are_written_in_files_of_limited_size(tmp_path, monkeypatch):
    monkeypatch.setattr("deepseek.checkpoint.stream.FILE_BYTES", 1000)
    assert FILE_BYTES > 1000
    tensors = {f"t{i}": torch.full((10, 10), float(i)) for i in range(7)}
    writer = TensorWriter(tmp_path)
    writer.add(tensors)
    writer.close()
    assert writer.num_bytes == 2800
    assert len(list(tmp_path.glob("model-*-of-00004.safetensors"))) == 4
    files = TensorFiles(tmp_path)
    assert set(files) == set(tensors)
    assert all(torch.equal(files.read(name), tensor) for name, tensor in tensors.items())
    assert torch.equal(files.read("t3", 2, 5), tensors["t3"][2:5])
