"""The web page's teach and review tabs and its login in a real browser."""

from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from live_server import Live, live
from page_driver import imported, keep
from page_routes import hold

from deepseek.data.preferences.database import Preference, PreferenceDatabase
from deepseek.packs.pack import read_pack
from deepseek.server.settings import Settings

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Page

expect = pytest.importorskip("playwright.sync_api").expect


def test_an_expert_is_taught_from_the_page(page: "Page", served: Live) -> None:
    page.get_by_role("tab", name="Teach").click()
    page.get_by_role("button", name="notes/").press("Enter")
    expect(page.locator("#lesson-path")).to_have_value("notes")
    expect(page.locator("#folder-size")).to_contain_text("20 files")
    expect(page.locator("#folders button")).to_be_focused()  # the parent folder
    page.locator("#lesson-name").fill("notes")
    page.locator("#lesson-minutes").fill("0.1")
    expect(page.locator("#estimate")).to_contain_text("6 seconds")
    page.get_by_text("More", exact=True).click()
    page.get_by_label("width").fill("32")
    page.get_by_role("button", name="Teach", exact=True).click()
    expect(page.locator("#lesson-stage")).to_have_text("notes: being taught")
    expect(page.locator("#steps [aria-current]")).to_be_visible()
    expect(page.locator("#lesson-stage")).to_have_text("notes: taught", timeout=540_000)
    expect(page.locator("#verdict strong")).to_contain_text("Better by")
    expect(page.locator("#verdict strong")).to_contain_text("and armed")
    for curve in ("train", "held"):
        assert page.locator(f"#curve polyline.{curve}").get_attribute("points")
    expect(page.locator("#plugged .name")).to_have_text(["notes", "one"])
    packs = served.service.settings.experts_folder
    assert read_pack(packs / "notes.safetensors").manifest.width == 32
    keep(page, "teach")
    served.engine.unplug("notes")


@pytest.mark.parametrize(
    ("gain", "armed", "title"),
    [
        (0.123, True, "Better by 12.3 %, and armed."),
        (-0.045, False, "Worse by 4.5 %, and not armed."),
        (0.0, False, "No better than the base, and not armed."),
    ],
)
def test_a_verdict_says_what_happened_and_why(
    open_page: "Page", gain: float, armed: bool, title: str
) -> None:
    lesson = {
        "state": "plugged",
        "name": "x",
        "armed": armed,
        "gain": gain,
        "before": 2.0,
        "after": 2.0 - gain,
        "story": "more text would help",
    }
    said = open_page.evaluate("l => import('/static/lesson.js').then(m => m.verdict(l))", lesson)
    assert said[0] == title
    assert "More text would help." in said[1]
    assert ("never armed by itself" in said[1]) is not armed


def test_a_duration_is_told_in_words(open_page: "Page") -> None:
    assert imported(open_page, "lesson.js", "[5, 100, 120, 900].map(m.minutes)") == [
        "5 seconds",
        "1.7 minutes",
        "2 minutes",
        "15 minutes",
    ]


def test_a_pair_is_reviewed_with_the_keyboard(page: "Page", served: Live) -> None:
    database = PreferenceDatabase(served.service.settings.preferences)
    question = ({"role": "user", "content": "Which way is up?"},)
    number = database.add(
        Preference(question, "Towards the sky.", "Up is a direction. " + "Long. " * 900, "file")
    )
    page.get_by_role("tab", name="Chat").focus()
    page.keyboard.press("ArrowRight")
    page.keyboard.press("ArrowRight")
    expect(page.locator("#pair-prompt")).to_contain_text("Which way is up?")
    page.locator("#review").evaluate("panel => panel.scrollTo(0, panel.scrollHeight)")
    expect(page.locator("#pair-prompt")).to_be_in_viewport()
    keep(page, "review")
    page.keyboard.press("2")
    expect(page.locator("#pair-none")).to_be_visible()
    assert database.get(number or 0).chosen.startswith("Up is a direction")
    page.locator("#question").fill("the value")
    page.locator("#question").press("Enter")
    expect(page.locator("#pair")).to_be_visible(timeout=60_000)
    answers = [page.locator(f"#answer-{place} .text").inner_text() for place in (0, 1)]
    page.locator("#answer-0").click()
    expect(page.locator("#review-count")).to_contain_text("2 of 2")
    if answers[0].strip():
        assert database.get(2).labels == ("reviewed",)
    database.close()


