"""HTML pages as readable text."""

import re
from collections import Counter
from html import unescape
from html.parser import HTMLParser

from deepseek.data.text.filters import words

SILENT = words(
    "script style head title nav header footer aside noscript template svg math button select "
    "iframe"
)
"""HTML elements to skip: not readable text, or navigation, which repeats on every page."""

CONTENT = words("article main")
"""HTML elements whose header is the head of a text, not that of the site."""

BREAKS = words("""
    p div section article main h1 h2 h3 h4 h5 h6 hgroup address center
    li dt dd tr table caption ul ol dl menu br hr blockquote figure figcaption pre
    details summary fieldset legend
""")
"""HTML elements that begin and end a line."""

PARAGRAPHS = words("p div")
"""Those of them that often wrap the whole text of a list item or of a table cell."""

CELLS = words("td th")
"""HTML elements that share a line with others of their kind."""

SOFT_HYPHEN = "\u00ad"
"""Optional break within a word. It is invisible, and would split the word into two tokens."""


def html_to_text(page: str) -> str:
    """Return the text of an HTML page: one line per paragraph, list item or table row.

    Preformatted text keeps its lines and their indentation. Several blank lines become one.

    Args:
        page: the HTML source.
    """
    reader = PageReader()
    reader.feed(page)
    reader.end()
    lines = "".join(reader.parts).split("\n")
    return re.sub(r"\n{3,}", "\n\n", "\n".join(line.rstrip() for line in lines)).strip() + "\n"


class PageReader(HTMLParser):
    """Collects the text outside the elements in `SILENT`."""

    def __init__(self) -> None:
        super().__init__(convert_charrefs=True)
        self.parts: list[str] = []
        self.silent: list[str] = []
        self.num_silent: Counter[str] = Counter()
        self.preformatted = 0
        self.articles = 0
        self.at_item_start = False  # right after the mark of a list item or of a cell
        self.ended_paragraphs = 0  # whose line breaks are due unless the cell ends there too

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        """Enter an element."""
        in_head = self.silent[-1:] == ["head"]
        if tag == "body" or (in_head and tag in BREAKS):
            self.silent.clear()  # the end tag of <head> is optional, and so is <body>
            self.num_silent.clear()
        elif tag in SILENT and not (tag == "header" and self.articles):
            self.silent.append(tag)
            self.num_silent[tag] += 1
        elif tag == "pre":
            self.preformatted += 1
        elif tag in CONTENT:
            self.articles += 1
        self.begin(tag)

    def begin(self, tag: str) -> None:
        """Start a new line, list item or table cell if the element has one."""
        if tag in PARAGRAPHS and self.at_item_start:
            return
        if tag in BREAKS:
            self.break_lines()
            self.parts.append("\n")
            self.at_item_start = False
        if self.silent:
            return
        if tag == "li":
            self.parts.append("- ")
            self.at_item_start = True
        elif tag in CELLS:
            self.ended_paragraphs = 0
            self.parts.append("  ")
            self.at_item_start = True

    def break_lines(self) -> None:
        """Write the line breaks that are due after paragraphs."""
        if self.ended_paragraphs:
            self.parts.append("\n" * self.ended_paragraphs)
            self.ended_paragraphs = 0

    def handle_endtag(self, tag: str) -> None:
        """Leave an element; ignore end tags without a start tag."""
        if self.num_silent[tag]:
            while self.num_silent[tag]:
                self.num_silent[self.silent.pop()] -= 1
        elif tag == "pre":
            self.preformatted = max(0, self.preformatted - 1)
        elif tag in CONTENT:
            self.articles = max(0, self.articles - 1)
        if tag in CELLS and not self.silent:
            self.ended_paragraphs = 0
        elif tag in PARAGRAPHS:
            self.ended_paragraphs += not self.at_item_start
        elif tag in BREAKS:
            self.break_lines()
            self.parts.append("\n")
            self.at_item_start = False

    def parse_marked_section(self, i: int, report: int = 1) -> int:
        """Return the end of a marked section, such as Word's `<![if ...]>`, which is skipped."""
        return self.rawdata.find(">", i) + 1 or -1

    def end(self) -> None:
        """Read what is left: text up to an unfinished entity is text, unfinished markup is dropped.

        `HTMLParser.close` would look for the end of each unfinished tag again, in quadratic time.
        """
        if self.rawdata and not self.rawdata.startswith("<"):
            self.handle_data(unescape(self.rawdata))

    def handle_data(self, data: str) -> None:
        """Collect readable text; outside <pre>, collapse white space into single spaces."""
        if self.silent:
            return
        if self.preformatted:
            self.break_lines()
            self.parts.append(data)
            self.at_item_start = False
            return
        at_line_start = not self.parts or self.parts[-1].endswith("\n")
        text = re.sub(r"\s+", " ", data.replace(SOFT_HYPHEN, ""))
        if at_line_start or self.at_item_start or self.ended_paragraphs:
            text = text.lstrip()
        if text:
            self.break_lines()
            self.parts.append(text)
            self.at_item_start = False
