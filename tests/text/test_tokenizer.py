"""Loading tokenizers, and the tokens that they put around a document."""

from pathlib import Path

import pytest
from tiny_tokenizer import tiny_tokenizer
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerFast

from deepseek.errors import CheckpointError
from deepseek.text.tokenizer import (
    document_end_id,
    document_start_ids,
    encode_document,
    encode_plain,
    load_tokenizer,
    tokenizer_digest,
)


def test_a_saved_tokenizer_comes_back_the_same(tmp_path: Path) -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.save_pretrained(tmp_path)
    loaded = load_tokenizer(tmp_path)
    assert loaded("the model<|im_end|>").input_ids == tokenizer("the model<|im_end|>").input_ids
    assert tokenizer_digest(loaded) == tokenizer_digest(load_tokenizer(tmp_path))


def test_the_digest_depends_on_vocabulary_and_template() -> None:
    digests = {
        tokenizer_digest(t)
        for t in (tiny_tokenizer(), tiny_tokenizer(("<x>",)), tiny_tokenizer((), "other"))
    }
    assert len(digests) == 3


def test_documents_end_as_in_pre_training_or_else_at_the_end_of_a_turn() -> None:
    tokenizer = tiny_tokenizer()
    assert document_end_id(tokenizer) == tokenizer.convert_tokens_to_ids("<|endoftext|>")
    plain = PreTrainedTokenizerFast(tokenizer_object=_without_endoftext(), eos_token="</s>")
    assert document_end_id(plain) == plain.eos_token_id
    plain.eos_token = None
    with pytest.raises(CheckpointError, match="no end-of-sequence token"):
        document_end_id(plain)


def test_only_tokenizers_that_begin_texts_with_bos_begin_documents_with_it() -> None:
    tokenizer = tiny_tokenizer()
    assert document_start_ids(tokenizer) == []
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<|im_start|> $A", special_tokens=[("<|im_start|>", tokenizer.bos_token_id)]
    )
    assert document_start_ids(tokenizer) == [tokenizer.bos_token_id]
    text = "the model<|im_end|>"
    assert encode_document(tokenizer, text) == [
        tokenizer.bos_token_id,
        *encode_plain(tokenizer, [text])[0],
    ]


def test_a_folder_without_tokenizer_says_so(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"holds no tokenizer\.json"):
        load_tokenizer(tmp_path)
    for damaged in ("{}", "{", ""):
        (tmp_path / "tokenizer.json").write_text(damaged)
        with pytest.raises(CheckpointError, match="cannot be read"):
            load_tokenizer(tmp_path)


def _without_endoftext() -> object:
    from tokenizers import Tokenizer, models

    backend = Tokenizer(models.WordLevel({"a": 0, "</s>": 1}, unk_token="a"))
    backend.add_special_tokens(["</s>"])
    return backend