def test_a_judgement_is_for_the_pair_on_the_screen(browser: "Browser", served: Live) -> None:
    database = PreferenceDatabase(served.service.settings.preferences)
    for words in ("Which way is left?", "Which way is right?"):
        question = ({"role": "user", "content": words},)
        database.add(Preference(question, f"{words} That one.", "This one.", "file"))
    database.close()
    page = browser.new_page()
    page.goto(served.url)
    page.locator("#words:focus").wait_for()
    page.get_by_role("tab", name="Review").click()
    expect(page.locator("#pair-prompt")).to_contain_text("left")
    page.keyboard.press("Shift+S")
    expect(page.locator("#pair-prompt")).to_contain_text("right")
    held = hold(page, "**/v1/preferences/*")
    with page.expect_request("**/v1/preferences/*"):
        page.keyboard.press("1")
    page.keyboard.press("s")  # ignored while the judgement is being stored
    page.locator("#question").fill("a fresh one")
    page.locator("#question").press("Enter")
    held[0].fulfill(status=503, json={"error": {"message": "The database is busy."}})
    expect(page.locator("#notice")).to_have_text("The database is busy.")
    expect(page.locator("#pair-prompt")).to_contain_text("right")
    page.locator("#answer-1").click()
    expect(page.locator("#skip")).to_have_attribute("aria-disabled", "true")
    assert [route.request.url for route in held] == [held[0].request.url] * 2
    page.close()


LESSON = {
    "name": "notes",
    "state": "running",
    "stage": "train",
    "done": 3,
    "total": 9,
    "message": "",
    "losses": [],
    "held_out": [],
    "verdict": "",
    "armed": False,
    "before": None,
    "after": None,
    "gain": None,
    "story": "",
    "seconds": 5,
    "expected_seconds": None,
}


def test_a_lesson_is_streamed_while_it_is_watched_until_the_server_forgets_it(page: "Page") -> None:
    page.route("**/v1/teach", lambda route: route.fulfill(json=LESSON))
    held = hold(page, "**/v1/teach/events")
    page.reload()
    expect(page.locator("#lesson-stage")).to_have_text("notes: being taught")
    assert held == []
    with page.expect_request("**/v1/teach/events"):
        page.get_by_role("tab", name="Teach").click()
    with page.expect_event("requestfailed"):  # aborted by the page itself
        page.get_by_role("tab", name="Chat").click()
    with page.expect_request("**/v1/teach/events"):
        page.get_by_role("tab", name="Teach").click()
    held[-1].fulfill(body='data: {"object": "lesson", "state": "none"}\n\n')
    expect(page.locator("#lesson-stage")).to_have_text("The server was started anew.")
    expect(page.locator("#lesson-start")).to_be_enabled()
    expect(page.locator("#verdict")).to_be_hidden()


def test_the_page_asks_for_a_key(browser: "Browser", served_folder: Path) -> None:
    with live(served_folder, Settings(api_keys=frozenset({"secret"}))) as server:
        context = browser.new_context()
        page = context.new_page()
        page.goto(server.url)
        keep(page, "login")
        page.locator("#key").fill("wrong")
        page.keyboard.press("Enter")
        expect(page.locator("#key")).to_be_visible()
        page.locator("#key").fill("secret")
        page.keyboard.press("Enter")
        expect(page.locator("#model")).to_have_text("tiny")
        expect(page.locator("#drop")).to_be_hidden()  # a user's key changes nothing
        expect(
            page.locator("#tab-review")
        ).to_be_hidden()  # nor does it show what others have written
        page.get_by_role("tab", name="Teach").focus()
        page.keyboard.press("ArrowRight")
        expect(page.get_by_role("tab", name="Chat")).to_be_focused()
        assert page.evaluate("document.cookie") == ""
        context.close()
