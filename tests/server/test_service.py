"""The server as an operator sees it: permissions, limits, metrics, teaching, start and shutdown."""

import asyncio
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import pygit2
import pytest
from live_server import Live, live, save_model
from tiny_expert import save_expert
from tiny_tokenizer import tiny_tokenizer
from waiting import wait_for

from deepseek.data.preferences.database import Preference, PreferenceDatabase
from deepseek.engine.load import load
from deepseek.engine.request import Request
from deepseek.engine.sampler import Sampling
from deepseek.errors import ConfigError, DataError
from deepseek.evaluate.answers import answer_text
from deepseek.packs.library import prompts_file
from deepseek.packs.manifest import LEAST_GAIN
from deepseek.packs.pack import read_pack
from deepseek.server.errors import without_paths
from deepseek.server.guard import Guard
from deepseek.server.prompt import time_limit
from deepseek.server.run import listen, serve
from deepseek.server.schema import TeachRequest, Tool
from deepseek.server.settings import Settings
from deepseek.server.tools import Calling
from deepseek.text.chat_template import render

USER, ADMIN = "user-key", "admin-key"
CHAT: dict[str, Any] = {
    "model": "tiny",
    "messages": [{"role": "user", "content": "a"}],
    "max_tokens": 2,
    "temperature": 0,
}


@pytest.fixture(scope="module")
def text_root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder to teach from, with text in `notes` and a link that leads outside."""
    root = tmp_path_factory.mktemp("text")
    (root / "notes").mkdir()
    for number in range(20):
        text = " ".join(
            f"the router {number * place % 97} returns the value of the expert"
            for place in range(30)
        )
        (root / "notes" / f"{number}.txt").write_text(text)
    (root / "out").symlink_to("/etc")
    (root / "linked").mkdir()
    (root / "linked" / "passwd").symlink_to("/etc/passwd")
    return root


@pytest.fixture(scope="module")
def keyed(served_folder: Path, text_root: Path) -> Iterator[Live]:
    """A server with a user and an admin key, small limits, and a folder to teach from."""
    settings = Settings(
        api_keys=frozenset({USER}),
        admin_keys=frozenset({ADMIN}),
        max_body=200_000,
        max_upload=60_000,
        hosts=frozenset({"Models.example"}),
        teach_root=text_root,
    )
    with live(served_folder, settings, max_waiting=4, max_running=2) as running:
        yield running


ROUTES = [
    ("GET", "/"),
    ("GET", "/metrics"),
    ("GET", "/openapi.json"),
    ("GET", "/tokenizer_info"),
    ("GET", "/static/app.js"),
    ("GET", "/v1/models"),
    ("GET", "/v1/experts"),
    ("GET", "/v1/me"),
    ("GET", "/v1/teach"),
    ("GET", "/v1/teach/folders"),
    ("GET", "/v1/preferences"),
    ("GET", "/nope"),
    ("POST", "/v1/chat/completions"),
    ("POST", "/v1/completions"),
    ("POST", "/v1/responses"),
    ("POST", "/v1/embeddings"),
    ("POST", "/v1/experts"),
    ("POST", "/v1/experts/upload"),
    ("POST", "/v1/experts/arm"),
    ("DELETE", "/v1/experts/one"),
    ("POST", "/v1/teach"),
    ("POST", "/v1/preferences"),
]


@pytest.mark.parametrize(("method", "path"), ROUTES)
@pytest.mark.parametrize(
    "header", [{}, {"Authorization": "Bearer wrong"}, {"Cookie": "deepseek_session=x"}]
)
def test_without_the_key_nothing_is_served(
    keyed: Live, method: str, path: str, header: dict[str, str]
) -> None:
    with keyed.http() as http:
        assert http.request(method, path, headers=header).status_code == 401


ADMINISTRATORS = [
    ("POST", "/v1/experts", {"name": "one"}),
    ("POST", "/v1/experts/upload", {}),
    ("DELETE", "/v1/experts/one", None),
    ("POST", "/v1/experts/arm", {"arm": "auto"}),
    ("POST", "/v1/teach", {"name": "x", "kind": "folder"}),
    ("DELETE", "/v1/teach", None),
    ("GET", "/v1/teach", None),
    ("GET", "/v1/teach/folders", None),
    ("POST", "/v1/experts/one/prompts", None),
    ("GET", "/v1/preferences", None),
    ("POST", "/v1/preferences/1", {"choice": 0}),
    ("POST", "/v1/preferences", {"prompt": CHAT["messages"], "chosen": "a", "rejected": "b"}),
]


@pytest.mark.parametrize(("method", "path", "body"), ADMINISTRATORS)
def test_what_changes_the_server_or_shows_others_texts_needs_the_admin_key(
    keyed: Live, method: str, path: str, body: Any
) -> None:
    with keyed.http(USER) as http:
        assert http.request(method, path, json=body).status_code == 403


def test_health_needs_no_key_and_both_keys_serve(keyed: Live) -> None:
    with keyed.http() as http:
        assert http.get("/health").json() == {"status": "ok"}
    for key in (USER, ADMIN):
        with keyed.http(key) as http:
            assert http.post("/v1/chat/completions", json=CHAT).status_code == 200


def test_servers_on_one_host_have_sessions_of_their_own() -> None:
    """Browsers send a cookie to all ports of a host."""
    service: Any = SimpleNamespace(settings=Settings(api_keys=("a",)))
    other: Any = SimpleNamespace(settings=Settings(api_keys=("a",)))
    app: Any = None
    first, again, second = (
        Guard(app, one, frozenset(), frozenset()).cookie for one in (service, service, other)
    )
    assert first == again != second


def test_the_page_asks_for_the_key_and_keeps_a_session(keyed: Live) -> None:
    with keyed.http() as http:
        asked = http.get("/")
        assert asked.status_code == 401
        assert "password" in asked.text
        assert "role=" not in asked.text
        refused = http.post("/login", data={"key": "wrong"})
        assert refused.status_code == 401
        assert '<p role="alert">That key is not one' in refused.text
        again = http.get("/login")
        assert (again.status_code, again.headers["location"]) == (307, "/")
        entered = http.post("/login", data={"key": USER})
        assert entered.status_code == 303
        assert {"HttpOnly", "SameSite=strict"} <= set(entered.headers["set-cookie"].split("; "))
        assert USER not in entered.headers["set-cookie"]
        assert http.get("/").status_code == 200
        me = http.get("/v1/me").json()
        assert me["admin"] is False
        assert me["licence"] == "licence unknown"  # its folder has no model card
        assert http.post("/v1/experts", json={"name": "one"}).status_code == 403


@pytest.mark.parametrize(
    ("host", "status"),
    [
        ("evil.example", 421),
        ("localhost.evil.example", 421),
        ("", 421),
        ("evil.example:80", 421),
        ("[", 421),
        ("127.0.0.1", 200),
        ("localhost:123", 200),
        ("[::1]:80", 200),
        ("models.example", 200),
        ("10.0.0.7:8000", 200),
    ],
)
def test_foreign_names_are_refused(keyed: Live, host: str, status: int) -> None:
    with keyed.http() as http:
        assert http.get("/health", headers={"Host": host}).status_code == status


@pytest.mark.parametrize("path", ["/", "/health", "/ready", "/api/version", "/api/tags"])
def test_a_head_is_that_of_the_reply(keyed: Live, path: str) -> None:
    """Load balancers send HEAD, and so does Ollama's own program before each command."""
    with keyed.http(USER) as http:
        reply = http.head(path)
        assert (reply.status_code, reply.content) == (200, b"")
        assert reply.headers["content-type"] == http.get(path).headers["content-type"]
    with keyed.http() as http:
        assert http.head("/").status_code == http.get("/").status_code


