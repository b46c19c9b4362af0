"""`deepseek serve --ray`: two replicas behind Ray's proxy answer as one server."""

import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest
from live_server import save_model
from processes import kill_with_children
from tiny_expert import save_expert
from waiting import wait_for

from deepseek.cli.main import main
from deepseek.engine.load import load

USER, ADMIN, LIMITED = "user-key", "admin-key", "limited-key"
CHAT: dict[str, Any] = {
    "model": "tiny",
    "messages": [{"role": "user", "content": "a"}],
    "max_tokens": 4,
    "temperature": 0,
}
PATIENCE = 300.0
"""Seconds to wait; a quiet machine needs a tenth: Ray starts a dozen processes, and each replica
loads everything.
"""


@dataclass
class Fleet:
    """A server started as a user would."""

    process: subprocess.Popen[str]
    url: str
    folder: Path

    def http(self, key: str = "") -> httpx.Client:
        headers = {"Authorization": f"Bearer {key}"} if key else {}
        return httpx.Client(base_url=self.url, headers=headers, timeout=PATIENCE)

    def figures(self, metric: str) -> dict[str, float]:
        """Return the sum of a metric by replica."""
        with self.http(USER) as http:
            text = http.get("/metrics").text
        found: dict[str, float] = {}
        for replica, value in re.findall(
            rf'^{metric}\{{.*replica="(\w+)".*\}} (\S+)$', text, re.MULTILINE
        ):
            found[replica] = found.get(replica, 0) + float(value)
        return found

    def workers(self) -> list[psutil.Process]:
        """Return the processes of the replicas."""
        below = psutil.Process(self.process.pid).children(recursive=True)
        return [process for process in below if "ServeReplica" in " ".join(process.cmdline())]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model and a folder of experts."""
    folder = tmp_path_factory.mktemp("ray")
    loaded = load(save_model(folder / "tiny"), dtype="float32")
    (folder / "experts").mkdir()
    for seed, name in enumerate(("one", "two"), 1):
        save_expert(loaded, name, folder / "experts", seed)
    return folder


@pytest.fixture(scope="module")
def fleet(folder: Path) -> Iterator[Fleet]:
    """Two replicas with keys and one expert plugged from the start; all paths are relative to the
    working folder.
    """
    (folder / "keys").write_text(f"{LIMITED} two\n")
    command = [
        sys.executable,
        "-m",
        "deepseek",
        "serve",
        "tiny",
        "--ray",
        "--replicas",
        "2",
        "--cpus",
        "0.5",
        "--port",
        "0",
        "--experts",
        "experts/one.safetensors",
        "--experts-folder",
        "experts",
        "--api-key-file",
        "keys",
        "--no-int8",
    ]
    paths = os.pathsep.join(str(Path(path).resolve()) for path in sys.path if path)
    environment = {
        **os.environ,
        "DEEPSEEK_API_KEY": USER,
        "DEEPSEEK_ADMIN_KEY": ADMIN,
        "PYTHONPATH": paths,
        "RAY_USAGE_STATS_ENABLED": "0",
    }
    log = folder / "log"
    with log.open("w") as errors:
        process = subprocess.Popen(
            command, cwd=folder, env=environment, stdout=subprocess.PIPE, stderr=errors, text=True
        )
    assert process.stdout is not None
    try:
        line = process.stdout.readline()
        assert line.startswith("http://127.0.0.1:"), log.read_text()
        yield Fleet(process, line.strip(), folder)
    finally:
        kill_with_children(process)
        process.communicate()


def repeated(fleet: Fleet, ask: Callable[[httpx.Client], Any], key: str = "") -> list[Any]:
    """Return the answers to one question, asked often enough that every replica answers."""
    with fleet.http(key) as http:
        return [ask(http) for _ in range(16)]


@pytest.mark.slow
def test_keys_names_and_limits_hold_at_every_replica(fleet: Fleet) -> None:
    assert set(repeated(fleet, lambda http: http.get("/v1/models").status_code)) == {401}
    foreign = {"Host": "evil.example"}
    assert set(repeated(fleet, lambda http: http.get("/health", headers=foreign).status_code)) == {
        421
    }
    changes = [("POST", "/v1/experts", {"name": "two"}), ("DELETE", "/v1/experts/one", None)]
    for method, path, body in changes:
        found = repeated(
            fleet,
            lambda http, m=method, p=path, b=body: http.request(m, p, json=b).status_code,
            USER,
        )
        assert set(found) == {403}
    with fleet.http(USER) as http:
        assert http.post("/v1/chat/completions", content=b"x" * (5 << 20)).status_code == 413
    refused = fleet.figures("deepseek_http_requests_total")
    assert len(refused) == 2
    assert min(refused.values()) >= 5
    with fleet.http() as http:  # a session is valid at every replica
        assert http.post("/login", data={"key": USER}).status_code == 303
        assert {http.get("/v1/me").status_code for _ in range(16)} == {200}


@pytest.mark.slow
def test_a_limited_key_has_its_experts_at_every_replica(fleet: Fleet) -> None:
    """The expert `one` is plugged, and the key may use only `two`."""
    asked = {**CHAT, "model": "tiny+one"}

    def models(http: httpx.Client) -> tuple[str, ...]:
        return tuple(model["id"] for model in http.get("/v1/models").json()["data"])

    def named(http: httpx.Client) -> int:
        return http.post("/v1/chat/completions", json=asked).status_code

    def armed(http: httpx.Client) -> tuple[str, ...]:
        return tuple(http.post("/v1/chat/completions", json=CHAT).json()["experts"])

    assert set(repeated(fleet, models, LIMITED)) == {("tiny", "tiny+none")}
    assert set(repeated(fleet, named, LIMITED)) == {403}
    assert set(repeated(fleet, armed, LIMITED)) == {()}
    assert set(repeated(fleet, armed, USER)) == {("one",)}
    with fleet.http() as http:  # the session too is valid at all replicas
        assert http.post("/login", data={"key": LIMITED}).status_code == 303
        assert {models(http) for _ in range(16)} == {("tiny", "tiny+none")}


@pytest.mark.slow
def test_what_is_plugged_is_plugged_everywhere_and_in_replicas_that_come_later(
    fleet: Fleet,
) -> None:
    asked = {**CHAT, "model": "tiny+two"}

    def answer(http: httpx.Client) -> str:
        return str(http.post("/v1/chat/completions", json=asked).json()["choices"])

    def shown(http: httpx.Client) -> str:
        return http.get("/v1/experts").text

    with fleet.http(ADMIN) as http:
        assert http.post("/v1/experts", json={"name": "two"}).status_code == 201
        assert http.post("/v1/experts", json={"name": "two"}).status_code == 409
        assert http.post("/v1/experts/arm", json={"arm": ["two"]}).json()["armed"] == ["two"]
        assert http.post("/v1/experts/arm", json={"arm": ["three"]}).status_code == 404
        damaged = (fleet.folder / "experts" / "two.safetensors").read_bytes()[:-1]
        assert (
            http.post("/v1/experts/upload", content=damaged).json()["error"]["code"]
            == "invalid_pack"
        )
        assert http.delete("/v1/experts/one").status_code == 200
    before = set(repeated(fleet, shown, USER)), set(repeated(fleet, answer, USER))
    assert list(map(len, before)) == [1, 1]
    assert fleet.figures("deepseek_experts_plugged") == dict.fromkeys(
        fleet.figures("deepseek_running"), 1.0
    )

    first = set(fleet.figures("deepseek_running"))
    fleet.workers()[0].kill()
    wait_for(
        lambda: len(now := set(fleet.figures("deepseek_running"))) == 2 and now != first, PATIENCE
    )
    assert (set(repeated(fleet, shown, USER)), set(repeated(fleet, answer, USER))) == before
    assert set(fleet.figures("deepseek_experts_plugged").values()) == {1.0}


@pytest.mark.slow
def test_a_signal_lets_answers_end_and_takes_no_more(fleet: Fleet) -> None:
    body = {**CHAT, "max_tokens": 700, "stream": True, "logit_bias": {"0": -100, "2": -100}}
    with fleet.http(USER) as http, http.stream("POST", "/v1/chat/completions", json=body) as stream:
        lines = stream.iter_lines()
        next(lines)
        fleet.process.send_signal(signal.SIGTERM)
        told = [line for line in lines if line]
    assert told[-1] == "data: [DONE]"
    assert '"finish_reason":"length"' in told[-2]
    assert fleet.process.wait(PATIENCE) == 0


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["tiny"], "pip install 'deepseek-dmoe[cluster]'"),
        (["tiny", "--teach-root", "."], "leave --teach-root out"),
        (["nothing-there"], "nothing-there"),
        (["tiny", "--experts", "other.safetensors"], "other.safetensors"),
        (["tiny", "--host", "0.0.0.0"], "a key is needed"),
    ],
)
def test_what_cannot_be_served_is_said_before_anything_starts(
    arguments: list[str],
    words: str,
    folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(folder)
    # Other errors are reported before a missing Ray.
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(SystemExit) as stop:
        main(["serve", "--experts", "", "--port", "0", "--ray", *arguments])
    assert stop.value.code == 2
    said = capsys.readouterr().err
    assert words in said
    assert said.count("\n") == 1
