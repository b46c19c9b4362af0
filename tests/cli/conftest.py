"""A small base model with its tokenizer."""

from pathlib import Path

import pytest
from tiny_expert import save_base

from deepseek.engine.load import Loaded, load


@pytest.fixture(scope="session")
def base_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Its folder."""
    return save_base(tmp_path_factory.mktemp("base"))


@pytest.fixture
def loaded(base_folder: Path) -> Loaded:
    """The model, freshly loaded."""
    return load(base_folder, dtype="float32")
