"""The tokenizer of a GGUF file, with its chat template.

`transformers` rebuilds it from the vocabulary, but splits text by GPT-2's rule if it does not know
the file's rule, which silently gives other ids. Here an unknown rule is an error.
"""

import json
import re
from typing import Any

from gguf import TokenType
from tokenizers import Tokenizer, decoders, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast
from transformers.convert_slow_tokenizer import bytes_to_unicode
from transformers.integrations.gguf.gguf_tokenizer_mapping import (
    GGUF_PRE_TOKENIZER_SPLITS,
    GGUF_TOKENIZER_MAPPING,
    GGUF_TOKENIZER_TYPES,
    convert_gguf_tokenizer,
)

from deepseek.checkpoint.gguf.reader import GgufFile
from deepseek.errors import CheckpointError, shown
from deepseek.registry import nearest

GPT2_SPLITS = ("gpt-2", "jais", "mpt", "olmo", "phi-2")
"""Names of GPT-2's own rule, which `transformers` uses where it knows no other."""

DIGIT_SPLITS = ("codeshell", "command-r", "refact", "smollm", "starcoder")
"""Names of the rule that splits off each digit, and then splits as GPT-2 does."""

WHOLE_WORDS = (
    "falcon-h1",
    "falcon3",
    "lfm2",
    "llama-bpe",
    "llama-v3",
    "llama3",
    "midm-2.0",
    "pixtral",
    "tekken",
)
"""Names of the rules under which llama.cpp takes a word of the vocabulary whole, whatever the
merges make of it, and begins a text with the BOS token, unless the file says otherwise.
"""

SPACE = "\u2581"
"""SentencePiece's sign for a space."""

TEMPLATE_NAME = re.compile("[A-Za-z0-9_]+")
"""Names of chat templates: what llama.cpp's converter makes of any name."""

SPECIAL_TOKENS = {"bos": "bos", "eos": "eos", "unk": "unknown", "pad": "padding"}
"""Name in `transformers` -> name in GGUF metadata."""


def gguf_tokenizer(file: GgufFile) -> PreTrainedTokenizerFast:
    """Return the tokenizer of a GGUF file.

    Its chat template is the file's, or its templates by their names; a file without one gives a
    tokenizer without one. The end token pads if the file names no other.

    Raises:
        CheckpointError: there is no vocabulary, its kind or split rule is not known, its tokens
            cannot have the ids that the file gives them, or a chat template is no text.
    """
    kind = file.fact("tokenizer.ggml.model")
    if not isinstance(kind, str) or kind not in GGUF_TOKENIZER_TYPES:
        raise CheckpointError(
            f"{file.path} has a tokenizer of kind {shown(kind)}; "
            f"{nearest(shown(kind), GGUF_TOKENIZER_TYPES)}."
        )
    adds_bos = kind == "llama" or (
        kind == "gpt2" and file.facts.get("tokenizer.ggml.pre") in WHOLE_WORDS
    )
    tokens = file.fact("tokenizer.ggml.tokens")
    described = {
        name: file.facts[f"tokenizer.{key}"]
        for key, name in GGUF_TOKENIZER_MAPPING["tokenizer"].items()
        if f"tokenizer.{key}" in file.facts
    }
    try:
        backend, _ = convert_gguf_tokenizer(file.architecture, described)
        backend = _with_added_tokens(file, tokens, backend, byte_level=kind == "gpt2")
        if kind == "gpt2":
            _set_split_rule(file, backend)
        elif file.facts.get("tokenizer.ggml.add_space_prefix") is False:
            _remove_prefix(backend)
        special: dict[str, Any] = {
            f"{name}_token": _token(file, tokens, key) for name, key in SPECIAL_TOKENS.items()
        }
    except CheckpointError:
        raise
    except Exception as error:  # tokenizers raises plain exceptions; lists may be of any length
        raise CheckpointError(
            f"The vocabulary in {file.path} makes no tokenizer ({error}); download or convert it "
            "again."
        ) from None
    special["pad_token"] = special["pad_token"] or special["eos_token"]
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        chat_template=_chat_template(file),
        model_max_length=file.facts.get(f"{file.architecture}.context_length"),
        add_bos_token=bool(file.facts.get("tokenizer.ggml.add_bos_token", adds_bos)),
        add_eos_token=bool(file.facts.get("tokenizer.ggml.add_eos_token", False)),
        **special,
    )
    _check_ids(file, tokens, tokenizer)
    return tokenizer


