"""Shared by the applications: a server in a thread of this process, and messages for bad input."""

import argparse
import json
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import uvicorn

from deepseek.checkpoint.files import writable_file
from deepseek.engine.start import start_engine
from deepseek.errors import UserError
from deepseek.packs.names import valid_name
from deepseek.server.app import create_app
from deepseek.server.connection import http_config
from deepseek.server.run import address, listen
from deepseek.server.settings import Settings

MODEL = "base"
"""Name of the base in requests."""


class Client:
    """Sends requests as any client of the server's HTTP API does.

    Args:
        url: address of the server.
        key: API key; empty: none.
    """

    def __init__(self, url: str, key: str = "") -> None:
        self.url = url
        self.headers = {"Content-Type": "application/json"}
        if key:
            self.headers["Authorization"] = f"Bearer {key}"

    def get(self, path: str) -> str:
        """Return the reply to a GET request."""
        return self._send("GET", path)

    def post(self, path: str, body: dict[str, Any]) -> dict[str, Any]:
        """Return the JSON reply to a POST request."""
        return dict(json.loads(self._send("POST", path, json.dumps(body).encode())))

    def _send(self, method: str, path: str, body: bytes | None = None) -> str:
        request = urllib.request.Request(self.url + path, body, self.headers, method=method)
        try:
            with urllib.request.urlopen(request) as reply:
                return str(reply.read().decode())
        except urllib.error.HTTPError as error:
            error.add_note(error.read().decode())  # says what is wrong
            raise


def parser_of(document: str, minutes: float) -> argparse.ArgumentParser:
    """Return a parser with the arguments that all applications share.

    Args:
        document: docstring of the program.
        minutes: default time to train an expert.
    """
    parser = argparse.ArgumentParser(
        description=document, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--base", default="smollm2-135m")
    parser.add_argument("--minutes", type=float, default=minutes, help="to train each expert")
    parser.add_argument("--json", type=new_file, help="file to write the figures to")
    return parser


def add_tokens(parser: argparse.ArgumentParser) -> None:
    """Add the argument that limits training by the amount of text instead of by time."""
    parser.add_argument("--tokens", type=int, help="of each expert; default: by --minutes")


def amount_of(options: argparse.Namespace) -> dict[str, Any]:
    """Return the arguments of `deepseek.train_expert` that say how much to train."""
    if options.tokens:
        return {"tokens": options.tokens}
    return {"minutes": options.minutes}


def named_folder(text: str) -> tuple[str, Path]:
    """Return the expert's name and the folder of an argument `NAME=FOLDER`."""
    name, equals, place = text.partition("=")
    folder = Path(place).expanduser()  # a shell may leave `~` alone behind the sign
    if not equals or not folder.is_dir():
        raise argparse.ArgumentTypeError(f"{text!r} is not NAME=FOLDER with a folder that exists")
    try:
        return valid_name(name), folder
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def new_file(text: str) -> Path:
    """Return the path of a file to write, checked before hours of training start."""
    try:
        return writable_file(text)
    except UserError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def write_figures(path: Path, figures: dict[str, Any]) -> None:
    """Write the figures of a program as JSON."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(figures, indent=1), encoding="utf-8")


def at_least_one(text: str) -> int:
    """Return a count, which must be at least one because means are computed over it."""
    count = int(text)
    if count < 1:
        raise argparse.ArgumentTypeError(f"{count} is too few; give 1 or more")
    return count


def run(main: Callable[[], None]) -> None:
    """Run a program. An error that the user can fix is printed as one sentence (exit code 2), and
    so is the message after Ctrl-C (exit code 130).
    """
    try:
        main()
    except (UserError, OSError) as error:
        if isinstance(error, urllib.error.HTTPError):
            raise  # a request of the program's own is wrong
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt as stop:  # a training's message says what it has saved
        print(stop if stop.args else "interrupted", file=sys.stderr)
        sys.exit(130)


@contextmanager
def served(
    base: str, experts: Sequence[Path] = (), settings: Settings | None = None
) -> Iterator[Client]:
    """Serve a base with experts plugged in, until the block ends.

    Args:
        base: name or folder of the base model.
        experts: packs to plug in.
        settings: further settings of the server; default: none.

    Yields:
        A client without a key.
    """
    settings = replace(settings or Settings(), port=0, model=MODEL)
    with closing(listen(settings)) as listener, start_engine(base, experts=experts) as engine:
        app = create_app(engine, settings)
        server = uvicorn.Server(http_config(app))
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
        thread.start()
        try:
            while not server.started:
                time.sleep(0.01)
            yield Client(address(listener, settings.host))
        finally:
            server.should_exit = True
            thread.join()
