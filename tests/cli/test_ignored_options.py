"""An option that a command would ignore is refused."""

import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from deepseek.cli.main import main
from deepseek.errors import ConfigError, PackError
from deepseek.packs.library import experts_folder
from deepseek.packs.lock import lock_packs
from deepseek.packs.manifest import BaseDescription, Manifest
from deepseek.packs.pack import ExpertPack, write_pack
from deepseek.packs.tensors import DTYPES
from deepseek.train.jobs.arguments import AdaptArguments

WITHOUT_AGAINST = "goes with an evaluation without --against; leave it out."
OF_TRAINING = "configures training, not --inference or --profile; leave it out."
OF_INFERENCE = "goes with --inference or --profile; leave it out."
OF_DEEPSPEED = (
    "contradicts --deepspeed, which writes ZeRO stage 3 in mixed precision; leave it out."
)


@pytest.mark.parametrize(
    ("command", "complaint"),
    [
        ("eval x --against rag --base smollm2-360m", f"--base {WITHOUT_AGAINST}"),
        ("eval x --against rag --data notes", f"--data {WITHOUT_AGAINST}"),
        ("eval x --against rag --tokens 1024", f"--tokens {WITHOUT_AGAINST}"),
        ("eval x --against rag --human-eval 3", f"--human-eval {WITHOUT_AGAINST}"),
        ("eval x --cases 10", "--cases goes with --against; leave it out."),
        (
            "serve --lock-trusted",
            "--lock-trusted says how to check a lock file; give --lock FILE too.",
        ),
        ("serve --replicas 3", "--replicas goes with --ray; leave it out."),
        ("serve --cpus 2", "--cpus goes with --ray; leave it out."),
        (
            "adapt --from-folder notes --mode lora --last 2",
            "--last goes with mode last-n or expert; leave it out.",
        ),
        ("adapt --from-folder notes --rank 4", "--rank goes with mode lora; leave it out."),
        ("plan --inference --precision float32", f"--precision {OF_TRAINING}"),
        ("plan --inference --tokens 5e9", f"--tokens {OF_TRAINING}"),
        ("plan --inference --zero 1", f"--zero {OF_TRAINING}"),
        ("plan --inference --trained 0.01", f"--trained {OF_TRAINING}"),
        ("plan --inference --no-recompute", f"--no-recompute {OF_TRAINING}"),
        ("plan --inference --zero 3", f"--zero {OF_TRAINING}"),
        ("plan --inference --precision mixed", f"--precision {OF_TRAINING}"),
        ("plan --inference --trained 1", f"--trained {OF_TRAINING}"),
        ("plan --inference --recompute", f"--recompute {OF_TRAINING}"),
        ("plan --dtype bfloat16", f"--dtype {OF_INFERENCE}"),
        ("plan --profile code --zero 1", f"--zero {OF_TRAINING}"),
        ("plan --inference --deepspeed ds.json", f"--deepspeed {OF_TRAINING}"),
        ("plan --dtype float32", f"--dtype {OF_INFERENCE}"),
        ("plan --bandwidth 2000", f"--bandwidth {OF_INFERENCE}"),
        ("plan --zero 1 --deepspeed ds.json", f"--zero {OF_DEEPSPEED}"),
        ("plan --precision float32 --deepspeed ds.json", f"--precision {OF_DEEPSPEED}"),
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


def save_base(folder: Path, value: float) -> Path:
    """Save files in `folder` that look like a base of width 8 with two layers, and return it."""
    folder.mkdir(parents=True)
    save_file({"a": torch.full((2,), value)}, folder / "model.safetensors")
    (folder / "config.json").write_text('{"hidden_size": 8, "num_hidden_layers": 2}')
    return folder


@pytest.fixture
def spanish(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The pack of an expert for the base `tiny`."""
    monkeypatch.setenv("DEEPSEEK_HOME", str(tmp_path / "home"))
    base = BaseDescription.of(save_base(tmp_path / "tiny", 1.0), "tiny")
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
    other = save_base(tmp_path / "other" / "tiny", 2.0)
    with pytest.raises(SystemExit) as stop:
        main([*words, "--base", str(other)])
    assert (stop.value.code, out.exists()) == (2, False)
    message = capsys.readouterr().err
    assert re.search(r"spanish was made for another base \(tiny, \w{16}\) than /.*; give", message)
    snapshot = tmp_path / "3f2a9c0d"  # the name of a hub snapshot
    (tmp_path / "tiny").rename(snapshot)
    for base in ([], ["--base", str(snapshot)]):
        with pytest.raises(SystemExit) as stop:
            main([*words, *base])
        assert (stop.value.code or 0, out.exists()) == (0, True)
        out.unlink()
    with pytest.raises(PackError, match="give --base the model it was made for"):
        lock_packs([spanish], str(other))
