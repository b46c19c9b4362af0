"""For a key that may use only some experts, no others exist, on every route."""

import json
import re
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest
from live_server import Live, live, save_model
from tiny_expert import save_expert

from deepseek.data import Document
from deepseek.engine.load import load
from deepseek.engine.request import ExpertChoice, Request
from deepseek.engine.sampler import Sampling
from deepseek.packs.library import index_folder
from deepseek.retrieval.index import Index
from deepseek.server import job
from deepseek.server.admission import ComputingRoute
from deepseek.server.app import ROUTERS
from deepseek.server.errors import ApiError
from deepseek.server.settings import Settings

ALL, SHOP, NONE, ABSENT, ADMIN = "all-key", "shop-key", "none-key", "absent-key", "admin-key"
PRIVATE, STORED = "qzv-private", "qzv-stored"
"""Experts that only some keys may use: a plugged one, and a pack in the folder."""

LIMITED = {SHOP: frozenset({"shop"}), NONE: frozenset[str](), ABSENT: frozenset({"shop", "absent"})}
TURNS = [{"role": "user", "content": "the router of the model"}]
LONG = "the router returns the value of the expert " * 20
SOURCE = Document(
    "".join(f"router_{n} = model.router({n})\n" for n in range(9)), "repo/router.py", "code"
)


@dataclass(frozen=True)
class Asked:
    """A request in one dialect, and the place of the text in its reply."""

    path: str
    body: dict[str, Any]
    text: Callable[[Any], str]


def plain(reply: Any) -> str:
    return str(reply["choices"][0]["text"])


def native(reply: Any) -> str:
    return str(reply["content"])


COMPLETION = {"model": "tiny", "prompt": "the value", "max_tokens": 8, "temperature": 0}
NATIVE = {"n_predict": 8, "temperature": 0, "ignore_eos": True}
OLLAMA = {"model": "tiny", "stream": False, "options": {"num_predict": 8, "temperature": 0}}
CHAT = {"model": "tiny", "messages": TURNS, "max_tokens": 8, "temperature": 0}
ASKED = {
    "chat": Asked(
        "/v1/chat/completions", CHAT, lambda reply: str(reply["choices"][0]["message"]["content"])
    ),
    "completion": Asked("/v1/completions", COMPLETION, plain),
    "suffix": Asked("/v1/completions", {**COMPLETION, "suffix": "b"}, plain),
    "completion of ids": Asked("/v1/completions", {**COMPLETION, "prompt": [5, 6, 7]}, plain),
    "responses": Asked(
        "/v1/responses",
        {"model": "tiny", "input": "a router", "max_output_tokens": 8, "temperature": 0},
        lambda reply: str(reply["output"][0]["content"][0]["text"]),
    ),
    "anthropic": Asked(
        "/v1/messages", CHAT, lambda reply: "".join(block["text"] for block in reply["content"])
    ),
    "ollama chat": Asked(
        "/api/chat", {**OLLAMA, "messages": TURNS}, lambda reply: str(reply["message"]["content"])
    ),
    "ollama generate": Asked(
        "/api/generate", {**OLLAMA, "prompt": "a router"}, lambda reply: str(reply["response"])
    ),
    "ollama raw": Asked(
        "/api/generate",
        {**OLLAMA, "prompt": "a router", "raw": True},
        lambda reply: str(reply["response"]),
    ),
    "llama.cpp": Asked("/completion", {**NATIVE, "prompt": "the value"}, native),
    "llama.cpp, ids": Asked("/completion", {**NATIVE, "prompt": [5, 6, 7]}, native),
    "infill": Asked(
        "/infill", {**NATIVE, "input_prefix": "the value ", "input_suffix": "b"}, native
    ),
}
"""Every way to have the model generate."""

WITHOUT_EXPERTS = {
    "/v1/embeddings",
    "/v1/messages/count_tokens",
    "/api/show",
    "/api/embed",
    "/api/embeddings",
    "/tokenize",
    "/detokenize",
    "/apply-template",
}
"""Computing routes that arm no expert."""

each_dialect = pytest.mark.parametrize("asked", ASKED.values(), ids=ASKED)


