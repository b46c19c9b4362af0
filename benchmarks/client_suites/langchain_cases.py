"""LangChain's own standard tests (`langchain-tests`) with `langchain-openai` against the server.

pytest runs them unchanged, in three classes: chat completions, the Responses API and embeddings.
Tests of features that a class declares as unsupported (images, PDF, audio) skip themselves and are
not counted.
"""

import argparse
import os
import tempfile
from pathlib import Path
from typing import Any

import pytest
from cases import one_line, report
from langchain_openai import ChatOpenAI, OpenAIEmbeddings
from langchain_tests.integration_tests import ChatModelIntegrationTests, EmbeddingsIntegrationTests

URL = "CLIENTS_URL"
MODEL = "CLIENTS_MODEL"
PENALTY = "CLIENTS_PENALTY"
"""Environment variables, since pytest imports this file again."""


SETTINGS = """[pytest]
asyncio_mode = auto
asyncio_default_fixture_loop_scope = function
"""


def connection() -> dict[str, Any]:
    """Return the arguments with which LangChain's classes connect to the server."""
    return {"model": os.environ[MODEL], "base_url": os.environ[URL] + "/v1", "api_key": "none"}


class TestChat(ChatModelIntegrationTests):
    """The tests of a chat model, with chat completions."""

    @property
    def chat_model_class(self) -> type[ChatOpenAI]:
        return ChatOpenAI

    @property
    def chat_model_params(self) -> dict[str, Any]:
        penalty = float(os.environ[PENALTY])
        # With another base URL than OpenAI's, the client requests a stream's usage only if told to.
        told = {**connection(), "stream_usage": True}
        return {**told, **({"frequency_penalty": penalty} if penalty else {})}

    @property
    def supports_json_mode(self) -> bool:
        return True

    @property
    def model_override_value(self) -> str:
        return os.environ[MODEL] + "+none"


class TestResponses(TestChat):
    """The same tests with the Responses API."""

    @property
    def chat_model_params(self) -> dict[str, Any]:
        return {**super().chat_model_params, "use_responses_api": True}


class TestEmbeddings(EmbeddingsIntegrationTests):
    """The tests of embeddings."""

    @property
    def embeddings_class(self) -> type[OpenAIEmbeddings]:
        return OpenAIEmbeddings

    @property
    def embedding_model_params(self) -> dict[str, Any]:
        # Otherwise texts are split with one of OpenAI's tokenizers, which has to be downloaded.
        return {**connection(), "check_embedding_ctx_length": False}


class Outcomes:
    """Collects the outcome of every test that ran."""

    def __init__(self) -> None:
        self.found: dict[str, str | None] = {}

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """Record a test that finished, or failed at any stage."""
        name = report.nodeid.partition("::")[2].replace("::", " ")
        if report.failed:
            crash = getattr(report.longrepr, "reprcrash", None)
            self.found[name] = one_line(crash.message if crash else str(report.longrepr))
        elif report.when == "call" and report.passed:
            self.found.setdefault(name, None)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("url")
    parser.add_argument("model")
    parser.add_argument("--penalty", type=float, default=0.0)
    parser.add_argument("--only", nargs="*")
    options = parser.parse_args()
    os.environ |= {URL: options.url, MODEL: options.model, PENALTY: str(options.penalty)}
    outcomes = Outcomes()
    tests = [name.replace(" ", "::") for name in options.only or [""]]
    with tempfile.TemporaryDirectory() as folder:
        settings = Path(folder) / "pytest.ini"
        settings.write_text(SETTINGS)
        quiet = ["-p", "no:cacheprovider", "-p", "no:terminal"]
        here = [f"{__file__}::{name}" if name else __file__ for name in tests]
        pytest.main(["-c", str(settings), *quiet, *here], plugins=[outcomes])
    report(outcomes.found, ["langchain-tests", "langchain-openai", "openai"])


if __name__ == "__main__":
    main()
