"""Lines that a server logs about its requests."""

import time

import pytest

LOGGER = "deepseek.server.request_log"


def logged(caplog: pytest.LogCaptureFixture, count: int) -> list[str]:
    """Return the lines once there are `count`; each is written after its reply.

    For an exception, the web server writes its own record, before or after the line.
    """
    deadline = time.monotonic() + 10
    while len(lines := request_lines(caplog)) < count and time.monotonic() < deadline:
        time.sleep(0.01)
    assert len(lines) == count
    return lines


def request_lines(caplog: pytest.LogCaptureFixture) -> list[str]:
    """Return the lines of the request log."""
    return [record.getMessage() for record in caplog.records if record.name == LOGGER]