@pytest.mark.parametrize("name", ["a" * 300, "etc"])
def test_a_text_of_a_client_that_looks_like_a_path_is_left_alone(name: str) -> None:
    assert without_paths(f"The regex (/{name}/b is open.") == (
        f"The regex (/{name}/b is open." if name != "etc" else "The regex (b is open."
    )


@pytest.mark.parametrize("origin", ["https://evil.example", "null", "http://localhost:1", ""])
def test_other_sites_cannot_send(keyed: Live, origin: str) -> None:
    with keyed.http(ADMIN) as http:
        assert (
            http.post(
                "/v1/experts/arm", json={"arm": "auto"}, headers={"Origin": origin}
            ).status_code
            == 403
        )
        same = {"Origin": keyed.url}
        assert http.post("/v1/experts/arm", json={"arm": "auto"}, headers=same).status_code == 200


def test_bodies_have_a_limit(keyed: Live) -> None:
    long = json.dumps({**CHAT, "messages": [{"role": "user", "content": "x" * 300_000}]})
    kind = {"Content-Type": "application/json"}

    def pieces() -> Iterator[bytes]:
        yield from (long[start : start + 50_000].encode() for start in range(0, len(long), 50_000))

    with keyed.http(USER) as http:
        assert http.post("/v1/chat/completions", content=long, headers=kind).status_code == 413
        # A body without a declared length.
        told = http.post("/v1/chat/completions", content=pieces(), headers=kind)
        assert (told.status_code, told.json()["error"]["type"]) == (413, "invalid_request_error")
        assert http.post("/v1/chat/completions", json=CHAT).status_code == 200
    with keyed.http(ADMIN) as http:
        assert http.post("/v1/experts/upload", content=b"x" * 70_000).status_code == 413


