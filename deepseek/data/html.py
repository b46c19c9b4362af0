"""The readable text of an HTML page, with the standard library's parser."""

import re
from html.parser import HTMLParser

from deepseek.data.filters import words

SILENT = words("script style head nav header footer aside noscript template svg math button select form iframe")
"""Elements whose content is no text to read; navigation would otherwise repeat on every page."""

BREAKS = words("p div section article main h1 h2 h3 h4 h5 h6 li dt dd tr table ul ol dl br hr blockquote figure pre")
"""Elements that begin and end a line."""


def html_to_text(page: str) -> str:
    """Return the text of a page: a line per paragraph, list item or table row, preformatted text as it stands."""
    reader = PageReader()
    reader.feed(page)
    reader.close()
    lines = "".join(reader.parts).split("\n")
    return re.sub(r"\n{3,}", "\n\n", "\n".join(line.rstrip() for line in lines)).strip() + "\n"


class PageReader(HTMLParser):
    """Collects the text outside silent elements."""

    def __init__(self) -> None:
        super().__init__(convert_charrefs=True)
        self.parts: list[str] = []
        self.silent: list[str] = []
        self.preformatted = 0

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        """Enter an element."""
        if tag == "body":
            self.silent.clear()  # the end tag of head is optional
        elif tag in SILENT:
            self.silent.append(tag)
        elif tag == "pre":
            self.preformatted += 1
        self.begin(tag)

    def begin(self, tag: str) -> None:
        """Start a new line or table cell where the element calls for it."""
        if tag in BREAKS:
            self.parts.append("\n")
        if tag == "li":
            self.parts.append("- ")
        elif tag in ("td", "th"):
            self.parts.append("  ")

    def handle_endtag(self, tag: str) -> None:
        """Leave an element; end tags that nothing opened are ignored."""
        if tag in self.silent:
            del self.silent[self.silent.index(tag) :]
        elif tag == "pre":
            self.preformatted = max(0, self.preformatted - 1)
        if tag in BREAKS:
            self.parts.append("\n")

    def handle_data(self, data: str) -> None:
        """Keep readable text; outside preformatted elements white space counts as one space."""
        if self.silent:
            return
        if self.preformatted:
            self.parts.append(data)
            return
        at_line_start = not self.parts or self.parts[-1].endswith("\n")
        text = re.sub(r"\s+", " ", data)
        self.parts.append(text.lstrip() if at_line_start else text)
