"""A new tokenizer from text: byte-level BPE, in which every text is some sequence of tokens."""

from collections.abc import Iterable

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from deepseek.errors import ConfigError
from deepseek.text.tokenizer import DOCUMENT_END

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
"""How text is cut before merges are learned: GPT-4's pattern, with which runs of spaces and digits stay short."""


def train_tokenizer(texts: Iterable[str], vocab_size: int) -> PreTrainedTokenizerFast:
    """Return a byte-level BPE tokenizer (arXiv:1508.07909) of `vocab_size` ids, learned from `texts`.

    Raises `ConfigError` if the size has no room for all bytes and control tokens.
    """
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    least = len(alphabet) + len(CONTROL)
    if vocab_size < least:
        raise ConfigError(f"vocab_size={vocab_size} is too small; all bytes and control tokens take {least}.")
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(WORDS), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size, special_tokens=list(CONTROL), initial_alphabet=alphabet, show_progress=False
    )
    backend.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, eos_token=DOCUMENT_END, pad_token=DOCUMENT_END, chat_template=CHAT_TEMPLATE
    )
