"""The tokenizer of a GGUF file, with its chat template.

`transformers` rebuilds it from the vocabulary, but splits text by GPT-2's rule if it does not know
the file's rule, which silently gives other ids. Here an unknown rule is an error.
"""

from typing import Any

from tokenizers import Tokenizer, decoders, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast
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

SPECIAL_TOKENS = {"bos": "bos", "eos": "eos", "unk": "unknown", "pad": "padding"}
"""Name in `transformers` -> name in GGUF metadata."""


def gguf_tokenizer(file: GgufFile) -> PreTrainedTokenizerFast:
    """Return the tokenizer of a GGUF file.

    Its chat template is the file's; a file without one gives a tokenizer without one. The end token
    pads if the file names no other.

    Raises:
        CheckpointError: there is no vocabulary, or its kind or split rule is not known.
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
    template = file.facts.get("tokenizer.chat_template")
    if not isinstance(template, str | None):
        raise CheckpointError(
            f"{file.path} has the chat template {shown(template)}, which is no text; convert the "
            "original model to GGUF again."
        )
    tokens = file.fact("tokenizer.ggml.tokens")
    described = {
        name: file.facts[f"tokenizer.{key}"]
        for key, name in GGUF_TOKENIZER_MAPPING["tokenizer"].items()
        if f"tokenizer.{key}" in file.facts
    }
    try:
        backend, _ = convert_gguf_tokenizer(file.architecture, described)
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
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        chat_template=template,
        model_max_length=file.facts.get(f"{file.architecture}.context_length"),
        add_bos_token=bool(file.facts.get("tokenizer.ggml.add_bos_token", adds_bos)),
        add_eos_token=bool(file.facts.get("tokenizer.ggml.add_eos_token", False)),
        **special,
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
