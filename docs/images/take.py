"""Take the screenshots of the web page in the documentation: an answer beside the base's.

The expert is that of the tutorial "Support in several languages":

    deepseek serve --experts support & python docs/images/take.py http://127.0.0.1:8000 support
"""

import sys
from pathlib import Path

from browser import ask, chromium, compare, opened

PICTURES = {
    "page-light": ((1100, 720), "light"),
    "page-dark": ((1100, 720), "dark"),
    "page-phone": ((375, 720), "light"),
}
EVERYDAY = "What is the capital of France?"
OWN = "What does error E7 on the display mean?"


def main(url: str, expert: str) -> None:
    """Write the pictures beside this file."""
    with chromium() as browser:
        for name, (size, scheme) in PICTURES.items():
            page = opened(browser, url, size, scheme, temperature=0, tokens=40)
            if size[0] > size[1]:
                ask(page, EVERYDAY)
            model = page.locator("#model").inner_text()
            page.locator("#pick").select_option(f"{model}+{expert}")
            ask(page, OWN)
            compare(page)
            page.screenshot(path=Path(__file__).parent / f"{name}.png")
            page.context.close()


main(*sys.argv[1:])
