"""The licence of a base model, in its model card: `README.md` with Hugging Face's front matter."""

import re
import shutil
from dataclasses import dataclass
from pathlib import Path

import yaml
from packaging.licenses import InvalidLicenseExpression, canonicalize_license_expression

CARD = "README.md"
LONGEST_CARD = 1 << 20


@dataclass(frozen=True)
class Licence:
    """Terms under which a base model may be used.

    Attributes:
        name: SPDX expression; "" if it is not known.
        link: where the terms are; "" if the card names no place.
        restricted: whether the terms restrict the use, and bind what is made from the model too.
    """

    name: str = ""
    link: str = ""
    restricted: bool = False

    def __str__(self) -> str:
        terms = f"{self.name or 'licence unknown'}{f', {self.link}' if self.link else ''}"
        if not self.restricted:
            return terms
        return f"{terms}; its use restrictions also bind experts and models made from it"


MALFORMED = (
    OSError,
    yaml.YAMLError,
    IndexError,
    # What the parser raises for impossible dates, tags that do not fit, and endless nesting.
    ValueError,
    TypeError,
    AttributeError,
    RecursionError,
)
"""Errors of a card that cannot be read."""

FRONT_MATTER = re.compile(r"\ufeff?---[ \t]*\r?\n(.*?)^---[ \t]*\r?$", re.DOTALL | re.MULTILINE)
"""The fields at the start of a card, between two lines of dashes."""

RESTRICTED_NAMES = re.compile(
    r"^(LicenseRef-)?(gemma|llama|deepseek|cc-by-nc)|openrail|-rail-", re.IGNORECASE
)
"""Parts of Hugging Face licence ids, and of their SPDX forms, whose terms restrict the use of
derivatives.
"""


TERMS = re.compile(
    r"README\.md"
    r"|([\w-]+[_-])?(LICEN[CS]E|NOTICE|COPYING|COPYRIGHT|USE_POLICY)([ ._-].*)?"
    r"|([\w-]+_)?(TERMS_OF_USE|(?-i:TERMS))(\.(html|md|pdf|txt))?",
    re.IGNORECASE,
)
"""Names of the files with a model's card and terms. TERMS alone, or after a vendor's name, is in
capitals: `search_terms.txt` does not match.
"""


def read_licence(folder: Path) -> Licence:
    """Return the licence that the model card in a folder states.

    A card that is missing, has no front matter, or has malformed YAML in it gives `Licence()`.
    """
    try:
        with (folder / CARD).open("rb") as card:
            front = FRONT_MATTER.match(card.read(LONGEST_CARD).decode(errors="replace"))
        fields = yaml.safe_load(front[1]) if front else None
    except MALFORMED:
        return Licence()
    if not isinstance(fields, dict) or not isinstance(fields.get("license"), str):
        return Licence()
    name = fields["license"]
    if name == "other" and isinstance(fields.get("license_name"), str):
        name = fields["license_name"]
    link = fields.get("license_link")
    return licence_of(name, link if isinstance(link, str) else "")


def copy_terms(source: Path, target: Path) -> None:
    """Copy the model card and the texts of the terms to a folder made from a model, since its
    licence applies there too.

    Args:
        source: folder of the model.
        target: the other folder; files that it has are kept. Links that lead out of the model are
            not followed.
    """
    # The hub's cache keeps files as links to its blobs.
    model_root = source.resolve()
    model_root = model_root.parents[1] if model_root.parent.name == "snapshots" else model_root
    for path in source.iterdir():
        copied_file = target / path.name
        if (
            TERMS.fullmatch(path.name)
            and path.is_file()
            and path.resolve().is_relative_to(model_root)
            and not copied_file.exists()
        ):
            shutil.copyfile(path, copied_file)


def licence_of(name: str, link: str = "") -> Licence:
    """Return the licence with a Hugging Face id, such as "apache-2.0" or "gemma".

    Args:
        name: the id.
        link: where its terms are; default: not known.
    """
    is_restricted = RESTRICTED_NAMES.search(name) is not None
    try:
        return Licence(canonicalize_license_expression(name), link, is_restricted)
    except InvalidLicenseExpression:
        word = "".join(letter if letter.isalnum() or letter in ".-" else "-" for letter in name)
        return Licence(f"LicenseRef-{word[:1].upper()}{word[1:]}", link, is_restricted)


def write_card(folder: Path, name: str, link: str, text: str) -> None:
    """Write a model card with a licence.

    Args:
        folder: the model's folder.
        name: Hugging Face licence id.
        link: where the terms are; "": not known.
        text: what the card says.
    """
    fields = {"license": name} | ({"license_link": link} if link else {})
    (folder / CARD).write_text(f"---\n{yaml.safe_dump(fields)}---\n\n{text}\n", encoding="utf-8")
