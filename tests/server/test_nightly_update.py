"""The script of `docs/tutorials/team.md` updates an expert and has a live server plug it."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import processes
import pytest
from live_server import Live, live, save_model
from new_home import new_home

from deepseek.packs.pack import read_pack
from deepseek.server.settings import Settings
from deepseek.train.jobs.expert import train_expert

PAGE = Path(__file__).parents[2] / "docs" / "tutorials" / "team.md"
NAME, KEY = "shop", "admin-key"


def script(url: str) -> str:
    """Return the page's script, for this server and with little time to train."""
    (found,) = re.findall(r"```bash\n(#!.*?)```", PAGE.read_text(), re.DOTALL)
    changed = found.replace("http://127.0.0.1:8000", url)
    changed = changed.replace("--minutes 10", "--minutes 0.05")
    assert url in changed and "--minutes 0.05" in changed
    return changed


def write_text(source: Path, numbers: range) -> None:
    for number in numbers:
        words = [f"the router {number * place % 97} returns the value" for place in range(20)]
        (source / f"{number}.txt").write_text(" ".join(words))


def run(server: Live, folder: Path) -> subprocess.CompletedProcess[str]:
    """Run the script as the user whose home is `folder`."""
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    environment = {**os.environ, "PATH": path, "HOME": str(folder), "NO_PROXY": "*"}
    return processes.run(["bash", "-c", script(server.url)], env=environment)


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("curl") is None, reason="curl is not installed")
def test_the_script_plugs_an_update_once_the_server_takes_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = new_home(tmp_path / "home")
    monkeypatch.setenv("DEEPSEEK_HOME", str(folder))
    source = tmp_path / "texts"
    source.mkdir()
    write_text(source, range(40))
    train_expert(
        str(save_model(folder / "tiny")),
        from_folder=source,
        name=NAME,
        layers="last:2",
        width=24,
        tokens=1500,
        epochs=1,
        row_length=32,
        batch_rows=4,
        held_out_tokens=400,
        quiet=True,
    )
    pack = folder / "experts" / f"{NAME}.safetensors"
    former = read_pack(pack).manifest.digest
    (folder / "admins.txt").write_text(f"{KEY}\n")
    with live(folder, Settings(admin_keys=frozenset({KEY}))) as server:

        def plugged() -> dict[str, str]:
            return {info.name: info.digest for info in server.engine.experts()}

        server.engine.plug(pack)
        server.engine.arm({NAME: 0.5})
        write_text(source, range(40, 60))
        (folder / "admins.txt").write_text("wrong\n")
        # If the server refuses, the exit code says so; the expert is already updated.
        assert run(server, folder).returncode != 0
        updated = read_pack(pack).manifest.digest
        assert plugged() == {NAME: former} != {NAME: updated}
        # The next night nothing is new, and the server gets the expert that it lacks.
        (folder / "admins.txt").write_text(f"{KEY}\n")
        done = run(server, folder)
        assert done.returncode == 0, done.stderr
        assert plugged() == {NAME: updated} == {NAME: read_pack(pack).manifest.digest}
        assert [info.weight for info in server.engine.experts()] == [0.5]
