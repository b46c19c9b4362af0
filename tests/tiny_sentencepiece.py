"""A tokenizer like Llama 2's, which puts a space before a text, created in memory."""

from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast

SCHEMES = ("Prepend", "first", "always")
"""Ways to put a space before a text: Llama 2's normalizer, and the schemes of `Metaspace`. "first"
puts one only before the beginning, the others also after each control token.
"""

ZEPHYR = (
    "{% for message in messages %}<|{{ message['role'] }}|>\n{{ message['content'] }}</s>\n"
    "{% endfor %}{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
)
"""TinyLlama's chat template, whose role names are ordinary text."""

MERGES = ("t h", "th e", "▁ the", "▁ a", "f i", "fi n", "fin e", "▁ fine")


def tiny_sentencepiece(
    scheme: str, extra: tuple[str, ...] = (), chat_template: str = ZEPHYR
) -> PreTrainedTokenizerFast:
    """Return a tokenizer that knows all bytes, letters, a few merges and `extra` control tokens.

    Args:
        scheme: one of `SCHEMES`.
        extra: further control tokens.
        chat_template: its chat template.
    """
    merges = [(first, second) for first, second in map(str.split, MERGES)]
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    tokens += ["▁", *map(chr, range(ord("!"), ord("~") + 1)), *(a + b for a, b in merges)]
    backend = Tokenizer(
        models.BPE(
            {token: index for index, token in enumerate(tokens)},
            merges,
            unk_token="<unk>",
            fuse_unk=True,
            byte_fallback=True,
        )
    )
    if scheme == "Prepend":
        backend.normalizer = normalizers.Sequence(
            [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
        )
    else:
        backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme, split=False)
    backend.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    backend.add_special_tokens(["<unk>", "<s>", "</s>", *extra])
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        chat_template=chat_template,
    )
