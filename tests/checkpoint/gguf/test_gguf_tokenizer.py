"""A tokenizer that is written as GGUF metadata and read again gives the same ids."""

from pathlib import Path

import pytest
from tiny_tokenizer import tiny_tokenizer
from tokenizers import Regex, normalizers
from tokenizers import pre_tokenizers as steps
from tokenizers.processors import TemplateProcessing
from transformers import AutoTokenizer, PreTrainedTokenizerFast
from transformers.integrations.gguf.gguf_tokenizer_mapping import GGUF_PRE_TOKENIZER_SPLITS

from deepseek.checkpoint.gguf.reader import GgufFile
from deepseek.checkpoint.gguf.tokenizer import gguf_tokenizer
from deepseek.errors import CheckpointError, ConfigError
from deepseek.export.gguf_tokenizer import tokenizer_facts

DISTILL = ("<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>", "<｜User｜>", "<｜tool sep｜>")

LLAMA_3 = steps.Split(Regex(GGUF_PRE_TOKENIZER_SPLITS["llama3"]), "isolated")
REMOVED = steps.Split(Regex(GGUF_PRE_TOKENIZER_SPLITS["llama3"]), "removed")
BYTES = steps.ByteLevel(add_prefix_space=False, use_regex=False)


def around(template: str) -> TemplateProcessing:
    """Return a post-processor that puts control tokens around a text."""
    return TemplateProcessing(
        single=template, special_tokens=[("<|im_start|>", 1), ("<|im_end|>", 2)]
    )


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


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"normalizer": normalizers.Lowercase()}, "normalizer Lowercase"),
        ({"normalizer": normalizers.Sequence([normalizers.NFKC()])}, "normalizer NFKC"),
        ({"pre_tokenizer": steps.ByteLevel(add_prefix_space=True)}, "add_prefix_space"),
        ({"pre_tokenizer": steps.Sequence([steps.Digits(True), LLAMA_3, BYTES])}, "no known name"),
        ({"pre_tokenizer": steps.Sequence([REMOVED, BYTES])}, "no known name"),
        ({"post_processor": around("<|im_end|> $A")}, r"'<\|im_end\|>', 'a'\] of the text"),
    ],
)
def test_a_tokenizer_that_llama_cpp_does_not_have_is_refused(
    changes: dict[str, object], message: str
) -> None:
    ours = tiny_tokenizer()
    for part, value in changes.items():
        setattr(ours.backend_tokenizer, part, value)
    with pytest.raises(ConfigError, match=message):
        tokenizer_facts(ours, len(ours), [])


@pytest.mark.parametrize("bos", ["<|im_start|> ", ""])
@pytest.mark.parametrize("eos", [" <|im_end|>", ""])
def test_tokens_around_a_text_go_along(bos: str, eos: str) -> None:
    ours = tiny_tokenizer()
    ours.backend_tokenizer.post_processor = around(f"{bos}$A{eos}")
    ours.backend_tokenizer.normalizer = normalizers.NFC()
    file = in_a_file(ours)
    assert file.facts["tokenizer.ggml.add_bos_token"] is bool(bos)
    assert file.facts["tokenizer.ggml.add_eos_token"] is bool(eos)
    assert gguf_tokenizer(file)("the router").input_ids == ours("the router").input_ids
