"""The models in the library's home: pulled bases, converted GGUF files, models trained here.

Models from the Hugging Face hub are in its own cache, which `hf cache` manages.
"""

import re
from dataclasses import dataclass
from pathlib import Path

from filelock import FileLock

from deepseek.checkpoint.files import folder_bytes
from deepseek.checkpoint.licence import read_licence
from deepseek.checkpoint.output import remove_folder
from deepseek.checkpoint.store import home, read_object
from deepseek.errors import CheckpointError, HubError
from deepseek.registry import nearest


@dataclass(frozen=True)
class StoredModel:
    """A model folder in the library's home.

    Attributes:
        name: name of the folder, under which commands know the model.
        folder: its path.
        num_bytes: size of its files.
        architecture: class that config.json states; "" if it states none.
        licence: SPDX expression; "" if its card states none.
    """

    name: str
    folder: Path
    num_bytes: int
    architecture: str
    licence: str


def models_folder() -> Path:
    """Return the folder of this user's models, which may not exist yet."""
    return home() / "models"


def model_name(path: str | Path) -> str:
    """Return the name of a model by its folder or hub id.

    The hub's cache names the folder of a model's files by their commit; the model's name is that
    of a folder above. `.` and `..` are no names, so the folder that they lead to has it.

    Args:
        path: folder of the model, or its id on the hub.
    """
    path = Path(path)
    if path.name in ("", ".."):
        path = path.resolve()
    snapshot_match = re.search(r"(?:^|/)models--(?:.+--)?([^/]+)/snapshots/[^/]+$", path.as_posix())
    return snapshot_match[1] if snapshot_match else path.name


def stored_models() -> list[StoredModel]:
    """Return the models in the library's home, by name."""
    root = models_folder()
    folders = sorted(root.iterdir()) if root.is_dir() else []
    return [
        _describe(folder)
        for folder in folders
        if not folder.name.startswith(".") and (folder / "config.json").is_file()
    ]


def stored_model(name: str) -> StoredModel:
    """Return a model in the library's home.

    Raises:
        HubError: there is no such model.
    """
    models = {model.name: model for model in stored_models()}
    if name not in models:
        hint = nearest(name, models) if models else "there is none, see `deepseek pull --help`"
        raise HubError(f"There is no model {name!r} in {models_folder()}; {hint}.")
    return models[name]


def remove_model(model: StoredModel) -> None:
    """Delete a model's folder, or the link to it, after any running pull of the same model."""
    with FileLock(model.folder.with_name(f".{model.name}.lock")):
        remove_folder(model.folder)


def _describe(folder: Path) -> StoredModel:
    try:
        architectures = read_object(folder / "config.json").get("architectures") or [""]
        architecture = str(architectures[0])
    except (CheckpointError, KeyError, TypeError):
        architecture = ""
    licence = read_licence(folder).name
    return StoredModel(folder.name, folder, folder_bytes(folder), architecture, licence)
