"""Load or train Hugging Face fast tokenizers. Remote code is never run."""

import hashlib
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from deepseek.errors import CheckpointError, ConfigError, DataError, shown
from deepseek.terminal import is_unicode
from deepseek.text.control import control_tokens, unflagged_control_tokens

DOCUMENT_END = "<|endoftext|>"
"""Separator of pre-training documents in most open models, whose `eos_token` often ends a chat turn
instead.
"""


def load_tokenizer(folder: str | Path) -> PreTrainedTokenizerFast:
    """Return the tokenizer in a model folder.

    Raises:
        CheckpointError: there is no tokenizer, it cannot be read, or it is not a fast tokenizer.
    """
    folder = Path(folder)
    if (
        not (folder / "tokenizer.json").is_file()
        and not (folder / "tokenizer_config.json").is_file()
    ):
        raise CheckpointError(
            f"{folder} holds no tokenizer.json; save the model's tokenizer there too, with "
            "`tokenizer.save_pretrained`."
        )
    try:
        tokenizer = AutoTokenizer.from_pretrained(
            folder, local_files_only=True, trust_remote_code=False
        )
    except Exception as error:  # the Rust part raises bare exceptions, the rest many types
        raise CheckpointError(
            f"The tokenizer in {folder} cannot be read ({error}); fetch the model again."
        ) from error
    if not isinstance(tokenizer, PreTrainedTokenizerFast):
        raise CheckpointError(
            f"The tokenizer in {folder} has no tokenizer.json; convert it with its own fast class."
        )
    return tokenizer


def plain_encoder(tokenizer: PreTrainedTokenizerFast) -> Tokenizer:
    """Return a copy of the backend that encodes control tokens in a text as ordinary characters.

    Untrusted text must never become control tokens: a source file that mentions `<|im_end|>` would
    end a turn.
    """
    return _plain_encoders(tokenizer, control_tokens(tokenizer)).first


def encode_plain(tokenizer: PreTrainedTokenizerFast, texts: Sequence[str]) -> list[list[int]]:
    """Return the ids of each text, without control, BOS or EOS tokens. Uses all cores.

    Raises:
        DataError: a text holds a lone surrogate, half of a character.
    """
    return _encode(plain_encoder(tokenizer), texts)


def encode_continued(tokenizer: PreTrainedTokenizerFast, texts: Sequence[str]) -> list[list[int]]:
    """Return the ids of texts that continue others, without control, BOS or EOS tokens.

    They differ from those of `encode_plain` for tokenizers that put a space before a text, such as
    Llama 2's: a text that is encoded in parts would get a space between them.

    Args:
        tokenizer: the tokenizer.
        texts: the texts; each stands directly after other text.

    Raises:
        DataError: a text holds a lone surrogate, half of a character.
    """
    return _encode(_plain_encoders(tokenizer, control_tokens(tokenizer)).continuation, texts)


@dataclass(frozen=True)
class _PlainEncoders:
    """Copies of a backend that encode control tokens as ordinary characters.

    Attributes:
        first: encodes texts as the tokenizer does.
        continuation: puts no space before a text; the same one if the tokenizer puts none.
    """

    first: Tokenizer
    continuation: Tokenizer


@lru_cache(maxsize=4)
def _plain_encoders(tokenizer: PreTrainedTokenizerFast, control: tuple[str, ...]) -> _PlainEncoders:
    """Return the plain encoders of a tokenizer.

    Args:
        tokenizer: the tokenizer.
        control: texts of its control tokens, with which the result is cached.
    """
    content = tokenizer.backend_tokenizer.to_str()
    first = _plain_copy(content, control)
    if not puts_space_before(tokenizer):
        return _PlainEncoders(first, first)
    steps = json.loads(content)
    for name in ("normalizer", "pre_tokenizer"):
        steps[name] = _without_space(steps[name])
    return _PlainEncoders(first, _plain_copy(json.dumps(steps), control))


def _plain_copy(content: str, control: Sequence[str]) -> Tokenizer:
    """Return a backend that encodes control tokens as ordinary characters.

    Args:
        content: the backend as JSON.
        control: texts of the control tokens.
    """
    encoder = Tokenizer.from_str(content)
    # `encode_special_tokens` applies to tokens flagged as special. These are in the vocabulary
    # already, so adding them only flags them.
    encoder.add_special_tokens([AddedToken(text, special=True) for text in control])
    encoder.encode_special_tokens = True
    encoder.no_truncation()
    encoder.no_padding()
    return encoder