def test_replies_carry_a_strict_policy(keyed: Live) -> None:
    with keyed.http(USER) as http:
        for path in ("/", "/health", "/v1/models", "/nope"):
            headers = http.get(path).headers
            assert "default-src 'none'" in headers["content-security-policy"]
            assert headers["x-content-type-options"] == "nosniff"


@pytest.mark.parametrize("path", ["/", "/static/app.js", "/static/style.css", "/static/icon.svg"])
def test_the_parts_of_the_page_are_of_one_version(keyed: Live, path: str) -> None:
    """Browsers revalidate each time, and receive only what has changed."""
    with keyed.http(USER) as http:
        whole = http.get(path)
        again = http.get(path, headers={"If-None-Match": whole.headers["etag"]})
    assert whole.headers["cache-control"] == "no-cache"
    if path != "/":
        assert (again.status_code, again.content) == (304, b"")
        assert again.headers["cache-control"] == "no-cache"


@pytest.mark.parametrize(
    "name", ["../tiny/model", "..%2ftiny", "/etc/passwd", "nobody", "one.safetensors", "%00", "ü"]
)
def test_no_path_of_a_client_is_opened(keyed: Live, name: str) -> None:
    with keyed.http(ADMIN) as http:
        assert http.post("/v1/experts", json={"name": name}).status_code in (400, 404)
        assert http.get(f"/v1/experts/{name}").status_code in (400, 404)
        assert http.get(f"/static/{name}").status_code == 404
        assert http.get("/static/../app.py").status_code == 404


def test_experts_come_and_go(keyed: Live) -> None:
    with keyed.http(ADMIN) as http:
        assert http.get("/v1/experts").json()["available"] == ["one", "two"]
        plugged = http.post("/v1/experts", json={"name": "one"})
        assert (plugged.status_code, plugged.json()["armed"]) == (201, True)
        assert http.post("/v1/experts", json={"name": "one"}).status_code == 409
        assert http.get("/v1/experts").json()["available"] == ["two"]
        assert http.get("/v1/experts/one").json()["manifest"]["licence"] == "Apache-2.0"
        assert http.get("/v1/experts/two").json()["plugged"] is False
        assert http.post("/v1/chat/completions", json=CHAT).json()["experts"] == {"one": 2}
        assert http.post("/v1/experts/arm", json={"arm": []}).json()["armed"] == []
        assert http.post("/v1/chat/completions", json=CHAT).json()["experts"] == {}
        unknown = http.post("/v1/experts/arm", json={"arm": ["nobody"]})
        assert (unknown.status_code, unknown.json()["error"]["param"]) == (404, "arm")
        assert "POST /v1/experts plugs one" in unknown.json()["error"]["message"]
        assert http.post("/v1/experts/arm", json={"arm": "auto"}).json()["armed"] == ["one"]
        assert http.delete("/v1/experts/one").status_code == 200
        assert http.delete("/v1/experts/one").status_code == 404
        assert [model["id"] for model in http.get("/v1/models").json()["data"]] == [
            "tiny",
            "tiny+none",
        ]


def test_a_file_is_plugged_under_its_own_name_only(keyed: Live) -> None:
    """Regression: `replace` took the place of the expert in the file, not of the one named."""
    copy = keyed.folder / "renamed.safetensors"
    copy.write_bytes((keyed.folder / "one.safetensors").read_bytes())
    try:
        with keyed.http(ADMIN) as http:
            before = http.get("/v1/experts").json()["data"]
            reply = http.post("/v1/experts", json={"name": "renamed", "replace": True})
            assert (reply.status_code, reply.json()["error"]["param"]) == (409, "name")
            assert "holds the expert one" in reply.json()["error"]["message"]
            assert http.get("/v1/experts").json()["data"] == before
    finally:
        copy.unlink()


