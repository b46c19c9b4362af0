"""A truncated or hostile GGUF file is refused at once, in one sentence, and nothing is written."""

import struct
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import tiny_gguf
from fuzz.mutate import mutated_facts
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pack_fixtures import is_one_sentence

from deepseek.checkpoint.gguf import convert
from deepseek.checkpoint.gguf.convert import convert_gguf
from deepseek.checkpoint.gguf.reader import read_gguf
from deepseek.errors import CheckpointError, UserError

HUGE = (1 << 62) + 1


@pytest.fixture(scope="session")
def content(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    path = tmp_path_factory.mktemp("gguf") / "tiny.gguf"
    return tiny_gguf.write_gguf(tiny_gguf.tiny_llama(), path).read_bytes()


def text(value: str | bytes) -> bytes:
    value = value.encode() if isinstance(value, str) else value
    return struct.pack("<Q", len(value)) + value


def header(version: int = 3, tensors: int = 0, facts: int = 0, body: bytes = b"") -> bytes:
    return b"GGUF" + struct.pack("<IQQ", version, tensors, facts) + body


NAMED = text("general.architecture") + struct.pack("<I", 8) + text("llama")
ALIGNED = text("general.alignment") + struct.pack("<I", 4)


def one_tensor(axes: int, *shape: int, kind: int = 0, offset: int = 0) -> bytes:
    entry = text("t") + struct.pack(f"<I{len(shape)}QIQ", axes, *shape, kind, offset)
    return header(3, 1, 1, NAMED + entry)


HOSTILE = {
    "empty": b"",
    "another format": b"PK\x03\x04" + bytes(100),
    "version 1": header(1),
    "big-endian": b"GGUF" + struct.pack(">IQQ", 3, 0, 0),
    "no architecture": header(3),
    "more facts than bytes": header(3, 0, HUGE, NAMED),
    "more tensors than bytes": header(3, HUGE, 1, NAMED),
    "a huge text": header(3, 0, 1, struct.pack("<Q", HUGE)),
    "a huge list of texts": header(3, 0, 1, text("a") + struct.pack("<IIQ", 9, 8, HUGE)),
    "a huge list of numbers": header(3, 0, 1, text("a") + struct.pack("<IIQ", 9, 0, HUGE)),
    "a list beyond the end": header(3, 0, 1, text("a") + struct.pack("<IIQ", 9, 0, 1 << 23)),
    "lists in lists": header(3, 0, 1, text("a") + struct.pack("<IIQIQ", 9, 9, 1, 9, HUGE)),
    "an unknown type": header(3, 0, 1, text("a") + struct.pack("<I", 99)),
    "not UTF-8": header(3, 0, 1, text(b"\xff\xfe")),
    "a key twice": header(3, 0, 2, NAMED + NAMED),
    "architecture is a number": header(
        3, 0, 1, text("general.architecture") + struct.pack("<II", 4, 1)
    ),
    "alignment 0": header(3, 0, 2, NAMED + ALIGNED + struct.pack("<I", 0)),
    "alignment 7": header(3, 0, 2, NAMED + ALIGNED + struct.pack("<I", 7)),
    "no axes": one_tensor(0),
    "a million axes": one_tensor(1 << 20),
    "an empty axis": one_tensor(2, 4, 0),
    "a huge axis": one_tensor(1, HUGE),
    "huge axes": one_tensor(4, HUGE, HUGE, HUGE, HUGE),
    "half a block": one_tensor(1, 33, kind=8),
    "an unknown encoding": one_tensor(1, 32, kind=77),
    "beyond the end": one_tensor(1, 8, offset=1 << 40),
}


@pytest.mark.parametrize("content", HOSTILE.values(), ids=HOSTILE.keys())
def test_a_hostile_file_is_one_sentence(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "bad.gguf"
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match=r"bad\.gguf") as caught:
        read_gguf(path)
    assert str(caught.value).endswith(".")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("share", [0.001, 0.05, 0.2, 0.5, 0.9, 0.999])
def test_a_truncated_file_is_refused(content: bytes, share: float, tmp_path: Path) -> None:
    (tmp_path / "cut.gguf").write_bytes(content[: int(len(content) * share)])
    with pytest.raises(CheckpointError, match="cut"):
        read_gguf(tmp_path / "cut.gguf")


@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
@given(position=st.integers(0, 6000), value=st.integers(0, 255), count=st.integers(1, 8))
def test_any_changed_bytes_are_read_or_refused(
    content: bytes, tmp_path_factory: pytest.TempPathFactory, position: int, value: int, count: int
) -> None:
    folder = tmp_path_factory.mktemp("changed")
    path = folder / "changed.gguf"
    path.write_bytes(content[:position] + bytes([value]) * count + content[position + count :])
    try:
        convert_gguf(path, folder)
    except UserError as error:
        assert "\n" not in str(error)


@pytest.mark.parametrize("make", [Path.mkdir, lambda path: None])
def test_what_is_no_file_is_refused(make: Callable[[Path], None], tmp_path: Path) -> None:
    make(tmp_path / "no.gguf")
    with pytest.raises(CheckpointError, match=r"no\.gguf cannot be read"):
        read_gguf(tmp_path / "no.gguf")


@pytest.mark.parametrize("layers", [1000, 2**31, 2**32 - 1])
def test_no_model_is_built_of_more_layers_than_there_are_tensors(
    layers: int, content: bytes, tmp_path: Path
) -> None:
    key = text("llama.block_count") + struct.pack("<I", 4)
    start = content.index(key) + len(key)
    source = tmp_path / "case.gguf"
    source.write_bytes(content[:start] + struct.pack("<I", layers) + content[start + 4 :])
    with pytest.raises(CheckpointError, match=f"states {layers} layers"):
        convert_gguf(source, tmp_path)


@pytest.mark.parametrize("heads", [0, 3, 64, 2**31])
@pytest.mark.parametrize("name", ["attention.head_count", "attention.head_count_kv"])
def test_heads_that_do_not_divide_the_rows_are_refused(
    name: str, heads: int, content: bytes, tmp_path: Path
) -> None:
    key = text(f"llama.{name}") + struct.pack("<I", 4)
    start = content.index(key) + len(key)
    source = tmp_path / "case.gguf"
    source.write_bytes(content[:start] + struct.pack("<I", heads) + content[start + 4 :])
    with pytest.raises(UserError, match=r"\.$"):
        convert_gguf(source, tmp_path)


@pytest.fixture(scope="session")
def contents(content: bytes, tmp_path_factory: pytest.TempPathFactory) -> list[bytes]:
    """One file for each of several architectures."""
    path = tmp_path_factory.mktemp("gguf") / "tiny.gguf"
    return [content] + [
        tiny_gguf.write_gguf(tiny_gguf.tiny_model(name), path, name).read_bytes()
        for name in ("qwen2", "qwen3moe", "gemma3", "phi3")
    ]


@pytest.mark.parametrize("key", ["split.count", "tokenizer.ggml.model", "tokenizer.chat_template"])
@pytest.mark.parametrize("value", ["x", [1, 2], 3.5, []], ids=str)
def test_metadata_of_another_type_is_taken_or_refused(
    key: str, value: object, content: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = tmp_path / "case.gguf"
    source.write_bytes(content)
    file = read_gguf(source)
    changed = replace(file, facts=file.facts | {key: value})
    monkeypatch.setattr(convert, "read_gguf", lambda _: changed)
    if key == "tokenizer.chat_template" and isinstance(value, str):
        convert_gguf(source, tmp_path)
        return
    with pytest.raises(CheckpointError) as refused:
        convert_gguf(source, tmp_path)
    assert is_one_sentence(str(refused.value))


@settings(max_examples=60)
@given(data=st.data())
def test_any_number_in_the_metadata_is_taken_or_refused(
    contents: list[bytes], tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    folder = tmp_path_factory.mktemp("numbers")
    (folder / "case.gguf").write_bytes(data.draw(mutated_facts(*contents)))
    (folder / "out").mkdir()
    try:
        convert_gguf(folder / "case.gguf", folder / "out")
    except UserError as error:
        assert str(error).endswith(".") and "\n" not in str(error)
