"""`POST /v1/completions`: continues plain texts, or scores them (`echo` with `logprobs`, as
lm-eval does).
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace

from fastapi import APIRouter
from fastapi.responses import Response

from deepseek.engine.request import Request, TokenEvent, TokenLogprob, TokenUsage
from deepseek.retrieval.passages import Passage
from deepseek.server.admission import ComputingRoute
from deepseek.server.encoding import PART
from deepseek.server.errors import ApiError
from deepseek.server.job import GenerationJob
from deepseek.server.openapi import CompletionReply, described
from deepseek.server.retrieve import Retrieval, answer_tokens, described_passages
from deepseek.server.schema import MAX_CHOICES, CompletionRequest
from deepseek.server.service import Service, TheService
from deepseek.server.stream import Chunks, Fields, Reply, finite
from deepseek.server.token_text import CharacterPlaces, TokenReader, TokenText
from deepseek.server.translate import ask
from deepseek.text.tokenizer import document_start_ids

router = APIRouter(route_class=ComputingRoute)

Scored = tuple[int, TokenLogprob | None]
"""A token and its log probability, None for a token without context (the first one)."""


@router.post("/v1/completions", responses=described(CompletionReply, streamed=True))
async def completions(body: CompletionRequest, service: TheService) -> Response:
    """Continue one or several texts, as one reply or as server-sent events."""
    chunks = await answer(service, body)
    return Reply(chunks.chunks(), job=chunks.job, fold=None if body.stream else chunks.fold)


async def answer(
    service: Service,
    body: CompletionRequest,
    heal: bool = False,
    document_ids: tuple[int, ...] | None = None,
) -> "CompletionChunks":
    """Start to continue one or several texts and return the chunks of the answer.

    Args:
        service: the server's state.
        body: the HTTP request.
        heal: whether the prompts may end within a word (see `engine.request.Request`).
        document_ids: the only prompt without the passages that the caller put into it; None: it
            put none.

    Raises:
        ApiError, UserError: the request is invalid.
    """
    if len(prompts(body)) * (body.n or 1) > MAX_CHOICES:
        raise ApiError(
            400, f"Prompts times n is more than {MAX_CHOICES}; send fewer at once.", param="n"
        )
    if body.retrieve and body.echo:
        raise ApiError(
            400,
            "echo repeats the prompt as it was sent, which retrieve changes; leave one out.",
            param="echo",
        )
    if body.suffix and body.echo:
        raise ApiError(
            400, "echo repeats the prompt without its suffix; leave one out.", param="suffix"
        )
    passages: list[Passage] = []
    heal = heal or (bool(body.suffix) and not service.writer.layout.has_tokens)
    job = await service.start(
        lambda: plan(service, body, passages, heal, document_ids),
        body.n or 1,
        is_constrained=body.is_constrained,
    )
    chunks = CompletionChunks(service, body, job)
    chunks.retrieved = described_passages(passages) if body.retrieve else None
    return chunks


def prompts(body: CompletionRequest) -> Sequence[str | list[int]]:
    """Return the prompts of a request, each a text or a list of ids."""
    single = isinstance(body.prompt, str) or isinstance(body.prompt[0], int)
    return [body.prompt] if single else body.prompt  # type: ignore[list-item,return-value]


def plan(
    service: Service,
    body: CompletionRequest,
    retrieved: list[Passage],
    heal: bool,
    document_ids: tuple[int, ...] | None,
) -> list[Request]:
    """Return the engine's requests: all choices of the first prompt, then those of the next.

    Args:
        service: the server's state.
        body: the HTTP request.
        retrieved: output; the passages put before the prompts are appended to it.
        heal: whether prompts may end within a word; a prompt with a grammar is taken as it is.
        document_ids: see `answer`.
    """
    limit = body.limit(service.settings.answer_tokens)
    scored = bool(body.echo) and body.logprobs is not None
    grammar = body.constraint(service.engine.check_grammar)
    retrieval = Retrieval.of(service, body)
    requests: list[Request] = []
    for prompt in prompts(body):
        writer = service.writer
        ids = writer.infill(prompt, body.suffix) if body.suffix else writer.text(prompt)
        if retrieval is not None:
            text = prompt if isinstance(prompt, str) else ""
            reserved = answer_tokens(service, limit)
            # The ids around a gap have been encoded to follow markers, whatever is before these.
            texts = {"before_gap": text} if body.suffix else {"text": text}
            document_ids = tuple(ids)
            ids, passages = retrieval.before(ids, service, reserved, **texts)
            retrieved += passages
        requests += [
            ask(
                service,
                body,
                ids,
                limit,
                choice=choice,
                grammar=grammar,
                logprobs=body.logprobs,
                prompt_logprobs=scored,
                document_ids=document_ids,
                # An empty prompt is preceded by a marker token.
                heal=heal and grammar is None and bool(prompt),
            )
            for choice in range(body.n or 1)
        ]
    return requests


class CompletionChunks(Chunks):
    """The chunks of plain completions."""

    def __init__(self, service: Service, body: CompletionRequest, job: GenerationJob) -> None:
        super().__init__(service, body, job, "text_completion", "cmpl", "")
        self.body = body
        # For max_tokens 0 the engine still generates one token, which is not sent.
        self.silent = body.max_tokens == 0
        self.lengths: dict[int, int] = {}  # choice -> characters so far
        self.held: dict[int, int] = {}  # choice -> further characters, which are held back
        self.readers = [TokenReader(service.tokens) for _ in job.generations]

    def choices(self, index: int, event: TokenEvent) -> Iterator[Fields]:
        """Yield the token, and before the first one the echoed prompt if requested."""
        if index not in self.lengths:
            self.lengths[index] = 0
            if self.body.echo:
                yield from self.echoed(index)
        reader = self.readers[index]
        if self.silent:
            # Only its last event counts: tokens in place of the prompt's last one have some too.
            if event.finish_reason:
                yield self.choice(
                    index, "", self.logprobs(reader, [], CharacterPlaces(0)), "length"
                )
        elif event.text or event.logprob or event.finish_reason:
            scored: list[Scored] = (
                [(event.logprob.token_id, event.logprob)] if event.logprob else []
            )
            offset = self.lengths[index] + self.held.get(index, 0)
            self.held[index] = event.held
            logprobs = self.logprobs(reader, scored, CharacterPlaces(offset))
            choice = self.choice(index, event.text, logprobs, event.finish_reason, event.expert)
            yield {**choice, "stop_reason": event.stop_text}

    def echoed(self, index: int) -> Iterator[Fields]:
        """Yield the prompt, and its log probabilities in pieces that take about a millisecond."""
        scored = self.scored(index)
        size = max(1, PART // (1 + (self.body.logprobs or 0)))
        text = self.prompt(index)
        has_ids = not isinstance(self.sent_prompt(index), str)
        texts = self.service.tokens
        reader = TokenReader(texts, has_special=has_ids)
        # A prompt of text lacks the tokens that the tokenizer puts before it.
        before = [] if has_ids else document_start_ids(self.service.engine.tokenizer)
        places = CharacterPlaces(-sum(len(texts.within(token).text) for token in before))
        for start in range(0, max(1, len(scored)), size):
            logprobs = self.logprobs(reader, scored[start : start + size], places)
            yield self.choice(index, "" if start else text, logprobs)

    def usage(self) -> TokenUsage:
        """Return the tokens used so far, without the unrequested one of `max_tokens` 0."""
        usage = super().usage()
        return replace(usage, completion_tokens=0, experts={}) if self.silent else usage

    def sent_prompt(self, index: int) -> str | list[int]:
        """Return the prompt of a choice as it was sent."""
        return prompts(self.body)[index // (self.body.n or 1)]

    def prompt(self, index: int) -> str:
        """Return the prompt of a choice as text."""
        prompt = self.sent_prompt(index)
        return (
            prompt if isinstance(prompt, str) else str(self.service.engine.tokenizer.decode(prompt))
        )

    def scored(self, index: int) -> list[Scored]:
        """Return the prompt tokens of a choice with their log probabilities, if requested.

        The first token has none.
        """
        generation = self.job.generations[index]
        return list(zip(generation.request.prompt_ids, generation.prompt_logprobs, strict=False))

    def choice(
        self,
        index: int,
        text: str,
        logprobs: Fields | None,
        finish: str | None = None,
        expert: str | None = None,
    ) -> Fields:
        """Return one choice of a chunk, and add its text to the choice's length."""
        self.lengths[index] += len(text)
        return {
            "index": index,
            "text": text,
            "logprobs": logprobs,
            "finish_reason": finish,
            "stop_reason": None,
            "expert": expert,
        }

    def logprobs(
        self, reader: TokenReader, scored: Sequence[Scored], places: CharacterPlaces
    ) -> Fields | None:
        """Return log probabilities in the column layout of this route, None if not requested.

        Args:
            reader: reads the tokens of the text.
            scored: tokens with their log probabilities.
            places: counts the characters before each of them; below 0 for tokens before the text.
        """
        if self.body.logprobs is None:
            return None
        reads = [reader.at(identity) for identity, _ in scored]
        tokens = [read(identity) for read, (identity, _) in zip(reads, scored, strict=True)]
        entries = [logprob for _, logprob in scored]
        return {
            "tokens": [token.text for token in tokens],
            "token_logprobs": [
                None if entry is None else finite(entry.logprob) for entry in entries
            ],
            "top_logprobs": [
                None if entry is None else top(read, entry)
                for read, entry in zip(reads, entries, strict=True)
            ],
            "text_offset": [max(0, places.next(token)) for token in tokens],
        }


def top(read: Callable[[int], TokenText], logprob: TokenLogprob) -> dict[str, float]:
    """Return text -> log probability of the most likely tokens.

    Several tokens can have the same text (parts of characters); the most likely one wins.

    Args:
        read: returns the texts of the tokens.
        logprob: the log probabilities.
    """
    return {read(identity).text: finite(value) for identity, value in reversed(logprob.top)}
