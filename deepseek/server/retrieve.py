"""The field `retrieve` of a request: puts passages of the experts' training text into the prompt.

Passages come only from indexes in the experts folder (`deepseek expert index NAME`). Clients send
names of indexes, never paths.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import zip_longest

from deepseek.errors import DataError
from deepseek.model.experts.arming import Arming
from deepseek.retrieval.index import DEFAULT_PASSAGES, Index
from deepseek.retrieval.passages import Passage
from deepseek.retrieval.prompt import before_text, in_question, query_of
from deepseek.server.errors import ApiError
from deepseek.server.prompt import EditorGap
from deepseek.server.schema import ChatMessage, GenerationFields
from deepseek.server.service import Service
from deepseek.text.chat_template import encode_rendered
from deepseek.text.tokenizer import document_start_ids, encode_plain, puts_space_before

MOST_TOKENS = 384
"""Token budget of all passages in a prompt; smaller if the context has less free."""

TEMPLATE_TOKENS = 32
"""Tokens reserved for the words around the passages in a chat."""


def answer_tokens(service: Service, limit: int | None) -> int:
    """Return how many tokens to reserve for the answer beside passages.

    A limit above the server's default is not reserved in full: many clients always request the
    whole context, and would never get a passage.

    Args:
        service: the server's state.
        limit: most tokens of the answer; None: the request sets no limit.
    """
    usual = service.settings.answer_tokens
    return min(limit or usual, usual)


@dataclass(frozen=True)
class Retrieval:
    """The retrieval settings of one request.

    Attributes:
        indexes: indexes to search, in the order of their names.
        passages: most passages to retrieve.
    """

    indexes: Sequence[Index]
    passages: int

    @classmethod
    def of(cls, service: Service, body: GenerationFields) -> "Retrieval | None":
        """Return the settings in the field `retrieve`, None if it is absent or false.

        Raises:
            ApiError: there is no index to take passages from, or the key may not use it.
        """
        wanted = body.retrieve
        if wanted is None or wanted is False:
            return None
        if isinstance(wanted, str):
            service.check_use(wanted, "retrieve")
            index = _find(service, wanted)
            if index is None:
                message = (
                    f"There is no index {wanted!r}; make one with `deepseek expert index {wanted}`."
                )
                raise ApiError(404, message, param="retrieve", code="index_not_found")
            return cls([index], DEFAULT_PASSAGES)
        names = _allowed_experts(service, body)
        indexes = _find_all(service, names)
        if not indexes:
            message = (
                f"No expert that this request may use ({', '.join(names) or 'none'}) has an index; "
                "make one with `deepseek expert index NAME`, or leave retrieve out."
            )
            raise ApiError(400, message, param="retrieve", code="index_not_found")
        return cls(indexes, DEFAULT_PASSAGES if wanted is True else wanted)

    @classmethod
    def if_possible(
        cls, service: Service, body: GenerationFields, passages: int
    ) -> "Retrieval | None":
        """Return the settings for a request that does not say whether to retrieve, None if no
        expert that it may use has an index.

        Args:
            service: the server's state.
            body: the HTTP request.
            passages: most passages to retrieve; 0: none.
        """
        indexes = _find_all(service, _allowed_experts(service, body)) if passages else []
        return cls(indexes, passages) if indexes else None

    def find(self, query: str, service: Service, budget: int) -> list[Passage]:
        """Return the best passages for a query within a token budget.

        Several indexes contribute in turn: the best passage of each, then the second best, and so
        on.

        Args:
            query: search text.
            service: the server's state.
            budget: most tokens of all passages with their headers; those of the passages alone are
                capped at `MOST_TOKENS`.
        """

        def length(text: str) -> int:
            return len(encode_plain(service.engine.tokenizer, [text])[0])

        left = min(MOST_TOKENS, budget)
        free = budget  # the budget also covers the passages' headers
        ranked = [
            index.retrieve(query, self.passages, max(0, left), length) for index in self.indexes
        ]
        chosen: list[Passage] = []
        turns = zip_longest(*ranked)
        for passage in (passage for turn in turns for passage in turn if passage is not None):
            size = length(passage.text)
            headed = length(before_text([passage]))
            if len(chosen) < self.passages and size <= left and headed <= free:
                chosen.append(passage)
                left -= size
                free -= headed
        return chosen

    def before(
        self,
        ids: Sequence[int],
        service: Service,
        answer: int,
        text: str = "",
        before_gap: str = "",
    ) -> tuple[list[int], list[Passage]]:
        """Return a plain prompt with passages put before it, and the passages.

        Args:
            ids: token ids of the prompt.
            service: the server's state.
            answer: tokens to leave free for the answer.
            text: the prompt's text, if it was sent as text; default: it was sent as ids.
            before_gap: the text before the gap, if the prompt has one (`PromptWriter.infill`).
        """
        tokenizer = service.engine.tokenizer
        unfinished = before_gap or str(tokenizer.decode(list(ids), skip_special_tokens=True))
        passages = self._find_for(unfinished, ids, service, answer)
        # The passages are put after the tokens that start a document, if the prompt has them.
        start = document_start_ids(tokenizer)
        split = len(start) if list(ids[: len(start)]) == start else 0
        (inserted,) = encode_plain(tokenizer, [before_text(passages)])
        continued = list(ids[split:])
        if inserted and text and puts_space_before(tokenizer):
            # The prompt's own ids begin with the space that the tokenizer puts before a text.
            continued = encode_rendered(tokenizer, text, previous=inserted[-1])
        return [*ids[:split], *inserted, *continued], passages

    def for_editor(
        self, gap: EditorGap, ids: Sequence[int], service: Service, answer: int
    ) -> tuple[EditorGap, list[Passage]]:
        """Return an editor's text with passages put before it, and the passages.

        Args:
            gap: the text.
            ids: token ids of its prompt without passages.
            service: the server's state.
            answer: tokens to leave free for the answer.
        """
        passages = self._find_for(gap.prefix + gap.line, ids, service, answer)
        return replace(gap, passages=before_text(passages)), passages

    def _find_for(
        self, unfinished: str, ids: Sequence[int], service: Service, answer: int
    ) -> list[Passage]:
        """Return the passages for an unfinished text that fit beside its prompt and the answer.

        Args:
            unfinished: the text up to where it is to be continued.
            ids: token ids of the prompt.
            service: the server's state.
            answer: tokens to leave free for the answer.
        """
        budget = service.writer.context - len(ids) - answer - TEMPLATE_TOKENS
        return self.find(query_of(unfinished), service, budget)

    def in_chat(
        self, messages: Sequence[ChatMessage], service: Service, budget: int
    ) -> tuple[list[ChatMessage], list[Passage]]:
        """Return a conversation with passages in the user's last turn, and the passages.

        Args:
            messages: the conversation; without a user turn, it is returned unchanged.
            service: the server's state.
            budget: tokens for the passages and the words around them.
        """
        user_turns = [place for place, message in enumerate(messages) if message.role == "user"]
        if not user_turns:
            return list(messages), []
        last_place = user_turns[-1]
        question = messages[last_place].text
        passages = self.find(question, service, budget - TEMPLATE_TOKENS)
        turn = messages[last_place].model_copy(update={"content": in_question(passages, question)})
        return [*messages[:last_place], turn, *messages[last_place + 1 :]], passages


def described_passages(passages: Sequence[Passage]) -> list[str]:
    """Return the source of each passage as `document:first-last`, with lines counted from 1."""
    return [
        f"{passage.path or passage.name}:{passage.start + 1}-{passage.stop}" for passage in passages
    ]


def _find(service: Service, name: str) -> Index | None:
    try:
        return service.indexes.find(name)
    except DataError as error:
        raise ApiError(500, str(error), param="retrieve", code="index_damaged") from None


def _find_all(service: Service, names: Sequence[str]) -> list[Index]:
    """Return the indexes of those experts that have one."""
    return [index for name in names if (index := _find(service, name)) is not None]


def _allowed_experts(service: Service, body: GenerationFields) -> list[str]:
    """Return the names of the experts that a request may use, sorted."""
    choice = service.experts(body.model, body.experts)
    plugged = service.visible_experts()
    requested = Arming.parse(choice.arm)
    by_default = {info.name for info in plugged if info.armed}
    armed = requested.named.keys() | (by_default if requested.auto is not None else set())
    return sorted(armed - set(choice.deny))
