"""The web page's chat in a real browser: answers, comparison, Markdown, stored conversations,
errors, keyboard, screen readers, a phone's width.

`SCREENSHOTS=folder pytest tests/server/test_page*.py` saves screenshots.
"""

import json
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from live_server import Live
from page_driver import imported, keep, rendered, say, set_up, violations
from page_routes import hold

from deepseek.packs.library import prompts_file

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Page

expect = pytest.importorskip("playwright.sync_api").expect

STATIC = Path(__file__).parents[2] / "deepseek" / "server" / "static"


def test_an_answer_is_attributed_and_compared_with_the_base(page: "Page") -> None:
    set_up(page, tokens=24)
    say(page, "the expert of the model")
    written = page.locator(".said .by")
    assert written.count() > 0
    digest = page.evaluate("fetch('/v1/experts').then(r => r.json())")["data"][0]["digest"]
    hue = round(int(digest[:8], 16) / 2**32 * 360)
    assert abs(int(written.first.evaluate("e => e.style.getPropertyValue('--hue')")) - hue) <= 1
    assert re.search(r"one \d+", page.locator(".legend").inner_text())
    expect(page.locator(".facts")).to_contain_text("tokens/s")
    assert page.evaluate("document.getElementById('context').value") > 24
    answer = page.locator(".assistant > .said").inner_text()
    page.get_by_role("button", name="Compare with base").focus()
    page.keyboard.press("Enter")
    expect(page.locator(".comparison > p")).to_contain_text("differ", timeout=60_000)
    base, expert = page.locator(".comparison .compared").all()
    assert base.locator(".by").count() == 0
    assert base.inner_text() != expert.inner_text()
    assert expert.inner_text().split() == answer.split()
    assert expert.locator("mark").count() > 0
    keep(page, "compare")
    page.reload()
    expect(page.locator(".comparison mark").first).to_be_visible()  # stored with the chat


def test_without_experts_the_comparison_says_that_nothing_changed(page: "Page") -> None:
    set_up(page, tokens=12)
    page.get_by_role("switch", name="one may write").uncheck()
    say(page, "again")
    assert "one" not in page.locator(".legend").inner_text()
    page.get_by_role("button", name="Compare with base").click()
    expect(page.locator(".comparison > p")).to_contain_text("the same", timeout=60_000)


def test_tokens_that_differ_are_outside_the_longest_common_part(open_page: "Page") -> None:
    differs = imported(open_page, "compare.js", "m.difference([...'abcde'], [...'abxde'])")
    assert differs == [[False, False, True, False, False]] * 2
    assert imported(open_page, "compare.js", "m.difference([], ['a'])") == [[], [True]]


MARKDOWN = {
    "# One\n\ntwo **three** *four* `five`": (
        "<h3>One</h3><p>two <strong>three</strong> <em>four</em> <code>five</code></p>"
    ),
    "- a\n- b\n  - c\n\n1. d": "<ul><li>a</li><li>b<ul><li>c</li></ul></li></ul><ol><li>d</li></ol>",
    "> a\n> b": "<blockquote><p>a\nb</p></blockquote>",
    "snake_case_name 2 * 3 * 4": "<p>snake_case_name 2 * 3 * 4</p>",
    "\\*a\\*": "<p>*a*</p>",
    "<b>no</b><img src=x onerror=alert(1)>": (
        "<p>&lt;b&gt;no&lt;/b&gt;&lt;img src=x onerror=alert(1)&gt;</p>"
    ),
    "[a](javascript:alert(1))": "<p>[a](javascript:alert(1))</p>",
    "***a***": "<p><em><strong>a</strong></em></p>",
    "имя_поля_тут 变量_名称_列 क_ख_ग": "<p>имя_поля_тут 变量_名称_列 क_ख_ग</p>",
    "## C#\n\n## a ##": "<h4>C#</h4><h4>a</h4>",
    "🙂 **é** 🙂": "<p>🙂 <strong>é</strong> 🙂</p>",
    "": "",
}


@pytest.mark.parametrize("source", MARKDOWN)
def test_markdown_becomes_elements_and_html_stays_text(open_page: "Page", source: str) -> None:
    assert rendered(open_page, source).replace(' start="1"', "") == MARKDOWN[source]


