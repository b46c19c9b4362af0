"""The web page must not lose turns, drafts, edits and settings through clicks, reloads, failures or
other tabs; and the keys and colours of an answer that is being generated.
"""

import re
from typing import TYPE_CHECKING

import pytest
from page_driver import imported, say, set_up
from page_routes import BEGUN, REFUSAL, chunks, hold

if TYPE_CHECKING:
    from playwright.sync_api import Page

expect = pytest.importorskip("playwright.sync_api").expect

ANSWERS = "**/v1/chat/completions"
FILL = """() => {
    for (let size = 1 << 22; size >= 1;) {
        try { localStorage.setItem(`pad${size}${Math.random()}`, "x".repeat(size)); }
        catch { size = Math.floor(size / 2); }
    }
}"""
"""Fills the storage of the page to the last character."""

GENERATED = """(async () => {
    const answer = m.blank("tiny", {});
    const turn = { kind: "chat", question: "q", answer };
    const seen = [];
    const look = () => seen.push({ ...answer.digests });
    const ask = () => m.generate({ turns: [turn] }, turn, answer, new AbortController().signal, look);
    await ask();
    await ask();
    return { seen, counts: { ...answer.counts } };
})()"""
"""Generates an answer and continues it; returns the known digests at each change."""


def ask(page: "Page", text: str) -> None:
    """Ask a question by keyboard, and do not wait for the answer."""
    page.locator("#words").fill(text)
    page.locator("#words").press("Enter")
    expect(page.locator("#stop")).to_be_visible()


def another_tab(page: "Page") -> "Page":
    """Open the page once more in the same browser."""
    other = page.context.new_page()
    other.goto(page.url)
    other.locator("#words:focus").wait_for()
    return other


def expect_questions(page: "Page", *questions: str) -> None:
    expect(page.locator(".turn.user .said")).to_have_text(list(questions))


def test_a_click_on_the_open_chat_lets_its_answer_go_on(page: "Page") -> None:
    set_up(page, tokens=4)
    say(page, "first")
    held = hold(page, ANSWERS)
    ask(page, "second")
    page.locator("#chat-list [aria-current]").press("Enter")
    expect(page.locator("#chat-list [aria-current]")).to_be_focused()
    held[0].fulfill(body=chunks("an answer"))
    expect(page.locator(".facts")).to_have_count(2)
    page.reload()
    expect_questions(page, "first", "second")


def test_a_reload_keeps_the_question_and_the_answer_so_far(page: "Page") -> None:
    set_up(page, tokens=700)
    ask(page, "a long question")
    expect(page.locator("#chat-list .chosen")).to_have_text(["a long question"])
    expect(page.locator(".assistant .said")).not_to_be_empty()
    page.reload()
    expect_questions(page, "a long question")
    expect(page.locator(".assistant .said")).not_to_be_empty()
    expect(page.locator(".facts")).to_contain_text("stopped")


def test_a_retry_leaves_the_draft_and_the_focus_near(page: "Page") -> None:
    set_up(page, tokens=4)
    say(page, "question")
    page.locator("#words").fill("my draft")
    page.get_by_role("button", name="Retry").press("Enter")
    expect(page.locator("#words")).to_be_focused()
    expect(page.locator(".facts")).to_be_visible()
    page.route(ANSWERS, lambda route: route.fulfill(body=REFUSAL))
    page.get_by_role("button", name="Retry").click()
    expect(page.locator("#notice")).to_have_text("The queue is full.")
    expect(page.locator("#words")).to_have_value("my draft")
    expect_questions(page, "question")
    page.reload()
    expect_questions(page, "question")


def test_an_open_editor_outlasts_an_answer_and_a_refusal(page: "Page") -> None:
    set_up(page, tokens=4)
    say(page, "first")
    held = hold(page, ANSWERS)
    ask(page, "second")
    page.get_by_role("button", name="Edit").first.click()
    field = page.get_by_label("Edit the message")
    field.fill("edited")
    field.press("Enter")  # ignored during an answer
    held[0].fulfill(body=chunks("an answer"))
    expect(page.locator(".facts")).to_have_count(2)
    expect(field).to_have_value("edited")
    expect(field).to_be_focused()
    field.press("Enter")
    expect(field).to_have_count(0)
    held[1].fulfill(body=REFUSAL)
    expect(field).to_have_value("edited")
    expect(page.locator(".exchange")).to_have_count(2)


