"""The index finds relevant passages, is stored on disk, and never returns held-out text."""

import json
import re
import unicodedata
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from deepseek.data import Document
from deepseek.data.text.document import Kind, split_lines
from deepseek.errors import DataError
from deepseek.retrieval.index import FORMAT, Index, beginning
from deepseek.retrieval.passages import LONGEST, passages
from deepseek.retrieval.prompt import before_text, in_question, query_of
from deepseek.retrieval.words import search_words

LINES = st.lists(
    st.sampled_from(
        ["def parse(text):", "    return value", "", "x = readHeader_v2(y)", "Straße 5"]
    )
)
TEXTS = st.lists(LINES.map("\n".join), min_size=1, max_size=6)


def code(name: str, subject: str, count: int = 40) -> Document:
    return Document(
        "".join(f"{subject}_{n} = load_{subject}({n})\n" for n in range(count)), name, "code"
    )


DOCUMENTS = [
    code("repo/apple.py", "apple"),
    code("repo/pear.py", "pear"),
    code("repo/plum.py", "plum"),
]


def test_pieces_of_one_long_line_are_found_beside_each_other() -> None:
    text = " ".join(f"pear number {place}" for place in range(900))
    index = Index.build([Document(text, "long", "text")])
    found = index.retrieve("pear number", 4)
    assert len(index) > 4 and len(found) == 4
    assert len({passage.piece for passage in found}) == 4
    assert all(passage.text in text for passage in found)


