"""Browser helpers for screenshots of the web page in the documentation."""

import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from playwright.sync_api import Browser, Page, expect, sync_playwright

PATIENCE = 900_000  # ms
ARGUMENTS = ["--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"]


@contextmanager
def chromium() -> Iterator[Browser]:
    """Yield Chromium, with long timeouts."""
    expect.set_options(timeout=PATIENCE)
    with sync_playwright() as driver:
        browser = driver.chromium.launch(
            executable_path=shutil.which("chromium"), args=ARGUMENTS, timeout=PATIENCE
        )
        yield browser
        browser.close()


def opened(browser: Browser, url: str, size: tuple[int, int], scheme: str, **settings: Any) -> Page:
    """Open the page in a new profile, with settings stored as its settings dialog does."""
    width, height = size
    context = browser.new_context(viewport={"width": width, "height": height}, color_scheme=scheme)
    page = context.new_page()
    page.set_default_timeout(PATIENCE)
    stored = json.dumps(json.dumps(settings))
    page.add_init_script(
        f"localStorage.getItem('settings') || localStorage.setItem('settings', {stored})"
    )
    page.goto(url)
    page.locator("#words:focus").wait_for()
    return page


def ask(page: Page, question: str) -> None:
    """Ask a question and wait for the whole answer."""
    before = page.locator(".facts").count()
    page.locator("#words").fill(question)
    page.locator("#words").press("Enter")
    page.locator(".facts").nth(before).wait_for()


def compare(page: Page) -> None:
    """Have the base answer the last question too."""
    page.get_by_role("button", name="Compare with base").last.click()
    page.locator(".comparison > p").last.wait_for()
