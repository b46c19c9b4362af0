"""The web page in a real browser: chat, experts, teaching and review, with the keyboard and on a
phone's width.

`SCREENSHOTS=folder pytest tests/server/test_page.py` keeps pictures.
"""

import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from live_server import Live, live

from deepseek.data.preferences.database import Preference, PreferenceDatabase
from deepseek.packs.pack import read_pack
from deepseek.server.service import Settings

playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
CHROMIUM = (
    shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
)
pytestmark = pytest.mark.skipif(
    CHROMIUM is None, reason="no Chromium on this machine; apt-get install chromium"
)
FLAGS = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--no-first-run",
]


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Live]:
    folder = tmp_path_factory.mktemp("page")
    notes = folder / "text" / "notes"
    notes.mkdir(parents=True)
    for number in range(20):
        text = " ".join(
            f"the router {number * place % 97} returns the value of the expert"
            for place in range(30)
        )
        (notes / f"{number}.txt").write_text(text)
    with live(folder, Settings(teach_root=folder / "text")) as server:
        yield server


@pytest.fixture(scope="module")
def browser() -> Iterator["playwright.Browser"]:
    with playwright.sync_playwright() as driver:
        opened = driver.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        yield opened
        opened.close()


@pytest.fixture
def page(browser: "playwright.Browser", served: Live) -> Iterator["playwright.Page"]:
    """The page, opened anew; it must neither log an error nor ask anything of another host."""
    context = browser.new_context(viewport={"width": 1180, "height": 760})
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
    playwright.expect(opened.locator("#model")).to_have_text("tiny")
    yield opened
    context.close()
    assert complaints == []


def keep(page: "playwright.Page", name: str) -> None:
    """Keep a picture if somebody asked for them."""
    folder = os.environ.get("SCREENSHOTS")
    if folder:
        page.screenshot(path=Path(folder) / f"{name}.png")


def say(page: "playwright.Page", text: str, tokens: int = 24) -> None:
    before = page.locator(".legend").count()
    page.locator("#tokens").fill(str(tokens))
    page.locator("#words").fill(text)
    page.locator("#words").press("Enter")
    playwright.expect(page.locator(".legend")).to_have_count(before + 1, timeout=60_000)


def test_experts_are_dropped_speak_in_their_colour_and_go(
    page: "playwright.Page", served: Live
) -> None:
    for name in ("one", "two"):
        page.locator("#pack").set_input_files(served.folder / f"{name}.safetensors")
        playwright.expect(page.locator("#plugged .name", has_text=name)).to_be_visible()
    say(page, "the expert of the model")
    spans = page.locator(".turn.assistant .said span[class^=e]")
    assert spans.count() > 0
    assert "tokens" in page.locator(".legend").inner_text()
    keep(page, "chat-light")
    page.locator("#theme").click()
    page.locator("#theme").click()
    assert page.evaluate("document.documentElement.dataset.theme") == "dark"
    keep(page, "chat-dark")
    for name in ("one", "two"):
        page.get_by_role("switch", name=f"{name} may speak").uncheck()
    say(page, "again")
    assert page.locator(".legend").last.locator("span.dot").count() == 1
    assert "base" in page.locator(".legend").last.inner_text()
    for name in ("one", "two"):
        page.get_by_role("button", name=f"Unplug {name}").click()
        playwright.expect(page.get_by_role("button", name=f"Plug {name}")).to_be_visible()
    page.get_by_role("button", name="Plug one").click()
    playwright.expect(page.locator("#expert-count")).to_have_text("1 plugged")
    page.get_by_role("button", name="Unplug one").click()
    playwright.expect(page.locator("#expert-count")).to_have_text("none plugged")


def test_a_file_dropped_on_the_page_is_plugged(page: "playwright.Page", served: Live) -> None:
    content = list((served.folder / "one.safetensors").read_bytes())
    page.evaluate(
        """bytes => {
            const transfer = new DataTransfer();
            transfer.items.add(new File([new Uint8Array(bytes)], "one.safetensors"));
            const fields = { dataTransfer: transfer, bubbles: true };
            document.getElementById("drop").dispatchEvent(new DragEvent("drop", fields));
        }""",
        content,
    )
    playwright.expect(page.locator("#plugged .name")).to_have_text("one")
    page.get_by_role("button", name="Unplug one").click()
    playwright.expect(page.locator("#expert-count")).to_have_text("none plugged")


