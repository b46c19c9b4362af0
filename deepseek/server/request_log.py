"""The server's log: one line a request, without content and keys."""

import logging
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:  # the command line needs the levels, and imports no torch for them
    from deepseek.engine.request import TokenUsage

LogLevel = Literal["debug", "info", "warning", "error"]
PACKAGE = "deepseek"

log = logging.getLogger(__name__)


def configure(level: LogLevel | None) -> None:
    """Write the package's log to standard error.

    Args:
        level: least severe messages to write; None: leave logging as the program has set it up.
    """
    if level is None:
        return
    handler = logging.StreamHandler()
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
    package = logging.getLogger(PACKAGE)
    package.handlers = [handler]
    package.setLevel(level.upper())
    package.propagate = False


@dataclass(frozen=True)
class Answered:
    """How a request was answered.

    Attributes:
        status: HTTP status of the reply.
        seconds: time from the head of the request to the end of the reply.
        is_complete: whether the whole reply was sent, or the client left before.
        identity: id of the request.
    """

    status: int
    seconds: float
    is_complete: bool
    identity: str


def write(method: str, route: str, reply: Answered, usage: "TokenUsage | None") -> None:
    """Log one request.

    Args:
        method: HTTP method.
        route: its route as declared, such as `/v1/models/{model:path}`, which holds no text of a
            client.
        reply: how it was answered.
        usage: tokens of prompt and answer; None: nothing was computed.
    """
    tokens = f" {usage.prompt_tokens}+{usage.completion_tokens} tokens" if usage else ""
    end = "" if reply.is_complete else " client left"
    milliseconds = reply.seconds * 1e3
    log.info(
        "%s %s %d%s %.0f ms%s %s",
        method,
        route,
        reply.status,
        tokens,
        milliseconds,
        end,
        reply.identity,
    )
