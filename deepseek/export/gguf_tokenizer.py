"""The metadata of a tokenizer in a GGUF file, under llama.cpp's names."""

import json
import re
import unicodedata
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from gguf import TokenType
from transformers import PreTrainedTokenizerFast
from transformers.integrations.gguf.gguf_tokenizer_mapping import GGUF_PRE_TOKENIZER_SPLITS

from deepseek.checkpoint.gguf.reader import read_gguf
from deepseek.checkpoint.gguf.tokenizer import SPECIAL_TOKENS, gguf_tokenizer
from deepseek.checkpoint.store import read_object
from deepseek.errors import CheckpointError, ConfigError, shown

NEVER_MERGED = -1e6
"""Score of tokens that no merge produces; llama.cpp merges by the highest score."""

END_ROLES = {"eot": "<|eot_id|>", "eom": "<|eom_id|>"}
"""Roles of end tokens beside EOS -> Llama 3's token: the end of a turn, and that of a message
before a tool's answer.
"""

WORDS, JOINED = 20_000, 100
"""Words of the vocabulary of which a file's tokenizer has to make the same ids, about, and texts
into which they are joined.
"""

SPACE_PREFIXES = ('"Prepend"', '"prepend_scheme": "first"', '"prepend_scheme": "always"')
"""Parts of a tokenizer's JSON by which it puts a space before a text."""


SPACE_NORMALIZERS = {"Prepend", "Replace"}
"""Normalizers of SentencePiece tokenizers, which write spaces as a sign of their own."""

WHOLE_SPLITS = (("Isolated", False), ("Removed", True))
"""`behavior` and `invert` of a `Split` whose parts are the matches of its pattern."""


def tokenizer_facts(
    tokenizer: PreTrainedTokenizerFast, vocab_size: int, stops: Iterable[int | None]
) -> dict[str, Any]:
    """Return the metadata of a tokenizer.

    Args:
        tokenizer: a tokenizer whose backend is byte-level BPE or BPE with byte tokens.
        vocab_size: rows of the model's embedding; rows without a token get unused ones.
        stops: ids of the tokens at which generation stops. Beside EOS the format has places for
            two, and the others are left out.

    Raises:
        ConfigError: llama.cpp has no such tokenizer: it knows another normalizer, splits text by
            another rule or puts other tokens around a text.
    """
    content = json.loads(tokenizer.backend_tokenizer.to_str())
    model = content["model"]
    if model["type"] != "BPE":
        raise ConfigError(
            f"Tokenizers of type {model['type']} are not written as GGUF; only BPE ones are."
        )
    byte_tokens = bool(model.get("byte_fallback"))
    merges = [m.split(" ") if isinstance(m, str) else m for m in model["merges"]]
    _check_normalizer(content, byte_tokens)
    adds_bos, adds_eos = _ends_added(tokenizer, vocab_size)
    tokens, kinds = _vocabulary(tokenizer, content, vocab_size)
    facts: dict[str, Any] = {
        "tokenizer.ggml.model": "llama" if byte_tokens else "gpt2",
        "tokenizer.ggml.pre": "default" if byte_tokens else _split_rule(content),
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": kinds,
        "tokenizer.ggml.add_bos_token": adds_bos,
        "tokenizer.ggml.add_eos_token": adds_eos,
    }
    if byte_tokens:
        facts["tokenizer.ggml.scores"] = _scores(tokens, merges)
        facts["tokenizer.ggml.add_space_prefix"] = _adds_space(content)
    else:
        facts["tokenizer.ggml.merges"] = [" ".join(merge) for merge in merges]
    for name, key in SPECIAL_TOKENS.items():
        index = getattr(tokenizer, f"{name}_token_id")
        # An added token without a row has no place in the file, as in `_vocabulary`.
        if index is not None and index < vocab_size:
            facts[f"tokenizer.ggml.{key}_token_id"] = index
    stop_ids = [index for index in stops if index is not None and 0 <= index < vocab_size]
    for role, index in _end_tokens(tokenizer, stop_ids).items():
        facts[f"tokenizer.ggml.{role}_token_id"] = index
    return facts | _template_facts(tokenizer.chat_template)