def puts_space_before(tokenizer: PreTrainedTokenizerFast) -> bool:
    """Return whether a tokenizer puts a space before a text, as many SentencePiece ones do."""
    backend = tokenizer.backend_tokenizer
    parts = [part for part in (backend.normalizer, backend.pre_tokenizer) if part is not None]
    steps = [json.loads(part.__getstate__()) for part in parts]
    return any(_without_space(step) != step for step in steps)


def _without_space(step: dict[str, Any] | None) -> dict[str, Any] | None:
    """Return a step of a backend, as JSON, that puts no space before a text; None: no step.

    Args:
        step: a normalizer or a pre-tokenizer.
    """
    if step is None or step["type"] == "Prepend":
        return None
    new_step = dict(step)
    for name in ("normalizers", "pretokenizers"):
        if name in step:
            inner_steps = [_without_space(inner_step) for inner_step in step[name]]
            new_step[name] = [inner_step for inner_step in inner_steps if inner_step is not None]
    if "prepend_scheme" in step:
        new_step["prepend_scheme"] = "never"
    if "add_prefix_space" in step:
        new_step["add_prefix_space"] = False
    return new_step


def _encode(encoder: Tokenizer, texts: Sequence[str]) -> list[list[int]]:
    try:
        encodings = encoder.encode_batch_fast(list(texts), add_special_tokens=False)
    except TypeError:
        broken_text = next((text for text in texts if not is_unicode(text)), None)
        if broken_text is None:
            raise
        raise DataError(
            f"{shown(broken_text)} is no Unicode text (it holds half of a surrogate pair); write "
            "it as UTF-8."
        ) from None
    return [encoding.ids for encoding in encodings]


def document_start_ids(tokenizer: PreTrainedTokenizerFast) -> list[int]:
    """Return the ids that this tokenizer puts before every text.

    These are `[bos]` for Llama and Mistral, and none for tokenizers of the GPT-2 kind.
    """
    bos = tokenizer.bos_token_id
    return [bos] if bos is not None and bos in tokenizer("").input_ids else []


def encode_document(tokenizer: PreTrainedTokenizerFast, text: str) -> list[int]:
    """Return the ids of a text without control tokens, after those that stand before every text."""
    return [*document_start_ids(tokenizer), *encode_plain(tokenizer, [text])[0]]


def document_end_id(tokenizer: PreTrainedTokenizerFast) -> int:
    """Return the id that ends a document: `<|endoftext|>` if the vocabulary has it, else EOS.

    Raises:
        CheckpointError: the tokenizer has neither.
    """
    end_id = tokenizer.get_vocab().get(DOCUMENT_END, tokenizer.eos_token_id)
    if end_id is None:
        raise CheckpointError(
            "The tokenizer has no end-of-sequence token; set eos_token in its "
            "tokenizer_config.json."
        )
    return int(end_id)


def tokenizer_digest(tokenizer: PreTrainedTokenizerFast) -> str:
    """Return a SHA-256 over everything that determines the ids of a text or a conversation.

    It serves as a cache key of tokenised data.
    """
    parts = [
        tokenizer.backend_tokenizer.to_str(),
        tokenizer.chat_template,
        document_end_id(tokenizer),
    ]
    # Only if our ids differ from the tokenizer's own: other tokenizers keep their digests, so that
    # stored data stays valid.
    unflagged_tokens = unflagged_control_tokens(tokenizer)
    if unflagged_tokens:
        parts.append({"control": unflagged_tokens})
    if puts_space_before(tokenizer):
        parts.append({"continued": "no space"})
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


CONTROL = (DOCUMENT_END, "<|im_start|>", "<|im_end|>")
"""Control tokens of a trained tokenizer: end of document, and ChatML's start and end of turn."""

CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n"
    "{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)

WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
"""Pre-tokenisation pattern, that of GPT-4. It keeps runs of digits and spaces short."""


def train_tokenizer(texts: Iterable[str], vocab_size: int) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE tokenizer (arXiv:1508.07909).

    Args:
        texts: training texts.
        vocab_size: number of ids, control tokens included.

    Raises:
        ConfigError: `vocab_size` is too small for all bytes and control tokens.
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
