"""Sets of experts as one file: complete or refused, whatever the file holds."""

import io
import os
import tarfile
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pack_fixtures import BASE

from deepseek.cli.main import main
from deepseek.errors import ConfigError, PackError
from deepseek.model.experts import ExpertModule
from deepseek.model.transformer import DeepSeekModel
from deepseek.packs import archive
from deepseek.packs.bundle import install_bundle, write_bundle
from deepseek.packs.library import index_folder
from deepseek.packs.lock import LOCK_FILE, lock_packs, locked_packs, read_lock, write_lock
from deepseek.packs.pack import write_pack
from deepseek.packs.signature import keygen, load_key, trusted_keys


def write_expert(path: Path, model: DeepSeekModel, seed: int) -> Path:
    module = ExpertModule.beside(model.layers, path.stem, [2, 3], 8, seed=seed)
    write_pack(path, module.requires_grad_(False).to_pack(BASE, "MIT"))
    return path


@pytest.fixture
def packs(model: DeepSeekModel, tmp_path: Path) -> list[Path]:
    names = ("code", "zh")
    return [
        write_expert(tmp_path / f"{name}.safetensors", model, n) for n, name in enumerate(names)
    ]


@pytest.fixture
def bundle(packs: list[Path], tmp_path: Path) -> Path:
    write_bundle(tmp_path / "team.tar", lock_packs(packs), packs)
    return tmp_path / "team.tar"


def contents(folder: Path) -> dict[str, bytes]:
    """Return the content of each file, hidden ones included."""
    if not folder.exists():
        return {}
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def members(bundle: Path) -> list[tuple[str, bytes]]:
    """Return names and contents of an archive."""
    with tarfile.open(bundle) as tar:
        files = [(entry.name, tar.extractfile(entry)) for entry in tar]
        return [(name, file.read()) for name, file in files if file]


def write_members(bundle: Path, files: list[tuple[str | tarfile.TarInfo, bytes]]) -> None:
    with tarfile.open(bundle, "w") as tar:
        for name, content in files:
            header = tarfile.TarInfo(name) if isinstance(name, str) else name
            header.size = len(content)
            tar.addfile(header, io.BytesIO(content))


def test_an_installed_set_is_the_bundled_one(
    bundle: Path, packs: list[Path], tmp_path: Path
) -> None:
    folder = tmp_path / "elsewhere"
    assert install_bundle(bundle, folder).written == ("code", "zh")
    assert contents(folder) == {path.name: path.read_bytes() for path in packs}
    assert locked_packs(read_lock(bundle), folder) == [folder / path.name for path in packs]
    assert install_bundle(bundle, folder).written == ()  # again: nothing to do


