"""Extract facts from prose and commits: sections, definitions, lists; messages and functions of
commits.
"""

import re
from collections.abc import Iterator, Sequence

from deepseek.data.builders.facts import Fact, first_sentence, sentences, shortened, tokens_of
from deepseek.data.builders.phrasings import language_of
from deepseek.data.text.document import Document
from deepseek.data.text.patches import message_and_patches

HEADING_MARK = re.compile(r"(?:#{1,6}|={1,6})\s+")
"""Mark of a heading before its text; the same marks may close it."""

UNDERLINE = re.compile(r"^([=\-~^\"'*+#])\1{2,}\s*$")
ITEM = re.compile(r"^\s{0,3}(?:[-*+•]|\d{1,2}[.)])\s+(\S.*)$")
NUMBER = re.compile(r"^(?:\d{1,2}[.)]|\d{1,2}(?:\.\d{1,2})+\.?)\s+")
"""Number of a section before its heading."""

CODE_LINE = re.compile(r"^(?:```|~~~|\s{4}|\t|\.\. |\||>>>|[<{\[])")

LONGEST_HEADING = 70
"""Maximum characters of a heading."""

SHORTEST_PARAGRAPH = 40
"""Minimum characters of a paragraph that is worth asking for."""

LONGEST_NAME = 4
"""Maximum words of a defined term."""

MOST_ITEMS = 6
LONGEST_ITEM = 80
"""Maximum characters of a list item."""

A_NAME = r"[^\W\d_][^.,;:!?()\n]{1,40}?"
DEFINITIONS = {
    "en": re.compile(rf"^(?:An?\s+|The\s+)?({A_NAME})\s+(?:is|are)\s+(?:an?|the)\s+\w"),
    "de": re.compile(
        rf"^(?:Ein|Eine|Der|Die|Das)?\s*({A_NAME})\s+ist\s+(?:ein|eine|der|die|das)\s+\w"
    ),
    "fr": re.compile(rf"^(?:(?:Une?|Le|La)\s+|L')?({A_NAME})\s+est\s+(?:une?|la|le)\s+\w"),
    "es": re.compile(rf"^(?:Una?\s+|El\s+|La\s+)?({A_NAME})\s+es\s+(?:una?|el|la)\s+\w"),
    "it": re.compile(rf"^(?:(?:Una?|Il|Lo|La)\s+|L')?({A_NAME})\s+è\s+(?:una?|uno|il|la|lo)\s+\w"),
    "pt": re.compile(rf"^(?:Uma?\s+|O\s+|A\s+)?({A_NAME})\s+é\s+(?:uma?|o|a)\s+\w"),
    "zh": re.compile(r"^([\w]{2,12}?)是(?:一|指|由|用)"),
    "ja": re.compile(r"^([\w・]{2,16}?)(?:とは|は).{4,}(?:です|である|ます)。"),
}
POINTERS = re.compile(
    r"(?:this|that|then|all|each|both|if|when|it|he|she|there|here|which|what|these|those|dies|es|"
    r"das|ce|cela|il|elle|esto|este|esta|questo|isto)\b"
    r"|[这那它该此]|[こそあ][れの]",  # Chinese and Japanese write no blanks between words
    re.IGNORECASE,
)
"""Words that refer to an earlier sentence, so they cannot be the term of a definition."""


def prose_facts(document: Document) -> Iterator[Fact]:
    """Yield the facts in the sections of a text."""
    for heading, blocks in sections(document.text):
        paragraph = first_paragraph(blocks)
        language = language_of(" ".join([heading, *blocks]))
        if heading and is_statement(paragraph):
            yield Fact(
                "section",
                heading,
                shortened(paragraph),
                (first_sentence(paragraph),),
                language=language,
            )
        items = first_items(blocks)
        if heading and 2 <= len(items) <= MOST_ITEMS:
            answer = "\n".join(f"- {item}" for item in items)
            check = tuple(" ".join(first_sentence(item).split()[:6]) for item in items)
            yield Fact("items", heading, answer, check, language=language)
        for block in blocks:
            yield from definition_facts(block, language)


def definition_facts(block: str, language: str) -> Iterator[Fact]:
    """Yield the sentences of a paragraph that define a term."""
    pattern = DEFINITIONS.get(language)
    if pattern is None or not is_paragraph(block):
        return
    for sentence in sentences(block):
        match = pattern.match(sentence)
        is_term = (
            match is not None
            and len(match[1].split()) <= LONGEST_NAME
            and not POINTERS.match(match[1])
        )
        if match and is_term and shortened(sentence):
            yield Fact("definition", match[1].strip(), sentence, (sentence,), language=language)


