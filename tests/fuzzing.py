"""Random valid and invalid requests, generated from a server's own OpenAPI description, and checks
of the replies.
"""

from collections import Counter
from typing import Any

import schemathesis
from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis.errors import Unsatisfiable
from schemathesis import GenerationMode
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    response_schema_conformance,
    status_code_conformance,
)

CHECKS: list[Any] = [
    not_a_server_error,
    status_code_conformance,
    content_type_conformance,
    response_schema_conformance,
]


def fuzz(url: str, each: int, start: int = 0) -> Counter[str]:
    """Send about `each` valid and as many invalid requests to every route; return the counts of
    status codes.

    Raises an assertion error that shows the request if a reply violates the description or is a
    5xx.
    """
    statuses: Counter[str] = Counter()
    for result in schemathesis.openapi.from_url(f"{url}/openapi.json").get_all_operations():
        for mode in (GenerationMode.POSITIVE, GenerationMode.NEGATIVE):
            try:
                send_all(url, result.ok().as_strategy(generation_mode=mode), statuses, each, start)
            except Unsatisfiable:  # a route without parameters has no invalid requests
                continue
    return statuses


def send_all(url: str, cases: Any, statuses: Counter[str], each: int, start: int) -> None:
    """Send `each` requests to one route and check the replies."""

    @seed(start)
    @settings(
        max_examples=each,
        deadline=None,
        database=None,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    @given(case=cases)
    def send(case: Any) -> None:
        if isinstance(case.body, dict) and case.body.get("model"):
            case.body = {**case.body, "model": "tiny"}  # a random name would be unknown
        reply = case.call(base_url=url, timeout=60)
        statuses[str(reply.status_code)] += 1
        case.validate_response(reply, checks=CHECKS)

    send()
