"""`llm`, the command-line tool, with our server configured as extra models."""

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from functools import partial
from pathlib import Path

from cases import Case, Target, expect, run

CONFIGURATION = """
- model_id: served
  model_name: {model}
  api_base: {url}/v1
  supports_tools: true
  supports_schema: true
  vision: true
- model_id: served-text
  model_name: {model}
  api_base: {url}/v1
  completion: true
- model_id: served-whole
  model_name: {model}
  api_base: {url}/v1
  can_stream: false
"""
BRIEF = ["-o", "max_tokens", "24"]
IMAGE = b"\x89PNG\r\n\x1a\n" + bytes(16)


class Tool:
    """The tool with a separate user folder."""

    def __init__(self, folder: Path, target: Target) -> None:
        self._environment = {**os.environ, "LLM_USER_PATH": str(folder), "OPENAI_API_KEY": "none"}
        text = CONFIGURATION.format(model=target.model, url=target.url)
        (folder / "extra-openai-models.yaml").write_text(text)
        self.image = folder / "image.png"
        self.image.write_bytes(IMAGE)

    def run(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        """Run a command."""
        return subprocess.run(
            [sys.executable, "-m", "llm", *arguments],
            env=self._environment,
            capture_output=True,
            text=True,
            stdin=subprocess.DEVNULL,
            timeout=300,
            check=False,
        )

    def said(self, *arguments: str) -> str:
        """Run a command that must succeed and return what it printed."""
        done = self.run(*arguments)
        expect(done.returncode == 0, done.stderr)
        expect(done.stdout.strip(), "it printed nothing")
        return done.stdout


def cases(target: Target) -> Iterator[tuple[str, Case]]:
    with tempfile.TemporaryDirectory() as folder:
        tool = Tool(Path(folder), target)
        asked = ["-m", "served", "Name a colour.", *BRIEF]
        yield "models", lambda: expect("served" in tool.said("models"), "not listed")
        yield "streamed", partial(tool.said, *asked)
        yield "whole", partial(tool.said, *asked, "--no-stream")
        yield (
            "model that cannot stream",
            partial(tool.said, "-m", "served-whole", "Name a colour.", *BRIEF),
        )
        yield "system", partial(tool.said, *asked, "-s", "Be brief.")
        yield (
            "options",
            partial(
                tool.said, *asked, "-o", "temperature", "0", "-o", "seed", "7", "-o", "stop", "e"
            ),
        )
        yield (
            "penalties",
            partial(
                tool.said, *asked, "-o", "frequency_penalty", "0.5", "-o", "presence_penalty", "0.5"
            ),
        )
        yield "continued", partial(continued, tool, asked)
        yield "schema", partial(schema, tool)
        yield "schema of several", partial(several, tool)
        yield (
            "JSON object",
            partial(
                tool.said,
                "-m",
                "served",
                "Name a colour in JSON.",
                "-o",
                "json_object",
                "1",
                *BRIEF,
            ),
        )
        yield "completion", partial(tool.said, "-m", "served-text", "Once upon", *BRIEF)
        yield (
            "log probabilities",
            partial(tool.said, "-m", "served-text", "Once upon", "-o", "logprobs", "2", *BRIEF),
        )
        yield (
            "tools offered",
            partial(
                tool.said,
                *asked,
                "--functions",
                "def add(a: int, b: int) -> int:\n    return a + b",
            ),
        )
        yield "usage", partial(usage, tool, asked)
        yield "image, refused", partial(image, tool)


def continued(tool: Tool, asked: list[str]) -> None:
    tool.said(*asked)
    tool.said("-c", "And another one.", *BRIEF)


def schema(tool: Tool) -> None:
    asked = ["-m", "served", "Invent a dog.", "--schema", "name, age int", "-o", "temperature", "0"]
    answer = json.loads(tool.said(*asked))
    expect(set(answer) == {"name", "age"}, f"{answer}")


def several(tool: Tool) -> None:
    asked = ["-m", "served", "Invent two dogs.", "--schema-multi", "name, age int"]
    answer = json.loads(tool.said(*asked, "-o", "temperature", "0"))
    expect(isinstance(answer["items"], list), f"{answer}")


def usage(tool: Tool, asked: list[str]) -> None:
    done = tool.run(*asked, "-u")
    expect("Token usage" in done.stderr, done.stderr)


def image(tool: Tool) -> None:
    done = tool.run("-m", "served", "Describe it.", "-a", str(tool.image))
    expect(done.returncode and "images" in done.stderr, f"{done.returncode}: {done.stderr}")


if __name__ == "__main__":
    run(cases, "llm")
