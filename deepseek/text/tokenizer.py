"""Tokenizers: always the Hugging Face fast kind, loaded from a model folder, never from remote
code, or learned.
"""

import hashlib
import json
from collections.abc import Iterable, Sequence
from functools import lru_cache
from pathlib import Path

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from deepseek.errors import CheckpointError, ConfigError

DOCUMENT_END = "<|endoftext|>"
"""What most open models saw between pre-training documents; their `eos_token` is often the end of a
chat turn.
"""


def load_tokenizer(folder: str | Path) -> PreTrainedTokenizerFast:
    """Return the tokenizer saved in `folder`; raise `CheckpointError` where there is none or it has
    no fast form.
    """
    folder = Path(folder)
    if (
        not (folder / "tokenizer.json").is_file()
        and not (folder / "tokenizer_config.json").is_file()
    ):
        raise CheckpointError(
            f"{folder} holds no tokenizer.json; point to a model folder saved by save_pretrained."
        )
    try:
        tokenizer = AutoTokenizer.from_pretrained(
            folder, local_files_only=True, trust_remote_code=False
        )
    except (OSError, ValueError, KeyError, ImportError) as error:
        raise CheckpointError(
            f"The tokenizer in {folder} cannot be read ({error}); fetch the model again."
        ) from error
    if not isinstance(tokenizer, PreTrainedTokenizerFast):
        raise CheckpointError(
            f"The tokenizer in {folder} has no tokenizer.json; convert it with its own fast class."
        )
    return tokenizer


@lru_cache(maxsize=4)
def plain_encoder(tokenizer: PreTrainedTokenizerFast) -> Tokenizer:
    """Return a copy of the backend that reads control tokens such as `<|im_end|>` in a text as
    ordinary characters.

    Foreign text must never become control tokens: a source file that mentions `<|im_end|>` would
    end a turn.
    """
    encoder = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
    encoder.encode_special_tokens = True
    encoder.no_truncation()
    encoder.no_padding()
    return encoder


def encode_plain(tokenizer: PreTrainedTokenizerFast, texts: Sequence[str]) -> list[list[int]]:
    """Return the ids of each text (all cores), without control tokens, beginning or end of
    sequence.
    """
    encodings = plain_encoder(tokenizer).encode_batch_fast(list(texts), add_special_tokens=False)
    return [encoding.ids for encoding in encodings]


def document_start_ids(tokenizer: PreTrainedTokenizerFast) -> list[int]:
    """Return what this tokenizer puts before every text: `[bos]` for Llama and Mistral, nothing for
    GPT-2 kinds.
    """
    bos = tokenizer.bos_token_id
    return [bos] if bos is not None and bos in tokenizer("").input_ids else []


def document_end_id(tokenizer: PreTrainedTokenizerFast) -> int:
    """Return the id that ends a document: `<|endoftext|>` where the vocabulary has it, else
    `eos_token`.
    """
    identity = tokenizer.get_vocab().get(DOCUMENT_END, tokenizer.eos_token_id)
    if identity is None:
        raise CheckpointError(
            "The tokenizer has no end-of-sequence token; set eos_token in its tokenizer_config.json."
        )
    return int(identity)


def tokenizer_digest(tokenizer: PreTrainedTokenizerFast) -> str:
    """Return a sha256 over everything that decides which ids a text or a conversation gets."""
    parts = (
        tokenizer.backend_tokenizer.to_str(),
        tokenizer.chat_template,
        document_end_id(tokenizer),
    )
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


CONTROL = (DOCUMENT_END, "<|im_start|>", "<|im_end|>")
"""The end of a document and ChatML's marks of a turn."""

CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)

WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
    r"|\s+(?!\S)|\s+"
)
"""How text is cut before merges are learned: GPT-4's pattern, with which runs of spaces and digits
stay short.
"""


def train_tokenizer(texts: Iterable[str], vocab_size: int) -> PreTrainedTokenizerFast:
    """Return a byte-level BPE tokenizer (arXiv:1508.07909) of `vocab_size` ids, learned from
    `texts`.

    Raises `ConfigError` if the size has no room for all bytes and control tokens.
    """
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    least = len(alphabet) + len(CONTROL)
    if vocab_size < least:
        raise ConfigError(
            f"vocab_size={vocab_size} is too small; all bytes and control tokens take {least}."
        )
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(WORDS), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=list(CONTROL),
        initial_alphabet=alphabet,
        show_progress=False,
    )
    backend.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        eos_token=DOCUMENT_END,
        pad_token=DOCUMENT_END,
        chat_template=CHAT_TEMPLATE,
    )