@pytest.fixture(scope="module")
def keyed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Live]:
    """A server with keys of all kinds, one expert that some may use, and one that others may."""
    folder = tmp_path_factory.mktemp("keyed")
    packs = folder / "experts"
    packs.mkdir()
    loaded = load(save_model(folder / "tiny"), dtype="float32")
    for seed, name in enumerate(("shop", PRIVATE, STORED, "absent"), 3):
        save_expert(loaded, name, packs, seed)
    settings = Settings(
        api_keys=frozenset({ALL, *LIMITED}), key_experts=LIMITED, admin_keys=frozenset({ADMIN})
    )
    with live(folder, settings) as running:
        running.engine.plug(packs / "shop.safetensors")
        running.engine.plug(packs / f"{PRIVATE}.safetensors")
        (packs / "absent.safetensors").unlink()
        yield running


def post(server: Live, key: str, path: str, body: dict[str, Any]) -> Any:
    with server.http(key) as http:
        reply = http.post(path, json=body)
    assert reply.status_code == 200, reply.text
    return reply.json()


def answers(server: Live, key: str) -> dict[str, str]:
    """Return the text of every dialect's answer."""
    return {
        name: asked.text(post(server, key, asked.path, asked.body)) for name, asked in ASKED.items()
    }


def message_of(reply: httpx.Response) -> str:
    """Return the message of an error in any dialect's layout."""
    error = reply.json()["error"]
    return str(error if isinstance(error, str) else error["message"])


def test_every_route_that_computes_is_tested_here() -> None:
    routes = [route for module in ROUTERS for route in module.router.routes]
    computing = {
        route.path
        for route in routes
        if isinstance(route, ComputingRoute) and "POST" in (route.methods or ())
    }
    assert computing == {asked.path for asked in ASKED.values()} | WITHOUT_EXPERTS


def test_the_answers_are_those_of_a_server_without_the_other_experts(keyed: Live) -> None:
    limited, base = answers(keyed, SHOP), answers(keyed, NONE)
    everything = answers(keyed, ALL)
    keyed.engine.unplug(PRIVATE)
    try:
        assert answers(keyed, ALL) == answers(keyed, SHOP) == limited
        keyed.engine.unplug("shop")
        assert answers(keyed, ALL) == answers(keyed, NONE) == base
    finally:
        keyed.engine.plug(keyed.folder / "shop.safetensors")
        keyed.engine.plug(keyed.folder / f"{PRIVATE}.safetensors")
    # Otherwise the experts had no effect. A random model may give the same few tokens for some.
    assert sum(everything[name] != limited[name] for name in ASKED) > len(ASKED) / 2
    assert sum(limited[name] != base[name] for name in ASKED) > len(ASKED) / 2


@each_dialect
def test_gates_fire_for_the_keys_own_experts_alone(keyed: Live, asked: Asked) -> None:
    assert set(post(keyed, SHOP, asked.path, asked.body)["experts"]) == {"shop"}
    assert post(keyed, NONE, asked.path, asked.body)["experts"] == {}
    for limits in ({"max_experts": 1}, {"deny": [PRIVATE, "nothing-there"]}, {"arm": "auto"}):
        reply = post(keyed, SHOP, asked.path, {**asked.body, "experts": limits})
        assert set(reply["experts"]) == {"shop"}


def test_a_server_that_arms_another_expert_arms_none_of_the_key(keyed: Live) -> None:
    with keyed.http(ADMIN) as http:
        assert http.post("/v1/experts/arm", json={"arm": [PRIVATE]}).status_code == 200
    try:
        assert post(keyed, SHOP, "/v1/completions", COMPLETION)["experts"] == {}
        assert set(post(keyed, ALL, "/v1/completions", COMPLETION)["experts"]) == {PRIVATE}
    finally:
        keyed.engine.arm("auto")


CHOICES: dict[str, Callable[[str], dict[str, Any]]] = {
    "model": lambda name: {"model": f"tiny+{name}"},
    "model among others": lambda name: {"model": f"tiny+shop+{name}"},
    "list": lambda name: {"experts": {"arm": [name]}},
    "list with auto": lambda name: {"experts": {"arm": ["auto", name]}},
    "weights": lambda name: {"experts": {"arm": {name: 0.5}}},
    "denied too": lambda name: {"experts": {"arm": [name], "deny": [name]}},
}
"""Ways to ask for an expert by name."""


