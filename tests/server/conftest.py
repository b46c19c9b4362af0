"""One server a module."""

from collections.abc import Iterator
from pathlib import Path

import pytest
from live_server import Live, live
from openai import OpenAI


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Live]:
    """A server without keys."""
    with live(tmp_path_factory.mktemp("server")) as running:
        yield running


@pytest.fixture(scope="module")
def client(server: Live) -> Iterator[OpenAI]:
    """OpenAI's own client for it."""
    with server.client() as openai:
        yield openai


@pytest.fixture(scope="module")
def served_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An empty folder in which the servers of a module share a model."""
    return tmp_path_factory.mktemp("served")