def test_blocks_of_markdown(open_page: "Page") -> None:
    code = rendered(open_page, "```python\n\n# note\ndef f(x):\n    return 'a'\n```\nafter")
    assert 'class="code-head"' in code and code.endswith("<p>after</p>")
    assert "\n# note\ndef f(x):\n    return 'a'" in re.sub(r"<[^>]+>", "", code)
    table = rendered(open_page, "| a | b |\n|---|:-:|\n| 1 | **2** |")
    assert "<th>a</th><th>b</th>" in table and "<td><strong>2</strong></td>" in table
    link = rendered(open_page, "see [this](https://example.org/a) or https://example.org/b.")
    assert link.count('rel="noopener noreferrer nofollow"') == 2 and link.endswith(".</p>")
    assert "</a>。然后</p>" in rendered(open_page, "见https://example.org。然后")


def test_no_text_of_a_model_becomes_markup() -> None:
    for file in STATIC.glob("*.js"):
        text = file.read_text()
        assert not re.search(
            r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|\beval\(", text
        )
        assert len(text.splitlines()) <= 400


@pytest.mark.parametrize(
    "source",
    [
        "*" * 4000,
        "[" * 4000,
        "`" * 3999 + "a",
        "> " * 500 + "a",
        "_a" * 2000,
        "# " + "#" * 40000 + "x",
        "```" + " " * 40000 + "`",
        "a|b\n-|-\n|a" + " " * 40000 + "b",
        "a|b\n" + " " * 40000 + "x",
    ],
)
def test_awkward_markdown_takes_no_time(open_page: "Page", source: str) -> None:
    timed = f"""{{
        const start = performance.now();
        m.render({json.dumps(source)}, () => []);
        return performance.now() - start;
    }}"""
    assert imported(open_page, "markdown.js", timed) < 1000  # ms


@pytest.mark.parametrize("level", ["> ", ">", "1. ", "- "])
def test_an_answer_that_nests_without_end_is_shown(open_page: "Page", level: str) -> None:
    source = json.dumps(level * 5000 + "deep")
    made = imported(
        open_page,
        "markdown.js",
        f"(() => {{ const place = document.createElement('div');"
        f" place.append(m.render({source}, (a, b) => [{source}.slice(a, b)]));"
        f" return place.textContent.endsWith('deep'); }})()",
    )
    assert made is True


def test_a_chat_that_is_deleted_while_it_is_answered_stays_deleted(page: "Page") -> None:
    hold(page, "**/v1/chat/completions")
    page.locator("#words").fill("the expert of the model")
    page.keyboard.press("Enter")
    page.get_by_role("button", name=re.compile("Delete the chat")).first.click()
    expect(page.locator("#stop")).to_be_hidden(timeout=60_000)
    expect(page.locator("#chat-none")).to_be_visible()
    page.reload()
    expect(page.locator("#chat-none")).to_be_visible()


def test_closing_the_settings_does_not_stop_an_answer(page: "Page") -> None:
    set_up(page, tokens=200)
    page.locator("#words").fill("the expert of the model")
    page.keyboard.press("Enter")
    expect(page.locator("#stop")).to_be_visible()
    page.locator("#gear").click()
    page.keyboard.press("Escape")
    expect(page.locator("#settings")).to_be_hidden()
    expect(page.locator("#stop")).to_be_hidden(timeout=60_000)
    assert "stopped" not in page.locator(".assistant").inner_text()


def test_a_failure_at_the_start_is_told_and_tried_again(page: "Page") -> None:
    failures = iter([True])

    def answer(route: Any) -> None:
        if next(failures, False):
            route.fulfill(json={"error": "no list"})
        else:
            route.continue_()

    page.route("**/v1/experts", answer)
    page.reload()
    expect(page.locator("#notice")).not_to_be_empty()
    expect(page.locator("#notice")).to_be_empty(timeout=10_000)
    set_up(page, tokens=4)
    say(page, "the expert")


def test_a_cut_answer_goes_on_and_can_be_asked_again(page: "Page") -> None:
    set_up(page, tokens=5, seed="3", temperature=0.6)
    say(page, "the value")
    expect(page.locator(".cut")).to_have_text("cut at 5 tokens")
    before = page.locator(".assistant > .said").inner_text()
    page.get_by_role("button", name="Continue").click()
    expect(page.locator(".assistant > .said")).not_to_have_text(before, timeout=30_000)
    page.locator(".facts").wait_for()
    assert page.locator(".assistant > .said").inner_text().startswith(before[:3])
    page.get_by_role("button", name="Retry").click()
    expect(page.locator(".assistant > .said")).to_have_text(before, timeout=30_000)  # same seed
    page.get_by_role("button", name="Copy the answer").click()
    assert page.evaluate("navigator.clipboard.readText()").split() == before.split()


def test_a_message_is_edited_with_the_keyboard(page: "Page") -> None:
    set_up(page, tokens=4)
    say(page, "first")
    say(page, "second")
    page.get_by_role("button", name="Edit").first.press("Enter")
    field = page.get_by_label("Edit the message")
    expect(field).to_be_focused()
    field.press("Escape")
    expect(page.get_by_role("button", name="Edit").first).to_be_focused()
    page.get_by_role("button", name="Edit").first.press("Enter")
    field.fill("changed")
    field.press("Enter")
    expect(page.locator(".turn.user .said")).to_have_text(["changed"])
    expect(page.locator(".facts")).to_have_count(1)


def test_an_answer_can_be_stopped(page: "Page") -> None:
    set_up(page, tokens=700)
    page.locator("#words").fill("the")
    page.locator("#words").press("Enter")
    expect(page.locator("#stop")).to_be_visible()
    expect(page.locator(".said").last).not_to_be_empty()
    page.keyboard.press("Escape")
    expect(page.locator("#stop")).to_be_hidden()
    expect(page.locator("#send")).to_be_enabled()
    expect(page.locator(".facts")).to_contain_text("stopped")


def test_a_failed_message_gives_its_words_back_and_spoils_nothing(page: "Page") -> None:
    set_up(page, tokens=4)
    body = json.dumps({"error": {"message": "The queue is full."}})
    page.route(
        "**/v1/chat/completions", lambda route: route.fulfill(status=200, body=f"data: {body}\n\n")
    )
    page.locator("#words").fill("my long question")
    page.locator("#words").press("Enter")
    expect(page.locator("#notice")).to_have_text("The queue is full.")
    expect(page.locator("#words")).to_have_value("my long question")
    expect(page.locator(".turn")).to_have_count(0)
    page.unroute("**/v1/chat/completions")
    page.reload()
    expect(page.locator("#words")).to_have_value("my long question")
    with page.expect_request("**/v1/chat/completions") as asked:
        page.locator("#words").press("Enter")
    assert [one["role"] for one in asked.value.post_data_json["messages"]] == ["user"]
    expect(page.locator(".facts")).to_have_count(1)
    expect(page.locator("#notice")).to_be_hidden()


def test_the_log_follows_a_long_answer_until_the_reader_scrolls_up(page: "Page") -> None:
    page.set_viewport_size({"width": 900, "height": 380})
    set_up(page, tokens=150)
    below = "(log => log.scrollHeight - log.scrollTop - log.clientHeight)(document.getElementById('log'))"
    for text in ("one\n" * 40, "two"):
        say(page, text)
        assert page.evaluate(below) < 40
    page.evaluate("document.getElementById('log').scrollTop = 0")
    page.get_by_role("button", name="Compare with base").last.evaluate("button => button.click()")
    page.locator(".comparison > p").wait_for(timeout=60_000)
    assert page.evaluate("document.getElementById('log').scrollTop") == 0


def test_a_screen_reader_hears_an_answer_once(page: "Page") -> None:
    set_up(page, tokens=12)
    page.evaluate(
        """() => {
            window.heard = [];
            new MutationObserver(() => heard.push(document.getElementById("live").textContent))
                .observe(document.getElementById("live"), { childList: true });
        }"""
    )
    assert page.locator("#log").get_attribute("aria-live") == "off"
    say(page, "the value")
    heard = page.evaluate("heard")
    assert len(heard) == 2 and heard[0] == "The answer is being written."


def test_chats_are_kept_found_exported_and_deleted(page: "Page") -> None:
    set_up(page, tokens=4)
    say(page, "about xylophones")  # four tokens of an answer do not spell that word
    page.get_by_role("button", name="New chat").click()
    page.locator("#pick").select_option("tiny+none")
    say(page, "about values")
    page.reload()
    expect(page.locator(".turn.user .said")).to_have_text("about values")
    expect(page.locator("#pick")).to_have_value("tiny+none")  # stored with this chat
    expect(page.locator("#chat-list .chosen")).to_have_text(["about values", "about xylophones"])
    page.locator("#search").fill("XYLOPHONES about")
    expect(page.locator("#chat-list .chosen")).to_have_text(["about xylophones"])
    page.locator("#chat-list .chosen").press("Enter")
    expect(page.locator("#pick")).to_have_value("tiny")
    with page.expect_download() as download:
        page.get_by_role("button", name="Export all").click()
    lines = Path(download.value.path()).read_text().splitlines()
    roles = [[one["role"] for one in json.loads(line)["messages"]] for line in lines]
    assert roles == [["user", "assistant"]] * 2
    page.get_by_role("button", name="Delete the chat: about xylophones").click()
    expect(page.locator("#log .empty")).to_be_visible()


def test_a_slow_start_does_not_take_the_focus_from_the_search(page: "Page") -> None:
    held: list[Any] = []
    page.route("**/v1/teach", lambda route: held.append(route))
    with page.expect_request("**/v1/teach"):
        page.reload()
    page.locator("#search").focus()
    held[0].continue_()
    page.evaluate("import('/static/app.js').then(() => null)")  # until the page is set up
    page.keyboard.insert_text("values")
    expect(page.locator("#search")).to_have_value("values")


def test_settings_and_switches_outlast_a_reload_and_reach_the_request(page: "Page") -> None:
    page.locator("#gear").press("Enter")
    for name, value in {
        "system": "Be brief.",
        "topP": "0.9",
        "seed": "7",
        "stop": "END\nSTOP",
        "tokens": "3",
    }.items():
        page.locator(f"#set-{name}").fill(value)
    page.locator("#set-theme").select_option("dark")
    keep(page, "settings")
    page.locator("#set-theme").press("Escape")
    say(page, "a")
    page.get_by_role("switch", name="one may write").press("Space")
    page.reload()
    assert page.evaluate("document.documentElement.dataset.theme") == "dark"
    expect(page.get_by_role("switch", name="one may write")).not_to_be_checked()
    with page.expect_request("**/v1/chat/completions") as asked:
        say(page, "b")
    sent = asked.value.post_data_json
    assert sent["messages"][0] == {"role": "system", "content": "Be brief."}
    assert (sent["top_p"], sent["seed"], sent["max_tokens"]) == (0.9, 7, 3)
    assert sent["stop"] == ["END", "STOP"] and sent["experts"] == {"deny": ["one"]}


def test_a_text_file_goes_into_the_message_and_a_pack_is_plugged(
    page: "Page", served: Live
) -> None:
    drop = """([name, bytes]) => {
        const transfer = new DataTransfer();
        transfer.items.add(new File([new Uint8Array(bytes)], name));
        document.getElementById("log").dispatchEvent(new DragEvent("drop", { dataTransfer: transfer, bubbles: true }));
    }"""
    page.evaluate(drop, ["note.py", list(b"print('```')\n")])
    expect(page.locator("#words")).to_have_value("note.py:\n````py\nprint('```')\n````\n")
    page.evaluate(drop, ["image.png", [0, 159, 255]])
    expect(page.locator("#notice")).to_contain_text("not a text")
    page.evaluate(drop, ["two.safetensors", list((served.folder / "two.safetensors").read_bytes())])
    expect(page.locator("#plugged .name")).to_have_text(["one", "two"])
    card = page.locator("#plugged .card", has_text="two")
    card.get_by_text("Details").click()
    expect(card.locator("dl")).to_contain_text("Apache-2.0")
    card.get_by_role("button", name="Unplug two").click()
    expect(page.locator("#expert-count")).to_have_text("1 plugged")
    page.get_by_role("button", name="Plug two").click()
    expect(page.locator("#expert-count")).to_have_text("2 plugged")
    page.locator("#plugged .card", has_text="two").get_by_text("Details").click()
    page.get_by_role("button", name="Unplug two").click()
    expect(page.locator("#expert-count")).to_have_text("1 plugged")


def test_an_expert_that_is_unplugged_elsewhere_is_not_asked_again(
    browser: "Browser", served: Live
) -> None:
    page = browser.new_page()  # which may log the refusal
    page.goto(served.url)
    set_up(page, tokens=4)
    page.locator("#pick").select_option("tiny+one")
    served.engine.unplug("one")
    try:
        page.locator("#words").fill("the value")
        page.locator("#words").press("Enter")
        expect(page.locator("#notice")).to_contain_text("There is no model 'tiny+one'")
        expect(page.locator("#pick")).to_have_value("tiny")
        expect(page.locator("#expert-count")).to_have_text("none plugged")
        say(page, "the value")
    finally:
        served.engine.plug(served.folder / "one.safetensors")
        page.close()


def test_an_empty_chat_offers_what_an_expert_knows(page: "Page", served: Live) -> None:
    digest = served.engine.experts()[0].digest
    prompts = [
        {"kind": "chat", "text": "Where is it?"},
        {"kind": "text", "text": "file: a.py\n\nimport os\n"},
    ]
    path = prompts_file("one", served.folder)
    path.write_text(json.dumps({"digest": digest, "prompts": prompts}))
    try:
        set_up(page, tokens=4)
        page.get_by_role("button", name="Where is it?").click()
        expect(page.locator(".facts")).to_have_count(1, timeout=30_000)
        expect(page.locator("#pick")).to_have_value("tiny+one")
        page.get_by_role("button", name="New chat").click()
        with page.expect_request("**/v1/completions") as asked:
            page.get_by_role("button", name="Continue the text: import os").click()
        assert asked.value.post_data_json["prompt"] == prompts[1]["text"]
        expect(page.locator(".facts")).to_have_count(1, timeout=30_000)
    finally:
        path.unlink()


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_axe_finds_nothing(browser: "Browser", served: Live, scheme: str) -> None:
    context = browser.new_context(
        color_scheme=scheme, viewport={"width": 1180, "height": 760}, bypass_csp=True
    )
    page = context.new_page()
    page.goto(served.url)
    page.locator("#words:focus").wait_for()
    found = violations(page)
    set_up(page, tokens=16)
    say(page, "the expert\n```py\nof = 'the model'\n```")
    page.get_by_role("button", name="Compare with base").click()
    expect(page.locator(".comparison > p")).to_be_visible(timeout=60_000)
    page.locator("#plugged summary").click()
    found += violations(page)
    for tab in ("Teach", "Review"):
        page.get_by_role("tab", name=tab).click()
        found += violations(page)
    page.locator("#gear").click()
    found += violations(page)
    context.close()
    assert found == []


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_a_phone_shows_everything_without_scrolling_sideways(
    browser: "Browser", served: Live, scheme: str
) -> None:
    context = browser.new_context(viewport={"width": 375, "height": 740}, color_scheme=scheme)
    page = context.new_page()
    page.goto(served.url)
    page.locator("#words:focus").wait_for()
    for tab in ("Teach", "Review", "Chat"):
        page.get_by_role("tab", name=tab).click()
        assert page.evaluate("document.documentElement.scrollWidth") <= 375
    set_up(page, tokens=24)
    say(page, "the expert of the model")
    page.get_by_role("button", name="Compare with base").click()
    expect(page.locator(".comparison > p")).to_be_visible(timeout=60_000)
    imported(page, "dom.js", "m.notice('No expert named ' + 'a'.repeat(90) + ' is plugged.')")
    assert page.evaluate("document.documentElement.scrollWidth") <= 375
    imported(page, "dom.js", "m.notice('')")
    boxes = [page.locator(name).bounding_box() for name in ("#attach", "#words", "#send")]
    middles = [box["y"] + box["height"] / 2 for box in boxes if box]
    assert len(middles) == 3 and max(middles) - min(middles) < 8  # one row
    ground = page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert (ground == "rgb(251, 251, 250)") == (scheme == "light")
    keep(page, f"phone-{scheme}")
    context.close()
