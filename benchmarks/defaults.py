"""Compare the default settings of `deepseek expert train` with nearby ones, on several sources.

    python benchmarks/corpora.py sizes --megabytes 20
    python benchmarks/defaults.py ~/text/manuals chats.jsonl [--tokens 24000] [--seeds 1] [--json FILE]

A source is a folder of text or a JSONL file. On each, experts are trained with the defaults and
with one setting changed at a time (`CHANGES`), on the same rows; gates are not fitted. `gain` is
the relative reduction of the loss on held-out text that no run has used, and `share` is the
defaults' gain over that of the best run. The best run is chosen on the same text, so its gain is
slightly overestimated and the share is a lower bound. A small source holds out only a few rows:
with `--seeds`, gains are means over that many splits into training and held-out text. An
interrupted run resumes. Figures in FILE of other sources, from an earlier run with the same base,
layers and tokens, are kept; each source records the commit at which it was measured.
"""

import argparse
import json
import re
import shutil
from collections import Counter
from pathlib import Path
from statistics import mean, median
from typing import Any

from entry import existing_path, run_main
from results import COMMIT, add_output, resumed, write

from deepseek.checkpoint.store import home, read_object, write_json
from deepseek.train.jobs.arguments import ExpertArguments
from deepseek.train.jobs.expert import ExpertRun
from deepseek.train.jobs.expert_request import ExpertRequest, expert_request
from deepseek.train.loop.progress import ProgressBar

CHANGES = (
    "defaults",
    "half the rate",
    "twice the rate",
    "half the width",
    "twice the width",
    "2 passes",
    "8 passes",
)
SETTINGS = ("base", "layers", "tokens")
"""Options that must be the same for all sources of a result."""
SHARED = ("corpus", "trunk")
"""Folders of a run that depend only on the text and the base."""


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("sources", nargs="+", type=existing_path)
    parser.add_argument("--base", default="smollm2-135m")
    parser.add_argument("--layers", default="last:3")
    parser.add_argument("--tokens", type=int, default=24_000, help="to train on, of each source")
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--changes", nargs="+", choices=CHANGES, default=list(CHANGES))
    parser.add_argument("--work", type=Path, default=home() / "defaults", help="runs are kept here")
    add_output(parser, "defaults")
    options = parser.parse_args()
    names = Counter(source.stem for source in options.sources)
    if max(names.values()) > 1:
        parser.error(
            "sources are told apart by their names without suffix; rename one of two alike"
        )
    if CHANGES[0] not in options.changes:
        parser.error(f"--changes needs {CHANGES[0]!r}, which the others are compared with")
    resumed(options.work)
    settings = {name: getattr(options, name) for name in SETTINGS}
    former = json.loads(options.json.read_text()) if options.json.exists() else {"sources": {}}
    figures = former["sources"]
    if figures and former.get("settings") != settings:
        measured = former.get("settings", "other settings")
        parser.error(f"{options.json} was measured with {measured}; name another --json.")
    for source in options.sources:
        path = source.expanduser().resolve()
        runs = {
            change: [trained(path, change, seed, options) for seed in range(options.seeds)]
            for change in options.changes
        }
        gains = {change: mean(one["gain"] for one in found) for change, found in runs.items()}
        best = max(gains.values())
        share = gains["defaults"] / best if best > 0 else 1.0
        figures[path.stem] = {
            "share": round(share, 4),
            "gains": gains,
            "runs": runs,
            "commit": COMMIT,
        }
        print(path.stem, figures[path.stem], flush=True)
        shares = [one["share"] for one in figures.values()]
        summary = {"shares": {"median": median(shares), "worst": min(shares)}}
        write(options.json, {"settings": settings, **summary, "sources": figures})


def trained(path: Path, change: str, seed: int, options: argparse.Namespace) -> dict[str, Any]:
    """Train an expert unless that was done before, and return its figures."""
    settings = "-".join(str(getattr(options, name)) for name in SETTINGS)
    place = options.work / path.stem / re.sub(r"[^\w.-]+", "-", settings) / str(seed)
    folder = place / change.replace(" ", "-")
    result = folder / "outcome.json"
    if not result.exists():
        for part in SHARED:
            first = place / CHANGES[0] / part
            if first.is_dir() and not (folder / part).is_dir():
                shutil.copytree(first, folder / part)
        with ProgressBar() as progress:
            usual = read_object(place / CHANGES[0] / "outcome.json") if change != CHANGES[0] else {}
            request = changed(path, change, seed, options, usual.get("learning_rate", 0.0))
            run = ExpertRun(request, folder, folder / "unused.safetensors", progress)
            write_json(result, outcome(run))
            if change != CHANGES[0]:
                run.drop_trunk()
    return read_object(result)


def changed(
    path: Path, change: str, seed: int, options: argparse.Namespace, rate: float
) -> ExpertRequest:
    """Return the request of a training with one setting changed; `rate` is the default rate."""
    plain = {
        "base": options.base,
        "name": "defaults",
        "layers": options.layers,
        "tokens": options.tokens,
        "seed": seed,
        "from_folder" if path.is_dir() else "from_jsonl": path,
    }
    usual = expert_request(ExpertArguments(**plain))
    changes: dict[str, dict[str, Any]] = {
        "defaults": {},
        "half the rate": {"learning_rate": rate / 2},
        "twice the rate": {"learning_rate": rate * 2},
        "half the width": {"width": usual.width // 2},
        "twice the width": {"width": usual.width * 2},
        "2 passes": {"epochs": 2},
        "8 passes": {"epochs": 8},
    }
    return expert_request(ExpertArguments(**plain, **changes[change]))


def outcome(run: ExpertRun) -> dict[str, Any]:
    """Train, and return the figures and the story of the run."""
    texts = run.texts(run.corpus())
    plan = run.plan(texts)
    found = run.train(texts, plan)
    reported = found.reported
    return {
        "before": round(reported.before, 4),
        "after": round(reported.after, 4),
        "gain": round(1 - reported.after / reported.before, 4),
        "train_tokens": plan.rows * run.request.row_length,
        "learning_rate": run.request.peak_rate(plan),
        "held_out_tokens": plan.held_out_rows * run.request.row_length,
        "story": found.story,
    }


if __name__ == "__main__":
    run_main(main)
