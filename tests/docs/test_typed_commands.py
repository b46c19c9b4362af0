"""The `deepseek` commands on the pages work, page by page, with tiny models and texts."""

import json
import os
import re
import shlex
import shutil
import sys
from collections.abc import Mapping
from pathlib import Path

import processes
import pytest
import uvicorn
from git_history import History
from pages import BLOCK, CURRENT, DOCS, ROOT, SHELL, blocks, page_id
from tiny_adapter import save_adapter

from deepseek.cli.main import main

FILES, CHARACTERS = 12, 1500
"""Files per folder of text, and characters per file. Those of `src` are whole: each has documented
functions, which `deepseek data code` collects."""

LEFT_OUT = {
    "deepseek claims run": "takes hours, or minutes: tests/claims",
    "deepseek watch": "runs until it is stopped: tests/train/jobs/test_update.py",
    " --human-eval": "takes minutes: tests/evaluate/test_code.py",
    " --ray": "starts a cluster: tests/server/test_replicas.py",
    "cuda": "needs a GPU: tests/gpu",
    "rag,lora,full": "of a tiny model, 0.1 % are no rank: tests/evaluate/test_against.py",
}
"""Part of a line that is not run -> the reason."""

SHORTER = {
    "deepseek align": "--rollouts 1 --rollout-size 4 --new-tokens 8 --layers last:2",
    "deepseek pretrain": "--tokens 4096 --vocab-size 512 --row-length 64",
    "deepseek expert train": "--tokens 4096",
    " --against": "--cases 4",
    "--mode lora": "--rank 1",
    "deepseek serve": "--port 0",
}
"""Part of a line -> options that are appended to it."""

BEFORE = {
    "docs/how-to/serving.md": ["expert train --name shop --from-git ~/src/shop"],
    "docs/how-to/scripting.md": ["expert train --name repository --from-git ~/src/shop"],
    "docs/how-to/training.md": [
        "expert train --name shop --from-git ~/src/shop",
        "expert train --name billing --from-folder src",
    ],
    "docs/tutorials/team.md": ["expert train --name shop --from-git ~/src/shop"],
}
"""Commands of other pages that a page depends on."""


def typed(page: Path) -> list[str]:
    """Return the lines of a page's code blocks that call `deepseek`, without comments."""
    lines = []
    for block in blocks(page, *SHELL):
        for line in re.sub(r"\\\n *", " ", block).splitlines():
            words = shlex.split(line.split(" | ")[0], comments=True)
            if words[:1] == ["deepseek"]:
                lines.append(shlex.join(words[: words.index("&")] if "&" in words else words))
    return lines


PAGES = [page for page in CURRENT if typed(page)]


@pytest.fixture(scope="module")
def tiny_home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A library home with tiny models under the names that pages use, and with texts beside it.

    One expert has been trained there, so that what trainings on a base compute once is stored.
    """
    folder = tmp_path_factory.mktemp("typed")
    run("benchmarks/quick_home.py", folder)
    shutil.copytree(folder / "models" / "tiny-bytes", folder / "home" / "models" / "smollm2-135m")
    source = ["--from-folder", folder / "corpora" / "code-b", "--tokens", "1024"]
    run("-m", "deepseek", "expert", "train", "--name", "asyncio", *source, home=folder / "home")
    (folder / "home" / "experts" / "asyncio.safetensors").rename(folder / "asyncio.safetensors")
    for made in ("experts", "runs"):
        shutil.rmtree(folder / "home" / made)
    return folder


def run(*words: str | Path, home: Path | None = None) -> None:
    environment = os.environ | ({"DEEPSEEK_HOME": str(home)} if home else {})
    done = processes.run([sys.executable, *words], cwd=ROOT, env=environment)
    assert done.returncode == 0, done.stderr[-4000:]


@pytest.fixture
def desk(tiny_home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A reader's working folder, with the files that the pages presuppose."""
    user, desk, home = (tmp_path / name for name in ("user", "desk", "home"))
    shutil.copytree(tiny_home / "home", home, copy_function=os.link)
    base = home / "models" / "smollm2-135m"
    shutil.copytree(base, home / "models" / "gemma3-270m", copy_function=os.link)
    for folder in (user / "models" / "SmolLM3-3B", desk / "smollm2-dpe"):
        shutil.copytree(base, folder)
    save_adapter(base, user / "adapters" / "support")
    texts = tiny_home / "corpora"
    whole = {file.name: file.read_text() for file in sorted((texts / "code-a").iterdir())[:FILES]}
    files = {name: text[:CHARACTERS] for name, text in whole.items()}
    for folder in (user / "src" / "shop", user / "src" / "project", desk):
        write_files(folder, files)
        history = History(folder)
        for number in range(1, FILES + 1):
            history.commit(dict([*files.items()][:number]))
    write_files(desk / "src", whole)
    for place in ("papers", "notes", "texts/code", "texts/prose"):
        write_files(desk / place, files)
    write_files(user / "code", files)
    shutil.copytree(ROOT / "examples", desk / "examples")
    conversations = (ROOT / "examples" / "support.jsonl").read_text().splitlines()
    prompts = [json.dumps({"prompt": f"How do I {task}?"}) for task in ("swim", "dive", "row")]
    lines = {
        "chats.jsonl": conversations[:FILES],
        "prompts.jsonl": prompts,
        "questions.jsonl": prompts,
        "users.txt": ["a-key"],
        "admins.txt": ["another-key"],
    }
    write_files(desk, {name: "\n".join(found) for name, found in lines.items()})
    shutil.copy(texts / "pairs.jsonl", desk)
    shutil.copy(tiny_home / "asyncio.safetensors", desk)
    monkeypatch.setenv("HOME", str(user))
    monkeypatch.setenv("DEEPSEEK_HOME", str(home))
    monkeypatch.chdir(desk)
    monkeypatch.setattr(uvicorn.Server, "run", lambda *_, **__: None)  # it would never return
    return desk


def write_files(folder: Path, files: Mapping[str, str]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in files.items():
        (folder / name).write_text(text)


def call(line: str, capfd: pytest.CaptureFixture[str]) -> None:
    """Run a line, which must exit with code 0."""
    shorter = [more for part, more in SHORTER.items() if part in line]
    words = [os.path.expanduser(word) for word in shlex.split(" ".join([line, *shorter]))]
    if words[2:3] == ["rm"]:
        words.append("--yes")  # there is no terminal to answer
    with pytest.raises(SystemExit) as stop:
        main(words[1:])
    assert stop.value.code in (0, None), f"{line}\n{capfd.readouterr().err[-3000:]}"


@pytest.mark.slow
@pytest.mark.parametrize("page", PAGES, ids=page_id)
def test_what_a_page_types_works(page: Path, desk: Path, capfd: pytest.CaptureFixture[str]) -> None:
    for language, block in [(found[1], found[2]) for found in BLOCK.findall(page.read_text())]:
        if language == "yaml" and not (desk / "run.yaml").exists():
            (desk / "run.yaml").write_text(block)
    for line in BEFORE.get(page_id(page), []):
        call(f"deepseek {line}", capfd)
    for line in typed(page):
        if not any(part in line for part in LEFT_OUT):
            call(line, capfd)


def test_what_is_left_out_is_on_a_page() -> None:
    lines = [line for page in PAGES for line in typed(page)]
    assert [part for part in LEFT_OUT if not any(part in line for line in lines)] == []
    assert len(lines) > 90 and DOCS / "tutorials" / "repository.md" in PAGES