def sections(text: str) -> Iterator[tuple[str, list[str]]]:
    """Yield (heading, blocks of lines under it); a heading is marked, underlined, or a short
    separate line. A separate line "1. ..." is a heading unless another one is next to it, as the
    items of a list are.
    """
    heading = ""
    blocks: list[str] = []
    texts = [block.strip("\n") for block in re.split(r"\n[ \t]*\n", text)]
    is_numbered = ["\n" not in block_text and bool(ITEM.match(block_text)) for block_text in texts]
    for place, block in enumerate(texts):
        neighbours = is_numbered[max(place - 1, 0) : place] + is_numbered[place + 1 : place + 2]
        is_heading = is_numbered[place] and not any(neighbours)
        new_heading, rest = heading_of(NUMBER.sub("", block) if is_heading else block)
        if new_heading:
            if blocks:
                yield heading, blocks
            heading = new_heading
            blocks = []
        if rest.strip():
            blocks.append(rest)
    if blocks:
        yield heading, blocks


def heading_of(block: str) -> tuple[str, str]:
    """Return the heading at the start of a block of lines ("" if none), and the other lines."""
    lines = block.split("\n")
    mark = HEADING_MARK.match(lines[0])
    # One pattern for mark, text and closing marks would backtrack at each space.
    heading_text = lines[0][mark.end() :].rstrip("#=").rstrip() if mark else None
    if heading_text is not None and len(heading_text) <= LONGEST_HEADING:
        return strip_markup(heading_text), "\n".join(lines[1:])
    if (
        len(lines) > 1
        and UNDERLINE.match(lines[1])
        and 0 < len(lines[0].strip()) <= LONGEST_HEADING
    ):
        return strip_markup(lines[0]), "\n".join(lines[2:])
    is_plain_line = len(lines) == 1 and not ITEM.match(block) and not CODE_LINE.match(block)
    if (
        is_plain_line
        and 2 < len(block.strip()) <= LONGEST_HEADING
        and block.strip()[-1] not in ".,;:!?。！？"
    ):
        return strip_markup(block), ""
    return "", block


def strip_markup(text: str) -> str:
    """Return a heading without its number, link targets and emphasis."""
    return (
        re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", NUMBER.sub("", text))
        .replace("`", "")
        .replace("**", "")
        .rstrip("#¶ ")
        .strip()
    )


def first_paragraph(blocks: Sequence[str]) -> str:
    """Return the first block if it is a paragraph, else ""; later blocks are not only about the
    heading.
    """
    return blocks[0] if blocks and is_paragraph(blocks[0]) else ""


def is_statement(paragraph: str) -> bool:
    """Return whether a paragraph is self-contained; one that ends in a colon only introduces the
    next block.
    """
    return len(paragraph) >= SHORTEST_PARAGRAPH and shortened(paragraph)[-1:] not in ("", ":", "：")


def is_paragraph(block: str) -> bool:
    """Return whether a block is running text: no list, table, code, or markup."""
    lines = block.split("\n")
    return not any(
        ITEM.match(line) or CODE_LINE.match(line) or UNDERLINE.match(line) for line in lines
    )


def first_items(blocks: Sequence[str]) -> list[str]:
    """Return the items of a list directly under a heading or after one paragraph, else no items."""
    for block in blocks[:2]:
        items = [match[1].strip() for line in block.split("\n") if (match := ITEM.match(line))]
        if len(items) > 1:
            are_short = all(len(item) <= LONGEST_ITEM and tokens_of(item) for item in items)
            return items if are_short and len(items) == len(block.strip("\n").split("\n")) else []
    return []


MOST_FUNCTIONS = 6
"""Maximum functions of a commit in one answer."""

LONGEST_SUBJECT = 120
"""Maximum characters of a commit's subject line; a longer one does not fit into a question."""

CHANGED_DEFINITION = re.compile(
    r"^([+-])[ \t]*(?:async[ \t]+)?(?:def|function|func|fn)[ \t]+([A-Za-z_]\w*)", re.MULTILINE
)
"""Sign and name of a function that a changed line defines."""


def commit_facts(document: Document) -> Iterator[Fact]:
    """Yield the facts of a commit: its message, and the functions that it added.

    The list of changed files is not a fact: the document leaves out lock files, images and changes
    of held-out files (`data.text.commits.follow_files`), so the list would be incomplete.
    """
    message, patches = message_and_patches(document.text)
    subject, _, body = message.partition("\n")
    if not subject.strip() or len(subject) > LONGEST_SUBJECT:
        return
    subject_quote = f'"{subject.strip()}"'
    paragraph = body.strip().split("\n\n")[0]
    if is_statement(paragraph):
        yield Fact("commit", subject_quote, shortened(paragraph), (first_sentence(paragraph),))
    functions = added_functions("".join(patch.text for patch in patches))
    if 0 < len(functions) <= MOST_FUNCTIONS:
        answer = "\n".join(f"- `{name}`" for name in functions)
        yield Fact("commit functions", subject_quote, answer, tuple(functions))


def added_functions(changes: str) -> list[str]:
    """Return the names of the public functions that are new in the changes of a commit.

    A name that a removed line defines too is not new: the function was changed or moved.
    """
    definitions = CHANGED_DEFINITION.findall(changes)
    removed_names = {name for sign, name in definitions if sign == "-"}
    added_names = dict.fromkeys(name for sign, name in definitions if sign == "+")
    return [
        name
        for name in added_names
        if name not in removed_names and not name.startswith(("_", "test"))
    ]
