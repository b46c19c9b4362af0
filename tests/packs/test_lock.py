"""Locks: sets of experts by digest, and differences between two packs."""

import json
import os
from pathlib import Path

import pytest
import torch
from pack_fixtures import BASE

from deepseek.errors import ConfigError, PackError
from deepseek.model.experts import ExpertModule
from deepseek.model.transformer import DeepSeekModel
from deepseek.packs.bundle import write_bundle
from deepseek.packs.difference import difference
from deepseek.packs.lock import LOCK_FILE, Lock, lock_packs, locked_packs, read_lock, write_lock
from deepseek.packs.manifest import BaseDescription
from deepseek.packs.pack import ExpertPack, write_pack
from deepseek.packs.signature import keygen, load_key, trusted_keys


def pack(
    model: DeepSeekModel, name: str, seed: int = 0, base: BaseDescription = BASE
) -> ExpertPack:
    module = ExpertModule.beside(model.layers, name, [2, 3], 8, seed=seed)
    return module.requires_grad_(False).to_pack(base, "MIT")


@pytest.fixture
def packs(model: DeepSeekModel, tmp_path: Path) -> list[Path]:
    paths = [tmp_path / f"{name}.safetensors" for name in ("code", "zh")]
    for seed, path in enumerate(paths):
        write_pack(path, pack(model, path.stem, seed))
    return paths


def test_a_locked_set_is_found_again(packs: list[Path], tmp_path: Path) -> None:
    lock = lock_packs(packs)
    path = tmp_path / "deepseek.lock"
    assert write_lock(path, lock) == read_lock(path) == lock
    assert lock_packs(packs[::-1]) == lock
    assert [expert.name for expert in lock.experts] == ["code", "zh"]
    assert lock.base == BASE.weights
    assert locked_packs(lock, tmp_path) == packs


def test_another_content_under_the_same_name_is_refused(
    packs: list[Path], model: DeepSeekModel, tmp_path: Path
) -> None:
    lock = lock_packs(packs)
    write_pack(packs[0], pack(model, "code", seed=7))
    with pytest.raises(PackError, match=r"has the digest .* the lock states"):
        locked_packs(lock, tmp_path)
    packs[0].unlink()
    with pytest.raises(PackError, match="is missing"):
        locked_packs(lock, tmp_path)


def test_a_signed_lock_cannot_be_changed(packs: list[Path], tmp_path: Path) -> None:
    path = tmp_path / "deepseek.lock"
    private, _ = keygen("me", tmp_path / "keys")
    signed = write_lock(path, lock_packs(packs), load_key(private))
    assert read_lock(path).signature == signed.signature
    with pytest.raises(PackError, match="not signed by a trusted key"):
        read_lock(path, trusted=True)
    keygen("other")
    with pytest.raises(PackError, match="not signed by a trusted key"):
        read_lock(path, trusted=True)
    content = json.loads(path.read_text())
    content["experts"].pop()
    path.write_text(json.dumps(content))
    with pytest.raises(PackError, match="changed after it was signed"):
        read_lock(path)


def test_a_signer_in_the_trust_folder_is_trusted(packs: list[Path], tmp_path: Path) -> None:
    private, _ = keygen("me")
    path = tmp_path / "deepseek.lock"
    write_lock(path, lock_packs(packs), load_key(private))
    assert read_lock(path, trusted=True).signature is not None


@pytest.mark.parametrize(
    "content",
    [
        "",
        "{",
        "[]",
        '{"format": 1}',
        '{"format": "2", "base": "' + "a" * 64 + '", "experts": []}',
        '{"format": 1, "base": "' + "a" * 64 + '", "experts": [{"name": "../x", "digest": ""}]}',
    ],
)
def test_what_is_no_lock_is_refused(content: str, tmp_path: Path) -> None:
    path = tmp_path / "deepseek.lock"
    path.write_text(content)
    with pytest.raises(PackError, match="is no lock file"):
        read_lock(path)
    with pytest.raises(PackError, match="cannot be read"):
        read_lock(tmp_path / "none")


