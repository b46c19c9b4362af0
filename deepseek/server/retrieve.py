"""The field `retrieve` of a request: passages of what experts were trained on, put into its prompt.

Passages come from indexes in the experts folder alone (`deepseek expert index NAME`); clients name
them, never paths.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import zip_longest

from deepseek.errors import DataError
from deepseek.retrieval.index import DEFAULT_PASSAGES, Index
from deepseek.retrieval.passages import Passage
from deepseek.retrieval.prompt import before_text, in_question, query_of
from deepseek.server.errors import ApiError
from deepseek.server.schema import ChatMessage, GenerationFields
from deepseek.server.service import Service
from deepseek.text.tokenizer import document_start_ids, encode_plain

MOST_TOKENS = 384
"""Of all passages in a prompt; less where the context has no room for them."""

TEMPLATE_TOKENS = 32
"""Kept free for the words around the passages in a chat."""


@dataclass(frozen=True)
class Retrieval:
    """What one request wants to have retrieved.

    Attributes:
        indexes: where from, in the order of their names.
        passages: how many at most.
    """

    indexes: Sequence[Index]
    passages: int

    @classmethod
    def of(cls, service: Service, body: GenerationFields) -> "Retrieval | None":
        """Return what the field `retrieve` asks for, None where it is absent or false.

        Raises `ApiError` if there is no index to take passages from.
        """
        wanted = body.retrieve
        if wanted is None or wanted is False:
            return None
        if isinstance(wanted, str):
            named = _find(service, wanted)
            if named is None:
                message = (
                    f"There is no index {wanted!r}; make one with `deepseek expert index {wanted}`."
                )
                raise ApiError(404, message, param="retrieve", code="index_not_found")
            return cls([named], DEFAULT_PASSAGES)
        names = _speakers(service, body)
        found = [index for name in names if (index := _find(service, name)) is not None]
        if not found:
            message = (
                f"No expert that may speak ({', '.join(names) or 'none'}) has an index; make one with "
                "`deepseek expert index NAME`, or leave retrieve out."
            )
            raise ApiError(400, message, param="retrieve", code="index_not_found")
        return cls(found, DEFAULT_PASSAGES if wanted is True else wanted)

    def find(self, query: str, service: Service, room: int) -> list[Passage]:
        """Return the best passages for a query that fit into `room` tokens; several indexes take
        turns.
        """

        def length(text: str) -> int:
            return len(encode_plain(service.engine.tokenizer, [text])[0])

        left = min(MOST_TOKENS, room)
        ranked = [
            index.retrieve(query, self.passages, max(0, left), length) for index in self.indexes
        ]
        chosen: list[Passage] = []
        for passage in (one for turn in zip_longest(*ranked) for one in turn if one is not None):
            size = length(passage.text)
            if len(chosen) < self.passages and size <= left:
                chosen.append(passage)
                left -= size
        return chosen

    def before(
        self, ids: Sequence[int], service: Service, answer: int
    ) -> tuple[list[int], list[Passage]]:
        """Return a plain prompt with passages before it, and these; `answer` tokens stay free."""
        tokenizer = service.engine.tokenizer
        query = query_of(str(tokenizer.decode(list(ids), skip_special_tokens=True)))
        found = self.find(
            query, service, service.writer.context - len(ids) - answer - TEMPLATE_TOKENS
        )
        start = document_start_ids(tokenizer)
        begun = len(start) if list(ids[: len(start)]) == start else 0
        return [
            *ids[:begun],
            *encode_plain(tokenizer, [before_text(found)])[0],
            *ids[begun:],
        ], found

    def in_chat(
        self, messages: Sequence[ChatMessage], service: Service, room: int
    ) -> tuple[list[ChatMessage], list[Passage]]:
        """Return a conversation with passages in the last turn of its user, and these."""
        asked = [place for place, message in enumerate(messages) if message.role == "user"]
        if not asked:
            return list(messages), []
        last = messages[asked[-1]]
        found = self.find(last.text, service, room - TEMPLATE_TOKENS)
        turn = last.model_copy(update={"content": in_question(found, last.text)})
        return [*messages[: asked[-1]], turn, *messages[asked[-1] + 1 :]], found


def described_passages(found: Sequence[Passage]) -> list[str]:
    """Return where passages come from: document and lines, counted from 1."""
    return [
        f"{passage.path or passage.name}:{passage.start + 1}-{passage.stop}" for passage in found
    ]


def _find(service: Service, name: str) -> Index | None:
    try:
        return service.indexes.find(name)
    except DataError as error:
        raise ApiError(500, str(error), param="retrieve", code="index_damaged") from None


def _speakers(service: Service, body: GenerationFields) -> list[str]:
    """Return the experts that may speak in a request, sorted by name."""
    choice = service.experts(body.model, body.experts)
    plugged = service.engine.experts()
    armed = (
        {info.name for info in plugged if info.armed} if choice.arm == "auto" else set(choice.arm)
    )
    return sorted(armed - set(choice.deny))
