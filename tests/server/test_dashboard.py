"""`examples/grafana.json` shows all metrics of a server, and only existing ones."""

import json
import re
from collections.abc import Iterator
from itertools import combinations
from pathlib import Path
from typing import Any

import pytest
from live_server import Live, live
from prometheus_client.parser import text_string_to_metric_families

DASHBOARD = json.loads((Path(__file__).parents[2] / "examples" / "grafana.json").read_text())
PANELS = DASHBOARD["panels"]
EXPRESSIONS = [target["expr"] for panel in PANELS for target in panel["targets"]]
LEFT_OUT = {
    "deepseek_http_requests_created": "when a series began; rates find resets by themselves",
    "deepseek_http_request_seconds_created": "the same",
    "deepseek_first_token_seconds_created": "the same",
    "deepseek_tokens_created": "the same",
    "deepseek_expert_tokens_created": "the same",
    "deepseek_build_info": "the version, which changes with a restart only",
}
"""Samples that no panel shows -> the reason."""


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, set[str]]]:
    """The metrics of a server that has answered and refused requests: name -> its labels."""
    with live(tmp_path_factory.mktemp("dashboard")) as server:
        server.engine.plug(server.folder / "one.safetensors")
        yield labels_by_name(server)


def labels_by_name(server: Live) -> dict[str, set[str]]:
    body = {"model": "tiny", "prompt": "the value", "max_tokens": 4, "temperature": 0}
    with server.http() as http:
        assert http.post("/v1/completions", json=body).status_code == 200
        assert http.post("/v1/completions", json={**body, "model": "other"}).status_code == 404
        text = http.get("/metrics").text
    found: dict[str, set[str]] = {}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            found.setdefault(sample.name, set()).update(sample.labels)
    return found


def metrics(expression: str) -> set[str]:
    return set(re.findall(r"\bdeepseek_\w+", expression))


def shown() -> set[str]:
    return {name for expression in EXPRESSIONS for name in metrics(expression)}


def test_every_metric_of_the_dashboard_is_exported(exported: dict[str, set[str]]) -> None:
    variables = {
        name
        for variable in DASHBOARD["templating"]["list"]
        for name in metrics(json.dumps(variable))
    }
    assert shown() | variables <= exported.keys()
    assert all(map(metrics, EXPRESSIONS))


def test_every_exported_metric_is_on_the_dashboard(exported: dict[str, set[str]]) -> None:
    ours = {name for name in exported if name.startswith("deepseek_")}
    assert ours - shown() == LEFT_OUT.keys()


def test_the_labels_of_an_expression_are_those_of_its_metrics(
    exported: dict[str, set[str]],
) -> None:
    """Prometheus adds `instance` to all of them."""
    for panel in PANELS:
        for target in panel["targets"]:
            known = {"instance"}.union(*(exported[name] for name in metrics(target["expr"])))
            grouped = re.findall(r"by \(([\w, ]+)\)", target["expr"])
            matched = re.findall(r"(\w+)=~?\"", target["expr"])
            named = re.findall(r"{{(\w+)}}", target["legendFormat"])
            labels = {label for group in grouped for label in group.split(", ")}
            assert labels | set(matched) | set(named) <= known, panel["title"]
            assert set(named) <= labels  # a legend shows only labels that series are grouped by


def test_any_prometheus_can_be_its_source() -> None:
    variable = DASHBOARD["templating"]["list"][0]
    assert (variable["name"], variable["type"], variable["query"]) == (
        "datasource",
        "datasource",
        "prometheus",
    )

    def sources(value: Any) -> Iterator[Any]:
        if isinstance(value, dict):
            yield from (value["datasource"],) if "datasource" in value else ()
            value = list(value.values())
        if isinstance(value, list):
            for inner in value:
                yield from sources(inner)

    found = list(sources(DASHBOARD))
    assert len(found) > len(EXPRESSIONS)
    assert all(source == {"type": "prometheus", "uid": "${datasource}"} for source in found)


def test_panels_are_told_apart_and_do_not_overlap() -> None:
    assert len({panel["id"] for panel in PANELS}) == len(PANELS)
    assert len({panel["title"] for panel in PANELS}) == len(PANELS)
    cells = [
        {
            (place["x"] + column, place["y"] + row)
            for column in range(place["w"])
            for row in range(place["h"])
        }
        for place in (panel["gridPos"] for panel in PANELS)
    ]
    assert not any(one & other for one, other in combinations(cells, 2))
    assert max(column for cell in cells for column, _ in cell) < 24
    assert all(
        panel["description"] and panel["fieldConfig"]["defaults"]["unit"] for panel in PANELS
    )
