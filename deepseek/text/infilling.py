"""Fill-in-the-middle: the token ids of a text with a gap, the same for training, evaluation and
serving (arXiv:2207.14255).

A tokenizer with markers for it belongs to a model that was trained on them in the order prefix,
suffix, middle (PSM). Other models get the same markers spelled as text, and the order suffix,
prefix, middle (SPM): the middle continues the prefix directly, so that a model that never saw a
marker continues it too, with the suffix as context, and training need only teach it to arrive at
the suffix. The cached suffix also stays valid while somebody types at the end of the prefix.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain

from transformers import PreTrainedTokenizerFast

from deepseek.text.control import FIM_TOKENS
from deepseek.text.tokenizer import encode_continued, encode_plain


@dataclass(frozen=True)
class InfillLayout:
    """How prefix and suffix are laid out before the middle.

    Attributes:
        prefix, suffix, middle: ids of the markers that open these parts.
        has_tokens: whether they are tokens of their own, of a model that was trained on them.
    """

    prefix: Sequence[int]
    suffix: Sequence[int]
    middle: Sequence[int]
    has_tokens: bool

    @property
    def markers(self) -> int:
        """Number of ids of the markers in a prompt."""
        return len(self.join([], []))

    def join(self, prefix: Sequence[int], suffix: Sequence[int]) -> list[int]:
        """Return the ids up to the middle, which follows directly.

        Args:
            prefix: ids of the text before the gap.
            suffix: ids of the text after it.
        """
        if self.has_tokens:
            return [*self.prefix, *prefix, *self.suffix, *suffix, *self.middle]
        return [*self.suffix, *suffix, *self.prefix, *prefix]

    def is_marker(self, prefix: Sequence[int], suffix: Sequence[int]) -> list[bool]:
        """Return, for each id of `join`, whether it belongs to a marker."""
        parts = (
            ((self.prefix, True), (prefix, False), (self.suffix, True), (suffix, False))
            if self.has_tokens
            else ((self.suffix, True), (suffix, False), (self.prefix, True), (prefix, False))
        )
        flags = chain.from_iterable([flag] * len(ids) for ids, flag in parts)
        return [*flags, *[True] * (len(self.middle) if self.has_tokens else 0)]


def infill_layout(tokenizer: PreTrainedTokenizerFast) -> InfillLayout:
    """Return the layout of a model, by its tokenizer."""
    vocabulary = tokenizer.get_added_vocab()
    for names in FIM_TOKENS:
        if all(name in vocabulary for name in names):
            prefix, suffix, middle = ([vocabulary[name]] for name in names)
            return InfillLayout(prefix, suffix, middle, True)
    prefix_name, suffix_name, middle_name = FIM_TOKENS[1]
    # The suffix's marker comes first. It is encoded as the beginning of a text, even after other
    # files, as in training.
    (suffix,) = encode_plain(tokenizer, [suffix_name])
    prefix, middle = encode_continued(tokenizer, [prefix_name, middle_name])
    return InfillLayout(prefix, suffix, middle, False)


@dataclass(frozen=True)
class AroundGap:
    """Token ids of the texts before and after a gap.

    Attributes:
        prefix: ids of the text before it.
        suffix: ids of the text after it.
    """

    prefix: list[int]
    suffix: list[int]


def encode_around_gap(
    tokenizer: PreTrainedTokenizerFast, layout: InfillLayout, prefix: str, suffix: str
) -> AroundGap:
    """Return the ids of the texts around a gap, without control tokens, for `InfillLayout.join`.

    A suffix continues the middle, and a prefix behind a marker that is spelled as text continues
    the marker: only a prefix behind a control token begins a text, before which many SentencePiece
    tokenizers put a space. The middle always continues its prefix; `encode_continued` encodes it.

    Args:
        tokenizer: the model's tokenizer.
        layout: its layout.
        prefix: the text before the gap.
        suffix: the text after it.

    Raises:
        DataError: a text holds a lone surrogate, half of a character.
    """
    encode_prefix = encode_plain if layout.has_tokens else encode_continued
    (prefix_ids,) = encode_prefix(tokenizer, [prefix])
    (suffix_ids,) = encode_continued(tokenizer, [suffix])
    return AroundGap(prefix_ids, suffix_ids)
