"""instructor: typed answers in each of its modes, complete and partial.

Modes that only ask for JSON in the prompt (`JSON`, `MD_JSON`) depend on the model to follow it.
"""

from collections.abc import Iterator
from functools import partial
from typing import Any, Literal

import anthropic
import instructor
import openai
from cases import Case, Target, expect, run
from pydantic import BaseModel, Field

ASKED: list[Any] = [{"role": "user", "content": "Anna is 31 years old and likes red. Who is she?"}]


class Person(BaseModel):
    """A person."""

    name: str = Field(max_length=20)
    age: int = Field(ge=0, le=120)
    colour: Literal["red", "blue", "green"]


class Flag(BaseModel):
    """A single decision."""

    is_adult: bool


MODES = {
    "tools": instructor.Mode.TOOLS,
    "strict tools": instructor.Mode.TOOLS_STRICT,
    "JSON schema": instructor.Mode.JSON_SCHEMA,
    "JSON": instructor.Mode.JSON,
    "Markdown": instructor.Mode.MD_JSON,
}


def cases(target: Target) -> Iterator[tuple[str, Case]]:
    for name, mode in MODES.items():
        client = openai.OpenAI(base_url=f"{target.url}/v1", api_key="none", max_retries=0)
        typed = instructor.from_openai(client, mode=mode)
        asked: dict[str, Any] = {
            "model": target.model,
            "messages": ASKED,
            "max_tokens": 200,
            "temperature": 0,
            "max_retries": 0,
        }
        if target.penalty:
            asked["frequency_penalty"] = target.penalty
        yield f"{name}, a person", partial(person, typed, asked)
        yield f"{name}, a flag", partial(flag, typed, asked)
        yield f"{name}, with the raw reply", partial(with_reply, typed, asked)
        yield f"{name}, partial", partial(growing, typed, asked)
    spoken = anthropic.Anthropic(base_url=target.url, api_key="none", max_retries=0)
    typed = instructor.from_anthropic(spoken, mode=instructor.Mode.ANTHROPIC_TOOLS)
    messages = {"model": target.model, "messages": ASKED, "max_tokens": 200, "max_retries": 0}
    yield "Anthropic's tools, a person", partial(person, typed, messages)
    yield "Anthropic's tools, a flag", partial(flag, typed, messages)


def person(client: Any, fields: dict[str, Any]) -> None:
    expect(isinstance(client.create(response_model=Person, **fields), Person), "no person")


def flag(client: Any, fields: dict[str, Any]) -> None:
    answer = client.create(response_model=Flag, **fields)
    expect(isinstance(answer.is_adult, bool), f"{answer}")


def with_reply(client: Any, fields: dict[str, Any]) -> None:
    answer, reply = client.create_with_completion(response_model=Person, **fields)
    expect(isinstance(answer, Person), f"{answer}")
    expect(reply.usage.completion_tokens > 0, f"{reply.usage}")


def growing(client: Any, fields: dict[str, Any]) -> None:
    answers = list(client.create_partial(response_model=Person, **fields))
    expect(len(answers) > 1, f"{len(answers)} states")
    Person.model_validate(answers[-1].model_dump())


if __name__ == "__main__":
    run(cases, "instructor", "openai")
