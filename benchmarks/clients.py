"""Run test suites of third-party clients against `deepseek serve`, and count the cases that pass.

    python benchmarks/clients.py [--python FOLDER ...] [--suite NAME ...] [--json FILE]

Every suite (`benchmarks/client_suites/`) runs in an environment that has its client: the virtual
environments given by `--python`, and this one; the one with the newest client is chosen. A suite
whose packages are not installed is skipped, and the figures say so. Failed cases are run once more
with a frequency penalty of 1 if the suite supports it: a model of 135M parameters can repeat itself
up to the token limit, which is not the server's fault.

    python -m venv clients && clients/bin/pip install langchain-tests langchain-openai litellm \\
        instructor llm llm-comply anthropic ollama openai openresponses-types
"""

import argparse
import json
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from entry import run_main
from results import write
from served import served

MODEL = "smollm2-135m"
SUITES_FOLDER = Path(__file__).parent / "client_suites"
COMMAND = "python benchmarks/clients.py --python FOLDER"
"""The command as the report shows it, without local folders."""

PAGE = "http://127.0.0.1:3000"
PENALTY = "1"
SECONDS = 1800

FIND = """
import json, sys
from importlib.metadata import PackageNotFoundError, version
try:
    print(json.dumps([version(name) for name in sys.argv[1:]]))
except PackageNotFoundError:
    print("null")
"""


@dataclass(frozen=True)
class Suite:
    """Cases of one client.

    Attributes:
        file: in `client_suites`.
        packages: required packages; the environment with the newest version of the first is used.
        penalized: whether its cases accept a frequency penalty.
    """

    file: str
    packages: tuple[str, ...]
    penalized: bool = False


SUITES = {
    "openai": Suite("openai_fields.py", ("openai",)),
    "anthropic": Suite("anthropic_cases.py", ("anthropic",)),
    "ollama": Suite("ollama_cases.py", ("ollama",), True),
    "open-responses": Suite("open_responses.py", ("openresponses-types", "httpx"), True),
    "llm-comply": Suite("comply_cases.py", ("llm-comply",)),
    "langchain": Suite(
        "langchain_cases.py", ("langchain-tests", "langchain-openai", "pytest-asyncio"), True
    ),
    "litellm": Suite("litellm_cases.py", ("litellm",)),
    "instructor": Suite("instructor_cases.py", ("instructor", "anthropic"), True),
    "llm": Suite("llm_cases.py", ("llm",)),
    "continue-and-open-webui": Suite("replayed_requests.py", ("httpx",)),
}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--python", type=Path, action="append", default=[], metavar="FOLDER")
    parser.add_argument(
        "--suite",
        action="append",
        choices=SUITES,
        help="default: all; the figures of the others in FILE stay",
    )
    parser.add_argument("--json", type=Path, help="file to write the figures to")
    options = parser.parse_args()
    interpreters = [*(folder / "bin" / "python" for folder in options.python), Path(sys.executable)]
    suites: dict[str, Any] = {}
    if options.suite and options.json and options.json.exists():
        suites = json.loads(options.json.read_text())["suites"]
    with served(MODEL, "--allow-origin", PAGE) as server:
        for name in options.suite or SUITES:
            suites[name] = outcome(SUITES[name], interpreters, server.url)
            print(name, json.dumps(suites[name], indent=1), flush=True)
            if options.json:
                write(options.json, {"command": COMMAND, "model": MODEL, "suites": suites})


def outcome(suite: Suite, interpreters: list[Path], url: str) -> dict[str, Any]:
    """Run one suite and return its figures.

    Args:
        suite: the suite.
        interpreters: Python of each environment.
        url: address of the server.
    """
    chosen = interpreter(suite, interpreters)
    if chosen is None:
        return {"skipped": f"not installed: {', '.join(suite.packages)}"}
    found = asked(chosen, suite, url)
    failed = {name: why for name, why in found["outcomes"].items() if why is not None}
    figures = {
        "client": found["versions"],
        "cases": len(found["outcomes"]),
        "passed": len(found["outcomes"]) - len(failed),
        "failed": failed,
    }
    if failed and suite.penalized:
        again = asked(chosen, suite, url, "--penalty", PENALTY, "--only", *failed)["outcomes"]
        figures["pass_with_frequency_penalty"] = [n for n, why in again.items() if why is None]
    return figures


def interpreter(suite: Suite, interpreters: list[Path]) -> Path | None:
    """Return the Python of the environment with the newest client; None if none has it."""
    newest: tuple[list[int], Path] | None = None
    for python in interpreters:
        command = [python, "-c", FIND, *suite.packages]
        told = subprocess.run(command, capture_output=True, text=True, check=True)
        versions = json.loads(told.stdout)
        if versions is None:
            continue
        release = [int(part) for part in versions[0].split(".") if part.isdigit()]
        if newest is None or release > newest[0]:
            newest = (release, python)
    return newest and newest[1]


def asked(python: Path, suite: Suite, url: str, *arguments: str) -> dict[str, Any]:
    """Run a suite's program and return what it reports."""
    command = [python, SUITES_FOLDER / suite.file, url, MODEL, *arguments]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, timeout=SECONDS, check=True)
    return dict(json.loads(done.stdout.splitlines()[-1]))


if __name__ == "__main__":
    run_main(main)
