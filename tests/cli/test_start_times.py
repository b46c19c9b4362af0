"""Commands that need no model do not import libraries that take seconds to load."""

import json
import os
import subprocess
import sys
from contextlib import closing
from pathlib import Path

import pytest
import torch

from deepseek.data.preferences.database import PreferenceDatabase
from deepseek.data.preferences.files import preference
from deepseek.packs.manifest import BaseDescription, Manifest
from deepseek.packs.pack import ExpertPack, write_pack
from deepseek.packs.tensors import DTYPES

HEAVY = {"datasets", "matplotlib", "numba", "pyarrow", "sklearn", "torch", "transformers"}

LIGHT = [
    "bench",
    "bench --json",
    "claims",
    "claims --json",
    "claims show dpe",
    "expert list",
    "expert list --json",
    "models list",
    "models list --json",
    "plan",
    "plan --inference --json",
    "plan --profile small",
    "prefs add --prompt Hi --chosen Hello. --rejected No.",
    "prefs import pairs.jsonl",
    "prefs search",
    "prefs search --json",
    "prefs stats",
    "prefs stats --json",
    "runs list",
    "runs list --json",
]


def pair(prompt: str) -> dict[str, str]:
    return {"prompt": prompt, "chosen": "Blue.", "rejected": "I cannot say."}


@pytest.fixture
def filled_home(tmp_path: Path) -> Path:
    """A home with an expert and a preference pair, so that listing them really reads something."""
    home = tmp_path / "home"
    base = BaseDescription(name="tiny", weights="0" * 64, tokenizer="", hidden_size=8, num_layers=2)
    manifest = Manifest(
        name="poems", base=base, layers=(1,), width=4, dtype="float32", licence="MIT"
    )
    tensors = {
        name: torch.zeros(spec.shape, dtype=DTYPES[spec.dtype])
        for name, spec in manifest.tensors().items()
    }
    pack = home / "experts" / "poems.safetensors"
    pack.parent.mkdir(parents=True)
    write_pack(pack, ExpertPack.seal(manifest, tensors))
    with closing(PreferenceDatabase(home / "preferences.db")) as database:
        database.add(preference(pair("Which colour has the sky?"), "the pair", "by hand"))
    (tmp_path / "pairs.jsonl").write_text(json.dumps(pair("Which colour has the sea?")))
    return home


@pytest.mark.parametrize("command", LIGHT)
def test_no_heavy_library_is_loaded(command: str, filled_home: Path) -> None:
    program = (
        "import sys\nfrom deepseek.cli.main import main\n"
        "try: main(sys.argv[1:])\nfinally: print(*sys.modules, file=sys.stderr)"
    )
    result = subprocess.run(
        [sys.executable, "-c", program, *command.split()],
        env=os.environ | {"DEEPSEEK_HOME": str(filled_home)},
        cwd=filled_home.parent,
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    assert HEAVY & set(result.stderr.split()) == set()
