"""Encoding one document: start and end tokens, targets, fill-in-the-middle."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tiny_sentencepiece import SCHEMES, tiny_sentencepiece
from tiny_tokenizer import tiny_tokenizer
from tokenizers import AddedToken
from transformers import PreTrainedTokenizerFast

from deepseek.data import Document, EncodeOptions
from deepseek.data.text import encode as encode_module
from deepseek.data.text.document import conversation
from deepseek.data.text.encode import CONTEXT_BIT, DocumentEncoder, pieces
from deepseek.server.prompt import PromptWriter
from deepseek.text.tokenizer import encode_continued

TOKENIZER = tiny_tokenizer()
FIM = ("<fim_prefix>", "<fim_suffix>", "<fim_middle>")
FIM_TOKENIZER = tiny_tokenizer(FIM)
CODE = Document("def f():\n    return the_model\n" * 5, "repo/f.py", "code")


def text_of(document: Document, options: EncodeOptions, tokenizer: object = TOKENIZER) -> str:
    ids = next(DocumentEncoder(tokenizer, options).encode([document]))
    return tokenizer.decode(ids & ~CONTEXT_BIT, clean_up_tokenization_spaces=False)


def test_code_and_commits_are_told_where_they_lie_and_prose_is_not() -> None:
    assert text_of(CODE, EncodeOptions()) == f"file: repo/f.py\n\n{CODE.text}<|endoftext|>"
    assert text_of(CODE, EncodeOptions(header=False)) == f"{CODE.text}<|endoftext|>"
    assert (
        text_of(Document("Fix it", "repo@12", "commit"), EncodeOptions())
        == "commit: repo@12\n\nFix it<|endoftext|>"
    )
    assert text_of(Document("Once", "book"), EncodeOptions()) == "Once<|endoftext|>"


def test_the_header_is_given_and_never_a_target() -> None:
    (ids,) = DocumentEncoder(TOKENIZER, EncodeOptions()).encode([CODE])
    assert TOKENIZER.decode(ids[(ids & CONTEXT_BIT) == 0]) == f"{CODE.text}<|endoftext|>"


def test_everything_is_a_target_but_what_others_said() -> None:
    ask, answer = {"role": "user", "content": "why?"}, {"role": "assistant", "content": "because"}
    encoder = DocumentEncoder(TOKENIZER, EncodeOptions())
    prose, chat = encoder.encode([Document("Once", "book"), conversation([ask, answer], "c", "c")])
    assert not (prose & CONTEXT_BIT).any()
    assert TOKENIZER.decode(chat[(chat & CONTEXT_BIT) == 0]) == "because<|im_end|>"


@given(st.text("ab\n ", max_size=400))
def test_pieces_join_to_the_text(text: str) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(encode_module, "CHUNK", 50)
        parts = pieces(text)
    assert "".join(parts) == text
    assert all(len(part) <= 50 for part in parts)
    assert all(part for part in parts[:-1])


def test_long_texts_are_cut_at_line_ends_only(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = text_of(CODE, EncodeOptions())
    monkeypatch.setattr(encode_module, "CHUNK", 64)
    assert text_of(CODE, EncodeOptions()) == whole
    assert all(part.endswith("\n") for part in pieces(CODE.text)[:-1])


GAP = json.dumps({"prefix": "a = f(", "suffix": ")\nb\n", "middle": "the_model"})


def test_the_middle_comes_last_and_markers_are_no_targets() -> None:
    document = Document(GAP, "repo/f.py:0", "infill")
    assert text_of(document, EncodeOptions(), FIM_TOKENIZER) == (
        "<fim_prefix>a = f(<fim_suffix>)\nb\n<fim_middle>the_model<|endoftext|>"
    )
    assert (
        text_of(document, EncodeOptions())
        == "<fim_suffix>)\nb\n<fim_prefix>a = f(the_model<|endoftext|>"
    )
    for tokenizer in (FIM_TOKENIZER, TOKENIZER):
        ids = next(DocumentEncoder(tokenizer, EncodeOptions()).encode([document]))
        targets = tokenizer.decode(ids[(ids & CONTEXT_BIT) == 0])
        assert "fim" not in targets
        assert targets.endswith("the_model<|endoftext|>")


def test_a_middle_that_follows_its_prefix_is_tokenised_with_it() -> None:
    gap = json.dumps({"prefix": "a = th", "suffix": "\nb\n", "middle": "e expert"})
    for tokenizer, whole in ((TOKENIZER, True), (FIM_TOKENIZER, False)):
        encoder = DocumentEncoder(tokenizer, EncodeOptions())
        ids = next(encoder.encode([Document(gap, "f.py:0", "infill")])) & ~CONTEXT_BIT
        joined = tokenizer.encode("a = the expert")
        places = range(len(ids) - len(joined) + 1)
        assert any(ids[n : n + len(joined)].tolist() == joined for n in places) == whole


@pytest.mark.parametrize("scheme", SCHEMES)
@given(text=st.text("abe \n", min_size=1, max_size=200))
def test_a_tokenizer_that_puts_a_space_before_a_text_puts_none_inside(
    scheme: str, text: str
) -> None:
    tokenizer = tiny_sentencepiece(scheme)
    options = EncodeOptions()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(encode_module, "CHUNK", 16)
        code = text_of(Document(text, "a.py", "code"), options, tokenizer)
        prose = text_of(Document(f"b{text}", "a"), options, tokenizer)
    assert code == f"file: a.py\n\n{text}</s>"
    assert prose == f"b{text}</s>"


GAP_TOKENIZERS = [tiny_sentencepiece(scheme, names) for scheme in SCHEMES for names in ((), FIM)]


@pytest.mark.parametrize("tokenizer", [*GAP_TOKENIZERS, TOKENIZER, FIM_TOKENIZER])
@given(texts=st.tuples(*[st.text("abe(\n", max_size=9)] * 3))
def test_training_lays_out_a_gap_as_the_server_does_without_spaces(
    tokenizer: PreTrainedTokenizerFast, texts: tuple[str, str, str]
) -> None:
    prefix, suffix, middle = texts
    gap = json.dumps({"prefix": prefix, "suffix": suffix, "middle": middle})
    encoder = DocumentEncoder(tokenizer, EncodeOptions())
    (stored,) = encoder.encode([Document(gap, "a:0", "infill")])
    ids = (stored & ~CONTEXT_BIT).tolist()[:-1]
    prompt = PromptWriter(tokenizer, 999).infill(prefix, suffix)
    written = str(tokenizer.decode(prompt, clean_up_tokenization_spaces=False))
    if encoder.layout.has_tokens:
        assert ids == [*prompt, *encode_continued(tokenizer, [middle])[0]]
        # After its control token the prefix starts a text, so a space may be added there.
        assert written.endswith(f"{prefix}<fim_suffix>{suffix}<fim_middle>")
    else:
        assert ids == PromptWriter(tokenizer, 999).infill(prefix + middle, suffix)
        assert written == f"<fim_suffix>{suffix}<fim_prefix>{prefix}"


def test_a_file_that_mentions_a_marker_trains_on_its_characters() -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.add_tokens([AddedToken(name, special=False) for name in FIM])
    markers = set(tokenizer.convert_tokens_to_ids(list(FIM)))
    code = Document("MIDDLE = '<fim_middle>'\n", "a.py", "code")
    (ids,) = DocumentEncoder(tokenizer, EncodeOptions()).encode([code])
    assert not markers & {*(ids & ~CONTEXT_BIT).tolist()}
    assert code.text in text_of(code, EncodeOptions(), tokenizer)
    gap = json.dumps({"prefix": "a", "suffix": "c", "middle": "<fim_middle>"})
    (ids,) = DocumentEncoder(tokenizer, EncodeOptions()).encode([Document(gap, "a:0", "infill")])
    assert sorted(markers & {*(ids & ~CONTEXT_BIT).tolist()}) == sorted(markers)
    assert text_of(Document(gap, "a:0", "infill"), EncodeOptions(), tokenizer) == (
        "<fim_prefix>a<fim_suffix>c<fim_middle><fim_middle><|endoftext|>"
    )