def test_what_is_typed_while_the_model_loads_waits_in_the_composer(page: "Page") -> None:
    held = hold(page, "**/v1/me")
    address = page.url
    with page.expect_request("**/v1/me"):
        page.reload()
    page.locator("#words").fill("typed early")
    page.locator("#words").press("Enter")
    page.locator("#send").evaluate("button => button.click()")
    held[0].continue_()
    expect(page.locator("#send")).to_be_enabled()
    expect(page.locator("#words")).to_have_value("typed early")
    assert page.url == address


def test_two_tabs_on_one_chat_keep_each_others_turns(page: "Page") -> None:
    set_up(page, tokens=4)
    say(page, "first")
    other = another_tab(page)
    say(page, "of one tab")
    expect_questions(other, "first", "of one tab")
    say(other, "of the other")
    expect_questions(page, "first", "of one tab", "of the other")
    page.get_by_role("button", name=re.compile("Delete the chat")).click()
    expect(other.locator("#log .empty")).to_be_visible()
    other.get_by_role("switch", name="one may write").click()
    other.reload()
    expect(other.locator("#chat-none")).to_be_visible()


def test_a_reload_shows_the_chat_of_its_own_tab(page: "Page") -> None:
    set_up(page, tokens=4)
    say(page, "of one tab")
    page.locator("#words").fill("my draft")
    other = another_tab(page)
    other.get_by_role("button", name="New chat").click()
    say(other, "of the other")
    page.reload()
    expect_questions(page, "of one tab")
    expect(page.locator("#words")).to_have_value("my draft")


def test_a_refusal_to_go_on_leaves_the_answer_as_it_was(page: "Page") -> None:
    set_up(page, tokens=3)
    say(page, "the value")
    page.get_by_role("button", name="Compare with base").click()
    expect(page.locator(".comparison > p")).not_to_be_empty(timeout=60_000)
    before = page.locator(".assistant").inner_text()
    page.route(ANSWERS, lambda route: route.fulfill(body=REFUSAL))
    page.get_by_role("button", name="Continue").click()
    expect(page.locator("#notice")).to_have_text("The queue is full.")
    assert page.locator(".assistant").inner_text() == before
    page.reload()
    expect(page.locator(".cut")).to_have_text("cut at 3 tokens")
    assert page.locator(".assistant").inner_text() == before
    page.unroute(ANSWERS)
    page.get_by_role("button", name="Continue").click()
    expect(page.locator(".cut")).to_have_text("cut at 6 tokens")
    expect(page.locator(".comparison")).to_have_count(0)


def test_two_tabs_keep_each_others_settings(page: "Page") -> None:
    other = another_tab(page)
    page.locator("#gear").click()
    page.locator("#set-system").fill("Be brief.")
    page.locator("#set-system").press("Tab")
    other.locator("#gear").click()
    other.locator("#set-theme").select_option("dark")
    expect(page.locator("#set-theme")).to_have_value("dark")
    page.reload()
    expect(page.locator("#set-system")).to_have_value("Be brief.")


def test_an_answer_that_finds_no_room_is_told(page: "Page") -> None:
    hold(page, ANSWERS)
    page.evaluate(FILL)
    ask(page, "a question")
    expect(page.locator("#notice")).to_contain_text("storage for this page is full")
    page.get_by_role("button", name="New chat").click()
    expect(page.locator("#log .empty")).to_be_visible()
    expect(page.locator("#notice")).to_contain_text("storage for this page is full")


def test_without_storage_the_page_keeps_chats_while_it_is_open(page: "Page") -> None:
    page.add_init_script(
        "Object.defineProperty(window, 'localStorage', { get() { throw new Error('blocked'); } })"
    )
    page.reload()
    page.locator("#words:focus").wait_for()
    page.route(ANSWERS, lambda route: route.fulfill(body=chunks("an answer")))
    say(page, "kept for now")
    expect(page.locator("#chat-list .chosen")).to_have_text(["kept for now"])


def test_a_chat_without_an_answer_is_not_exported(page: "Page") -> None:
    page.route(ANSWERS, lambda route: route.fulfill(body=chunks()))
    say(page, "answered by nothing")
    expect(page.locator("#chat-list .chosen")).to_have_count(1)
    assert imported(page, "conversations.js", "m.asJsonLines()") == ""


def test_an_expert_has_its_colour_from_its_first_token(page: "Page") -> None:
    page.route(ANSWERS, lambda route: route.fulfill(body=chunks("a", "b", expert="one")))
    made = imported(page, "generate.js", GENERATED)
    assert all("one" in digests for digests in made["seen"])
    assert made["counts"] == {"one": 4}  # both requests, though neither reported usage


