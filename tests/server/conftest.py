"""One server per module; one server and one browser for all tests of the page."""

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from live_server import Live, live
from openai import OpenAI
from page_driver import CHROMIUMS, FLAGS

from deepseek.server.settings import Settings

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Page


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Live]:
    """A server without keys."""
    with live(tmp_path_factory.mktemp("server")) as running:
        yield running


@pytest.fixture(scope="module")
def client(server: Live) -> Iterator[OpenAI]:
    """OpenAI's own client for the server."""
    with server.client() as openai:
        yield openai


@pytest.fixture(scope="module")
def served_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder in which the servers of a module share a model; empty at first."""
    return tmp_path_factory.mktemp("served")


@pytest.fixture(scope="module")
def browser() -> Iterator["Browser"]:
    """Chromium; tests are skipped if it or its driver is missing.

    It is closed after each test file, since its event loop would disturb tests that run their own.
    """
    driver = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    chromium = next((found for name in CHROMIUMS if (found := shutil.which(name))), None)
    if chromium is None:
        pytest.skip("no Chromium on this machine; apt-get install chromium")
    with driver.sync_playwright() as started:
        opened = started.chromium.launch(executable_path=chromium, args=FLAGS)
        yield opened
        opened.close()


@pytest.fixture(scope="module")
def served(browser: "Browser", tmp_path_factory: pytest.TempPathFactory) -> Iterator[Live]:
    """The server whose page is tested, with text to teach and the expert `one` plugged."""
    folder = tmp_path_factory.mktemp("page")
    notes = folder / "text" / "notes"
    notes.mkdir(parents=True)
    for number in range(20):
        words = "the router {} returns the value of the expert"
        text = " ".join(words.format(number * place % 97) for place in range(30))
        (notes / f"{number}.txt").write_text(text)
    with live(folder, Settings(teach_root=folder / "text")) as server:
        server.engine.plug(server.folder / "one.safetensors")
        yield server


@pytest.fixture
def page(browser: "Browser", served: Live) -> Iterator["Page"]:
    """The page in a new profile; it must neither log an error nor contact another host."""
    context = browser.new_context(viewport={"width": 1180, "height": 760})
    context.grant_permissions(["clipboard-read", "clipboard-write"])
    opened = context.new_page()
    complaints: list[str] = []
    opened.on("pageerror", lambda error: complaints.append(str(error)))
    opened.on(
        "console", lambda line: complaints.append(line.text) if line.type == "error" else None
    )
    opened.on(
        "request",
        lambda request: complaints.append(request.url) if served.url not in request.url else None,
    )
    opened.goto(served.url)
    opened.locator("#words:focus").wait_for()  # the last thing that the page does when it opens
    yield opened
    context.close()
    assert complaints == []


@pytest.fixture(scope="module")
def open_page(browser: "Browser", served: Live) -> "Page":
    """The page, opened once, for tests of single functions."""
    opened = browser.new_page()
    opened.goto(served.url)
    return opened
