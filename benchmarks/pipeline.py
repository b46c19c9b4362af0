"""Run one recipe on SmolLM2 with real data: adaptation, alignment, an expert and an evaluation.

    python benchmarks/pipeline.py CODE PREFS [--git .] [--work DIR] [--json benchmarks/results/pipeline.json]

CODE is a folder of source files, PREFS a preference database (`benchmarks/rlpo.py` leaves one in
its work folder), and the expert is trained on the git history of `--git`. The recipe is written as
YAML to the work folder and run by `deepseek train`, as a user would; each stage's time is taken
from its run folder. Goal: at most 30 minutes.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import yaml
from entry import existing_path, run_main
from results import write


def recipe(code: Path, prefs: Path, git: Path) -> dict[str, object]:
    """Return the recipe of four stages."""
    adapt = {"from_folder": str(code), "mode": "last-n", "tokens": 60_000, "epochs": 2}
    align = {
        "prefs": str(prefs),
        "rollouts": 8,
        "rollout_size": 32,
        "new_tokens": 24,
        "learning_rate": 1e-4,
    }
    expert = {"from_git": str(git), "minutes": 4, "licence": "Apache-2.0"}
    stages = [
        {"stage": "adapt", "with": adapt},
        {"stage": "align", "with": align},
        {"stage": "expert", "name": "history", "with": expert},
        {
            "stage": "eval",
            "with": {
                "data": [str(code)],
                "experts": ["history"],
                "functions": str(code),
                "most_functions": 8,
            },
        },
    ]
    return {"name": "pipeline", "base": "smollm2-135m", "licence": "Apache-2.0", "stages": stages}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("code", type=existing_path)
    parser.add_argument("prefs", type=existing_path)
    parser.add_argument("--git", type=existing_path, default=Path(__file__).parent.parent)
    parser.add_argument(
        "--work", type=Path, default=Path(tempfile.gettempdir()) / "pipeline-benchmark"
    )
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    from deepseek.checkpoint.store import home

    place = options.work / "home"
    place.mkdir(parents=True, exist_ok=True)
    # Reuse what earlier runs stored for the base: weights, public text, fingerprints.
    for shared in ("models", "public", "fingerprints"):
        if (home() / shared).is_dir() and not (place / shared).exists():
            (place / shared).mkdir()
            for entry in (home() / shared).glob("[!.]*"):  # but not their locks
                (place / shared / entry.name).symlink_to(entry)
    path = options.work / "recipe.yaml"
    paths = (p.resolve() for p in (options.code, options.prefs, options.git))
    path.write_text(yaml.safe_dump(recipe(*paths), sort_keys=False))
    started = time.perf_counter()
    command = [sys.executable, "-m", "deepseek", "train", str(path)]
    subprocess.run(command, check=True, env={**os.environ, "DEEPSEEK_HOME": str(place)})
    seconds = time.perf_counter() - started
    result = json.loads((place / "runs" / "pipeline" / "result.json").read_text())
    stages = {one["stage"]: one["figures"] for one in result["results"]}
    print(json.dumps({"seconds": seconds, "stages": stages}, indent=1))
    if options.json:
        write(options.json, {"seconds": seconds, "stages": stages})


if __name__ == "__main__":
    run_main(main)