def test_an_expert_may_be_named_as_what_all_objects_have(open_page: "Page") -> None:
    marked = "m.marker([['a', 'constructor']], {})(0, 1)[0].title"
    assert imported(open_page, "attribution.js", marked) == "constructor"
    legend = "m.legend({ counts: { toString: 2 }, digests: {} }).textContent"
    assert imported(open_page, "attribution.js", legend) == "toString 2"


def test_a_stream_without_an_end_is_broken_off(page: "Page") -> None:
    page.route(ANSWERS, lambda route: route.fulfill(body=chunks("half an", finish=None)))
    say(page, "question")
    expect(page.locator(".facts")).to_contain_text("broken off")
    expect(page.locator("#notice")).to_contain_text("broke off")


def test_a_comparison_that_was_stopped_is_no_result(page: "Page") -> None:
    page.route(ANSWERS, lambda route: route.fulfill(body=chunks("an answer")))
    say(page, "question")
    page.evaluate(BEGUN, chunks("half", finish=None))
    page.get_by_role("button", name="Compare with base").click()
    expect(page.locator(".comparison")).to_contain_text("half")
    page.keyboard.press("Escape")
    expect(page.get_by_role("button", name="Compare with base")).to_be_visible()
    expect(page.locator(".comparison")).to_have_count(0)


def test_answers_too_long_to_compare_are_said_to_be(open_page: "Page") -> None:
    compared = """{
        const answer = (model, first) => ({
            model, digests: {}, tokens: [[first, null], ...Array(2100).fill(["a", null])],
        });
        const made = m.comparison(answer("tiny", "b"), answer("tiny+none", "c"), true);
        return [made.querySelector("section > p").textContent, made.querySelectorAll("mark").length];
    }"""
    told, tinted = imported(open_page, "compare.js", compared)
    assert "too long to compare" in told
    assert tinted == 0


def test_keys_of_an_input_method_are_left_to_it(page: "Page") -> None:
    pressed = """(field, key) => field.dispatchEvent(
        new KeyboardEvent("keydown", { key, keyCode: 229, bubbles: true, cancelable: true }))"""
    set_up(page, tokens=4)
    say(page, "question")
    page.get_by_role("button", name="Edit").click()
    field = page.get_by_label("Edit the message")
    field.evaluate(pressed, "Escape")
    expect(field).to_be_visible()
    hold(page, ANSWERS)
    page.locator("#words").fill("にほ")
    page.locator("#words").evaluate(pressed, "Enter")
    expect(page.locator("#words")).to_have_value("にほ")
    page.locator("#words").press("Enter")
    expect(page.locator("#stop")).to_be_visible()
    page.locator("#words").evaluate(pressed, "Escape")
    expect(page.locator("#stop")).to_be_visible()


def test_text_runs_in_the_direction_of_its_words(page: "Page") -> None:
    page.route(ANSWERS, lambda route: route.fulfill(body=chunks("שלום, world!")))
    say(page, "שלום")
    direction = "element => getComputedStyle(element).direction"
    assert page.locator(".turn.user .said").evaluate(direction) == "rtl"
    assert page.locator("#chat-list .chosen").evaluate(direction) == "rtl"
    bidi = "element => getComputedStyle(element).unicodeBidi"
    assert page.locator(".assistant .said p").evaluate(bidi) == "plaintext"


def test_plugging_by_keyboard_does_not_lose_the_focus(page: "Page") -> None:
    page.get_by_role("button", name="Plug two").press("Enter")
    expect(page.locator("#expert-count")).to_have_text("2 plugged")
    assert page.evaluate("document.activeElement.id") == "words"
    page.locator("#plugged .card", has_text="two").get_by_text("Details").click()
    page.get_by_role("button", name="Unplug two").press("Enter")
    expect(page.locator("#expert-count")).to_have_text("1 plugged")
    assert page.evaluate("document.activeElement.id") == "words"


def test_several_files_are_taken_and_their_failures_told(page: "Page") -> None:
    page.evaluate(
        """() => {
            const transfer = new DataTransfer();
            for (const [name, bytes] of [["image.png", [0, 159]], ["a.txt", [97]]])
                transfer.items.add(new File([new Uint8Array(bytes)], name));
            const drop = new DragEvent("drop", { dataTransfer: transfer, bubbles: true });
            document.getElementById("log").dispatchEvent(drop);
        }"""
    )
    expect(page.locator("#words")).to_have_value(re.compile(r"^a\.txt:"))
    expect(page.locator("#notice")).to_have_text("image.png is not a text in UTF-8.")
