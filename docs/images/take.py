"""Take the pictures of the web page in these documents, of a server that runs with a plugged
expert.

deepseek serve --experts spanish & python docs/images/take.py http://127.0.0.1:8000
"""

import shutil
import sys
from pathlib import Path

from playwright.sync_api import Page, expect, sync_playwright

QUESTIONS = ("What is the capital of France?", "Cuéntame una historia corta.")
PATIENCE = 600_000  # ms


def picture(page: Page, name: str) -> None:
    """Ask the questions and keep what the page shows then."""
    page.goto(sys.argv[1])
    page.locator("#temperature").fill("0")
    page.locator("#tokens").fill("48")
    for number, question in enumerate(QUESTIONS, 1):
        page.locator("#words").fill(question)
        page.locator("#words").press("Enter")
        expect(page.locator(".legend")).to_have_count(number)
    page.screenshot(path=Path(__file__).parent / f"{name}.png")


expect.set_options(timeout=PATIENCE)
with sync_playwright() as driver:
    browser = driver.chromium.launch(
        executable_path=shutil.which("chromium"), args=["--no-sandbox"], timeout=PATIENCE
    )
    for name, width, height, scheme in (
        ("page-light", 1100, 640, "light"),
        ("page-dark", 1100, 640, "dark"),
        ("page-phone", 375, 720, "light"),
    ):
        page = browser.new_context(
            viewport={"width": width, "height": height}, color_scheme=scheme
        ).new_page()
        page.set_default_timeout(PATIENCE)
        picture(page, name)
    browser.close()
