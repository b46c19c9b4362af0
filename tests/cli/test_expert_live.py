"""`deepseek expert plug` and `unplug` send requests to a running server, with the admin key."""

import socket
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer

import pytest

from deepseek.cli.main import main


class Asked(BaseHTTPRequestHandler):
    """Records the requests; knows one expert and one key."""

    seen: list[tuple[str, str, str]]

    def _answer(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0)).decode()
        self.seen.append((self.command, self.path, body))
        fault = b""
        if self.headers["Authorization"] != "Bearer secret":
            fault = b"An admin key is needed."
        elif "shop" not in self.path + body:
            fault = b"There is no such expert."
        self.send_response(403 if fault else 200)
        self.end_headers()
        self.wfile.write(b'{"error": {"message": "%s"}}' % fault)

    do_POST = do_DELETE = _answer

    def log_message(self, *_: object) -> None:
        """Print nothing."""


@pytest.fixture
def server() -> Iterator[HTTPServer]:
    Asked.seen = []
    served = HTTPServer(("127.0.0.1", 0), Asked)
    thread = threading.Thread(target=served.serve_forever)
    thread.start()
    yield served
    served.shutdown()
    thread.join()
    served.server_close()


def call(capsys: pytest.CaptureFixture[str], *words: str) -> tuple[int, str]:
    """Return exit status and output of `deepseek expert WORDS`."""
    with pytest.raises(SystemExit) as stop:
        main(["expert", *words])
    output = capsys.readouterr()
    return int(stop.value.code or 0), output.out + output.err


def test_an_expert_is_plugged_and_unplugged(
    server: HTTPServer, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("DEEPSEEK_ADMIN_KEY", "secret")
    where = ("--server", f"http://127.0.0.1:{server.server_port}/")
    assert call(capsys, "plug", "shop", *where) == (0, "shop is plugged\n")
    assert call(capsys, "unplug", "shop", *where) == (0, "shop is unplugged\n")
    assert Asked.seen == [
        ("POST", "/v1/experts", '{"name": "shop"}'),
        ("DELETE", "/v1/experts/shop", ""),
    ]
    code, said = call(capsys, "unplug", "../x y", *where)
    assert (code, Asked.seen[-1][1]) == (2, "/v1/experts/..%2Fx%20y")
    assert "(403): There is no such expert." in said


@pytest.mark.parametrize("command", ["plug", "unplug"])
def test_what_the_server_or_the_address_refuses_is_said(
    command: str,
    server: HTTPServer,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.delenv("DEEPSEEK_ADMIN_KEY", raising=False)
    for address, complaint in {
        f"http://127.0.0.1:{server.server_port}": "An admin key is needed.",
        "http://127.0.0.1:9": "cannot be reached",
        "127.0.0.1:8000": "is not understood",
        "http://127.0.0.1:abc": "is not understood",
        "http://[::1": "is not understood",
        "http://:8000": "is not understood",
        f"http://127.0.0.1:{server.server_port}/a b": "cannot be reached",
    }.items():
        code, said = call(capsys, command, "shop", "--server", address)
        assert (code, complaint in said) == (2, True), said


def test_a_server_of_another_kind_is_one_sentence(capsys: pytest.CaptureFixture[str]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:

        def answer() -> None:
            with other.accept()[0] as client:
                client.recv(4096)
                client.sendall(b"SSH-2.0-OpenSSH_9.2\r\n")

        thread = threading.Thread(target=answer)
        thread.start()
        address = f"http://127.0.0.1:{other.getsockname()[1]}"
        code, said = call(capsys, "plug", "shop", "--server", address)
        thread.join()
    assert (code, "cannot be reached" in said) == (2, True), said
