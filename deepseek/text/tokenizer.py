"""Tokenizers: always the Hugging Face fast kind, loaded from a model folder, never from remote code."""

import hashlib
import json
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path

from tokenizers import Tokenizer
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from deepseek.errors import CheckpointError

DOCUMENT_END = "<|endoftext|>"
"""What most open models saw between pre-training documents; their `eos_token` is often the end of a chat turn."""


def load_tokenizer(folder: str | Path) -> PreTrainedTokenizerFast:
    """Return the tokenizer saved in `folder`; raise `CheckpointError` where there is none or it has no fast form."""
    folder = Path(folder)
    if not (folder / "tokenizer.json").is_file() and not (folder / "tokenizer_config.json").is_file():
        raise CheckpointError(f"{folder} holds no tokenizer.json; point to a model folder saved by save_pretrained.")
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except (OSError, ValueError, KeyError, ImportError) as error:
        raise CheckpointError(f"The tokenizer in {folder} cannot be read ({error}); fetch the model again.") from error
    if not isinstance(tokenizer, PreTrainedTokenizerFast):
        raise CheckpointError(f"The tokenizer in {folder} has no tokenizer.json; convert it with its own fast class.")
    return tokenizer


@lru_cache(maxsize=4)
def plain_encoder(tokenizer: PreTrainedTokenizerFast) -> Tokenizer:
    """Return a copy of the backend that reads control tokens such as `<|im_end|>` in a text as ordinary characters.

    Foreign text must never become control tokens: a source file that mentions `<|im_end|>` would end a turn.
    """
    encoder = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
    encoder.encode_special_tokens = True
    encoder.no_truncation()
    encoder.no_padding()
    return encoder


def encode_plain(tokenizer: PreTrainedTokenizerFast, texts: Sequence[str]) -> list[list[int]]:
    """Return the ids of each text (all cores), without control tokens, beginning or end of sequence."""
    encodings = plain_encoder(tokenizer).encode_batch_fast(list(texts), add_special_tokens=False)
    return [encoding.ids for encoding in encodings]


def document_start_ids(tokenizer: PreTrainedTokenizerFast) -> list[int]:
    """Return what this tokenizer puts before every text: `[bos]` for Llama and Mistral, nothing for GPT-2 kinds."""
    bos = tokenizer.bos_token_id
    return [bos] if bos is not None and bos in tokenizer("").input_ids else []


def document_end_id(tokenizer: PreTrainedTokenizerFast) -> int:
    """Return the id that ends a document: `<|endoftext|>` where the vocabulary has it, else `eos_token`."""
    identity = tokenizer.get_vocab().get(DOCUMENT_END, tokenizer.eos_token_id)
    if identity is None:
        raise CheckpointError("The tokenizer has no end-of-sequence token; set eos_token in its tokenizer_config.json.")
    return int(identity)


def tokenizer_digest(tokenizer: PreTrainedTokenizerFast) -> str:
    """Return a sha256 over everything that decides which ids a text or a conversation gets."""
    parts = (tokenizer.backend_tokenizer.to_str(), tokenizer.chat_template, document_end_id(tokenizer))
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()
