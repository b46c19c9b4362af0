"""What stands before the routes: ids of requests, host names, open paths, wrong addresses."""

import logging
import re
from collections.abc import Iterator
from typing import Any

import pytest
from live_server import Live, live
from log_lines import LOGGER, logged
from openai import NotFoundError, OpenAI
from prometheus_client.parser import text_string_to_metric_families

from deepseek.server.settings import Settings

USER = {"Authorization": "Bearer user"}


@pytest.fixture(scope="module")
def keyed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Live]:
    """A server with keys that accepts every host name and the pages of one site."""
    settings = Settings(
        hosts=frozenset({"*"}),
        origins=frozenset({"https://chat.example"}),
        api_keys=frozenset({"user"}),
    )
    with live(tmp_path_factory.mktemp("keyed"), settings) as running:
        yield running


def test_a_reply_has_the_id_that_the_log_has(
    server: Live, client: OpenAI, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO, LOGGER):
        reply = client.completions.create(model="tiny", prompt="a", max_tokens=1)
        (line,) = logged(caplog, 1)
    identity = reply._request_id
    assert identity is not None and re.fullmatch(r"req_[0-9a-f]{24}", identity)
    assert line.endswith(f" {identity}")


@pytest.mark.parametrize(
    ("given", "is_kept"), [("proxy-1:2.3_4", True), ("a b", False), ("x" * 65, False), ("ä", False)]
)
def test_an_id_that_a_proxy_gives_is_kept_if_it_is_one(
    given: str, is_kept: bool, server: Live
) -> None:
    with server.http() as http:
        headers = http.get("/health", headers={"X-Request-Id": given.encode()}).headers
    assert (headers["x-request-id"] == given) == is_kept
    assert headers["request-id"] == headers["x-request-id"]


def test_every_host_name_is_accepted_if_the_settings_say_so(keyed: Live) -> None:
    with keyed.http() as http:
        assert http.get("/v1/models", headers={**USER, "Host": "gpu-box"}).status_code == 200


def test_probes_need_no_key(keyed: Live) -> None:
    with keyed.http() as http:
        assert [http.get(path).status_code for path in ("/health", "/ready", "/metrics")] == [
            200,
            200,
            401,
        ]


def test_a_refused_request_is_logged_under_its_route(
    keyed: Live, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO, LOGGER), keyed.http() as http:
        http.get("/v1/models")
        http.get("/openapi.json")
        http.get("/secret-path")
        lines = logged(caplog, 3)
    assert [line.split()[1] for line in lines] == ["/v1/models", "/openapi.json", "other"]


def test_a_page_that_may_not_ask_is_told_so_in_our_layout(keyed: Live) -> None:
    with keyed.http() as http:
        asked = {"Access-Control-Request-Method": "POST"}
        foreign = http.options("/v1/models", headers={**asked, "Origin": "https://evil.example"})
        allowed = http.options("/v1/models", headers={**asked, "Origin": "https://chat.example"})
    assert foreign.status_code == 403 and foreign.json()["error"]["code"] == "foreign_origin"
    assert "--allow-origin" in foreign.json()["error"]["message"]
    assert "access-control-allow-origin" not in foreign.headers
    assert allowed.status_code == 200


@pytest.mark.parametrize(
    ("method", "path", "status", "code", "mend"),
    [
        ("POST", "/chat/completions", 404, "unknown_route", "this is /v1/chat/completions"),
        ("POST", "/v1/v1/messages", 404, "unknown_route", "so that this is /v1/messages"),
        ("GET", "/v1/health", 404, "unknown_route", "leave /v1 out"),
        ("GET", "/nothing", 404, "unknown_route", "/openapi.json describes the routes"),
        ("GET", "/v1/chat/completions", 405, "method_not_allowed", "does not take GET; use POST."),
    ],
)
def test_a_wrong_address_is_answered_with_the_right_one(
    method: str, path: str, status: int, code: str, mend: str, server: Live
) -> None:
    with server.http() as http:
        reply = http.request(method, path, json={} if method == "POST" else None)
    error = reply.json()["error"]
    if "messages" in path:
        assert reply.status_code == status and mend in error["message"]
        return
    assert (reply.status_code, error["code"]) == (status, code)
    assert mend in error["message"]
    assert reply.headers.get("allow") == ("POST" if status == 405 else None)


