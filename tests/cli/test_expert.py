"""`deepseek expert` on packs of random values: list, rename, remove, inspect, verify, sign, keygen."""

import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from tiny_adapter import save_llama, write_adapter

from deepseek.checkpoint.fingerprint import fingerprint
from deepseek.cli.main import main
from deepseek.cli.options import expert_packs
from deepseek.errors import PackError
from deepseek.packs.library import experts_folder, index_folder, prompts_file
from deepseek.packs.manifest import BaseDescription, Manifest, Metric
from deepseek.packs.pack import ExpertPack, read_pack, write_pack
from deepseek.packs.tensors import DTYPES
from deepseek.train.jobs import rename
from deepseek.train.jobs.arguments import source_name

Capture = pytest.CaptureFixture[str]

LAYERS = {"model.layers.0.self_attn.q_proj": (64, 64)}


def run(capsys: Capture, *arguments: str) -> tuple[int, str, str]:
    """Return exit status, standard output and standard error of `deepseek expert ARGUMENTS`."""
    with pytest.raises(SystemExit) as stop:
        main(["expert", *arguments])
    output = capsys.readouterr()
    assert isinstance(stop.value.code, int)
    return stop.value.code, output.out, output.err


@pytest.fixture(autouse=True)
def own_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DEEPSEEK_HOME", str(tmp_path / "home"))


@pytest.fixture
def base(tmp_path: Path) -> Path:
    """A folder that looks like a base model of width 8 with two layers."""
    folder = tmp_path / "tiny-base"
    folder.mkdir()
    save_file({"a": torch.ones(2)}, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps({"hidden_size": 8, "num_hidden_layers": 2}))
    return folder


@pytest.fixture
def pack(base: Path) -> Path:
    """A trained expert named `poems` for that base."""
    marks = fingerprint(base)
    description = BaseDescription(
        name=base.name, weights=marks.weights, tokenizer="", hidden_size=8, num_layers=2
    )
    metrics = {"held-out": Metric(before=3.5, after=2.25)}
    manifest = Manifest(
        name="poems",
        base=description,
        layers=(1,),
        width=4,
        dtype="float32",
        licence="MIT",
        metrics=metrics,
    )
    tensors = {
        name: torch.zeros(spec.shape, dtype=DTYPES[spec.dtype])
        for name, spec in manifest.tensors().items()
    }
    path = experts_folder() / "poems.safetensors"
    write_pack(path, ExpertPack.seal(manifest, tensors))
    return path


def test_list_shows_experts_and_names_the_damaged(pack: Path, capsys: Capture) -> None:
    pack.with_name("spoilt.safetensors").write_bytes(pack.read_bytes()[:-1])
    status, out, _ = run(capsys, "list")
    assert status == 0
    poems, spoilt = out.splitlines()
    assert poems.startswith("poems")
    assert "3.500 -> 2.250" in poems and "better by 35.7 %" in poems
    assert "refused" in spoilt


def test_a_dangling_link_stops_no_list(pack: Path, capsys: Capture) -> None:
    pack.with_name("gone.safetensors").symlink_to(pack.with_name("nowhere"))
    status, out, _ = run(capsys, "list")
    assert status == 0
    assert [line.split()[0] for line in out.splitlines()] == ["gone", "poems"]


def test_all_means_the_readable_experts_of_a_folder(
    pack: Path, tmp_path: Path, capsys: Capture
) -> None:
    other = tmp_path / "other"
    other.mkdir()
    (other / "mine.safetensors").write_bytes(pack.read_bytes())
    (other / "spoilt.safetensors").write_bytes(pack.read_bytes()[:-1])
    (other / "gone.safetensors").symlink_to(other / "nowhere")
    base = str(tmp_path / "tiny-base")
    assert expert_packs("all", base, other) == [other / "mine.safetensors"]
    warned = capsys.readouterr().err
    assert "spoilt.safetensors is left out" in warned
    assert "gone.safetensors is left out" in warned
    assert expert_packs("all", base) == ["poems"]


def other_base(folder: Path) -> Path:
    """Save a base with other weights in `folder` and return it."""
    folder.mkdir(parents=True)
    save_file({"a": torch.zeros(2)}, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps({"hidden_size": 8, "num_hidden_layers": 2}))
    return folder