def test_the_command_installs_into_a_folder_of_the_users_home(
    bundle: Path, packs: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    work = tmp_path / "work"
    work.mkdir()
    monkeypatch.chdir(work)
    monkeypatch.setenv("HOME", str(tmp_path))
    with pytest.raises(SystemExit, match="0"):
        main(["expert", "install", "~/team.tar", "--experts-folder=~/elsewhere"])
    assert contents(tmp_path / "elsewhere") == {path.name: path.read_bytes() for path in packs}
    with pytest.raises(SystemExit, match="0"):
        main(["expert", "lock", "--experts=code", "--experts-folder=~/elsewhere"])
    assert [path.name for path in work.iterdir()] == [LOCK_FILE]


def test_the_command_refuses_a_folder_as_the_bundle(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit, match="2"):
        main(["expert", "install", str(tmp_path)])
    assert "is a folder; give the file that `expert bundle` wrote." in capsys.readouterr().err


def test_the_command_refuses_a_file_as_its_folder(
    bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("a file")
    with pytest.raises(SystemExit, match="2"):
        main(["expert", "install", str(bundle), "--experts-folder", str(tmp_path / "file")])
    assert "file cannot be written, it is not a folder; choose" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("named", "told"), [("cod", "perhaps 'code' is meant"), ("zh.safetensors", "There is no")]
)
def test_an_expert_that_is_not_in_the_folder_is_named_as_it_was_given(
    named: str, told: str, packs: list[Path], capsys: pytest.CaptureFixture[str]
) -> None:
    folder = str(packs[0].parent)
    with pytest.raises(SystemExit, match="2"):
        main(["expert", "lock", "--experts", named, "--experts-folder", folder])
    message = capsys.readouterr().err
    assert told in message and ".safetensors.safetensors" not in message


def test_equal_sets_give_equal_files(packs: list[Path], bundle: Path, tmp_path: Path) -> None:
    again = tmp_path / "again.tar"
    write_bundle(again, lock_packs(packs[::-1]), packs[::-1])
    assert again.read_bytes() == bundle.read_bytes()
    with pytest.raises(ConfigError, match="exists already"):
        write_bundle(again, lock_packs(packs), packs)


def test_only_what_is_missing_is_written(bundle: Path, packs: list[Path], tmp_path: Path) -> None:
    folder = tmp_path / "elsewhere"
    install_bundle(bundle, folder)
    (folder / "zh.safetensors").unlink()
    before = (folder / "code.safetensors").stat().st_mtime_ns
    assert install_bundle(bundle, folder).written == ("zh",)
    assert (folder / "code.safetensors").stat().st_mtime_ns == before


def test_another_pack_of_the_name_is_replaced_only_on_request(
    bundle: Path, model: DeepSeekModel, tmp_path: Path
) -> None:
    folder = tmp_path / "elsewhere"
    folder.mkdir()
    write_expert(folder / "zh.safetensors", model, seed=7)
    before = contents(folder)
    with pytest.raises(PackError, match="another pack of that name"):
        install_bundle(bundle, folder)
    assert contents(folder) == before
    assert install_bundle(bundle, folder, replace=True).written == ("code", "zh")
    assert install_bundle(bundle, folder).written == ()


@pytest.mark.parametrize("beside_a_pack", [False, True])
def test_an_index_of_another_pack_is_not_taken_over(
    bundle: Path, model: DeepSeekModel, tmp_path: Path, beside_a_pack: bool
) -> None:
    folder = tmp_path / "elsewhere"
    index = index_folder("zh", folder)
    index.mkdir(parents=True)
    if beside_a_pack:
        write_expert(folder / "zh.safetensors", model, seed=7)
    before = contents(folder / "zh.index")
    with pytest.raises(PackError, match="another pack of that name"):
        install_bundle(bundle, folder)
    assert contents(index) == before
    assert install_bundle(bundle, folder, replace=True).written == ("code", "zh")
    assert not index.exists()
    index.mkdir()
    assert install_bundle(bundle, folder, replace=True).written == ()
    assert index.exists(), "it belongs to the pack that is there"


def test_an_expert_that_was_trained_here_keeps_its_name(
    bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DEEPSEEK_HOME", str(tmp_path / "home"))
    (tmp_path / "home" / "runs" / "zh").mkdir(parents=True)
    with pytest.raises(PackError, match="was trained here"):
        install_bundle(bundle, replace=True)
    assert not (tmp_path / "home" / "experts").exists()


def test_a_signature_covers_the_whole_set(packs: list[Path], tmp_path: Path) -> None:
    private, _ = keygen("me", tmp_path / "keys")
    signed, unsigned = tmp_path / "signed.tar", tmp_path / "unsigned.tar"
    write_bundle(signed, lock_packs(packs), packs, load_key(private))
    write_bundle(unsigned, lock_packs(packs), packs)
    for path in (signed, unsigned):
        with pytest.raises(PackError, match="not signed by a trusted key"):
            install_bundle(path, tmp_path / "elsewhere", trusted=True)
    assert not (tmp_path / "elsewhere").exists()


def test_a_trusted_signature_is_accepted(
    packs: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DEEPSEEK_HOME", str(tmp_path / "home"))
    private, _ = keygen("me")
    assert trusted_keys()
    signed = tmp_path / "signed.tar"
    write_bundle(signed, lock_packs(packs), packs, load_key(private))
    assert install_bundle(signed, trusted=True).lock.signature is not None
    changed = [
        (n, c.replace(b"zh", b"zz")) if n == LOCK_FILE else (n, c) for n, c in members(signed)
    ]
    write_members(signed, changed)
    with pytest.raises(PackError, match="changed after it was signed"):
        install_bundle(signed, tmp_path / "elsewhere")


def test_a_pack_that_changes_while_it_is_bundled_is_refused(
    packs: list[Path], model: DeepSeekModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lock = lock_packs(packs)
    write_expert(packs[1], model, seed=7)
    with pytest.raises(PackError, match="bundle the set again"):
        write_bundle(tmp_path / "team.tar", lock, packs)
    assert not (tmp_path / "team.tar").exists()


def link(name: str, target: str) -> tarfile.TarInfo:
    header = tarfile.TarInfo(name)
    header.type, header.linkname = tarfile.SYMTYPE, target
    return header


Change = Callable[[list[tuple[str, bytes]]], list[tuple[str | tarfile.TarInfo, bytes]]]

CHANGES: dict[str, Change] = {
    "a pack is missing": lambda files: [*files[:-1]],
    "a pack twice": lambda files: [*files, files[-1]],
    "another order": lambda files: [files[0], files[2], files[1]],
    "no lock": lambda files: [*files[1:]],
    "a path in place of a name": lambda files: [*files[:2], ("../zh.safetensors", files[2][1])],
    "a link": lambda files: [*files[:2], (link("zh.safetensors", "/etc/hostname"), b"")],
    "the packs exchanged": lambda files: [
        files[0],
        (files[1][0], files[2][1]),
        (files[2][0], files[1][1]),
    ],
    "a pack that is none": lambda files: [*files[:2], (files[2][0], b"text")],
    "a large lock": lambda files: [(files[0][0], b" " * (1 << 21)), *files[1:]],
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_a_changed_bundle_installs_nothing(bundle: Path, change: Change, tmp_path: Path) -> None:
    write_members(bundle, change(members(bundle)))
    with pytest.raises(PackError):
        install_bundle(bundle, tmp_path / "elsewhere")
    assert contents(tmp_path / "elsewhere") == {}


def test_what_is_no_bundle_is_named(bundle: Path, packs: list[Path], tmp_path: Path) -> None:
    lock_file = tmp_path / LOCK_FILE
    write_lock(lock_file, lock_packs(packs))
    os.mkfifo(tmp_path / "pipe")
    for path in (lock_file, packs[0], tmp_path / "pipe"):
        with pytest.raises(PackError, match="is not a bundle; give a file of"):
            install_bundle(path, tmp_path / "elsewhere")
    with pytest.raises(PackError, match=r"bundle .*nosuch.tar cannot be read"):
        install_bundle(tmp_path / "nosuch.tar", tmp_path / "elsewhere")


def test_a_long_header_is_not_read(bundle: Path, tmp_path: Path) -> None:
    header = tarfile.TarInfo("pax")
    header.type = tarfile.XHDTYPE
    bundle.write_bytes(b"")
    write_members(bundle, [(header, bytes(archive.BLOCK + 1))])
    with pytest.raises(PackError, match=r"damaged .a header of"):
        install_bundle(bundle, tmp_path / "elsewhere")


@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_a_damaged_bundle_installs_nothing_or_the_set(
    bundle: Path, packs: list[Path], data: st.DataObject, tmp_path_factory: pytest.TempPathFactory
) -> None:
    content = bytearray(bundle.read_bytes())
    place = data.draw(st.integers(0, 1023) | st.integers(0, len(content) - 1))
    if data.draw(st.booleans(), "cut"):
        del content[place:]
    else:
        content[place] ^= data.draw(st.integers(1, 255))
    folder = tmp_path_factory.mktemp("damaged")
    damaged = folder / "team.tar"
    damaged.write_bytes(content)
    try:
        install_bundle(damaged, folder / "elsewhere")
    except PackError:
        assert contents(folder / "elsewhere") == {}
    else:  # the damage is in what no reader looks at, such as padding
        expected = {path.name: path.read_bytes() for path in packs}
        assert contents(folder / "elsewhere") == expected
