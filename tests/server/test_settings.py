"""Settings for clients: pages of other sites, the model's names, and its default sampling."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from live_server import Live, live
from transformers import GenerationConfig

from deepseek.errors import ConfigError
from deepseek.server.app import create_app
from deepseek.server.settings import Settings

SITE = "https://chat.example"
PREFLIGHT = {
    "Origin": SITE,
    "Access-Control-Request-Method": "POST",
    "Access-Control-Request-Headers": "authorization,content-type",
}
BODY = {"model": "gpt-4o-mini", "prompt": "the value", "max_tokens": 4, "temperature": 0}


@pytest.fixture(scope="module")
def open_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Live]:
    settings = Settings(
        origins=frozenset({SITE}),
        aliases=frozenset({"gpt-4o-mini", "org/c++", "llama3.2:latest"}),
        api_keys=frozenset({"user"}),
        admin_keys=frozenset({"admin"}),
    )
    with live(tmp_path_factory.mktemp("settings"), settings) as running:
        running.engine.plug(running.folder / "one.safetensors")
        yield running


@pytest.mark.parametrize(("site", "status"), [(SITE, 200), ("https://evil.example", 403)])
def test_a_page_of_an_allowed_site_may_reach_a_private_network(
    open_server: Live, site: str, status: int
) -> None:
    asked = {**PREFLIGHT, "Origin": site, "Access-Control-Request-Private-Network": "true"}
    with open_server.http() as http:
        preflight = http.options("/v1/completions", headers=asked)
    assert preflight.status_code == status
    allowed = preflight.headers.get("access-control-allow-private-network")
    assert allowed == ("true" if status == 200 else None)


def test_an_alias_with_a_tag_is_known_to_ollamas_clients(open_server: Live) -> None:
    body = {"model": "llama3.2:latest", "prompt": "a", "stream": False}
    with open_server.http("user") as http:
        assert http.post("/api/generate", json=body).status_code == 200
        assert http.post("/v1/completions", json={**BODY, "model": body["model"]}).is_success
        assert http.get("/v1/models/").status_code == 404


def test_a_page_of_an_allowed_site_may_ask(open_server: Live) -> None:
    with open_server.http() as http:
        preflight = http.options("/v1/completions", headers=PREFLIGHT)
    assert preflight.status_code == 200
    assert preflight.headers["access-control-allow-origin"] == SITE
    with open_server.http("user") as http:
        reply = http.post("/v1/completions", json=BODY, headers={"Origin": SITE})
    assert reply.status_code == 200
    assert reply.headers["access-control-allow-origin"] == SITE
    assert "access-control-allow-credentials" not in reply.headers


def test_an_allowed_site_still_needs_a_key(open_server: Live) -> None:
    with open_server.http() as http:
        reply = http.post("/v1/completions", json=BODY, headers={"Origin": SITE})
    assert reply.status_code == 401
    assert reply.headers["access-control-allow-origin"] == SITE  # so that the page sees the reason


@pytest.mark.parametrize("origin", ["https://other.example", "null", "https://chat.example.evil"])
def test_pages_of_other_sites_are_refused(open_server: Live, origin: str) -> None:
    with open_server.http("user") as http:
        preflight = http.options("/v1/completions", headers={**PREFLIGHT, "Origin": origin})
        reply = http.post("/v1/completions", json=BODY, headers={"Origin": origin})
    assert "access-control-allow-origin" not in preflight.headers
    assert reply.status_code == 403
    assert reply.json()["error"]["code"] == "foreign_origin"


def test_a_server_without_the_setting_allows_no_page(server: Live) -> None:
    with server.http() as http:
        preflight = http.options("/v1/completions", headers=PREFLIGHT)
        reply = http.post("/v1/completions", json=BODY, headers={"Origin": SITE})
    assert "access-control-allow-origin" not in preflight.headers
    assert reply.status_code == 403


def test_an_alias_is_the_model(open_server: Live) -> None:
    texts = []
    with open_server.http("user") as http:
        for name in ("tiny", "gpt-4o-mini", "tiny+one", "gpt-4o-mini+one", "gpt-4o-mini+none"):
            reply = http.post("/v1/completions", json={**BODY, "model": name}).json()
            assert reply["model"] == name
            texts.append(reply["choices"][0]["text"])
        for name in ("org/c++", "org/c+++one"):
            assert http.post("/v1/completions", json={**BODY, "model": name}).status_code == 200
            assert http.get(f"/v1/models/{name}").json()["id"] == name
        listed = [model["id"] for model in http.get("/v1/models").json()["data"]]
        unknown = http.post("/v1/completions", json={**BODY, "model": "gpt-4o"})
    assert texts[0] == texts[1]
    assert texts[2] == texts[3]
    assert "gpt-4o-mini" in listed
    assert unknown.status_code == 404


def test_the_fingerprint_changes_with_the_experts(open_server: Live) -> None:
    with open_server.http("user") as http:

        def fingerprint() -> str:
            reply = http.post("/v1/completions", json=BODY)
            return str(reply.json()["system_fingerprint"])

        before = fingerprint()
        assert fingerprint() == before
        open_server.engine.plug(open_server.folder / "two.safetensors")
        assert fingerprint() != before
        open_server.engine.unplug("two")
        assert fingerprint() == before


def test_the_models_own_sampling_is_the_default(open_server: Live) -> None:
    model = open_server.engine.model
    before = model.generation_config
    body = {name: value for name, value in BODY.items() if name != "temperature"}

    def texts() -> set[str]:
        with open_server.http("user") as http:
            replies = [http.post("/v1/completions", json={**body, "max_tokens": 12}).json()]
            replies.append(http.post("/v1/completions", json={**body, "max_tokens": 12}).json())
        return {reply["choices"][0]["text"] for reply in replies}

    try:
        assert len(texts()) == 2  # temperature 1
        model.generation_config = GenerationConfig(
            do_sample=True, temperature=0.01, top_k=1, eos_token_id=before.eos_token_id
        )
        assert len(texts()) == 1
    finally:
        model.generation_config = before


@pytest.mark.parametrize("field", ["hosts", "origins", "aliases"])
@pytest.mark.parametrize("value", ["chat.example", None, {""}, {5}])
def test_a_set_of_texts_holds_texts(field: str, value: Any) -> None:
    """One text would be taken for a set of letters."""
    with pytest.raises(ConfigError, match=field):
        Settings(**{field: value})


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("model", 5),
        ("base", Path("base")),
        ("device", None),
        ("host", None),
        ("port", "8000"),
        ("port", 65536),
        ("max_body", "4"),
        ("max_upload", 0),
        ("request_seconds", "x"),
        ("request_seconds", 0),
        ("answer_tokens", 0),
        ("infill_passages", -1),
        ("log_level", "loud"),
        ("experts_folder", None),
        ("teach_root", 5),
        ("preferences", ""),
        ("secret", ""),
    ],
)
def test_a_wrong_value_is_refused_before_the_server_starts(field: str, value: Any) -> None:
    with pytest.raises(ConfigError, match=rf"^{field}\b"):
        Settings(**{field: value})


def test_a_path_may_be_a_text() -> None:
    paths: Any = {"experts_folder": "~/packs", "teach_root": "text", "preferences": "pairs.db"}
    settings = Settings(**paths)
    assert settings.experts_folder == Path.home() / "packs"
    assert settings.teach_root == Path("text")
    assert settings.preferences == Path("pairs.db")


@pytest.mark.parametrize(
    "arguments", [{"engine": "smollm2-135m"}, {"engine": Settings()}, {"settings": 5}]
)
def test_an_application_takes_an_engine_and_settings(arguments: Any) -> None:
    with pytest.raises(ConfigError, match="must be of class"):
        create_app(**arguments)
