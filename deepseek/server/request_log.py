"""The server's log: one line a request, without content and keys."""

import logging
from typing import Literal

LogLevel = Literal["debug", "info", "warning", "error"]
PACKAGE = "deepseek"

log = logging.getLogger(__name__)


def configure(level: LogLevel | None) -> None:
    """Write the package's log from this level on to standard error; None: change nothing."""
    if level is None:
        return
    handler = logging.StreamHandler()
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
    package = logging.getLogger(PACKAGE)
    package.handlers = [handler]
    package.setLevel(level.upper())
    package.propagate = False


def write(method: str, route: str, status: int, tokens: str, seconds: float) -> None:
    """Log one request.

    Args:
        method: HTTP method.
        route: its route as declared, which holds no names of a client.
        status: status of the reply.
        tokens: tokens of prompt and answer; "" where there are none.
        seconds: time from the head to the end of the reply.
    """
    spent = f" {tokens} tokens" if tokens else ""
    log.info("%s %s %d%s %.0f ms", method, route, status, spent, seconds * 1e3)
