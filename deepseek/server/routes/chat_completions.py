"""`POST /v1/chat/completions`."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from secrets import token_hex

from fastapi import APIRouter
from fastapi.responses import Response

from deepseek.engine.request import Request, TokenEvent, TokenLogprob
from deepseek.retrieval.passages import Passage
from deepseek.server.errors import ApiError
from deepseek.server.openapi import ChatReply, described
from deepseek.server.retrieve import Retrieval, described_passages
from deepseek.server.schema import ChatRequest
from deepseek.server.service import GenerationJob, Service, TheService, ask, wanted_schema
from deepseek.server.stream import Chunks, Fields, Reply, chat_logprobs
from deepseek.server.tools import Calling

router = APIRouter()


@router.post("/v1/chat/completions", responses=described(ChatReply, streamed=True))
async def chat(body: ChatRequest, service: TheService) -> Response:
    """Answer a conversation, at once or as server-sent events."""
    calling = Calling.of(body)
    if body.top_logprobs and not body.logprobs:
        raise ApiError(400, "top_logprobs needs logprobs to be true.", param="top_logprobs")
    found: list[Passage] = []
    job = await service.start(lambda: plan(service, body, calling, found), body.n or 1)
    told = ChatChunks(service, body, job, calling)
    told.retrieved = described_passages(found) if body.retrieve else None
    return Reply(told.chunks(), job=job, fold=None if body.stream else told.fold)


def plan(
    service: Service, body: ChatRequest, calling: Calling, found: list[Passage]
) -> list[Request]:
    """Return the engine's requests, one for each choice; passages put into the prompt are appended
    to `found`.
    """
    schema = calling.schema()
    if schema is None and body.response_format is not None:
        schema = wanted_schema(body.response_format.type, body.response_format.json_schema)
    logprobs = (body.top_logprobs or 0) if body.logprobs else None
    limit = body.max_completion_tokens or body.max_tokens
    ids = service.writer.chat(body.messages, calling)
    retrieval = Retrieval.of(service, body)
    if retrieval is not None:
        room = service.writer.context - len(ids) - (limit or service.settings.answer_tokens)
        messages, passages = retrieval.in_chat(body.messages, service, room)
        found += passages
        ids = service.writer.chat(messages, calling)
    user_ids = service.writer.user_ids(body.messages)  # not the passages
    return [
        ask(
            service,
            body,
            ids,
            limit,
            choice=choice,
            schema=schema,
            logprobs=logprobs,
            user_ids=user_ids,
        )
        for choice in range(body.n or 1)
    ]


@dataclass
class Told:
    """One choice as far as its client knows it.

    Attributes:
        text: what the model has said.
        sent: how many of its characters were sent.
        logprobs: of tokens that came since the last chunk.
    """

    text: str = ""
    sent: int = 0
    logprobs: list[TokenLogprob] = field(default_factory=list)


class ChatChunks(Chunks):
    """The chunks of a chat. A text that may be a call is held back until it is known what it is."""

    def __init__(
        self, service: Service, body: ChatRequest, job: GenerationJob, calling: Calling
    ) -> None:
        super().__init__(service, body, job, "chat.completion", "chatcmpl", ".chunk")
        self.calling = calling
        self.told = [Told() for _ in job.generations]

    def opening(self) -> Iterator[Fields]:
        """Yield who speaks."""
        for index in range(len(self.told)):
            yield self.choice(index, {"role": "assistant", "content": "", "refusal": None})

    def choices(self, index: int, event: TokenEvent) -> Iterator[Fields]:
        """Yield the text that is known to be text, and at the end calls and the reason."""
        told = self.told[index]
        finish = event.finish_reason
        told.text += event.text
        told.logprobs += [event.logprob] if event.logprob else []
        calls = self.calling.read(told.text) if finish else []
        end = len(told.text) if finish and not calls else self.calling.content_length(told.text)
        if end > told.sent or told.logprobs:
            yield self.choice(
                index, {"content": told.text[told.sent : end]}, told=told, expert=event.expert
            )
            told.sent = end
            told.logprobs = []
        if calls:
            made = [
                {
                    "index": place,
                    "id": f"call_{token_hex(12)}",
                    "type": "function",
                    "function": call,
                }
                for place, call in enumerate(calls)
            ]
            yield self.choice(index, {"tool_calls": made})
        if finish:
            yield self.choice(index, {}, finish="tool_calls" if calls else finish)

    def choice(
        self,
        index: int,
        delta: Fields,
        *,
        told: Told | None = None,
        expert: str | None = None,
        finish: str | None = None,
    ) -> Fields:
        """Return one choice of a chunk."""
        logprobs = chat_logprobs(self.service, told.logprobs) if told and told.logprobs else None
        return {
            "index": index,
            "delta": delta,
            "logprobs": logprobs,
            "finish_reason": finish,
            "expert": expert,
        }

    def finished(self, choice: Fields) -> Fields:
        """Return a choice with the message that its deltas make."""
        message = choice.pop("delta")
        if message.get("tool_calls"):
            message["content"] = message["content"] or None
            message["tool_calls"] = [
                {k: v for k, v in call.items() if k != "index"} for call in message["tool_calls"]
            ]
        return {**super().finished(choice), "message": message}
