"""llm-comply: the published cases of Open Responses, and its own cases for OpenAI's chat and
Anthropic's messages; every answer is validated against the API's published OpenAPI description.

Cases with an image must be refused: our models read only text.
"""

import json
import subprocess
import sys

from cases import Case, Target, expect, run

FORMATS = ("open-responses", "openai-chat", "anthropic")


def asked(target: Target, kind: str) -> list[dict[str, object]]:
    """Run llm-comply's cases of one API and return the results."""
    command = [sys.executable, "-m", "llm_comply.cli", "--json", "--timeout", "120"]
    command += ["--base-url", f"{target.url}/v1", "--api-key", "none"]
    command += ["--model", target.model, "--format", kind]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    results: list[dict[str, object]] = json.loads(done.stdout)["results"]
    return results


def cases(target: Target) -> list[tuple[str, Case]]:
    """Return one case for each result that was not skipped."""
    return [
        (f"{kind}: {result['id']}", judged(result))
        for kind in FORMATS
        for result in asked(target, kind)
        if result["status"] != "skipped"
    ]


def judged(result: dict[str, object]) -> Case:
    """Return a case that raises an exception if the result is a failure."""

    def case() -> None:
        errors = result.get("errors") or []
        if "image" in str(result["id"]):
            expect("HTTP 400" in str(errors), f"an image was not refused: {errors}")
        else:
            expect(result["status"] != "failed", f"{errors}")

    return case


if __name__ == "__main__":
    run(cases, "llm-comply")
