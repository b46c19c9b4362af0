"""The commands and code in `docs/how-to/serving.md` and `clients.md` work against a live server."""

import os
import re
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from live_server import Live
from processes import run

from deepseek.engine.scheduler import PREFILL_CHUNK
from deepseek.server.dialects.anthropic import CacheControl
from deepseek.server.dialects.harmless_fields import CacheBreakpoint
from deepseek.server.schema import DEFAULT_TOKENS, ChatRequest, CompletionRequest, ExpertsField
from deepseek.server.settings import Settings

PAGES = Path(__file__).parents[2] / "docs" / "how-to"
NAMES = {"http://127.0.0.1:8000": "{url}", "smollm2-135m": "tiny", "code": "one"}
"""Names on the page -> names in the test."""


def blocks(kind: str, about: str, url: str, page: str = "serving.md") -> list[str]:
    """Return a page's code blocks in a language that mention `about`, with the names of the live
    server.
    """
    found = [
        block
        for block in re.findall(rf"```{kind}\n(.*?)```", (PAGES / page).read_text(), re.DOTALL)
        if about in block
    ]
    assert found
    for name, live_name in NAMES.items():
        found = [
            re.sub(rf"{re.escape(name)}\b", live_name.format(url=url), block) for block in found
        ]
    return found


@pytest.fixture
def folder(tmp_path: Path) -> Iterator[Path]:
    """An empty working folder, separate from the user's files."""
    yield tmp_path


def shell(lines: str, folder: Path) -> str:
    """Run lines of bash, of which none may fail, and return their output."""
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    environment = {
        **os.environ,
        "PATH": path,
        "LLM_USER_PATH": str(folder),
        "HOME": str(folder),
        "NO_PROXY": "*",
    }
    command = ["bash", "-eo", "pipefail", "-c", lines]
    done = run(command, env=environment)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.skipif(shutil.which("curl") is None, reason="curl is not installed")
def test_curl(server: Live, folder: Path) -> None:
    server.engine.plug(server.folder / "one.safetensors")
    for block in blocks("bash", "curl", server.url):
        told = shell(block, folder).replace(" ", "")
        assert (
            '"object":"text_completion"' in told
            and "data:[DONE]" in told
            and '"id":"tiny+one"' in told
        )
    assert [info.name for info in server.engine.experts()] == ["one"]
    server.engine.unplug("one")


def test_llm(server: Live, folder: Path) -> None:
    (models,) = blocks("yaml", "model_id", server.url)
    (folder / "extra-openai-models.yaml").write_text(models)
    before = server.engine.stats().finished
    for block in blocks("bash", "llm -m", server.url):
        answers = shell(block, folder)
        assert re.search(r'\{\s*"name"', answers), answers
    assert sum(server.engine.stats().finished.values()) == sum(before.values()) + 2


def test_openai(server: Live) -> None:
    server.engine.plug(server.folder / "one.safetensors")
    for block in blocks("python", "from openai", server.url):
        done = run([sys.executable, "-c", block])
        assert done.returncode == 0, done.stderr
        assert re.search(r"\{'one': \d+\}$", done.stdout), done.stdout
    server.engine.unplug("one")


@pytest.mark.parametrize("package", ["anthropic", "ollama"])
def test_clients_of_other_products(server: Live, folder: Path, package: str) -> None:
    server.engine.plug(server.folder / "one.safetensors")
    try:
        for block in blocks("python", package, server.url, "clients.md"):
            program = folder / "client.py"
            program.write_text(block)
            assert shell(f"{sys.executable} {program}", folder)
    finally:
        server.engine.unplug("one")


@pytest.mark.skipif(shutil.which("curl") is None, reason="curl is not installed")
def test_routes_of_llama_cpp(server: Live, folder: Path) -> None:
    (block,) = blocks("bash", "/completion", server.url, "clients.md")
    told = shell(block, folder).replace(" ", "")
    assert '"stop_type"' in told
    assert '"tokens":[' in told
    assert '"n_ctx"' in told


def test_limits_and_blocks_have_the_documented_sizes() -> None:
    page = (PAGES / "clients.md").read_text()
    limit = f"{Settings().answer_tokens} "
    assert f"ends after {limit}tokens" in page
    assert f"after {DEFAULT_TOKENS}, as at OpenAI" in page
    assert limit in (ChatRequest.__doc__ or "")
    assert f"after {DEFAULT_TOKENS} tokens" in (CompletionRequest.__doc__ or "")
    blocks_of = f"blocks of {PREFILL_CHUNK} tokens"
    for text in (page, CacheControl.__doc__, CacheBreakpoint.__doc__):
        assert blocks_of in " ".join((text or "").split())
        assert "every prefix" not in (text or "")


def test_experts_that_are_not_plugged_can_be_denied(server: Live) -> None:
    body = {"model": "tiny", "prompt": "a", "max_tokens": 1, "experts": {"deny": ["not-there"]}}
    with server.http() as http:
        assert http.post("/v1/completions", json=body).status_code == 200
    for text in ((PAGES / "serving.md").read_text(), ExpertsField.__doc__ or ""):
        assert "`deny` may name experts that are not plugged" in " ".join(text.split())