def _chat_template(file: GgufFile) -> str | dict[str, str] | None:
    """Return the chat template, or all by name if the file has more than the default one."""
    names = file.facts.get("tokenizer.chat_templates") or []
    # A name becomes that of a file when the tokenizer is saved.
    if not isinstance(names, list) or not all(TEMPLATE_NAME.fullmatch(str(name)) for name in names):
        raise CheckpointError(
            f"{file.path} has chat templates of the names {shown(names)}, which are no words; "
            "convert the original model to GGUF again."
        )
    keys = {name: f"tokenizer.chat_template.{name}" for name in names}
    default_key = "tokenizer.chat_template"
    if not names or default_key in file.facts:
        keys["default"] = default_key
    found: dict[str, str] = {}
    for name, key in keys.items():
        template = file.facts.get(key)
        if isinstance(template, str):
            found[name] = template
        elif names or template is not None:
            raise CheckpointError(
                f"{file.path} has the chat template {shown(template)}, which is no text; convert "
                "the original model to GGUF again."
            )
    return found if names else found.get("default")


def _with_added_tokens(
    file: GgufFile, tokens: list[str], backend: Tokenizer, byte_level: bool
) -> Tokenizer:
    """Return a tokenizer whose added tokens are the file's, each with its text and id.

    `transformers` spells all of a byte-level vocabulary in the letters that stand for bytes and
    then does not find added tokens such as `<｜User｜>` or `New York`, which stand in the file as
    they are. It also adds the special tokens of its own class, which the model may not have.
    """
    kinds = file.facts.get("tokenizer.ggml.token_type") or []
    added = {
        index: kind == TokenType.CONTROL
        for index, kind in enumerate(kinds)
        if byte_level and kind in (TokenType.CONTROL, TokenType.USER_DEFINED)
    }
    letters = bytes_to_unicode()
    is_spelled = [set(text) <= set(letters.values()) for text in tokens]
    content = json.loads(backend.to_str())
    known = {token["id"]: token for token in content["added_tokens"] if token["id"] < len(tokens)}
    if len(known) == len(content["added_tokens"]) and all(is_spelled[index] for index in added):
        return backend
    if byte_level:
        as_bytes = {
            "".join(letters[byte] for byte in text.encode()): index
            for index, text in enumerate(tokens)
            if index not in added and not is_spelled[index]
        }
        as_written = {
            text: index for index, text in enumerate(tokens) if index in added or is_spelled[index]
        }
        content["model"]["vocab"] = as_bytes | as_written
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    for index, special in added.items():
        known[index] = {"id": index, "content": tokens[index], "special": special, **flags}
    content["added_tokens"] = [known[index] for index in sorted(known)]
    return Tokenizer.from_str(json.dumps(content))


def _check_ids(file: GgufFile, tokens: list[str], tokenizer: PreTrainedTokenizerFast) -> None:
    """Raise `CheckpointError` unless the special tokens have the file's ids and none is new."""
    for name, key in SPECIAL_TOKENS.items():
        index = file.token_id(key)
        if index is not None and getattr(tokenizer, f"{name}_token_id") != index:
            raise CheckpointError(
                f"{file.path} has the {key} token {shown(tokens[index])} under several ids or "
                f"none, not under {index} alone; convert the original model to GGUF again."
            )
    if len(tokenizer) > len(tokens):
        raise CheckpointError(
            f"The tokenizer in {file.path} makes {len(tokenizer)} tokens of the file's "
            f"{len(tokens)}; convert the original model to GGUF again."
        )


def _token(file: GgufFile, tokens: list[str], key: str) -> str | None:
    index = file.token_id(key)
    return None if index is None else tokens[index]


def _remove_prefix(backend: Tokenizer) -> None:
    """Make a SentencePiece tokenizer put no space before a text.

    `transformers` reads the field but does not use it. Gemma's tokenizer has none of these steps.
    """
    if isinstance(backend.pre_tokenizer, pre_tokenizers.Metaspace):
        backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="never", split=False)
    if "Prepend" in str(backend.normalizer):
        backend.normalizer = normalizers.Replace(pattern=" ", content=SPACE)
    if "Strip" in str(backend.decoder):
        steps = [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
        backend.decoder = decoders.Sequence(steps)


def _set_split_rule(file: GgufFile, backend: Tokenizer) -> None:
    """Set the split rule of a byte-level tokenizer if `transformers` does not know it.

    Raises:
        CheckpointError: the rule is unknown here, too.
    """
    rule = str(file.fact("tokenizer.ggml.pre"))
    if rule in WHOLE_WORDS:
        backend.model.ignore_merges = True
    if rule in DIGIT_SPLITS:
        backend.pre_tokenizer = pre_tokenizers.Sequence(
            [
                pre_tokenizers.Digits(individual_digits=True),
                pre_tokenizers.ByteLevel(add_prefix_space=False),
            ]
        )
    elif rule not in GPT2_SPLITS and rule not in GGUF_PRE_TOKENIZER_SPLITS:
        known_rules = [*GPT2_SPLITS, *DIGIT_SPLITS, *GGUF_PRE_TOKENIZER_SPLITS]
        raise CheckpointError(
            f"{file.path} splits text by the unknown rule {rule!r}; {nearest(rule, known_rules)}."
        )