@pytest.mark.parametrize("stored", [False, True])
def test_a_replaced_expert_stays_armed_as_it_was(
    stored: bool, keyed: Live, monkeypatch: pytest.MonkeyPatch
) -> None:
    experts = keyed.engine.model.experts
    monkeypatch.setattr(experts.weight_cache, "limit", (1 << 30) if stored else None)
    path = keyed.folder / "one.safetensors"
    former = path.read_bytes()

    def state(http: httpx.Client) -> list[tuple[str, float]]:
        return [(info["name"], info["weight"]) for info in http.get("/v1/experts").json()["data"]]

    replace = {"name": "one", "replace": True}
    try:
        with keyed.http(ADMIN) as http:
            assert http.post("/v1/experts", json=replace).status_code == 201
            assert http.post("/v1/experts", json={"name": "two"}).status_code == 201
            for arm in ({"one": 0.5}, {"one": 0.5, "auto": 0.25}, [], ["two"], "auto"):
                http.post("/v1/experts/arm", json={"arm": arm})
                before = state(http)
                save_expert(load(keyed.folder.parent / "tiny"), "one", keyed.folder, seed=7)
                replaced = http.post("/v1/experts", json=replace)
                digest = read_pack(path).manifest.digest
                assert (replaced.status_code, replaced.json()["digest"]) == (201, digest)
                assert state(http) == before
                assert replaced.json()["weight"] == dict(before)["one"]
                path.write_bytes(former[:-1])
                assert http.post("/v1/experts", json=replace).status_code == 400
                assert state(http) == before
                assert http.get("/v1/experts/one").json()["digest"] == digest
            for name in ("one", "two"):
                assert http.delete(f"/v1/experts/{name}").status_code == 200
            http.post("/v1/experts/arm", json={"arm": "auto"})
    finally:
        path.write_bytes(former)


def test_a_manifest_is_shown_without_reading_the_weights(
    keyed: Live, monkeypatch: pytest.MonkeyPatch
) -> None:
    def read(*_: object) -> None:
        raise AssertionError("the whole file is read")

    monkeypatch.setattr("deepseek.packs.pack.read_tensors", read)
    with keyed.http(ADMIN) as http:
        assert http.get("/v1/experts/two").json()["manifest"]["name"] == "two"


def test_an_uploaded_pack_is_checked_and_plugged(keyed: Live) -> None:
    pack = (keyed.folder / "two.safetensors").read_bytes()
    with keyed.http(ADMIN) as http:
        for bad in (b"", b"PK\x03\x04", pack[:-1], pack[:3000] + b"\xff" + pack[3001:]):
            refused = http.post("/v1/experts/upload", content=bad)
            assert (refused.status_code, refused.json()["error"]["code"]) == (400, "invalid_pack")
            assert "/tmp" not in refused.text
        assert http.post("/v1/experts/upload", content=pack).json()["name"] == "two"
        again = http.post("/v1/experts/upload", content=pack)
        assert (again.status_code, again.json()["error"]["code"]) == (409, "conflict")
        assert "plugged already; unplug it first" in again.text
        assert http.delete("/v1/experts/two").status_code == 200


@pytest.mark.parametrize(
    "path", ["..", "/etc", "out", "linked", "notes/../..", "missing", "\u0000", "a" * 5000]
)
def test_text_outside_the_teach_root_is_refused(keyed: Live, path: str) -> None:
    with keyed.http(ADMIN) as http:
        assert (
            http.post("/v1/teach", json={"name": "x", "kind": "folder", "path": path}).status_code
            == 400
        )


@pytest.mark.parametrize("path", ["..", "/etc", "out", "missing", "notes/0.txt", "a" * 4000])
def test_no_folder_outside_the_teach_root_is_listed(keyed: Live, path: str) -> None:
    with keyed.http(ADMIN) as http:
        refused = http.get("/v1/teach/folders", params={"path": path})
    assert (refused.status_code, refused.json()["error"]["param"]) == (400, "path")


def test_folders_are_listed_without_links_and_hidden_ones(keyed: Live, tmp_path: Path) -> None:
    root = keyed.service.settings.teach_root
    (root / ".hidden").mkdir(exist_ok=True)
    with keyed.http(ADMIN) as http:
        whole = http.get("/v1/teach/folders").json()
        notes = http.get("/v1/teach/folders", params={"path": "linked/../notes/"}).json()
    (root / ".hidden").rmdir()
    names = [folder["name"] for folder in whole["folders"]]
    assert names == [name for name in sorted(names) if name not in ("out", ".hidden")]
    assert {"linked", "notes"} <= {*names} and whole["path"] == "."
    size = sum(path.stat().st_size for path in (root / "notes").iterdir())
    assert notes == {
        "object": "folder",
        "path": "notes",
        "repository": False,
        "folders": [],
        "files": 20,
        "bytes": size,
        "complete": True,
    }


def test_prompts_are_those_of_the_plugged_pack_and_need_its_held_out_text(keyed: Live) -> None:
    path = prompts_file("one", keyed.folder)
    digest = keyed.engine.plug(keyed.folder / "one.safetensors").digest
    prompts = [{"kind": "chat", "text": "Where is it?"}]
    with keyed.http(ADMIN) as http:
        told = []
        for stored in ({"digest": digest, "prompts": prompts}, {"digest": "0" * 64}, {}):
            path.write_text(json.dumps(stored))
            told.append(http.get("/v1/experts/one/prompts").json()["prompts"])
        path.unlink()
        told.append(http.get("/v1/experts/one/prompts").json()["prompts"])
        assert told == [prompts, [], [], []]
        assert "held-out text" in http.post("/v1/experts/one/prompts").json()["error"]["message"]

        assert http.get("/v1/experts/absent/prompts").status_code == 404
    keyed.engine.unplug("one")


