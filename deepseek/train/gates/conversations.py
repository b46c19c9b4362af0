"""Conversations as public text: everyday messages with the base's replies, and sampled
conversations.

Their rows are used like other public text (`public_text.py`): experts replay them, and gates are
calibrated against them. Each row is the model's input in a chat: the template with its system
prompt, a user message, and the base's own reply.
"""

from collections.abc import Iterator, Sequence
from dataclasses import replace

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from deepseek.data.builders.everyday import Conversation, everyday_conversations
from deepseek.data.text.document import Progress, silent
from deepseek.engine.engine import Engine
from deepseek.engine.request import ExpertChoice, Request
from deepseek.engine.sampler import Sampling
from deepseek.engine.start import quickest_runner
from deepseek.model.language_model import LanguageModel, context_length
from deepseek.text.chat_template import encode_prompt, encode_rendered, render
from deepseek.text.tokenizer import document_end_id, encode_plain

PAIR_STRIDE = 8
"""One pair of neighbouring everyday conversations in this many becomes two rows."""

INVENTED = 32
"""Number of rows in which the base also writes the user message."""

PLACEHOLDER = "placeholder"


def conversation_halves() -> tuple[list[Conversation], list[Conversation]]:
    """Return the everyday conversations for fitting and those for thresholds, both in all
    languages.
    """
    conversations = everyday_conversations()
    return list(conversations[0::2]), list(conversations[1::2])


def conversation_rows(
    model: LanguageModel,
    tokenizer: PreTrainedTokenizerFast,
    length: int,
    progress: Progress = silent,
) -> Tensor:
    """Return ids `[R, length]`: even rows for fitting, odd rows for thresholds.

    There are no rows if the model's context is not longer than a row.
    """
    if context_length(model) <= length:
        return torch.empty(0, length, dtype=torch.long)
    fitted, reserved = conversation_halves()
    openings = []
    for place in range(0, len(reserved), PAIR_STRIDE):
        openings += [
            opening(tokenizer, fitted[place].turns[0]),
            opening(tokenizer, reserved[place].turns[0]),
        ]
    openings += [open_turn(tokenizer)] * INVENTED
    sampling = Sampling(length, temperature=0.8, top_k=50)
    rows = []
    with Engine(model, tokenizer, quickest_runner(model), max_waiting=len(openings)) as engine:
        requests = [
            Request(
                tuple(ids[:length]), replace(sampling, seed=seed), ExpertChoice(()), ignore_end=True
            )
            for seed, ids in enumerate(openings)
        ]
        generations = [engine.submit(request) for request in requests]
        for done, generation in enumerate(generations):
            progress(done, len(generations), "conversations")
            rows.append(
                [*generation.request.prompt_ids, *(event.token_id for event in generation)][:length]
            )
    return torch.tensor(rows, dtype=torch.long).view(-1, length)


def without_reserved(rows_RT: Tensor, tokenizer: PreTrainedTokenizerFast) -> Tensor:
    """Return the public rows that do not begin with a message of a reserved conversation."""
    _, reserved = conversation_halves()
    openings = [
        opening(tokenizer, conversation.turns[0])[: rows_RT.shape[1]]
        for conversation in reserved[::PAIR_STRIDE]
    ]

    def is_kept(row: list[int]) -> bool:
        return not any(row[: len(begun)] == begun for begun in openings)

    kept = [is_kept(row) for row in rows_RT.tolist()]
    return rows_RT[torch.tensor(kept, dtype=torch.bool, device=rows_RT.device)]


def opening(tokenizer: PreTrainedTokenizerFast, message: str) -> list[int]:
    """Return the prompt ids of a first message; plain text if there is no chat template."""
    if tokenizer.chat_template is None:
        return [document_end_id(tokenizer), *encode_plain(tokenizer, [f"{message}\n"])[0]]
    return encode_prompt(tokenizer, [{"role": "user", "content": message}])


def open_turn(tokenizer: PreTrainedTokenizerFast) -> list[int]:
    """Return the prompt ids after which the model writes a user message."""
    if tokenizer.chat_template is None:
        return [document_end_id(tokenizer)]
    text = render(tokenizer, [{"role": "user", "content": PLACEHOLDER}])
    return encode_rendered(tokenizer, text[: text.index(PLACEHOLDER)])


PACKED_TOKENS = 512
"""Maximum tokens of the messages that share a forward pass."""


@torch.no_grad()
def expected_frequencies(
    model: LanguageModel,
    tokenizer: PreTrainedTokenizerFast,
    conversations: Sequence[Conversation],
    progress: Progress = silent,
) -> dict[str, Tensor]:
    """Return for each language the token frequencies `[V]` that the base expects in user messages.

    They are the mean of the base's next-token distributions over the messages, and so cover many
    more words than the messages contain.
    """
    longest = min(PACKED_TOKENS, context_length(model))
    end = document_end_id(tokenizer)
    texts = encode_plain(
        tokenizer, ["\n".join(conversation.turns) for conversation in conversations]
    )
    messages = [[end, *ids][:longest] for ids in texts]
    languages = [conversation.language for conversation in conversations]
    sums: dict[str, Tensor] = {}
    with model.experts.arming(None):
        for start, stop in _packed([len(ids) for ids in messages], longest):
            # Positions restart with every message, so that none attends to the previous one.
            ids = [token for message in messages[start:stop] for token in message]
            positions = [place for message in messages[start:stop] for place in range(len(message))]
            logits_TV = model(
                torch.tensor([ids], device=model.device),
                position_ids=torch.tensor([positions], device=model.device),
                use_cache=False,
            ).logits[0]
            expected_TV = logits_TV.float().softmax(-1).cpu()
            parts = expected_TV.split([len(message) for message in messages[start:stop]])
            for language, part_TV in zip(languages[start:stop], parts, strict=True):
                sums[language] = sums.get(language, 0.0) + part_TV.sum(0)
            progress(stop, len(messages), "expected words")
    return {language: total_V / total_V.sum() for language, total_V in sums.items()}


def _packed(lengths: Sequence[int], longest: int) -> Iterator[tuple[int, int]]:
    """Yield (start, stop) of consecutive messages that fit into one row of `longest` tokens."""
    start = 0
    used = 0
    for place, length in enumerate(lengths):
        if used + length > longest:
            yield start, place
            start = place
            used = 0
        used += length
    if used:
        yield start, len(lengths)
