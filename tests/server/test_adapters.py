"""Adapters and weights over HTTP: plugged live, chosen per request, in one mixed batch."""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from live_server import Live, live
from tiny_adapter import write_adapter

from deepseek.engine.adapters import import_adapter

LAYERS = {
    f"model.layers.{layer}.{name}": shape
    for layer in range(3)
    for name, shape in {"self_attn.q_proj": (32, 32), "mlp.down_proj": (48, 32)}.items()
}


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Live]:
    """A server with one expert and two adapters, plugged while it runs."""
    folder = tmp_path_factory.mktemp("adapters")
    with live(folder) as server, server.http() as http:
        for seed, name in enumerate(("lora-a", "lora-b"), 1):
            adapter = write_adapter(folder / name, LAYERS, seed=seed, lora_alpha=0.4)
            out = server.folder / f"{name}.safetensors"
            import_adapter(adapter, name=name, base=folder / "tiny", out=out)
        for name in ("one", "lora-a", "lora-b"):
            assert http.post("/v1/experts", json={"name": name}).status_code == 201
        yield server


def answer(server: Live, experts: Any = None, model: str = "tiny") -> dict[str, Any]:
    body = {"model": model, "prompt": "the value", "max_tokens": 12, "temperature": 0}
    if experts is not None:
        body["experts"] = experts
    with server.http() as http:
        reply = http.post("/v1/completions", json=body)
    assert reply.status_code == 200, reply.text
    content: dict[str, Any] = reply.json()
    return content


def text(server: Live, experts: Any = None, model: str = "tiny") -> str:
    return str(answer(server, experts, model)["choices"][0]["text"])


def test_adapters_are_listed_and_not_armed_by_themselves(served: Live) -> None:
    with served.http() as http:
        found = {info["name"]: info for info in http.get("/v1/experts").json()["data"]}
    assert [found[name]["kind"] for name in ("one", "lora-a")] == ["expert", "lora"]
    assert [found[name]["armed"] for name in ("one", "lora-a")] == [True, False]
    assert found["lora-a"]["width"] == 4
    assert found["lora-a"]["layers"] == [0, 1, 2]


CHOICES: dict[str, Any] = {
    "base": {"arm": []},
    "a": {"arm": ["lora-a"]},
    "b": {"arm": ["lora-b"]},
    "both": {"arm": ["lora-a", "lora-b"]},
    "weighted": {"arm": {"lora-a": 0.5, "lora-b": 2}},
    "with an expert": {"arm": {"one": 0.7, "lora-a": 1.0}},
    "with auto": {"arm": ["auto", "lora-b"]},
}


def test_requests_at_the_same_time_answer_as_if_alone(served: Live) -> None:
    alone = {name: text(served, experts) for name, experts in CHOICES.items()}
    with ThreadPoolExecutor(len(CHOICES)) as pool:
        texts = pool.map(lambda experts: text(served, experts), CHOICES.values())
        together = dict(zip(CHOICES, texts, strict=True))
    assert together == alone
    assert len(set(alone.values())) >= 6


def test_a_model_name_arms_an_adapter(served: Live) -> None:
    assert text(served, model="tiny+lora-a") == text(served, {"arm": ["lora-a"]})
    reply = answer(served, model="tiny+lora-a")
    assert reply["experts"] == {"lora-a": reply["usage"]["completion_tokens"]}


def test_weight_one_is_the_name(served: Live) -> None:
    for name in ("one", "lora-a"):
        assert text(served, {"arm": {name: 1}}) == text(served, {"arm": [name]})


def test_the_default_of_the_server_has_weights_too(served: Live) -> None:
    with served.http() as http:
        armed = http.post("/v1/experts/arm", json={"arm": {"lora-a": 0.5, "lora-b": 2}})
        assert armed.json()["armed"] == ["lora-a", "lora-b"]
        weights = {info["name"]: info["weight"] for info in http.get("/v1/experts").json()["data"]}
        assert weights == {"one": 0, "lora-a": 0.5, "lora-b": 2}
        assert text(served) == text(served, CHOICES["weighted"])
        assert http.post("/v1/experts/arm", json={"arm": "auto"}).json()["armed"] == ["one"]


@pytest.mark.parametrize(
    ("arm", "reason"),
    [
        ({"lora-a": 0}, "experts.arm.lora-a is invalid: it should be greater than 0."),
        ({"lora-a": -1}, "greater than 0"),
        ({"lora-a": 2.5}, "at most 2"),
        ({"lora-a": "1"}, "a number"),
        ({"lora-a": True}, "a number"),
        ({f"e{i}": 1 for i in range(65)}, "64 or fewer"),
        (7, "experts.arm"),
    ],
)
def test_weights_out_of_range_are_one_sentence(arm: Any, reason: str, served: Live) -> None:
    body = {"model": "tiny", "prompt": "a", "experts": {"arm": arm}}
    with served.http() as http:
        reply = http.post("/v1/completions", json=body)
    assert reply.status_code == 400
    assert reason in reply.json()["error"]["message"]


def test_weights_are_in_the_openapi_schema(served: Live) -> None:
    with served.http() as http:
        schema = http.get("/openapi.json").json()["components"]["schemas"]["ExpertsField"]
    weights = [kind for kind in schema["properties"]["arm"]["anyOf"] if kind["type"] == "object"]
    limits = weights[0]["additionalProperties"]
    assert (limits["exclusiveMinimum"], limits["maximum"]) == (0, 2)