@pytest.mark.parametrize(
    ("method", "path", "methods"),
    [("PUT", "/v1/experts", ["GET", "POST"]), ("PATCH", "/v1/experts/one", ["DELETE", "GET"])],
)
def test_a_wrong_method_is_answered_with_all_that_the_path_takes(
    method: str, path: str, methods: list[str], server: Live
) -> None:
    with server.http() as http:
        reply = http.request(method, path)
    assert reply.status_code == 405
    assert reply.headers["allow"] == ", ".join(methods)
    told = f"{path} does not take {method}; use {' or '.join(methods)}."
    assert reply.json()["error"]["message"] == told


def test_an_unknown_expert_is_no_unknown_route(client: OpenAI) -> None:
    with pytest.raises(NotFoundError, match="No expert named 'nope' is plugged") as error:
        client.completions.create(
            model="tiny", prompt="a", extra_body={"experts": {"arm": ["nope"]}}
        )
    assert (error.value.code, error.value.param) == ("not_found", "experts.arm")


def test_the_description_has_the_key_and_the_version(server: Live) -> None:
    with server.http() as http:
        description = http.get("/openapi.json").json()
    assert description["info"]["version"] == server.service.version
    assert description["components"]["securitySchemes"]["key"]["scheme"] == "bearer"
    metrics = description["paths"]["/metrics"]["get"]["responses"]
    assert "text/plain" in metrics["200"]["content"]
    assert "application/json" in metrics["4XX"]["content"]


def test_what_only_grows_is_a_counter(server: Live) -> None:
    families = text_string_to_metric_families(server.service.metrics.text().decode())
    kinds = {family.name: family.type for family in families}
    for name in ("step_seconds", "expert_loads", "tokens", "http_requests"):
        assert kinds[f"deepseek_{name}"] == "counter"
    assert f'version="{server.service.version}"' in server.service.metrics.text().decode()


@pytest.mark.parametrize(
    ("path", "body", "field"),
    [
        ("/v1/embeddings", {"input": "word " * 5000}, "input"),
        ("/detokenize", {"tokens": [999_999]}, "tokens"),
    ],
)
def test_the_field_at_fault_is_that_of_the_route(
    path: str, body: dict[str, Any], field: str, server: Live
) -> None:
    with server.http() as http:
        reply = http.post(path, json={"model": "tiny", **body} if "v1" in path else body)
    assert (reply.status_code, reply.json()["error"]["param"]) == (400, field)


@pytest.mark.parametrize(
    ("body", "sentence"),
    [
        ({"messages": []}, "it should be a list of 1 or more items."),
        ({"stop": ["x"] * 17}, "a list of 16 or fewer items."),
        ({"logit_bias": {"hello": 1}}, "it should be the id of a token."),
        ({"experts": {"arm": ["../x"]}}, "at most 64 letters, digits, dots, hyphens or"),
    ],
)
def test_a_mistake_is_explained_in_words(body: dict[str, Any], sentence: str, server: Live) -> None:
    asked = {"model": "tiny", "messages": [{"role": "user", "content": "a"}], **body}
    with server.http() as http:
        message = http.post("/v1/chat/completions", json=asked).json()["error"]["message"]
    assert sentence in message and "^[" not in message


def test_a_key_that_comes_twice_is_named(server: Live) -> None:
    text = '{"model": "tiny", "max_tokens": 4, "prompt": "a", "max_tokens": 1}'
    with server.http() as http:
        reply = http.post(
            "/v1/completions", content=text, headers={"Content-Type": "application/json"}
        )
    assert "has the key 'max_tokens' twice" in reply.json()["error"]["message"]
