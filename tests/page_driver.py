"""Drives the web page in a browser for the tests in `server/test_page*.py`."""

import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from playwright.sync_api import Page

CHROMIUMS = ("chromium", "chromium-browser", "google-chrome")
FLAGS = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--no-first-run",
]
AXE = Path(__file__).parent / "server" / "axe" / "axe.min.js"
PATIENCE = 60_000  # ms


def keep(page: "Page", name: str) -> None:
    """Save a screenshot if they were asked for."""
    folder = os.environ.get("SCREENSHOTS")
    if folder:
        page.screenshot(path=Path(folder) / f"{name}.png")


def set_up(page: "Page", **settings: Any) -> None:
    """Store settings as the settings dialog does; answers are greedy by default."""
    chosen = {"temperature": 0, **settings}
    page.evaluate("value => localStorage.setItem('settings', JSON.stringify(value))", chosen)
    page.reload()
    page.locator("#words:focus").wait_for()


def say(page: "Page", text: str) -> None:
    """Ask a question by keyboard and wait for the whole answer."""
    before = page.locator(".facts").count()
    page.locator("#words").fill(text)
    page.locator("#words").press("Enter")
    page.locator(".facts").nth(before).wait_for(timeout=PATIENCE)


def imported(page: "Page", module: str, script: str) -> Any:
    """Return the value of a script that uses a module's exports as `m`."""
    return page.evaluate(f"import('/static/{module}').then(m => {script})")


def rendered(page: "Page", source: str) -> str:
    """Return the page's HTML for Markdown in which every token is by the base."""
    return imported(
        page,
        "markdown.js",
        f"""{{
            const source = {json.dumps(source)};
            const box = document.createElement("div");
            box.append(m.render(source, (from, to) => [document.createTextNode(source.slice(from, to))]));
            return box.innerHTML;
        }}""",
    )


def violations(page: "Page") -> list[str]:
    """Return axe-core's violations for the current state of the page."""
    if not page.evaluate("Boolean(window.axe)"):
        page.evaluate(AXE.read_text())
    found = page.evaluate("axe.run()")
    return [
        f"{one['id']}: {node['html'][:120]}" for one in found["violations"] for node in one["nodes"]
    ]
