"""Token shards: built once, rebuilt when anything changes, never half written."""

from pathlib import Path

import numpy as np
import pytest
from tiny_sentencepiece import tiny_sentencepiece
from tiny_tokenizer import tiny_tokenizer

from deepseek.data import Document, EncodeOptions, TokenShards
from deepseek.data.text import shards as shards_module
from deepseek.data.text.encode import DocumentEncoder
from deepseek.data.text.shards import source_digest
from deepseek.errors import DataError

TOKENIZER = tiny_tokenizer()
DOCUMENTS = [
    Document(f"the value of the expert is {number}\n" * 3, f"d{number}") for number in range(10)
]


def stamp(folder: Path) -> list[tuple[str, int]]:
    return sorted((file.name, file.stat().st_mtime_ns) for file in folder.iterdir())


def test_the_ids_are_those_of_the_documents(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shards_module, "BATCH_CHARACTERS", 200)
    seen: list[tuple[int, int, str]] = []
    shards = TokenShards.build(
        DOCUMENTS, TOKENIZER, tmp_path / "s", progress=lambda *step: seen.append(step)
    )
    expected = list(DocumentEncoder(TOKENIZER, EncodeOptions()).encode(DOCUMENTS))
    assert len(shards.offsets) == 10 + 1
    assert shards.num_tokens == sum(map(len, expected))
    for index, ids in enumerate(expected):
        start, stop = shards.offsets[index : index + 2]
        assert np.array_equal(shards.ids_N[int(start) : int(stop)], ids)
    assert seen[-1] == (10, 10, "tokenise")
    assert len(seen) > 1


def test_the_same_text_is_tokenised_once(tmp_path: Path) -> None:
    first = TokenShards.build(DOCUMENTS, TOKENIZER, tmp_path / "s")
    before = stamp(tmp_path / "s")
    again = TokenShards.build(list(DOCUMENTS), tiny_tokenizer(), tmp_path / "s")
    assert stamp(tmp_path / "s") == before
    assert again.digest == first.digest == TokenShards(tmp_path / "s").digest


@pytest.mark.parametrize(
    ("documents", "tokenizer", "options"),
    [
        (DOCUMENTS[:9], TOKENIZER, EncodeOptions()),
        ([Document("other", "d0"), *DOCUMENTS[1:]], TOKENIZER, EncodeOptions()),
        (DOCUMENTS, tiny_tokenizer(("<x>",)), EncodeOptions()),
        (DOCUMENTS, TOKENIZER, EncodeOptions(header=False)),
    ],
    ids=["fewer", "edited", "tokenizer", "options"],
)
def test_any_change_builds_them_anew(
    tmp_path: Path, documents: object, tokenizer: object, options: object
) -> None:
    first = TokenShards.build(DOCUMENTS, TOKENIZER, tmp_path / "s")
    source, expected = first.source, next(DocumentEncoder(tokenizer, options).encode(documents))
    second = TokenShards.build(documents, tokenizer, tmp_path / "s", options)
    assert second.source != source
    assert np.array_equal(second.ids_N[: len(expected)], expected)


@pytest.mark.parametrize(
    ("tokenizer", "kind", "same"),
    [
        (TOKENIZER, "infill", True),
        (tiny_sentencepiece("first"), "text", True),
        (tiny_sentencepiece("first"), "infill", False),
    ],
)
def test_only_gaps_that_earlier_versions_stored_with_spaces_are_stored_anew(
    tokenizer: object, kind: str, same: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    documents = [Document('{"prefix": "a", "suffix": "c", "middle": "b"}', "a:0", kind)]
    digest = source_digest(documents, tokenizer, EncodeOptions())
    monkeypatch.setattr(shards_module, "puts_space_before", lambda _: False)
    assert (source_digest(documents, tokenizer, EncodeOptions()) == digest) is same


def test_the_digest_names_the_content(tmp_path: Path) -> None:
    digests = [
        TokenShards.build(d, TOKENIZER, tmp_path / f"{len(d)}").digest
        for d in (DOCUMENTS, DOCUMENTS[:9])
    ]
    assert digests[0] != digests[1]
    moved = (tmp_path / "10").rename(tmp_path / "moved")
    assert TokenShards(moved).digest == digests[0]


def test_a_flipped_bit_is_noticed_and_mended(tmp_path: Path) -> None:
    digest = TokenShards.build(DOCUMENTS, TOKENIZER, tmp_path / "s").digest
    with open(tmp_path / "s" / "tokens.bin", "r+b") as file:
        first = file.read(1)
        file.seek(0)
        file.write(bytes([first[0] ^ 1]))
    assert not TokenShards(tmp_path / "s").is_intact()
    mended = TokenShards.build(DOCUMENTS, TOKENIZER, tmp_path / "s")
    assert mended.is_intact()
    assert mended.digest == digest


def test_an_interrupted_build_leaves_the_old_shards(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    old = TokenShards.build(DOCUMENTS, TOKENIZER, tmp_path / "s").digest
    monkeypatch.setattr(shards_module, "BATCH_CHARACTERS", 200)

    def stop(done: int, total: int, what: str) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        TokenShards.build(DOCUMENTS[:9], TOKENIZER, tmp_path / "s", progress=stop)
    assert TokenShards(tmp_path / "s").digest == old
    assert [path.name for path in tmp_path.iterdir()] == ["s"]


def test_damage_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="holds no token shards"):
        TokenShards(tmp_path / "missing")
    TokenShards.build(DOCUMENTS, TOKENIZER, tmp_path / "s")
    tokens = tmp_path / "s" / "tokens.bin"
    tokens.write_bytes(tokens.read_bytes()[:-4])
    with pytest.raises(DataError, match=r"tokens\.bin is missing or cut short"):
        TokenShards(tmp_path / "s")


def test_other_folders_are_never_replaced(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(DataError, match="holds other files"):
        TokenShards.build(DOCUMENTS, TOKENIZER, tmp_path)
    assert (tmp_path / "thesis.tex").read_text() == "years of work"


def test_no_documents_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no documents"):
        TokenShards.build([], TOKENIZER, tmp_path / "s")
