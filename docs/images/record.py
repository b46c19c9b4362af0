"""Record teaching on the web page as a GIF: lesson, verdict, answer beside the base's.

Writes a handbook of an invented shop from `examples/support.jsonl`, serves a model, and teaches an
expert from the handbook. It takes about as long as the lesson. A separate home leaves the user's
runs and models alone:

    DEEPSEEK_HOME=build/recording python docs/images/record.py
"""

import io
import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

from browser import chromium, compare, opened
from PIL import Image
from playwright.sync_api import Page

HERE = Path(__file__).parent
CONVERSATIONS = HERE.parents[1] / "examples" / "support.jsonl"
SIZE = (900, 640)
WIDTH = 760  # pixels of the GIF
COLOURS = 48
EACH = 1200  # ms per picture
LAST = 4000
FILES = 16
LESSON = {"tokens": "0", "epochs": "7"}
"""Seven passes over the whole handbook, however busy the machine is."""


class Recording:
    """Screenshots of a page, each with its duration."""

    def __init__(self, page: Page) -> None:
        self.page = page
        self.frames: list[Image.Image] = []
        self.times: list[int] = []

    def take(self, milliseconds: int = EACH) -> None:
        """Add a screenshot of the page."""
        with Image.open(io.BytesIO(self.page.screenshot())) as picture:
            height = picture.height * WIDTH // picture.width
            small = picture.convert("RGB").resize((WIDTH, height), Image.Resampling.LANCZOS)
        self.frames.append(small.quantize(COLOURS, dither=Image.Dither.NONE))
        self.times.append(milliseconds)

    def write(self, path: Path) -> None:
        """Write the GIF."""
        first, *others = self.frames
        first.save(
            path, save_all=True, append_images=others, duration=self.times, loop=0, optimize=True
        )


def write_handbook(folder: Path) -> None:
    """Write the questions and answers of the conversations as text files."""
    folder.mkdir(parents=True)
    turns = [json.loads(line)["messages"] for line in CONVERSATIONS.open(encoding="utf-8")]
    pairs = [f"Customer: {turn[0]['content']}\nShop: {turn[1]['content']}\n" for turn in turns]
    for number in range(FILES):
        # Each file has all answers, in a different order and with different questions.
        (folder / f"{number:02}.txt").write_text("\n".join(pairs[number::5]), encoding="utf-8")


def record(page: Page) -> Recording:
    """Teach an expert on the page, and compare one of its answers with the base's."""
    recording = Recording(page)
    page.get_by_role("tab", name="Teach").click()
    page.get_by_role("button", name="handbook/").click()
    page.locator("#lesson-name").fill("bicycle-shop")
    page.locator("#lesson-minutes").fill("10")
    page.get_by_text("More", exact=True).click()
    for argument, value in LESSON.items():
        page.locator(f"#lesson-arguments [name={argument}]").fill(value)
    page.get_by_text("More", exact=True).click()
    recording.take()
    page.get_by_role("button", name="Teach", exact=True).click()
    shown = ""
    while not page.locator("#verdict").is_visible():
        page.wait_for_timeout(500)
        steps = page.locator("#steps [aria-current]").all_inner_texts()
        points = page.locator("#curve polyline.held").get_attribute("points") or "" if steps else ""
        if steps and steps[0] + points != shown:
            shown = steps[0] + points
            page.locator("#lesson-message").scroll_into_view_if_needed()
            recording.take(600)
    page.locator("#lesson-stage").filter(has_text="taught").filter(has_not_text="being").wait_for()
    page.locator("#verdict").scroll_into_view_if_needed()
    recording.take(LAST)
    page.get_by_role("tab", name="Chat").click()
    page.locator(".example").first.wait_for()
    recording.take()
    page.locator(".example").first.click()
    page.locator(".facts").wait_for()
    recording.take(2 * EACH)
    compare(page)
    recording.take(LAST)
    return recording


def main() -> None:
    """Serve, teach, and write `page-teach.gif` beside this file."""
    with tempfile.TemporaryDirectory() as folder:
        write_handbook(Path(folder) / "handbook")
        command = [sys.executable, "-m", "deepseek", "serve", "--port=0", f"--teach-root={folder}"]
        environment = {**os.environ, "PYTHONUNBUFFERED": "1"}
        server = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment)
        try:
            assert server.stdout is not None
            url = next(
                found[0] for line in server.stdout if (found := re.search(r"http://\S+", line))
            )
            with chromium() as browser:
                page = opened(browser, url, SIZE, "light", temperature=0, tokens=32)
                record(page).write(HERE / "page-teach.gif")
        finally:
            server.terminate()
            server.wait()


main()
