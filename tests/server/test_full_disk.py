"""A full disk is a server error, reported in one sentence, and nothing is stored partially."""

import errno
import logging
import sqlite3
import tempfile
from typing import Any

import pytest
from live_server import Live

PAIR: dict[str, Any] = {
    "prompt": [{"role": "user", "content": "a"}],
    "chosen": "yes " * 2000,
    "rejected": "no",
}


def pair(number: int) -> dict[str, Any]:
    return {**PAIR, "rejected": f"no {number}"}


def test_preferences_on_a_full_disk(server: Live, monkeypatch: pytest.MonkeyPatch) -> None:
    connect = sqlite3.connect
    with server.http() as http:
        first = http.post("/v1/preferences", json=pair(0))
        assert first.status_code == 201

        def full(*arguments: Any, **options: Any) -> sqlite3.Connection:
            """Return a connection whose file cannot grow, as SQLite sees a full disk."""
            connection = connect(*arguments, **options)
            connection.execute("PRAGMA max_page_count = 1")  # SQLite raises it to the current size
            return connection

        with monkeypatch.context() as patch:
            patch.setattr(sqlite3, "connect", full)
            replies = [http.post("/v1/preferences", json=pair(number)) for number in range(1, 40)]
        refused = [reply for reply in replies if reply.status_code != 201]
        assert refused
        for reply in refused:
            assert reply.status_code == 507
            assert "disk is full" in reply.json()["error"]["message"]
            assert int(reply.headers["Retry-After"]) > 0
        again = http.post("/v1/preferences", json=pair(40))
    assert again.status_code == 201
    # Exactly the acknowledged pairs are stored.
    assert again.json()["id"] == first.json()["id"] + len(replies) - len(refused) + 1


def test_uploads_on_a_full_disk(
    server: Live, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def full(*_: Any, **__: Any) -> Any:
        raise OSError(errno.ENOSPC, "No space left on device", "/tmp/secret")

    pack = (server.folder / "one.safetensors").read_bytes()
    before = server.engine.experts()
    with server.http() as http, caplog.at_level(logging.WARNING, "deepseek.server.errors"):
        with monkeypatch.context() as patch:
            patch.setattr(tempfile, "TemporaryDirectory", full)
            replies = [http.post("/v1/experts/upload", content=pack) for _ in range(5)]
        for reply in replies:
            assert reply.status_code == 507
            assert "disk is full" in reply.json()["error"]["message"]
            assert "secret" not in reply.text
        assert server.engine.experts() == before
        assert len(caplog.records) <= 1  # one line per minute, however many requests fail
        assert http.post("/v1/experts/upload", content=pack).status_code == 201
    server.engine.unplug("one")