def test_all_are_those_of_the_base_under_any_of_its_names(
    pack: Path, base: Path, tmp_path: Path, capsys: Capture
) -> None:
    """A hub id or a GGUF file is stored under a name other than the requested one."""
    snapshot = base.rename(tmp_path / "3f2a9c0d")
    assert expert_packs("all", str(snapshot)) == ["poems"]
    assert expert_packs("all", str(other_base(tmp_path / "another"))) == []
    assert capsys.readouterr().err == ""


def test_experts_of_another_base_of_the_same_name_are_left_out(
    pack: Path, tmp_path: Path, capsys: Capture
) -> None:
    """They would keep a server from starting."""
    other = other_base(tmp_path / "b" / "tiny-base")
    assert expert_packs("all", str(other)) == []
    assert "poems.safetensors is left out: it was made for another base" in capsys.readouterr().err


def test_a_base_of_another_shape_is_not_hashed(
    pack: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    """Hashing would read all weights of a large model, although no expert can fit it."""
    steps: list[str] = []

    def progress(done: int, total: int, what: str) -> None:
        steps.append(what)

    assert expert_packs("all", str(tmp_path / "tiny-base"), progress=progress) == ["poems"]
    assert steps == ["checking the base"]
    other = other_base(tmp_path / "b" / "tiny-base")
    (other / "config.json").write_text(json.dumps({"hidden_size": 16, "num_hidden_layers": 2}))
    monkeypatch.setattr(
        "deepseek.checkpoint.fingerprint.fingerprint", lambda _: pytest.fail("it is hashed")
    )
    assert expert_packs("all", str(other), progress=progress) == []
    assert steps == ["checking the base"]
    assert "poems.safetensors is left out: it was made for another base" in capsys.readouterr().err


def test_of_several_packs_of_one_expert_one_is_plugged(
    pack: Path, tmp_path: Path, capsys: Capture
) -> None:
    """The one whose file has its name; the others would keep a server from starting."""
    base = str(tmp_path / "tiny-base")
    other = tmp_path / "other"
    other.mkdir()
    for name in ("copy", "older"):
        (other / f"{name}.safetensors").write_bytes(pack.read_bytes())
    assert expert_packs("all", base, other) == [other / "copy.safetensors"]
    assert "older.safetensors is left out: copy.safetensors holds" in capsys.readouterr().err
    (other / "poems.safetensors").write_bytes(pack.read_bytes())
    assert expert_packs("all", base, other) == [other / "poems.safetensors"]
    warned = capsys.readouterr().err
    assert warned.count("left out: poems.safetensors holds an expert named poems") == 2


def test_an_empty_list_says_how_to_begin(capsys: Capture) -> None:
    status, out, _ = run(capsys, "list")
    assert (status, "deepseek expert train" in out) == (0, True)


def test_inspect_prints_the_manifest(pack: Path, capsys: Capture) -> None:
    for name in ("poems", str(pack)):
        status, out, _ = run(capsys, "inspect", name)
        assert status == 0
        assert json.loads(out)["metrics"] == {"held-out": {"before": 3.5, "after": 2.25}}


def test_verify_knows_the_base(pack: Path, base: Path, tmp_path: Path, capsys: Capture) -> None:
    status, out, _ = run(capsys, "verify", "poems", "--base", str(base))
    assert (status, out[:3]) == (0, "ok:")
    save_file({"a": torch.zeros(2)}, base / "model.safetensors")
    status, _, err = run(capsys, "verify", "poems", "--base", str(base))
    assert (status, "another base" in err) == (2, True)


def test_verify_does_not_skip_the_base_if_its_name_is_empty(pack: Path, capsys: Capture) -> None:
    status, out, err = run(capsys, "verify", "poems", "--base", "")
    assert (status, out) == (2, "") and "'' is neither a folder nor a GGUF file" in err


def test_verify_needs_a_shape_in_the_config_of_the_base(
    pack: Path, base: Path, capsys: Capture
) -> None:
    (base / "config.json").write_text("{}")
    status, _, err = run(capsys, "verify", "poems", "--base", str(base))
    assert (status, "hidden_size" in err) == (2, True)


def test_signing(pack: Path, tmp_path: Path, capsys: Capture) -> None:
    assert run(capsys, "verify", "poems", "--signature", "signed")[0] == 2
    assert run(capsys, "keygen", "me", "--folder", str(tmp_path))[0] == 0
    assert run(capsys, "sign", "poems", "--key", str(tmp_path / "me.pem"))[0] == 0
    status, out, _ = run(capsys, "verify", "poems", "--signature", "signed")
    assert (status, "signed by" in out) == (0, True)
    # A key is trusted if its public part is in the trust folder.
    assert run(capsys, "verify", "poems", "--signature", "trusted")[0] == 2
    trusted = Path(tmp_path / "home" / "keys" / "me.pub")
    trusted.parent.mkdir()
    trusted.write_bytes((tmp_path / "me.pub").read_bytes())
    assert run(capsys, "verify", "poems", "--signature", "trusted")[0] == 0


@pytest.mark.parametrize(
    ("source", "name"),
    [
        ("/src/My Project", "My-Project"),
        ("/data/notes.jsonl", "notes"),
        ("/data/.hidden", "hidden"),
        ("/", "expert"),
    ],
)
def test_an_expert_is_named_after_its_source(source: str, name: str) -> None:
    assert source_name(Path(source)) == name


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_llama(tmp_path_factory.mktemp("llama"))


def test_import_writes_a_signed_pack_under_a_name(
    llama: Path, tmp_path: Path, capsys: Capture
) -> None:
    adapter = write_adapter(tmp_path / "my lora!", LAYERS, base_model_name_or_path="org/Other-1B")
    status, _, _ = run(capsys, "keygen", "me", "--folder", str(tmp_path))
    assert status == 0
    key = str(tmp_path / "me.pem")
    how = ("import", str(adapter), "--base", str(llama), "--key", key, "--licence", "MIT")
    status, out, err = run(capsys, *how)
    assert status == 0
    path = experts_folder() / "my-lora.safetensors"
    assert out == f"{path}: 1 linear layers, rank 4, MIT\n"
    assert "trained on org/Other-1B" in err
    assert run(capsys, *how)[0] == 0
    manifest = read_pack(path).manifest
    assert manifest.signature is not None
    assert not manifest.helps
    status, out, err = run(capsys, "inspect", "my-lora")
    assert json.loads(out)["kind"] == "lora"
    assert "armed only if named" in err
    status, out, _ = run(capsys, "verify", "my-lora", "--base", str(llama))
    assert "signed by" in out
    assert "my-lora" in run(capsys, "list")[1]


MISFITS = {
    "another name": ({"--name": "auto"}, {}, "reserved word"),
    "no such layer": ({}, {"model.layers.7.self_attn.q_proj": (64, 64)}, "is no linear layer"),
    "the head": ({}, {"lm_head": (64, 64)}, "is no linear layer"),
    "other shape": ({}, {"model.layers.0.self_attn.q_proj": (32, 64)}, "from 32 to 64 features"),
    "no licence": ({"--licence": "mine"}, {}, "SPDX"),
}


@pytest.mark.parametrize("name", MISFITS)
def test_an_adapter_that_does_not_fit_writes_nothing(
    name: str, llama: Path, tmp_path: Path, capsys: Capture
) -> None:
    options, layers, reason = MISFITS[name]
    adapter = write_adapter(tmp_path / "mine", layers or LAYERS)
    words = [word for option in options.items() for word in option]
    status, _, err = run(capsys, "import", str(adapter), "--base", str(llama), *words)
    assert status == 2
    assert reason in err
    assert len(err.splitlines()) == 1
    assert not experts_folder().exists()


def test_import_replaces_no_other_pack(llama: Path, tmp_path: Path, capsys: Capture) -> None:
    first = write_adapter(tmp_path / "one" / "mine", LAYERS)
    second = write_adapter(tmp_path / "two" / "mine", LAYERS, seed=2)
    assert run(capsys, "import", str(first), "--base", str(llama))[0] == 0
    content = (experts_folder() / "mine.safetensors").read_bytes()
    status, _, err = run(capsys, "import", str(second), "--base", str(llama))
    assert status == 2
    assert "is another pack; give this one another name" in err
    assert (experts_folder() / "mine.safetensors").read_bytes() == content


def test_import_takes_no_name_of_a_run(llama: Path, tmp_path: Path, capsys: Capture) -> None:
    """If the run were resumed, it would replace the adapter."""
    adapter = write_adapter(tmp_path / "mine", LAYERS)
    begun = tmp_path / "home" / "runs" / "mine"
    begun.mkdir(parents=True)
    status, _, err = run(capsys, "import", str(adapter), "--base", str(llama))
    assert status == 2
    assert f"{begun} exists already" in err and "choose another name" in err
    assert not experts_folder().exists()
    begun.rmdir()
    assert run(capsys, "import", str(adapter), "--base", str(llama))[0] == 0
    begun.mkdir()
    assert run(capsys, "import", str(adapter), "--base", str(llama))[0] == 0, "the same pack"


def test_the_same_import_again_leaves_a_signature(
    llama: Path, tmp_path: Path, capsys: Capture
) -> None:
    adapter = write_adapter(tmp_path / "mine", LAYERS)
    how = ("import", str(adapter), "--base", str(llama))
    assert run(capsys, *how)[0] == 0
    run(capsys, "keygen", "me", "--folder", str(tmp_path))
    run(capsys, "sign", "mine", "--key", str(tmp_path / "me.pem"))
    assert run(capsys, *how)[0] == 0
    assert "signed by" in run(capsys, "verify", "mine", "--signature", "signed")[1]


def test_rm_asks_and_removes_pack_prompts_and_index(
    pack: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO())
    index = index_folder("poems")
    index.mkdir()
    prompts_file("poems").write_text("{}")
    assert run(capsys, "rm", "poems")[0] == 2
    assert pack.is_file()
    status, out, _ = run(capsys, "rm", "poems", "--yes")
    assert (status, out.count("removed")) == (0, 3)
    assert list(experts_folder().iterdir()) == []


def test_rm_names_the_nearest_expert_and_no_files(pack: Path, capsys: Capture) -> None:
    status, _, err = run(capsys, "rm", "poem", "--yes")
    assert (status, "'poems'" in err) == (2, True)
    status, _, err = run(capsys, "rm", str(pack), "--yes")
    assert (status, "name a trained expert" in err) == (2, True)
    assert pack.is_file()


def test_rename_takes_pack_index_and_run_along(pack: Path, capsys: Capture) -> None:
    tensors = read_pack(pack).tensors
    index_folder("poems").mkdir()
    runs = experts_folder().parent / "runs"
    (runs / "poems").mkdir(parents=True)
    for name, record in {
        "request.json": {"name": "poems", "base": "tiny"},
        "start.json": {"request": {"name": "poems"}, "inputs": {}},
        "result.json": {"pack": str(pack), "seconds": 1.0},
    }.items():
        (runs / "poems" / name).write_text(json.dumps(record))
    status, out, _ = run(capsys, "rename", "poems", "verses")
    assert status == 0
    renamed = read_pack(out.strip())
    assert renamed.manifest.name == "verses"
    assert all(torch.equal(renamed.tensors[name], tensors[name]) for name in tensors)
    assert index_folder("verses").is_dir() and not pack.exists()
    run_folder = runs / "verses"
    assert json.loads((run_folder / "request.json").read_text())["name"] == "verses"
    assert json.loads((run_folder / "start.json").read_text())["request"]["name"] == "verses"
    assert json.loads((run_folder / "result.json").read_text())["pack"] == out.strip()
    assert not (runs / "poems").exists()


def test_rename_takes_the_prompts_of_this_pack_along(pack: Path, capsys: Capture) -> None:
    prompts = [{"kind": "chat", "text": "Where is it?"}]
    stored = {"digest": read_pack(pack).manifest.digest, "prompts": prompts}
    prompts_file("poems").write_text(json.dumps(stored))
    _, out, _ = run(capsys, "rename", "poems", "verses")
    digest = read_pack(out.strip()).manifest.digest
    moved = json.loads(prompts_file("verses").read_text())
    assert moved == {"digest": digest, "prompts": prompts}
    prompts_file("verses").write_text(json.dumps({"digest": "0" * 64, "prompts": prompts}))
    run(capsys, "rename", "verses", "poems")
    assert [path.name for path in experts_folder().iterdir()] == ["poems.safetensors"]


class Killed(BaseException):
    """The end of a process in the middle of a command."""


@pytest.mark.parametrize("step", range(7))
def test_an_interrupted_rename_is_completed_by_the_same_command(
    step: int, pack: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    """The process is killed before one of its seven moves and writes."""
    stored = {"digest": read_pack(pack).manifest.digest, "prompts": []}
    prompts_file("poems").write_text(json.dumps(stored))
    index_folder("poems").mkdir()
    runs = experts_folder().parent / "runs"
    (runs / "poems").mkdir(parents=True)
    (runs / "poems" / "request.json").write_text(json.dumps({"name": "poems"}))
    left = [step]

    def dying(function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*given: Any, **options: Any) -> Any:
            if left[0] == 0:
                raise Killed
            left[0] -= 1
            return function(*given, **options)

        return call

    with monkeypatch.context() as patch:
        patch.setattr("deepseek.packs.pack.write_pack", dying(write_pack))
        patch.setattr(rename, "write_json", dying(rename.write_json))
        patch.setattr(Path, "rename", dying(Path.rename))
        patch.setattr(Path, "unlink", dying(Path.unlink))
        with pytest.raises(Killed):
            rename.rename_expert("poems", "verses")
    status, out, _ = run(capsys, "rename", "poems", "verses")
    assert status == 0
    kept = {path.name for path in experts_folder().iterdir()}
    assert kept == {"verses.safetensors", prompts_file("verses").name, index_folder("verses").name}
    digest = read_pack(out.strip()).manifest.digest
    assert json.loads(prompts_file("verses").read_text())["digest"] == digest
    assert json.loads((runs / "verses" / "request.json").read_text()) == {"name": "verses"}
    assert not (runs / "poems").exists()


@pytest.mark.parametrize(
    ("new", "reason"),
    [
        ("other", "exists already"),
        ("poems", "exists already"),
        ("auto", "reserved word"),
        ("a/b", "no name"),
        ("..", "no name"),
        ("verses.safetensors", "is the name of a file"),
    ],
)
def test_a_bad_new_name_changes_nothing(new: str, reason: str, pack: Path, capsys: Capture) -> None:
    pack.with_name("other.safetensors").write_bytes(pack.read_bytes())
    before = pack.read_bytes()
    status, _, err = run(capsys, "rename", "poems", new)
    assert (status, reason in err) == (2, True), err
    assert pack.read_bytes() == before
    assert len(list(experts_folder().glob("*.safetensors"))) == 2


def test_a_signed_pack_needs_a_key_to_be_renamed(
    pack: Path, tmp_path: Path, capsys: Capture
) -> None:
    run(capsys, "keygen", "me", "--folder", str(tmp_path))
    key = str(tmp_path / "me.pem")
    run(capsys, "sign", "poems", "--key", key)
    status, _, err = run(capsys, "rename", "poems", "verses")
    assert (status, "--key" in err) == (2, True)
    assert run(capsys, "rename", "poems", "verses", "--key", key)[0] == 0
    assert "signed by" in run(capsys, "verify", "verses", "--signature", "signed")[1]


def test_names_are_looked_up_in_the_folder(pack: Path, tmp_path: Path) -> None:
    other = tmp_path / "run=3"
    other.mkdir()
    mine = other / "mine.safetensors"
    mine.write_bytes(pack.read_bytes())
    assert expert_packs("mine=0.5", "tiny-base", other) == {str(mine): 0.5}
    assert expert_packs(str(mine), "tiny-base") == {str(mine): None}
    with pytest.raises(PackError, match=r"no expert named 'poems' in .*run=3"):
        expert_packs("poems", "tiny-base", other)
    with pytest.raises(PackError, match="no expert named 'nope'"):
        expert_packs("nope", "tiny-base")


@pytest.mark.parametrize("text", ["none", "", " none "])
def test_none_plugs_nothing(text: str, pack: Path) -> None:
    assert list(expert_packs(text, "tiny-base")) == []