@each_dialect
@pytest.mark.parametrize("choose", CHOICES.values(), ids=CHOICES)
def test_an_expert_of_others_is_refused_as_one_that_does_not_exist(
    keyed: Live, asked: Asked, choose: Callable[[str], dict[str, Any]]
) -> None:
    replies = {}
    with keyed.http(SHOP) as http:
        for name in (PRIVATE, STORED, "qzv-nothing", "qzv-privat"):
            reply = http.post(asked.path, json={**asked.body, **choose(name)})
            assert reply.status_code == 403, reply.text
            assert "it may use shop" in message_of(reply)
            replies[reply.text.replace(name, "NAME")] = reply
    assert len(replies) == 1
    error = next(iter(replies.values())).json()["error"]
    if isinstance(error, dict) and "code" in error:  # OpenAI's layout
        assert error["code"] == "expert_not_allowed"
        assert error["param"] in ("model", "experts.arm")
    with keyed.http(ALL) as http:  # with another key it is allowed
        assert http.post(asked.path, json={**asked.body, **choose(PRIVATE)}).status_code == 200


@each_dialect
def test_the_keys_own_expert_can_be_named(keyed: Live, asked: Asked) -> None:
    for choose in (CHOICES["model"], CHOICES["list"], CHOICES["weights"]):
        reply = post(keyed, SHOP, asked.path, {**asked.body, **choose("shop")})
        assert set(reply["experts"]) == {"shop"}


@pytest.mark.parametrize("choose", CHOICES.values(), ids=CHOICES)
def test_an_own_expert_that_is_not_plugged_is_missing(
    keyed: Live, choose: Callable[[str], dict[str, Any]]
) -> None:
    with keyed.http(ABSENT) as http:
        reply = http.post("/v1/completions", json={**COMPLETION, **choose("absent")})
    assert reply.status_code == 404
    assert "qzv" not in reply.text


def test_no_route_shows_other_experts(keyed: Live) -> None:
    shown = []
    with keyed.http(ALL) as http:
        paths = [
            path
            for path, methods in http.get("/openapi.json").json()["paths"].items()
            if "get" in methods and "{" not in path
        ]
        paths += ["/", "/v1/me", "/openapi.json", f"/v1/models/tiny+{PRIVATE}"]
        paths += [f"/v1/experts/{name}" for name in (PRIVATE, STORED)]
        paths += [f"/v1/experts/{PRIVATE}/prompts"]
        shown = [path for path in paths if "qzv" in http.get(path).text]
    assert {"/v1/models", "/v1/experts", "/api/tags", "/api/ps", "/metrics"} <= set(shown)
    for key in LIMITED:
        with keyed.http(key) as http:
            for path in paths:
                reply = http.get(path)
                # A refusal may repeat the requested name.
                assert "qzv" not in reply.text or (reply.status_code == 403 and "qzv" in path), path


def test_lists_have_the_keys_own_experts(keyed: Live) -> None:
    with keyed.http(SHOP) as http:
        models = [model["id"] for model in http.get("/v1/models").json()["data"]]
        experts = http.get("/v1/experts").json()
        assert http.get("/v1/experts/shop").json()["manifest"]["name"] == "shop"
        assert http.get("/v1/experts/shop/prompts").status_code == 200
        assert http.get("/v1/models/tiny+shop").json()["id"] == "tiny+shop"
    assert models == ["tiny", "tiny+none", "tiny+shop"]
    assert [info["name"] for info in experts["data"]] == ["shop"]
    assert experts["available"] == []
    with keyed.http(NONE) as http:
        assert [model["name"] for model in http.get("/api/tags").json()["models"]] == models[:2]
        assert http.get("/v1/experts").json()["data"] == []


@pytest.mark.parametrize(
    "path", ["/v1/experts/NAME", "/v1/experts/NAME/prompts", "/v1/models/tiny+NAME"]
)
def test_an_expert_of_others_cannot_be_inspected(keyed: Live, path: str) -> None:
    texts = set()
    with keyed.http(SHOP) as http:
        for name in (PRIVATE, STORED, "qzv-nothing"):
            reply = http.get(path.replace("NAME", name))
            assert reply.status_code == 403
            texts.add(reply.text.replace(name, "NAME"))
    assert len(texts) == 1


def test_an_unknown_model_is_answered_with_the_keys_own_models(keyed: Live) -> None:
    with keyed.http(SHOP) as http:
        reply = http.post("/v1/completions", json={**COMPLETION, "model": "other"})
        counted = http.post(
            "/v1/messages/count_tokens", json={"model": f"tiny+{PRIVATE}", "messages": TURNS}
        )
    assert reply.status_code == 404
    assert message_of(reply).endswith("there are tiny, tiny+none, tiny+shop.")
    assert counted.status_code == 403
    assert counted.json()["error"]["type"] == "permission_error"