def test_of_a_passage_that_is_too_long_the_beginning_is_shown() -> None:
    index = Index.build([code("repo/apple.py", "apple", 10)])
    (whole,) = index.retrieve("apple_3 = load_apple(3)", 1)
    (lines,) = index.retrieve("apple_3 = load_apple(3)", 1, len(whole.text) - 1)
    assert whole.text.startswith(lines.text) and lines.text.endswith(")\n")
    assert len(whole.text) - len(lines.text) < 40
    assert len(index.retrieve("apple_3 = load_apple(3)", 1, len(whole.text) // 4 + 1)) == 1
    assert index.retrieve("apple_3 = load_apple(3)", 1, len(whole.text) // 5) == []


@given(st.text("ab é\n", max_size=200), st.integers(0, 120))
def test_a_beginning_fits_and_ends_with_a_line_if_that_keeps_half(text: str, most: int) -> None:
    kept = beginning(text, most, len)
    assert text.startswith(kept) and len(kept) <= most
    if len(text) > most:
        assert 2 * len(kept) >= most
        assert kept.endswith("\n") or "\n" not in text[most // 2 : most] or not kept


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("parseHeader_v2(x)", ["parse", "header", "v", "2", "parseheader_v2", "x"]),
        ("HTTPServer", ["http", "server", "httpserver"]),
        ("to_be or NOT", ["to", "be", "to_be", "or", "not"]),
        ("路由器 x", ["路由", "由器", "x"]),
        ("Größe", ["größe"]),
        (
            "Größenänderung_übernehmen",
            ["größenänderung", "übernehmen", "größenänderung_übernehmen"],
        ),
        ("élève naïf: œuvre", ["élève", "naïf", "œuvre"]),
        ("¿Cuántos años? ÑANDÚ", ["cuántos", "años", "ñandú"]),
        ("lireÉlève2", ["lire", "élève", "2", "lireélève2"]),
        ("XMLÜbersicht", ["xml", "übersicht", "xmlübersicht"]),
        ("parseДанныеHTTP", ["parse", "данные", "http", "parseданныеhttp"]),
        ("東京タワー", ["東京", "京タ", "タワ", "ワー"]),
        ("한국어 x²", ["한국", "국어", "x", "²", "x²"]),
        ("हिन्दी भाषा", ["हिन्दी", "भाषा"]),
        ("শক্তি க்ஷ র\u200d্য", ["শক্তি", "க்ஷ", "র্য"]),
        ("עִבְרִית", ["עִבְרִית"]),
        ("می\u200cخواهم", ["می", "خواهم"]),
        ("ภาษาไทย x", ["ภา", "าษ", "ษา", "าไ", "ไท", "ทย", "x"]),
        ("x\u0304_Y", ["x\u0304", "y", "x\u0304_y"]),
        ("+ - __ ()", []),
    ],
)
def test_identifiers_are_words_whole_and_in_parts(text: str, words: list[str]) -> None:
    assert search_words(text) == words


@given(st.text("éèüößñçœab", min_size=1).map(str.capitalize))
def test_a_word_with_accents_is_one_word_however_they_are_encoded(word: str) -> None:
    decomposed = unicodedata.normalize("NFD", word)
    assert search_words(word) == search_words(decomposed) == [word.lower()]


@given(st.text("aBc9_ -路由器日本語かナー한국", max_size=40))
def test_ascii_chinese_and_japanese_are_split_as_by_ascii_patterns(text: str) -> None:
    ascii_part = re.compile(r"[A-Z]+(?=[A-Z][a-z])|[A-Z]?[a-z]+|[A-Z]+|\d+|[^\W\d_a-zA-Z]+")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("deepseek.retrieval.words.PART", ascii_part)
        expected = search_words(text)
    assert search_words(text) == expected


@given(st.text(max_size=200))
def test_words_are_lower_case_and_never_empty(text: str) -> None:
    assert all(word and word == word.lower() for word in search_words(text))


@given(TEXTS, st.sampled_from(["code", "text", "commit"]))
def test_passages_show_all_lines_with_something_on_them(texts: list[str], kind: str) -> None:
    for place, text in enumerate(texts):
        document = Document(text, f"repo/{place}", kind)
        shown = [passage for passage, _ in passages(document)]
        lines = text.splitlines()
        covered = {line for passage in shown for line in range(passage.start, passage.stop)}
        assert {number for number, line in enumerate(lines) if line.strip()} <= covered
        assert all(passage.text in text and len(passage.text) <= LONGEST for passage in shown)


@given(
    st.lists(st.sampled_from([3, 40, 300, 900, 3000]), max_size=40),
    st.sampled_from(["code", "text", "commit"]),
)
def test_all_text_is_matched_with_however_long_its_lines(lengths: list[int], kind: Kind) -> None:
    text = "\f\n".join(f"{number:{length}}" for number, length in enumerate(lengths))
    lines = split_lines(text)
    is_covered = [character.isspace() for character in text]
    for passage, matched in passages(Document(text, "file", kind)):
        begin = sum(map(len, lines[: passage.start])) + passage.piece * LONGEST
        assert text.startswith(passage.text, begin) and passage.text.startswith(matched)
        is_covered[begin : begin + len(matched)] = [True] * len(matched)
    assert all(is_covered)


def test_a_query_finds_its_subject_and_no_two_passages_overlap() -> None:
    index = Index.build(DOCUMENTS)
    found = index.retrieve("pear_3 = load_pear(3)", k=2)
    assert [passage.name for passage in found] == ["repo/pear.py"] * 2
    for place, passage in enumerate(found):
        assert not any(passage.overlaps(other) for other in found[place + 1 :])
    assert "pear_3 = load_pear(3)" in found[0].text
    assert index.retrieve("?? !!") == index.retrieve("cherries") == []


@given(st.integers(1, 6), st.integers(0, 2000))
def test_passages_fit_into_the_tokens_that_are_left(k: int, most: int) -> None:
    found = Index.build(DOCUMENTS).retrieve("load_apple apple_1 plum_2", k, most)
    assert len(found) <= k
    assert sum(len(passage.text) for passage in found) <= most


@given(TEXTS, LINES.map("\n".join))
def test_an_index_is_the_same_after_saving(
    tmp_path_factory: pytest.TempPathFactory, texts: list[str], query: str
) -> None:
    documents = [
        *DOCUMENTS[:1],
        *(Document(text, f"repo/{place}", "code") for place, text in enumerate(texts)),
    ]
    index = Index.build(documents, source="s")
    folder = tmp_path_factory.mktemp("index") / "x.index"
    index.save(folder)
    again = Index.load(folder)
    assert again.passages == index.passages and again.source == "s"
    assert again.retrieve(query) == index.retrieve(query)


def test_equal_text_gives_equal_files(tmp_path: Path) -> None:
    for name in ("a", "b"):
        Index.build(DOCUMENTS).save(tmp_path / name)
    names = sorted(path.name for path in (tmp_path / "a").iterdir())
    assert all(
        (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()
        for name in names
    )


@given(st.sets(st.sampled_from([document.name for document in DOCUMENTS]), max_size=2))
def test_what_is_held_out_is_never_found(held_out: set[str]) -> None:
    patch = "".join(
        f"--- {name}\n+++ {name}\n@@\n+{name}_secret = 1\n"
        for name in ("apple.py", "pear.py", "plum.py")
    )
    commit = Document(f"Change all\n\n{patch}", "repo@12ab", "commit")
    index = Index.build([*DOCUMENTS, commit], without=held_out)
    for subject in ("apple", "pear", "plum"):
        found = index.retrieve(f"{subject} {subject}_1 load_{subject} {subject}.py_secret", k=20)
        names = {passage.path or passage.name for passage in found}
        assert (f"repo/{subject}.py" in names) is (f"repo/{subject}.py" not in held_out)
        assert not names & {f"repo/{name}" for name in held_out} and not names & held_out
        assert f"repo/{subject}.py" not in held_out or not any(
            f"{subject}.py_" in passage.text for passage in found
        )


def test_neither_spaces_in_a_name_nor_a_deletion_show_what_is_held_out() -> None:
    added = Document(
        "Add\n\n--- /dev/null\n+++ src/my file.py\n@@\n+secret = 1\n", "repo@1", "commit"
    )
    deleted = Document(
        "Drop\n\n--- src/old.py\n+++ /dev/null\n@@\n-secret = 2\n", "repo@2", "commit"
    )
    index = Index.build([added, deleted], without=["repo/src/my file.py", "repo/src/old.py"])
    assert index.retrieve("secret") == []
    found = Index.build([added, deleted]).retrieve("secret")
    assert {passage.path for passage in found} == {"repo/src/my file.py", "repo/src/old.py"}


def test_mistakes_are_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no text to index"):
        Index.build([Document("", "a")])
    with pytest.raises(DataError, match="There is no index"):
        Index.load(tmp_path / "nowhere")
    Index.build(DOCUMENTS).save(tmp_path / "x")
    whole = (tmp_path / "x" / "passages.jsonl").read_text()
    for damaged in ("", whole[:-9], whole.split("\n", 1)[1]):
        (tmp_path / "x" / "passages.jsonl").write_text(damaged)
        with pytest.raises(DataError, match="damaged"):
            Index.load(tmp_path / "x")
    (tmp_path / "x" / "passages.jsonl").write_text(whole)
    arrays = list((tmp_path / "x").glob("*.npy"))
    assert arrays
    for array in arrays:
        content = array.read_bytes()
        array.write_bytes(b"")
        with pytest.raises(DataError, match="damaged"):
            Index.load(tmp_path / "x")
        array.write_bytes(content)


@pytest.mark.parametrize(
    ("fields", "cause"),
    [
        ({"source": None}, "of another version"),
        ({"format": 2, "source": "s"}, "of another version"),
        ({"format": FORMAT}, "names no source"),
        ({"format": FORMAT, "source": 5}, "names no source"),
        ([FORMAT], "no JSON object"),
    ],
)
def test_a_foreign_index_is_one_sentence(tmp_path: Path, fields: object, cause: str) -> None:
    Index.build(DOCUMENTS).save(tmp_path / "x")
    (tmp_path / "x" / "meta.json").write_text(json.dumps(fields))
    with pytest.raises(DataError, match=rf"^The index in .* {cause}.*; build it again .*\.$"):
        Index.load(tmp_path / "x")


def test_the_best_passage_stands_next_to_the_text() -> None:
    first, second = Index.build(DOCUMENTS).retrieve("pear_3 pear_4 pear_5", k=2)
    text = before_text([first, second])
    assert text.endswith(first.text.strip("\n") + "\n\n") and text.startswith(
        "file: repo/pear.py\n\n"
    )
    assert in_question([], "Why?") == "Why?"
    assert in_question([first], "Why?").endswith("\n\nWhy?")
    assert query_of("a\n\nb\nc\nd\n").split("\n") == ["a", "b", "c", "d", "b", "c", "d"]