def test_a_lock_of_a_later_format_is_named_so(packs: list[Path], tmp_path: Path) -> None:
    path = tmp_path / "deepseek.lock"
    path.write_text('{"format": 2, "members": []}')
    with pytest.raises(PackError, match=r"is of format 2 and .* reads format 1; install a later"):
        read_lock(path)
    with pytest.raises(ConfigError, match="choose another name"):
        write_lock(path, lock_packs(packs))


def test_a_pipe_is_refused_and_not_waited_for(tmp_path: Path) -> None:
    pipe = tmp_path / "me.pub"
    os.mkfifo(pipe, 0o600)
    with pytest.raises(PackError, match="is a pipe or a device"):
        read_lock(pipe)
    with pytest.raises(PackError, match="is a pipe or a device"):
        load_key(pipe)
    with pytest.raises(PackError, match=r"me\.pub in the trust folder"):
        trusted_keys(tmp_path)


def test_packs_of_other_bases_and_of_one_name_are_no_set(
    packs: list[Path], model: DeepSeekModel, tmp_path: Path
) -> None:
    with pytest.raises(PackError, match="no expert"):
        lock_packs([])
    with pytest.raises(PackError, match="same name"):
        lock_packs([packs[0], packs[0]])
    other = BASE.model_copy(update={"weights": "c" * 64})
    path = tmp_path / "other.safetensors"
    write_pack(path, pack(model, "other", base=other))
    with pytest.raises(PackError, match="different bases"):
        lock_packs([packs[0], path])


def test_a_lock_replaces_a_lock_and_nothing_else(packs: list[Path], tmp_path: Path) -> None:
    lock, bundle, path = lock_packs(packs), tmp_path / "team.tar", tmp_path / LOCK_FILE
    write_bundle(bundle, lock, packs)
    for other in (packs[0], bundle):
        before = other.read_bytes()
        with pytest.raises(ConfigError, match="is no lock file"):
            write_lock(other, lock)
        assert other.read_bytes() == before
    write_lock(path, lock_packs(packs[:1]))
    write_lock(path, lock)
    assert read_lock(path) == lock


def test_a_pack_in_a_file_of_another_name_is_not_locked(packs: list[Path], tmp_path: Path) -> None:
    """A server with the lock would look for it under the expert's name."""
    copy = packs[0].rename(tmp_path / "copy.safetensors")
    with pytest.raises(PackError, match=r"rename the file to that\."):
        lock_packs([copy])


def test_the_digest_covers_all_but_the_signature(packs: list[Path]) -> None:
    lock = lock_packs(packs)
    assert lock.model_copy(update={"base": "c" * 64}).digest != lock.digest
    assert lock.model_copy(update={"experts": lock.experts[:1]}).digest != lock.digest
    assert Lock.model_validate_json(lock.model_dump_json()).digest == lock.digest


def test_a_pack_differs_from_itself_in_nothing(model: DeepSeekModel) -> None:
    one = pack(model, "code")
    found = difference(one, one)
    assert (found.fields, found.tensors) == ({}, [])
    assert found.equal_tensors == len(one.tensors)


def test_what_changed_is_told_by_name_and_size(model: DeepSeekModel) -> None:
    one = pack(model, "code")
    name = "ffn.2.gate_up_proj"
    changed = {**one.tensors, name: one.tensors[name] * 1.5}
    other = ExpertPack.seal(one.manifest.model_copy(update={"domain": "shop"}), changed)
    found = difference(one, other)
    assert {"domain", "digest"} == set(found.fields)
    assert found.fields["domain"] == ("", "shop")
    (tensor,) = found.tensors
    assert tensor.name == name
    assert tensor.relative == pytest.approx(0.5, rel=1e-2)
    assert tensor.cosine == pytest.approx(1.0, abs=1e-4)
    less = ExpertPack(one.manifest, {k: v for k, v in one.tensors.items() if k != name})
    assert difference(one, less).tensors[0].relative is None
    zero = ExpertPack(one.manifest, {name: torch.zeros_like(one.tensors[name])})
    full = ExpertPack(one.manifest, {name: one.tensors[name]})
    assert difference(zero, full).tensors[0].relative == 1.0
