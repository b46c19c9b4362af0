"""A tokenizer that is written as GGUF metadata and read again gives the same ids."""

from pathlib import Path

import pytest
from tiny_tokenizer import tiny_tokenizer
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from deepseek.checkpoint.gguf.reader import GgufFile
from deepseek.checkpoint.gguf.tokenizer import gguf_tokenizer
from deepseek.errors import CheckpointError
from deepseek.export.gguf_tokenizer import tokenizer_facts

DISTILL = ("<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>", "<｜User｜>", "<｜tool sep｜>")


def in_a_file(tokenizer: PreTrainedTokenizerFast, **changes: object) -> GgufFile:
    """Return a GGUF file with the metadata of a tokenizer, some of it changed."""
    facts = tokenizer_facts(tokenizer, len(tokenizer), [])
    facts |= {f"tokenizer.{key}": value for key, value in changes.items()}
    return GgufFile(Path("t.gguf"), {"general.architecture": "qwen2", **facts}, {})


def test_added_tokens_with_spaces_and_other_letters_stay_whole() -> None:
    ours = tiny_tokenizer(DISTILL)
    ours.bos_token, ours.eos_token = DISTILL[:2]
    # In letters that stand for bytes, "New York" is spelled as the ordinary token is.
    ours.add_tokens(["NewĠYork", "New York", "größe", "<tool>"])
    back = gguf_tokenizer(in_a_file(ours))
    assert back.get_vocab() == ours.get_vocab()
    assert (back.bos_token_id, back.eos_token_id) == (ours.bos_token_id, ours.eos_token_id)
    text = "".join(DISTILL) + "in New York, größe <tool><|im_end|> a NewĠYork"
    assert back(text).input_ids == ours(text).input_ids
    assert back.decode(back(text).input_ids) == ours.decode(ours(text).input_ids)
    ids = range(len(ours))
    shown = [tokenizer.decode(ids, skip_special_tokens=True) for tokenizer in (ours, back)]
    assert shown[0] == shown[1]


def test_no_token_is_added_that_the_file_does_not_have() -> None:
    """Llama 3 has no `<|endoftext|>`, which is a special token of GPT-2's class."""
    ours = tiny_tokenizer()
    file = in_a_file(ours)
    file.facts["tokenizer.ggml.tokens"][0] = "<|begin_of_text|>"
    back = gguf_tokenizer(file)
    assert len(back) == len(ours)
    assert max(back("a<|endoftext|>").input_ids) < len(ours)


def test_a_special_token_that_stands_twice_is_refused() -> None:
    file = in_a_file(tiny_tokenizer(("<spare>",)))
    file.facts["tokenizer.ggml.tokens"][3] = "<|im_end|>"
    with pytest.raises(CheckpointError, match=r"the eos token '<\|im_end\|>' under several ids"):
        gguf_tokenizer(file)


def test_several_chat_templates_keep_their_names(tmp_path: Path) -> None:
    templates = {"tool-use": "TOOLS {{ bos_token }}", "default": "{{ eos_token }}", "rag": "RAG"}
    ours = tiny_tokenizer(chat_template=templates)
    file = in_a_file(ours)
    assert file.facts["tokenizer.chat_template"] == templates["default"]
    assert file.facts["tokenizer.chat_templates"] == ["tool_use", "rag"]
    back = gguf_tokenizer(file)
    templates["tool_use"] = templates.pop("tool-use")
    assert back.chat_template == templates
    back.save_pretrained(tmp_path)
    assert AutoTokenizer.from_pretrained(tmp_path).chat_template == back.chat_template


@pytest.mark.parametrize(
    ("names", "message"),
    [(["../x"], "no words"), ("x", "no words"), ([1], "no text"), (["rag"], "no text")],
)
def test_chat_templates_that_are_none_are_refused(names: object, message: str) -> None:
    file = in_a_file(tiny_tokenizer(), chat_templates=names)
    with pytest.raises(CheckpointError, match=message):
        gguf_tokenizer(file)