def stop_ids(folder: Path) -> list[int]:
    """Return the ids of the tokens at which generation stops.

    Without a generation config they are read from the model's config, as `transformers` does.

    Raises:
        CheckpointError: they are no whole numbers.
    """
    file = folder / "generation_config.json"
    if not file.is_file():
        file = folder / "config.json"
    stops = read_object(file).get("eos_token_id") or []
    stops = stops if isinstance(stops, list) else [stops]
    if not all(type(stop) is int for stop in stops):
        raise CheckpointError(f"{file} has an eos_token_id that is no token's number; correct it.")
    return stops


def check_tokenizer(tokenizer: PreTrainedTokenizerFast, path: Path) -> None:
    """Raise `ConfigError` unless the tokenizer in a GGUF file makes the same ids of text.

    The texts are words of the vocabulary, one by one and joined, so that rules of merging and of
    splitting show. They are composed (NFC), as some tokenizers do and llama.cpp does not. Left out
    are added tokens, parts of characters, and texts that begin with a space where another one is
    put before a text, on which programs differ.

    Args:
        tokenizer: the model's tokenizer.
        path: the GGUF file.
    """
    back = gguf_tokenizer(read_gguf(path))
    added = tokenizer.added_tokens_decoder
    ids = [[index] for index in range(len(tokenizer)) if index not in added]
    decoded = tokenizer.batch_decode(ids[:: max(1, len(ids) // WORDS)])
    words = [text for text in decoded if "\ufffd" not in text]
    joined = ["".join(words[start::JOINED]) for start in range(JOINED)]
    texts = [unicodedata.normalize("NFC", text) for text in words + joined]
    if _adds_space(json.loads(tokenizer.backend_tokenizer.to_str())):
        texts = [text for text in texts if not text.startswith(" ")]
    here = tokenizer(texts, add_special_tokens=False).input_ids
    there = back(texts, add_special_tokens=False).input_ids
    differing = [
        text for text, ours, theirs in zip(texts, here, there, strict=True) if ours != theirs
    ]
    if differing:
        raise ConfigError(
            f"llama.cpp would make other tokens of {len(differing)} of {len(texts)} texts, such as "
            f"{shown(min(differing, key=len))}; keep the model's own folder."
        )


def _check_normalizer(content: dict[str, Any], byte_tokens: bool) -> None:
    """Raise `ConfigError` if a normalizer changes text in a way that llama.cpp does not."""
    step = content["normalizer"]
    steps = step["normalizers"] if step and step["type"] == "Sequence" else [step] if step else []
    allowed = SPACE_NORMALIZERS if byte_tokens else {"NFC"}
    for part in steps:
        if part["type"] not in allowed:
            raise ConfigError(
                f"The tokenizer changes text by the normalizer {part['type']}, which llama.cpp "
                "does not have; keep the model's own folder."
            )


def _ends_added(tokenizer: PreTrainedTokenizerFast, vocab_size: int) -> tuple[bool, bool]:
    """Return whether the tokenizer puts BOS before a text, and EOS after it.

    Raises:
        ConfigError: it puts other tokens there, or ones without a row of the model.
    """
    plain = tokenizer("a", add_special_tokens=False).input_ids
    ids = tokenizer("a").input_ids
    bos, eos = (
        [index] if index is not None and index < vocab_size else []
        for index in (tokenizer.bos_token_id, tokenizer.eos_token_id)
    )
    for before, after in (([], []), (bos, []), ([], eos), (bos, eos)):
        if ids == [*before, *plain, *after]:
            return bool(before), bool(after)
    raise ConfigError(
        f"The tokenizer makes {tokenizer.convert_ids_to_tokens(ids)} of the text 'a'; llama.cpp "
        "can only put BOS before a text and EOS after it. Keep the model's own folder."
    )


def _template_facts(templates: str | dict[str, str] | None) -> dict[str, Any]:
    """Return the metadata of a chat template, or of several by their names."""
    if templates is None:
        return {}
    if isinstance(templates, str):
        return {"tokenizer.chat_template": templates}
    # llama.cpp's converter writes other characters of a name as underscores.
    by_name = {re.sub("[^A-Za-z0-9_]", "_", name): text for name, text in templates.items()}
    default = by_name.pop("default", None)
    facts: dict[str, Any] = {
        f"tokenizer.chat_template.{name}": text for name, text in by_name.items()
    }
    if by_name:
        facts["tokenizer.chat_templates"] = list(by_name)
    if default is not None:
        facts["tokenizer.chat_template"] = default
    return facts


def _end_tokens(tokenizer: PreTrainedTokenizerFast, stops: Iterable[int]) -> dict[str, int]:
    """Return the tokens of `END_ROLES`: those with Llama 3's texts, and then the first others."""
    remaining_ids = [index for index in dict.fromkeys(stops) if index != tokenizer.eos_token_id]
    ids_by_text = {tokenizer.convert_ids_to_tokens(index): index for index in remaining_ids}
    ends = {role: ids_by_text[text] for role, text in END_ROLES.items() if text in ids_by_text}
    remaining_ids = [index for index in remaining_ids if index not in ends.values()]
    return ends | dict(
        zip((role for role in END_ROLES if role not in ends), remaining_ids, strict=False)
    )


def _vocabulary(
    tokenizer: PreTrainedTokenizerFast, content: dict[str, Any], vocab_size: int
) -> tuple[list[str], list[int]]:
    """Return the text and the kind of every token by id."""
    texts = {index: text for text, index in tokenizer.get_vocab().items()}
    special = {token["id"]: token["special"] for token in content["added_tokens"]}
    # Added tokens without a row are ignored: they are placeholders, such as for an image.
    largest_id = max(texts.keys() - special.keys(), default=0)
    if largest_id >= vocab_size:
        raise ConfigError(
            f"The tokenizer has {largest_id + 1} tokens, more than the model's {vocab_size}; "
            "llama.cpp cannot use it."
        )
    tokens = []
    kinds = []
    for index in range(vocab_size):
        text = texts.get(index, f"[PAD{index}]")
        tokens.append(text)
        kinds.append(int(_kind(tokenizer, content, index, text, special, index in texts)))
    return tokens, kinds


def _kind(
    tokenizer: PreTrainedTokenizerFast,
    content: dict[str, Any],
    index: int,
    text: str,
    special: dict[int, bool],
    is_used: bool,
) -> TokenType:
    byte_fallback = content["model"].get("byte_fallback")
    if not is_used:
        return TokenType.UNUSED
    if byte_fallback and index == tokenizer.unk_token_id:
        return TokenType.UNKNOWN
    if index in special:
        return TokenType.CONTROL if special[index] else TokenType.USER_DEFINED
    if byte_fallback and len(text) == 6 and text.startswith("<0x") and text.endswith(">"):
        return TokenType.BYTE
    return TokenType.NORMAL


def _scores(tokens: list[str], merges: list[list[str]]) -> list[float]:
    """Return SentencePiece scores by which llama.cpp merges in the order of `merges`."""
    ranks: dict[str, int] = {}
    for rank, (left, right) in enumerate(merges):
        ranks.setdefault(left + right, rank)
    return [-float(ranks[token]) if token in ranks else NEVER_MERGED for token in tokens]


def _adds_space(content: dict[str, Any]) -> bool:
    """Return whether a space is put before each text."""
    steps = json.dumps([content.get("normalizer"), content.get("pre_tokenizer")])
    return any(step in steps for step in SPACE_PREFIXES)


def _split_rule(content: dict[str, Any]) -> str:
    """Return llama.cpp's name for the rule by which a byte-level tokenizer splits text."""
    step = content["pre_tokenizer"] or {"type": "none"}
    steps = step["pretokenizers"] if step["type"] == "Sequence" else [step]
    kinds = [part["type"] for part in steps]
    if kinds[-1:] == ["ByteLevel"]:
        if steps[-1]["add_prefix_space"]:
            raise ConfigError(
                "The tokenizer puts a space before a text (add_prefix_space), which llama.cpp "
                "does not do for byte-level tokenizers; keep the model's own folder."
            )
        splits_words = steps[-1]["use_regex"]
        if kinds == ["ByteLevel"] and splits_words:
            return "gpt-2"
        if kinds == ["Digits", "ByteLevel"] and steps[0]["individual_digits"] and splits_words:
            return "smollm"
        if kinds == ["Split", "ByteLevel"] and not splits_words:
            for name, pattern in GGUF_PRE_TOKENIZER_SPLITS.items():
                if (
                    steps[0]["pattern"].get("Regex") == pattern
                    and (steps[0]["behavior"], steps[0]["invert"]) in WHOLE_SPLITS
                ):
                    return name
    raise ConfigError(
        "The tokenizer splits text by a rule that llama.cpp has no known name for; convert the "
        "model with llama.cpp's own converter."
    )
