"""`POST /v1/chat/completions`."""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from secrets import token_hex

from fastapi import APIRouter
from fastapi.responses import Response

from deepseek.engine.request import Request, TokenEvent, TokenLogprob
from deepseek.retrieval.passages import Passage
from deepseek.server.admission import ComputingRoute
from deepseek.server.constraints import json_grammar
from deepseek.server.errors import ApiError, about
from deepseek.server.job import GenerationJob
from deepseek.server.openapi import ChatReply, described
from deepseek.server.retrieve import Retrieval, answer_tokens, described_passages
from deepseek.server.schema import ChatRequest
from deepseek.server.service import Service, TheService
from deepseek.server.stream import Chunks, Fields, Reply, chat_logprobs
from deepseek.server.token_text import TokenReader
from deepseek.server.tools import Calling
from deepseek.server.translate import ask

router = APIRouter(route_class=ComputingRoute)


@router.post("/v1/chat/completions", responses=described(ChatReply, streamed=True))
async def chat(body: ChatRequest, service: TheService) -> Response:
    """Answer a conversation, as one reply or as server-sent events."""
    chunks = await answer(service, body)
    return Reply(chunks.chunks(), job=chunks.job, fold=None if body.stream else chunks.fold)


async def answer(service: Service, body: ChatRequest) -> "ChatChunks":
    """Start to answer a conversation and return the chunks of the answer.

    Args:
        service: the server's state.
        body: the HTTP request.

    Raises:
        ApiError, UserError: the request is invalid.
    """
    calling = Calling.of(body)
    if body.top_logprobs and not body.logprobs:
        raise ApiError(400, "top_logprobs needs logprobs to be true.", param="top_logprobs")
    passages: list[Passage] = []
    job = await service.start(
        lambda: plan(service, body, calling, passages),
        body.n or 1,
        is_constrained=body.is_constrained or calling.must,
    )
    chunks = ChatChunks(service, body, job, calling)
    chunks.retrieved = described_passages(passages) if body.retrieve else None
    return chunks


def plan(
    service: Service, body: ChatRequest, calling: Calling, retrieved: list[Passage]
) -> list[Request]:
    """Return the engine's requests, one per choice.

    Args:
        service: the server's state.
        body: the HTTP request.
        calling: the function calls that it allows.
        retrieved: output; the passages put into the prompt are appended to it.
    """
    call = calling.schema()
    if call is None:
        grammar = body.constraint(service.engine.check_grammar)
    else:
        with about("tools"):
            grammar = json_grammar(call)
            service.engine.check_grammar(grammar)
    logprobs = (body.top_logprobs or 0) if body.logprobs else None
    continued = bool(body.continue_final_message)
    write = partial(
        service.writer.chat,
        calling=calling,
        continued=continued,
        variables=body.chat_template_kwargs,
    )
    ids = write(body.messages)
    retrieval = Retrieval.of(service, body)
    if retrieval is not None:
        budget = service.writer.context - len(ids) - answer_tokens(service, body.limit)
        messages, passages = retrieval.in_chat(body.messages, service, budget)
        retrieved += passages
        ids = write(messages)
    # From the original messages, so that retrieved passages do not make gates fire.
    user_ids = service.writer.user_ids(body.messages)
    return [
        ask(
            service,
            body,
            ids,
            body.limit,
            choice=choice,
            grammar=grammar,
            logprobs=logprobs,
            user_ids=user_ids,
        )
        for choice in range(body.n or 1)
    ]


@dataclass
class ChoiceProgress:
    """The streaming progress of one choice.

    Attributes:
        reader: reads its tokens.
        text: the text generated so far.
        sent: number of its characters already sent.
    """

    reader: TokenReader
    text: str = ""
    sent: int = 0


class ChatChunks(Chunks):
    """The chunks of a chat. Text that may be a function call is held back until that is known."""

    def __init__(
        self, service: Service, body: ChatRequest, job: GenerationJob, calling: Calling
    ) -> None:
        super().__init__(service, body, job, "chat.completion", "chatcmpl", ".chunk")
        self.calling = calling
        self.progress = [ChoiceProgress(TokenReader(service.tokens)) for _ in job.generations]

    def opening(self) -> Iterator[Fields]:
        """Yield the role of each choice."""
        for index in range(len(self.progress)):
            yield self.choice(index, {"role": "assistant", "content": "", "refusal": None})

    def choices(self, index: int, event: TokenEvent) -> Iterator[Fields]:
        """Yield the text that cannot be part of a call, and at the end the calls and the finish
        reason.
        """
        progress = self.progress[index]
        finish = event.finish_reason
        progress.text += event.text
        text = progress.text
        calls = self.calling.read(text) if finish else []
        end = len(text) if finish and not calls else self.calling.content_length(text)
        if end > progress.sent or event.logprob:  # also of a token whose text is held back
            yield self.choice(
                index,
                {"content": text[progress.sent : end]},
                logprob=event.logprob,
                expert=event.expert,
            )
            progress.sent = end
        if calls:
            call_fields = [
                {
                    "index": place,
                    "id": f"call_{token_hex(12)}",
                    "type": "function",
                    "function": call,
                }
                for place, call in enumerate(calls)
            ]
            yield self.choice(index, {"tool_calls": call_fields})
        if finish:
            finish_fields = self.choice(index, {}, finish="tool_calls" if calls else finish)
            yield {**finish_fields, "stop_reason": event.stop_text}

    def choice(
        self,
        index: int,
        delta: Fields,
        *,
        logprob: TokenLogprob | None = None,
        expert: str | None = None,
        finish: str | None = None,
    ) -> Fields:
        """Return one choice of a chunk."""
        return {
            "index": index,
            "delta": delta,
            "logprobs": chat_logprobs(self.progress[index].reader, logprob) if logprob else None,
            "finish_reason": finish,
            "stop_reason": None,
            "expert": expert,
        }

    def finished(self, choice: Fields) -> Fields:
        """Return a choice with its joined deltas as the message."""
        message = {**choice.pop("delta"), "annotations": []}
        if message.get("tool_calls"):
            message["content"] = message["content"] or None
            message["tool_calls"] = [
                {k: v for k, v in call.items() if k != "index"} for call in message["tool_calls"]
            ]
        return {**super().finished(choice), "message": message}
