"""A job without a model: it stores its text in two stages, and may be killed before each."""

from pathlib import Path
from typing import Any

from deepseek.checkpoint.store import read_json, write_json
from deepseek.errors import DataError
from deepseek.train.loop.runs import Run


class KilledError(Exception):
    """Simulates the death of the process."""


class FakeRequest(dict[str, Any]):
    """Arguments of the fake job."""

    lighter = "less text"


class FakeJob:
    """Stores its text in an early and a late stage, and may be killed before a stage."""

    def __init__(self, request: dict[str, Any], folder: Path, out: Path, progress: object) -> None:
        self.request = request
        self.folder = folder
        self.out = out

    def stage(self, name: str) -> str:
        """Return the text of a stage, stored by an earlier call if there was one."""
        if self.request["killed"] == name:
            raise KilledError
        path = self.folder / name / "text.json"
        if not path.is_file():
            write_json(path, self.request["text"])
        return str(read_json(path))

    def run(self) -> dict[str, Any]:
        """Run both stages and write their texts."""
        texts = [self.stage("corpus")]
        if self.request["killed"] == "request":
            raise KilledError
        write_json(self.folder / "request.json", {"seed": self.request["seed"]})
        texts.append(self.stage("training"))
        if self.request["killed"] == "end":
            raise KilledError
        write_json(self.out, texts)
        return {}

    def estimate(self) -> str:
        """Return nothing."""
        return ""


class PoorJob(FakeJob):
    """Refuses a short text before it starts."""

    def run(self) -> dict[str, Any]:
        if self.stage("corpus") == "short":
            raise DataError("There is too little text; give more.")
        return super().run()


def guarded(
    folder: Path, made: Path, command: str = "", text: str = "one", dry_run: bool = False
) -> Run:
    """Return a run whose folder and result must be new or its own, as with a user's command."""
    inputs = {"text": text}
    return Run(
        {"seed": 0}, made, folder, True, dry_run, lambda: inputs, True, command, guarded=True
    )


def asked(text: str = "one", killed: str = "") -> FakeRequest:
    return FakeRequest({"text": text, "seed": 0, "killed": killed})