def test_the_end_of_a_server_ends_the_search_for_prompts(
    keyed: Live, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def endless(engine: Any, name: str, check: Callable[[], None]) -> list[Any]:
        while True:
            generation = engine.submit(Request((5, 6), Sampling(1)))
            answer_text(generation, check)
            keyed.service.admission.ended = True

    monkeypatch.setattr("deepseek.server.routes.prompts.held_out_folder", lambda _: tmp_path)
    monkeypatch.setattr("deepseek.server.routes.prompts.working_prompts", endless)
    keyed.engine.plug(keyed.folder / "one.safetensors")
    try:
        with keyed.http(ADMIN) as http:
            reply = http.post("/v1/experts/one/prompts")
    finally:
        keyed.service.admission.ended = False
        keyed.engine.unplug("one")
    assert (reply.status_code, reply.json()["error"]["code"]) == (503, "draining")


def repository_with(folder: Path, change: Callable[[Path], object]) -> Path:
    """Return a new repository, its `.git` changed."""
    pygit2.init_repository(folder)
    change(folder / ".git")
    return folder


def moved_to(elsewhere: Path, leave: Callable[[Path, Path], object]) -> Callable[[Path], object]:
    """Return a change that moves `.git` to `elsewhere` and leaves something in its place."""

    def change(own: Path) -> None:
        own.rename(elsewhere)
        leave(own, elsewhere)

    return change


def test_no_repository_is_read_that_lies_partly_outside_the_teach_root(
    keyed: Live, tmp_path: Path
) -> None:
    """Neither in a parent folder, nor by a `.git` file, a link, a shared folder, alternates, or
    links among its objects.
    """
    root = keyed.service.settings.teach_root
    assert root is not None
    outside = tmp_path / "outside"
    pygit2.init_repository(outside)
    changes: dict[str, Callable[[Path], object]] = {
        "file": moved_to(tmp_path / "a", lambda own, there: own.write_text(f"gitdir: {there}\n")),
        "link": moved_to(tmp_path / "b", lambda own, there: own.symlink_to(there)),
        "shared": lambda own: (own / "commondir").write_text(f"{outside / '.git'}\n"),
        "alternates": lambda own: (own / "objects" / "info" / "alternates").write_text(
            f"{outside}/.git/objects\n"
        ),
        "object": lambda own: (own / "objects" / "aa").symlink_to(outside / ".git" / "objects"),
        "refs": lambda own: (own / "refs" / "heads" / "main").symlink_to("/etc/passwd"),
    }
    for name, change in changes.items():
        repository_with(root / f"repository-{name}", change)
    pygit2.init_repository(root / "sound")
    (root / "sound" / "below").mkdir()
    with keyed.http(ADMIN) as http:
        for path in [
            *(f"repository-{name}" for name in changes),
            "sound/below",
            "notes",
            "missing",
        ]:
            told = http.post("/v1/teach", json={"name": "x", "kind": "git", "path": path})
            assert told.status_code == 400, path
            assert str(tmp_path) not in told.text
        assert (
            http.post("/v1/teach", json={"name": "x", "kind": "git", "path": "sound"}).status_code
            == 202
        )
        http.delete("/v1/teach")


def test_of_many_lessons_asked_for_at_once_one_begins(keyed: Live) -> None:
    def ask(number: int) -> int:
        with keyed.http(ADMIN) as http:
            return http.post(
                "/v1/teach", json={"name": f"n{number}", "kind": "folder", "path": "notes"}
            ).status_code

    with ThreadPoolExecutor(12) as pool:
        assert sorted(pool.map(ask, range(12))) == [202] + [409] * 11
    with keyed.http(ADMIN) as http:
        assert http.delete("/v1/teach").json()["state"] in ("stopped", "failed")


def test_preferences_are_reviewed_and_recorded(keyed: Live) -> None:
    path = keyed.service.settings.preferences
    database = PreferenceDatabase(path)
    number = database.add(
        Preference(({"role": "user", "content": "q"},), "worse", "better", "file")
    )
    with keyed.http(ADMIN) as http:
        shown = http.get("/v1/preferences").json()
        # More than a database id can be.
        assert http.get(f"/v1/preferences?after={1 << 70}").status_code == 400
        assert (shown["pair"]["id"], shown["pair"]["answers"]) == (number, ["better", "worse"])
        assert (
            http.post(f"/v1/preferences/{number}", json={"choice": 0, "reviewer": "me"}).status_code
            == 200
        )
        assert http.get("/v1/preferences").json() == {
            "object": "preference",
            "pair": None,
            "pairs": 1,
            "reviewed": 1,
        }
        new = {"prompt": CHAT["messages"], "chosen": "x", "rejected": "y"}
        assert http.post("/v1/preferences", json=new).json()["new"] is True
        assert http.post("/v1/preferences", json=new).json()["new"] is False
        assert http.post("/v1/preferences", json={**new, "rejected": "x"}).status_code == 400
        assert http.post("/v1/preferences/999", json={"choice": 0}).status_code == 404
    judged = database.get(number or 0)
    assert (judged.chosen, judged.rejected, judged.scores["me"]) == ("better", "worse", (1.0, 0.0))
    assert len(database.history(number or 0)) == 1
    database.close()


def test_a_full_queue_says_when_to_come_back(keyed: Live) -> None:
    replies: list[httpx.Response] = []

    def ask() -> None:
        with keyed.http(USER) as http:
            replies.append(http.post("/v1/chat/completions", json={**CHAT, "max_tokens": 200}))

    threads = [threading.Thread(target=ask) for _ in range(24)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    statuses = {reply.status_code for reply in replies}
    assert statuses == {200, 429}
    assert all(
        int(reply.headers["retry-after"]) >= 1 for reply in replies if reply.status_code == 429
    )


@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions", "/v1/responses"])
def test_a_full_queue_refuses_before_a_body_is_read(
    keyed: Live, path: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(keyed.engine, "_max_waiting", 0)
    with keyed.http(USER) as http:
        refused = http.post(path, content=b"no JSON", headers={"Content-Type": "application/json"})
        assert refused.status_code == 429
        assert refused.json()["error"]["code"] == "queue_full"
        assert http.get("/v1/models").status_code == 200
    with keyed.http() as http:
        # Without a key, nothing is revealed about the queue.
        assert http.post(path, content=b"no JSON").status_code == 401


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_leaves_frees_its_place(keyed: Live, stream: bool) -> None:
    body = {**CHAT, "max_tokens": 700, "stream": stream, "logit_bias": {"0": -100, "2": -100}}
    before = keyed.engine.stats().finished.get("cancelled", 0)
    with socket.create_connection(("127.0.0.1", int(keyed.url.rsplit(":", 1)[1]))) as connection:
        content = json.dumps(body)
        connection.sendall(
            f"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nAuthorization: Bearer {USER}\r\n"
            f"Content-Type: application/json\r\nContent-Length: {len(content)}\r\n\r\n{content}".encode()
        )
        wait_for(lambda: keyed.engine.stats().running)
    wait_for(lambda: keyed.engine.stats().finished.get("cancelled", 0) == before + 1)


def test_metrics_count_replies_tokens_and_experts(keyed: Live) -> None:
    with keyed.http(USER) as http:
        http.post("/v1/chat/completions", json=CHAT)
        text = http.get("/metrics").text
    assert 'deepseek_http_requests_total{route="/v1/chat/completions",status="200"}' in text
    tokens = re.search(r'deepseek_tokens_total\{kind="completion"\} ([0-9.]+)', text)
    assert tokens
    assert float(tokens[1]) >= 2
    assert "deepseek_experts_plugged 0.0" in text


def test_metrics_count_the_tokens_of_embeddings(served_folder: Path) -> None:
    with live(served_folder) as server, server.http() as http:
        body = {"model": "tiny", "input": ["the value", "a"]}
        tokens = http.post("/v1/embeddings", json=body).json()["usage"]["prompt_tokens"]
        counted = f'deepseek_tokens_total{{kind="prompt"}} {tokens:.1f}'
        wait_for(lambda: counted in http.get("/metrics").text)


def test_metrics_count_no_prompt_that_was_never_computed(served_folder: Path) -> None:
    with live(served_folder, Settings(request_seconds=0.2), max_running=1) as server:
        server.engine.submit(Request((5,), Sampling(max_new_tokens=760), ignore_end=True))
        with server.http() as http:
            assert http.post("/v1/chat/completions", json=CHAT).status_code == 504
            text = http.get("/metrics").text
    assert 'deepseek_tokens_total{kind="prompt"}' not in text
    assert "deepseek_first_token_seconds_count 0.0" in text  # nor a token that never came


def test_an_answer_that_takes_too_long_is_given_up(served_folder: Path) -> None:
    with live(served_folder, Settings(request_seconds=0.05)) as server, server.http() as http:
        body = {**CHAT, "max_tokens": 700, "logit_bias": {"0": -100, "2": -100}}
        reply = http.post("/v1/chat/completions", json=body)
        assert (reply.status_code, reply.json()["error"]["code"]) == (504, "timeout")
        with http.stream("POST", "/v1/chat/completions", json={**body, "stream": True}) as stream:
            assert '"code":"timeout"' in stream.read().decode()


@pytest.mark.slow
def test_an_expert_is_taught_and_plugs_itself_in(keyed: Live) -> None:
    with keyed.http(ADMIN) as http:
        asked = {
            "name": "lecture",
            "kind": "folder",
            "path": "notes",
            "tokens": 2048,
            "layers": "last:1",
        }
        assert http.post("/v1/teach", json=asked).status_code == 202
        assert http.post("/v1/teach", json={**asked, "name": "more"}).status_code == 409
        with http.stream("GET", "/v1/teach/events", timeout=300) as stream:
            told = [
                json.loads(line[6:]) for line in stream.iter_lines() if line.startswith("data: {")
            ]
        assert http.delete("/v1/teach").json()["name"] == "lecture"  # no longer running
        names = [info["name"] for info in http.get("/v1/experts").json()["data"]]
        assert http.post("/v1/teach", json=asked).status_code == 409  # the name is taken
        http.delete("/v1/experts/lecture")
    assert [told[0]["state"], told[-1]["state"]] == ["running", "plugged"], told[-1]
    assert names == ["lecture"]
    assert told[-1]["losses"]
    assert told[-1]["held_out"]
    assert told[-1]["armed"] == told[-1]["verdict"].startswith("better") and told[-1]["verdict"]
    assert told[-1]["gain"] == pytest.approx(1 - told[-1]["after"] / told[-1]["before"])
    assert told[-1]["armed"] == (told[-1]["gain"] >= LEAST_GAIN)
    assert told[-1]["story"] and told[-1]["expected_seconds"] > 0
    assert prompts_file("lecture", keyed.folder).is_file() == told[-1]["armed"]


def first_state(server: Live) -> dict[str, Any]:
    """Return the lesson that the server started by itself."""
    with server.http() as http:
        wait_for(lambda: http.get("/v1/teach").json()["state"] != "none")
        told = http.get("/v1/teach").json()
        if told["state"] == "running":
            told = http.delete("/v1/teach").json()
    return dict(told)


def test_a_server_begins_with_a_lesson(served_folder: Path, tmp_path: Path) -> None:
    pygit2.init_repository(tmp_path)
    # A working tree may contain links: only committed content is read.
    (tmp_path / "out").symlink_to("/")
    lesson = TeachRequest(name="history", kind="git")
    with live(served_folder, Settings(teach_root=tmp_path), lesson) as server:
        assert first_state(server)["state"] == "stopped"
    with live(served_folder, Settings(), lesson) as server:
        told = first_state(server)
        assert (told["state"], "--teach-root" in told["message"]) == ("failed", True)


def test_a_template_has_a_time_limit() -> None:
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    bomb = "{% for a in range(90000) %}{% for b in range(90000) %}{% set c = a %}{% endfor %}{% endfor %}"
    template = ImmutableSandboxedEnvironment().from_string(bomb)
    started = time.monotonic()
    with pytest.raises(DataError, match="took longer"), time_limit(0.1):
        template.render()
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = bomb
    asked = [{"role": "user", "content": "a"}]
    with pytest.raises(DataError, match=r"^The chat template took longer"), time_limit(0.1):
        render(tokenizer, asked)
    assert time.monotonic() - started < 5
    with time_limit(5):
        assert ImmutableSandboxedEnvironment().from_string("{{ 1 + 1 }}").render() == "2"


@pytest.mark.parametrize(
    ("text", "content", "calls"),
    [
        ("plain", 5, []),
        (
            '<tool_call>{"name": "f", "arguments": {"a": 1}}</tool_call>',
            0,
            [{"name": "f", "arguments": '{"a": 1}'}],
        ),
        (
            'Sure.\n<tool_call>\n{"name": "f", "arguments": {}}',
            6,
            [{"name": "f", "arguments": "{}"}],
        ),
        ('{"name": "f", "parameters": {"a": 2}}', 0, [{"name": "f", "arguments": '{"a": 2}'}]),
        ('{"name": "f", "arguments": "{\\"a\\": 2}"}', 0, [{"name": "f", "arguments": '{"a": 2}'}]),
        ('{"name": "f", "arguments": null}', 0, [{"name": "f", "arguments": "{}"}]),
        ('{"name": "f", "arguments": [1]}', 0, [{"name": "f", "arguments": "[1]"}]),
        ('{"name": "f"}', 0, [{"name": "f", "arguments": "{}"}]),
        ('{"name": "g", "arguments": {}}', 0, []),
        ('{"name": {"first": "f"}}', 0, []),
        ("a < b <tool", 6, []),
        ("<tool_call>nonsense</tool_call>", 0, []),
        ('<tool_call>{"name": "f"} and more</tool_call>', 0, []),
        (
            '<tool_call>{"name": "f", "arguments": {"a": "</tool_call><tool_call>"}}</tool_call>'
            '<tool_call> {"name": "f"} <tool_call>[{"name": "f"}]',
            0,
            [
                {"name": "f", "arguments": '{"a": "</tool_call><tool_call>"}'},
                {"name": "f", "arguments": "{}"},
                {"name": "f", "arguments": "{}"},
            ],
        ),
    ],
)
def test_calls_are_read_out_of_texts(text: str, content: int, calls: list[dict[str, str]]) -> None:
    calling = Calling((Tool.model_validate({"type": "function", "function": {"name": "f"}}),))
    assert calling.content_length(text) == content
    assert calling.read(text) == calls
    for end in range(len(text)):  # content that was final stays so
        assert (
            text[: calling.content_length(text[:end])]
            == text[: min(calling.content_length(text[:end]), len(text))]
        )


def test_addresses_are_checked_before_anything_is_loaded() -> None:
    with pytest.raises(ConfigError, match="a key is needed"):
        listen(Settings(host="0.0.0.0"))
    listen(Settings(host="127.0.0.2", port=0)).close()  # all of 127.0.0.0/8 is this machine
    for host in ("ä..b", "a\x00b"):
        with pytest.raises(ConfigError, match="cannot be the name of a host"):
            listen(Settings(host=host, api_keys=frozenset({"key"})))
    with listen(Settings(port=0)) as taken:
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(ConfigError, match=f"Port {port} .* is taken"):
            listen(Settings(port=port))


def test_a_server_in_a_running_event_loop_is_refused_before_anything_is_loaded() -> None:
    """A notebook runs one."""

    async def cell() -> None:
        serve("no-such-model", settings=Settings(port=0), announce=announced.append)

    announced: list[str] = []
    with pytest.raises(ConfigError, match=r"`deepseek serve` in a terminal, or .* create_app"):
        asyncio.run(cell())
    assert not announced


@pytest.fixture(scope="module")
def command(
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """Run `deepseek serve` in its own process; yield it when it is ready."""
    folder = tmp_path_factory.mktemp("command")
    base = save_model(folder / "tiny")
    save_expert(load(base, dtype="float32"), "one", folder, 1)
    arguments = ["serve", str(base), "--port", "0", "--experts", str(folder / "one.safetensors")]
    process = subprocess.Popen(
        [sys.executable, "-m", "deepseek", *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert process.stdout is not None
    try:
        found = re.search(r"http://127\.0\.0\.1:\d+", process.stdout.readline())
        assert found
        wait_for(lambda: is_ready(found[0]))
        yield process, found[0]
    finally:
        process.kill()
        process.communicate()


def is_ready(url: str) -> bool:
    """Return whether the model is loaded; until then the server must say so."""
    reply = httpx.get(f"{url}/ready", timeout=30)
    if reply.status_code == 200:
        return True
    told = (reply.status_code, reply.json()["error"]["code"], reply.headers["retry-after"])
    assert told == (503, "loading", "1")
    return False


def test_a_signal_lets_answers_end_and_takes_no_more(
    command: tuple[subprocess.Popen[str], str],
) -> None:
    process, url = command
    body = {
        **CHAT,
        "max_tokens": 600,
        "stream": True,
        "logit_bias": {"0": -100, "2": -100},
        "model": "tiny+one",
    }
    with httpx.stream("POST", f"{url}/v1/chat/completions", json=body, timeout=60) as stream:
        lines = stream.iter_lines()
        next(lines)
        process.send_signal(signal.SIGTERM)
        time.sleep(0.1)
        refused = httpx.post(f"{url}/v1/chat/completions", json=CHAT)
        assert (refused.status_code, refused.json()["error"]["code"]) == (503, "draining")
        assert "retry-after" in refused.headers
        others = {
            path: httpx.post(f"{url}{path}", json={}).status_code
            for path in ("/completion", "/infill", "/tokenize", "/api/chat", "/api/embed")
        }
        assert set(others.values()) == {503}, others
        told = [line for line in lines if line]
    assert told[-1] == "data: [DONE]"
    assert json.loads(told[-2][6:])["choices"][0]["finish_reason"] == "length"
    assert process.wait(20) == 0


def test_a_model_in_the_working_folder_has_the_name_of_the_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    models: list[str] = []

    def stop(settings: Settings) -> None:
        models.append(settings.model)
        raise ConfigError("no socket in this test")

    folder = tmp_path / "house"
    folder.mkdir()
    monkeypatch.chdir(folder)
    monkeypatch.setattr("deepseek.server.run.listen", stop)
    with pytest.raises(ConfigError, match="no socket"):
        serve(".")
    assert models == ["house"]
