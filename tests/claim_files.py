"""A git checkout with two claims and three results, for tests of claims."""

import json
import subprocess
from pathlib import Path

import yaml

DECLARATION = {
    "results": {
        "speed": {
            "measures": ["package/engine"],
            "command": "benchmarks/speed.py --json RESULT",
            "quick": "benchmarks/speed.py --quick --json RESULT",
        },
        "gain": {
            "measures": ["package/train.py"],
            "command": "benchmarks/gain.py CORPORA/code --work WORK --json RESULT",
        },
        "elsewhere": {"measures": ["package/engine"]},
    },
    "claims": {
        "fast": {
            "says": "Twice as fast",
            "protocol": "In turns.",
            "reached_when": "at least twice as fast",
            "figures": [
                {
                    "what": "speed",
                    "in": ["speed", "elsewhere"],
                    "ours": "rounds/ours/*",
                    "theirs": "rounds/theirs/*",
                    "rival": "theirs",
                    "show": "ratio",
                    "form": "{:.1f}x",
                    "spread": "rounds",
                    "goal": [">=", 2],
                }
            ],
        },
        "better": {
            "says": "Half of the gain",
            "protocol": "Three seeds.",
            "reached_when": "at least half",
            "figures": [
                {"what": "gain", "in": "gain", "ours": "gain", "goal": [">=", 0.5]},
                {"what": "loss", "goal": ["<=", 1], "unmeasured": "no benchmark"},
            ],
            "why": "Too little text.",
        },
    },
}


def git(folder: Path, *words: str) -> str:
    """Run git in a folder and return what it prints."""
    identity = ["-c", "user.name=A", "-c", "user.email=a@b.c"]
    command = ["git", *identity, *words]
    done = subprocess.run(command, cwd=folder, check=True, capture_output=True, text=True)
    return done.stdout.strip()


def commit_all(folder: Path) -> str:
    """Commit all files and return the commit."""
    git(folder, "add", ".")
    git(folder, "commit", "--quiet", "--allow-empty", "-m", "x")
    return git(folder, "rev-parse", "--short", "HEAD")


def write_result(folder: Path, name: str, commit: str, **figures: object) -> None:
    """Write a result file of the checkout."""
    record = {
        "machine": "A, 2 cores",
        "commit": commit,
        "command": "python x",
        "date": "2026-01-01",
    }
    path = folder / "benchmarks" / "results" / f"{name}.json"
    path.write_text(json.dumps(record | figures))


def make_checkout(folder: Path) -> Path:
    """Make a git repository with code, and results of its first commit, except `gain`."""
    for path in ("package/engine/step.py", "package/train.py"):
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_text("old\n")
    (folder / "benchmarks" / "results").mkdir(parents=True)
    (folder / "benchmarks" / "claims.yaml").write_text(yaml.safe_dump(DECLARATION, sort_keys=False))
    git(folder, "init", "--quiet")
    commit = commit_all(folder)
    rounds = {"ours": [4.0, 6.0, 9.0], "theirs": [2.0, 2.0, 3.0]}
    write_result(folder, "speed", commit, rounds=rounds)
    write_result(folder, "elsewhere", commit, rounds=rounds)
    return folder
