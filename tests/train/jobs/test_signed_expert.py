"""A signed pack stays signed when its expert is updated; the training is faked."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from deepseek.cli.main import main
from deepseek.errors import ConfigError, PackError
from deepseek.packs.manifest import BaseDescription, Manifest
from deepseek.packs.pack import ExpertPack, read_pack, write_pack
from deepseek.packs.policy import PackPolicy
from deepseek.packs.signature import keygen, load_key
from deepseek.packs.tensors import DTYPES
from deepseek.train.jobs import signed_expert, watch
from deepseek.train.jobs.update import TrainedExpert

SIGNED = PackPolicy(signature="signed")


def unsigned(domain: str) -> ExpertPack:
    base = BaseDescription(weights="0" * 64, tokenizer="", hidden_size=8, num_layers=2)
    manifest = Manifest(
        name="words", base=base, layers=(1,), width=4, dtype="float32", licence="MIT", domain=domain
    )
    tensors = {
        name: torch.zeros(spec.shape, dtype=DTYPES[spec.dtype])
        for name, spec in manifest.tensors().items()
    }
    return ExpertPack.seal(manifest, tensors)


@pytest.fixture
def key(tmp_path: Path) -> Path:
    private, _ = keygen("me", tmp_path)
    return private


@pytest.fixture
def pack(tmp_path: Path, key: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The signed pack of an expert `words`, whose update writes another content, unsigned."""
    path = tmp_path / "words.safetensors"
    write_pack(path, unsigned("old"), load_key(key))

    def update(**arguments: Any) -> Path:
        if not arguments.get("dry_run"):
            write_pack(path, unsigned("new"))
        return path

    expert = SimpleNamespace(
        name="words", pack=path, state=lambda: "changed", learnt_states=lambda: frozenset()
    )
    monkeypatch.setattr(TrainedExpert, "find", lambda _: expert)
    monkeypatch.setattr(signed_expert, "train_expert", update)
    return path


def test_an_update_of_a_signed_pack_needs_the_key(
    pack: Path, key: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = pack.read_bytes()
    with pytest.raises(SystemExit) as stop:
        main(["expert", "train", "--update", "words"])
    assert stop.value.code == 2
    error = capsys.readouterr().err
    assert "words is signed, and an update would drop the signature; give --key" in error
    assert pack.read_bytes() == before
    with pytest.raises(SystemExit) as stop:
        main(["expert", "train", "--update", "words", "--key", str(key)])
    assert stop.value.code == 0
    assert read_pack(pack, SIGNED).manifest.domain == "new"


def test_a_dry_run_signs_nothing(pack: Path, key: Path) -> None:
    write_pack(pack, unsigned("old"))
    signed_expert.train_signed(update="words", key=key, dry_run=True)
    assert read_pack(pack).manifest.signature is None


def test_a_pack_without_a_signature_needs_no_key(pack: Path) -> None:
    write_pack(pack, unsigned("old"))
    signed_expert.train_signed(update="words")
    assert read_pack(pack).manifest.domain == "new"


def test_a_watcher_signs_before_it_plugs(pack: Path, key: Path) -> None:
    plugged: list[str] = []

    class Noting:
        def plugged_digest(self, _: str) -> None:
            """The server has no such expert."""

        def plug_again(self, _: str) -> None:
            plugged.append(read_pack(pack, SIGNED).manifest.domain)

    with pytest.raises(ConfigError, match="give --key"):
        watch.watch_expert("words", rounds=0)
    with pytest.raises(PackError):
        watch.watch_expert("words", rounds=0, key=pack)
    noting: Any = Noting()
    watch.watch_expert("words", noting, every=0, rounds=1, key=key)
    assert plugged == ["new"]


def test_a_watcher_signs_what_an_update_left_unsigned(pack: Path, key: Path) -> None:
    """As when the process is killed after the pack is written."""
    write_pack(pack, unsigned("new"))
    watch.watch_expert("words", rounds=0, key=key)
    assert read_pack(pack, SIGNED).manifest.domain == "new"