def test_the_fingerprint_follows_the_keys_own_experts(keyed: Live) -> None:
    def fingerprint(key: str) -> str:
        return str(post(keyed, key, "/v1/completions", COMPLETION)["system_fingerprint"])

    before = {key: fingerprint(key) for key in (ALL, SHOP, NONE)}
    assert len(set(before.values())) == 3
    keyed.engine.unplug(PRIVATE)
    try:
        assert fingerprint(SHOP) == before[SHOP]
        assert fingerprint(ALL) == before[SHOP]
    finally:
        keyed.engine.plug(keyed.folder / f"{PRIVATE}.safetensors")


def test_passages_come_from_the_keys_own_indexes(keyed: Live) -> None:
    for name in ("shop", PRIVATE):
        document = Document(SOURCE.text, f"{name}.py", "code")
        Index.build([document]).save(index_folder(name, keyed.folder))
    body = {**COMPLETION, "prompt": "router = model.", "retrieve": True}
    everything = post(keyed, ALL, "/v1/completions", body)["retrieved"]
    assert {source.partition(":")[0] for source in everything} == {"shop.py", f"{PRIVATE}.py"}
    assert post(keyed, SHOP, "/v1/completions", body)["retrieved"] == ["shop.py:1-9"]
    texts = set()
    with keyed.http(SHOP) as http:
        for name in (PRIVATE, "qzv-nothing"):
            reply = http.post("/v1/completions", json={**body, "retrieve": name})
            assert (reply.status_code, reply.json()["error"]["param"]) == (403, "retrieve")
            texts.add(reply.text.replace(name, "NAME"))
    assert len(texts) == 1
    with keyed.http(NONE) as http:
        assert http.post("/v1/completions", json=body).status_code == 400


def test_a_session_of_the_page_has_the_limits_of_its_key(keyed: Live) -> None:
    names = {}
    for key in (ALL, SHOP, NONE, ADMIN):
        with keyed.http() as http:
            assert http.post("/login", data={"key": key}).status_code == 303
            names[key] = [info["name"] for info in http.get("/v1/experts").json()["data"]]
            assert http.get("/v1/me").json()["admin"] is (key == ADMIN)
            named = http.post("/v1/completions", json={**COMPLETION, "model": f"tiny+{PRIVATE}"})
        assert named.status_code == (200 if key in (ALL, ADMIN) else 403)
    both = sorted(["shop", PRIVATE])
    assert names == {ALL: both, ADMIN: both, SHOP: ["shop"], NONE: []}


def test_a_limited_key_changes_nothing(keyed: Live) -> None:
    with keyed.http(SHOP) as http:
        assert http.post("/v1/experts", json={"name": STORED}).status_code == 403
        assert http.delete("/v1/experts/shop").status_code == 403
        assert http.post("/v1/experts/arm", json={"arm": ["shop"]}).status_code == 403
        assert http.get("/v1/preferences").status_code == 403


def test_keys_share_a_batch_and_change_no_answer(keyed: Live) -> None:
    bodies = [{**COMPLETION, "prompt": LONG[:size], "logprobs": 1} for size in (80, 200, 400)]
    asked = [(key, body) for body in bodies for key in (ALL, SHOP, NONE, ADMIN, ABSENT)]

    def answer(pair: tuple[str, dict[str, Any]]) -> Any:
        return post(keyed, pair[0], "/v1/completions", pair[1])["choices"]

    alone = [answer(pair) for pair in asked]
    with ThreadPoolExecutor(len(asked)) as pool:
        together = list(pool.map(answer, asked))
    for one, other in zip(alone, together, strict=True):
        assert one[0]["text"] == other[0]["text"]
        assert one[0]["logprobs"]["token_logprobs"] == pytest.approx(
            other[0]["logprobs"]["token_logprobs"], abs=1e-4
        )


def test_the_prompt_cache_tells_nothing_of_other_keys(keyed: Live) -> None:
    body = {**COMPLETION, "prompt": f"cache {LONG}", "logprobs": 0}
    fresh = post(keyed, SHOP, "/v1/completions", body)
    for _ in range(2):
        primed = post(keyed, ALL, "/v1/completions", {**body, "model": f"tiny+{PRIVATE}"})
    assert primed["usage"]["prompt_tokens_details"]["cached_tokens"] > 0
    again = post(keyed, SHOP, "/v1/completions", body)
    assert again["choices"] == fresh["choices"]
    assert again["usage"] == fresh["usage"]
    assert again["usage"]["prompt_tokens_details"]["cached_tokens"] == 0
    streamed = {"stream": True, "stream_options": {"include_usage": True}}
    with keyed.http(SHOP) as http:
        text = http.post("/v1/completions", json={**body, **streamed}).text
    chunks = [json.loads(line[6:]) for line in text.splitlines() if line.startswith("data: {")]
    assert chunks[-1]["usage"] == fresh["usage"]


