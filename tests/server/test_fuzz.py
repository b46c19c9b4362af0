"""For any request, the server's reply follows its own OpenAPI description and is never a 5xx."""

from pathlib import Path

from fuzzing import fuzz
from live_server import live

from deepseek.server.settings import Settings


def test_random_requests_get_described_replies(served_folder: Path) -> None:
    with live(served_folder, Settings(answer_tokens=4), max_waiting=200) as server:
        statuses = fuzz(server.url, each=3)
        with server.http() as http:
            assert http.get("/ready").status_code == 200
    assert statuses["200"] > 10
    assert sum(count for status, count in statuses.items() if status.startswith("4")) > 10