def test_an_answer_can_be_stopped(page: "playwright.Page", served: Live) -> None:
    page.locator("#tokens").fill("700")
    page.locator("#words").fill("the")
    page.locator("#words").press("Enter")
    playwright.expect(page.locator("#stop")).to_be_visible()
    page.keyboard.press("Escape")
    playwright.expect(page.locator("#stop")).to_be_hidden()
    playwright.expect(page.locator("#send")).to_be_enabled()


def test_an_expert_is_taught_from_the_page(page: "playwright.Page", served: Live) -> None:
    page.get_by_role("tab", name="Teach").click()
    page.locator("#lesson-name").fill("notes")
    page.locator("#lesson-path").fill("notes")
    page.locator("#lesson-minutes").fill("0.1")
    page.get_by_text("More", exact=True).click()
    page.get_by_label("width").fill("32")
    page.get_by_role("button", name="Teach", exact=True).click()
    playwright.expect(page.locator("#lesson-stage")).to_contain_text("notes")
    playwright.expect(page.locator("#lesson-stage")).to_contain_text("Plugged", timeout=240_000)
    playwright.expect(page.locator("#plugged .name")).to_have_text("notes")
    assert page.locator("#curve polyline.train").get_attribute("points")
    assert (
        read_pack(served.service.settings.experts_folder / "notes.safetensors").manifest.width == 32
    )
    keep(page, "teach")
    page.get_by_role("button", name="Unplug notes").click()


def test_a_pair_is_reviewed_with_the_keyboard(page: "playwright.Page", served: Live) -> None:
    database = PreferenceDatabase(served.service.settings.preferences)
    question = ({"role": "user", "content": "Which way is up?"},)
    number = database.add(
        Preference(question, "Towards the sky.", "Up is a direction, opposite to the pull.", "file")
    )
    page.get_by_role("tab", name="Chat").focus()
    page.keyboard.press("ArrowRight")
    page.keyboard.press("ArrowRight")
    playwright.expect(page.locator("#pair-prompt")).to_contain_text("Which way is up?")
    keep(page, "review")
    page.keyboard.press("2")
    playwright.expect(page.locator("#pair-none")).to_be_visible()
    assert database.get(number or 0).chosen == "Up is a direction, opposite to the pull."
    page.locator("#question").fill("the value")
    page.locator("#question").press("Enter")
    playwright.expect(page.locator("#pair")).to_be_visible(timeout=60_000)
    answers = [page.locator(f"#answer-{place} .text").inner_text() for place in (0, 1)]
    page.locator("#answer-0").click()
    playwright.expect(page.locator("#review-count")).to_contain_text("2 of 2")
    if answers[0].strip():
        assert database.get(2).labels == ("reviewed",)
    database.close()


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_a_phone_shows_everything_without_scrolling_sideways(
    browser: "playwright.Browser", served: Live, scheme: str
) -> None:
    context = browser.new_context(viewport={"width": 375, "height": 740}, color_scheme=scheme)
    page = context.new_page()
    page.goto(served.url)
    playwright.expect(page.locator("#model")).to_have_text("tiny")
    for tab in ("Chat", "Teach", "Review"):
        page.get_by_role("tab", name=tab).click()
        assert page.evaluate("document.documentElement.scrollWidth") <= 375
    page.get_by_role("tab", name="Chat").click()
    say(page, "the expert of the model")
    ground = page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert (ground == "rgb(251, 251, 250)") == (scheme == "light")
    keep(page, f"phone-{scheme}")
    context.close()


def test_the_page_asks_for_a_key(browser: "playwright.Browser", served_folder: Path) -> None:
    with live(served_folder, Settings(api_keys=frozenset({"secret"}))) as server:
        context = browser.new_context()
        page = context.new_page()
        page.goto(server.url)
        keep(page, "login")
        page.locator("#key").fill("wrong")
        page.keyboard.press("Enter")
        playwright.expect(page.locator("#key")).to_be_visible()
        page.locator("#key").fill("secret")
        page.keyboard.press("Enter")
        playwright.expect(page.locator("#model")).to_have_text("tiny")
        assert page.locator("#drop").is_hidden()  # a user's key changes nothing
        assert page.evaluate("document.cookie") == ""
        context.close()
