"""An option that a command would ignore is refused."""

from pathlib import Path

import pytest
import torch

from deepseek.cli.main import main
from deepseek.errors import ConfigError, PackError
from deepseek.packs.library import experts_folder
from deepseek.packs.lock import lock_packs
from deepseek.packs.manifest import BaseDescription, Manifest
from deepseek.packs.pack import ExpertPack, write_pack
from deepseek.packs.tensors import DTYPES
from deepseek.train.jobs.arguments import AdaptArguments

WITHOUT_AGAINST = "goes with an evaluation without --against; leave it out."


@pytest.mark.parametrize(
    ("command", "complaint"),
    [
        ("eval x --against rag --base smollm2-360m", f"--base {WITHOUT_AGAINST}"),
        ("eval x --against rag --data notes", f"--data {WITHOUT_AGAINST}"),
        ("eval x --against rag --tokens 1024", f"--tokens {WITHOUT_AGAINST}"),
        ("eval x --against rag --human-eval 3", f"--human-eval {WITHOUT_AGAINST}"),
        ("eval x --cases 10", "--cases goes with --against; leave it out."),
        ("serve --replicas 3", "--replicas goes with --ray; leave it out."),
        ("serve --cpus 2", "--cpus goes with --ray; leave it out."),
        (
            "adapt --from-folder notes --mode lora --last 2",
            "--last goes with mode last-n or expert; leave it out.",
        ),
    ],
)
def test_it_is_refused_before_anything_is_loaded(
    command: str, complaint: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stop:
        main(command.split())
    assert (stop.value.code, capsys.readouterr().err.strip()) == (2, f"error: {complaint}")


@pytest.mark.parametrize("mode", ["lora", "full"])
def test_a_mode_that_trains_all_layers_has_no_last_ones(mode: str) -> None:
    assert AdaptArguments.read(from_folder="notes", mode=mode).last == 3
    with pytest.raises(ConfigError, match="last goes with mode last-n"):
        AdaptArguments.read(from_folder="notes", mode=mode, last=2)


@pytest.fixture
def spanish(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The pack of an expert for the base `smollm2-135m`."""
    monkeypatch.setenv("DEEPSEEK_HOME", str(tmp_path / "home"))
    base = BaseDescription(
        name="smollm2-135m", weights="1" * 64, tokenizer="", hidden_size=8, num_layers=2
    )
    manifest = Manifest(
        name="spanish", base=base, layers=(1,), width=4, dtype="float32", licence="MIT", metrics={}
    )
    tensors = {
        name: torch.zeros(spec.shape, dtype=DTYPES[spec.dtype])
        for name, spec in manifest.tensors().items()
    }
    path = experts_folder() / "spanish.safetensors"
    write_pack(path, ExpertPack.seal(manifest, tensors))
    return path


def test_a_lock_of_named_experts_heeds_the_base(
    spanish: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "deepseek.lock"
    words = ["expert", "lock", "--experts", "spanish", "--out", str(out)]
    with pytest.raises(SystemExit) as stop:
        main([*words, "--base", "gemma3-270m"])
    assert (stop.value.code, out.exists()) == (2, False)
    assert "spanish was made for smollm2-135m, not for gemma3-270m" in capsys.readouterr().err
    for base in ([], ["--base", "smollm2-135m"], ["--base", "models/smollm2-135m"]):
        with pytest.raises(SystemExit) as stop:
            main([*words, *base])
        assert (stop.value.code or 0, out.exists()) == (0, True)
        out.unlink()
    with pytest.raises(PackError, match="give --base smollm2-135m"):
        lock_packs([spanish], "another")