def test_the_metrics_count_what_replies_of_limited_keys_hide(keyed: Live) -> None:
    def cached() -> float:
        with keyed.http(ALL) as http:
            text = http.get("/metrics").text
        found = re.search(r'^deepseek_tokens_total\{kind="cached"\} (\S+)$', text, re.MULTILINE)
        return float(found[1]) if found else 0.0

    body = {**COMPLETION, "prompt": f"metrics {LONG}"}
    post(keyed, SHOP, "/v1/completions", body)
    before = cached()
    post(keyed, SHOP, "/v1/completions", body)
    assert cached() > before
    with keyed.http(SHOP) as http:
        assert http.get("/metrics").status_code == 403


def racing_request() -> Request:
    return Request((5, 6, 7), Sampling(temperature=0.0, max_new_tokens=4), ExpertChoice())


def test_an_expert_that_is_plugged_at_the_same_moment_is_not_armed(
    keyed: Live, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is not among the experts that the request denies when it is first submitted."""
    submit = keyed.engine.submit_all
    submitted = []

    def plug_first(requests: list[Request]) -> Any:
        if not submitted:
            keyed.engine.plug(keyed.folder / f"{STORED}.safetensors")
        generations = submit(requests)
        submitted.extend(generations)
        return generations

    monkeypatch.setattr(keyed.engine, "submit_all", plug_first)
    try:
        found = job.submit_within(keyed.engine, [racing_request()], frozenset())
        for generation in submitted:
            list(generation)  # wait for its end
        assert [generation.usage.experts for generation in found] == [{None: 4}]
        assert found == submitted[1:]
    finally:
        keyed.engine.unplug(STORED)


def test_all_answers_of_a_request_choose_among_the_same_experts(
    keyed: Live, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Even if one is plugged between the first and the second."""
    experts = keyed.engine.model.experts
    choose = experts.choose
    chosen: list[int] = []

    def plug_second(*args: Any, **options: Any) -> Any:
        chosen.append(len(keyed.engine.experts()))
        if len(chosen) == 2:
            keyed.engine.plug(keyed.folder / f"{STORED}.safetensors")
        return choose(*args, **options)

    monkeypatch.setattr(experts, "choose", plug_second)
    try:
        with keyed.http(ALL) as http:
            reply = http.post("/v1/completions", json={**COMPLETION, "n": 2})
        assert reply.status_code == 200
        assert len(chosen) == 4 and chosen[2:] == [chosen[0] + 1] * 2
    finally:
        keyed.engine.unplug(STORED)


def test_experts_that_never_stay_the_same_are_an_error(
    keyed: Live, monkeypatch: pytest.MonkeyPatch
) -> None:
    submit = keyed.engine.submit_all

    def arm_first(requests: list[Request]) -> Any:
        keyed.engine.arm("auto")
        return submit(requests)

    monkeypatch.setattr(keyed.engine, "submit_all", arm_first)
    with pytest.raises(ApiError, match="being changed") as refusal:
        job.submit_within(keyed.engine, [racing_request()], frozenset({"shop"}))
    assert refusal.value.status == 503
    assert "Retry-After" in refusal.value.headers


def test_an_expert_that_is_unplugged_at_the_same_moment_suggests_no_other(keyed: Live) -> None:
    request = Request((5, 6, 7), Sampling(max_new_tokens=1), ExpertChoice(("qzv-privat",)))
    with pytest.raises(ApiError) as refusal:
        job.submit_within(keyed.engine, [request], frozenset({"qzv-privat"}))
    assert refusal.value.status == 404
    assert "qzv" not in refusal.value.message


def test_a_folder_of_packs_is_listed_for_its_keys(keyed: Live, tmp_path: Path) -> None:
    pack = keyed.folder / "absent.safetensors"
    (keyed.folder / f"{STORED}.safetensors").rename(tmp_path / "away")
    try:
        (tmp_path / "away").rename(pack)
        with keyed.http(ABSENT) as http:
            assert http.get("/v1/experts").json()["available"] == ["absent"]
            assert http.get("/v1/experts/absent").json()["plugged"] is False
        with keyed.http(SHOP) as http:
            assert http.get("/v1/experts").json()["available"] == []
    finally:
        pack.rename(keyed.folder / f"{STORED}.safetensors")
