"""Answers constrained by a JSON schema, sampled at temperature 1: every finished one must validate.

    python benchmarks/structured.py [--schemas 300] [--tokens 400] [--json FILE]

The schemas are random, with fixed seeds: objects, arrays, numbers with bounds, strings with
lengths, patterns and formats, enumerations, alternatives, and recursive references. For each, a
server (`deepseek serve`) is asked for an answer, with the schema's number as seed; answers are
checked with the `jsonschema` package, formats included. An answer that reaches the token limit is
unfinished and only counted.
"""

import argparse
import asyncio
import json
import random
from collections import Counter
from pathlib import Path
from typing import Any

import httpx
import jsonschema
from entry import run_main
from results import write
from served import served

MODEL = "smollm2-135m"
NAMES = [
    "name",
    "age",
    "city",
    "price",
    "tags",
    "items",
    "active",
    "owner",
    "date",
    "size",
    "score",
    "id",
    "notes",
]
FORMATS = ["date", "time", "date-time", "uuid", "ipv4", "email"]

PATTERNS = [
    "^[A-Z]{2}[0-9]{4}$",
    "^(red|green|blue)-[a-z]+$",
    r"^\d{3}-\d{2}$",
    "^[a-f0-9]{8}$",
    r"^https?://[a-z]+\.org$",
]
Schema = dict[str, Any]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--schemas", type=int, default=300)
    parser.add_argument("--tokens", type=int, default=400)
    parser.add_argument("--json", type=Path, help="file to write the figures to")
    options = parser.parse_args()
    schemas = [whole(random.Random(number)) for number in range(options.schemas)]
    for schema in schemas:
        jsonschema.Draft202012Validator.check_schema(schema)
    with served(MODEL) as server:
        figures = asyncio.run(ask_all(server.url, schemas, options.tokens))
    print(json.dumps(figures, indent=1))
    if options.json:
        write(options.json, figures)


def whole(dice: random.Random) -> Schema:
    """Return a schema with an object at the top; one in five is recursive."""
    schema = table(dice, 3)
    if dice.random() < 0.2:
        node = {
            "type": "object",
            "properties": {
                "value": scalar(dice),
                "next": {"anyOf": [{"$ref": "#/$defs/node"}, {"type": "null"}]},
            },
            "required": ["value", "next"],
            "additionalProperties": False,
        }
        schema["properties"]["chain"] = {"$ref": "#/$defs/node"}
        schema["required"].append("chain")
        schema["$defs"] = {"node": node}
    return schema


def table(dice: random.Random, depth: int) -> Schema:
    names = dice.sample(NAMES, dice.randint(1, 5))
    needed = [name for name in names if dice.random() < 0.7]
    schema = {
        "type": "object",
        "properties": {name: value(dice, depth - 1) for name in names},
        "required": needed,
    }
    return schema if dice.random() < 0.2 else {**schema, "additionalProperties": False}


def value(dice: random.Random, depth: int) -> Schema:
    """Return the schema of a random value, nested at most `depth` levels deep."""
    kind = dice.random()
    if depth > 0 and kind < 0.2:
        return table(dice, depth)
    if depth > 0 and kind < 0.4:
        least = dice.randint(0, 2)
        return {
            "type": "array",
            "items": value(dice, depth - 1),
            "minItems": least,
            "maxItems": least + dice.randint(1, 3),
        }
    if depth > 0 and kind < 0.5:
        return {"anyOf": [scalar(dice), table(dice, depth - 1)]}
    return scalar(dice)


def scalar(dice: random.Random) -> Schema:
    least = dice.randint(-50, 50)
    return dice.choice(
        [
            {"type": "integer", "minimum": least, "maximum": least + dice.randint(1, 1000)},
            {"type": "integer", "exclusiveMinimum": 0},
            {"type": "number", "minimum": least, "exclusiveMaximum": least + 10},
            {"type": "boolean"},
            {"type": ["string", "null"], "maxLength": 20},
            {"type": "string", "minLength": 3, "maxLength": dice.randint(5, 40)},
            {"type": "string", "pattern": dice.choice(PATTERNS)},
            {"type": "string", "format": dice.choice(FORMATS)},
            {"enum": dice.sample(["north", "south", 1, 2.5, None, True, 'ü"x'], 3)},
            {"const": dice.choice(["fixed", 7, None])},
        ]
    )


async def ask_all(url: str, schemas: list[Schema], tokens: int) -> dict[str, Any]:
    """Return the number of finished and of valid answers, and the invalid ones."""
    counts: Counter[str] = Counter()
    wrong: list[Any] = []
    places = asyncio.Semaphore(16)
    checker = jsonschema.Draft202012Validator.FORMAT_CHECKER

    async def ask(number: int, schema: Schema) -> None:
        body = {
            "model": MODEL,
            "max_tokens": tokens,
            "temperature": 1.0,
            "seed": number,
            "messages": [{"role": "user", "content": "Describe something in JSON."}],
            "response_format": {
                "type": "json_schema",
                "json_schema": {"name": "thing", "schema": schema},
            },
        }
        async with places:
            reply = await http.post("/v1/chat/completions", json=body)
        if reply.status_code != 200:
            counts["refused"] += 1
            wrong.append([number, schema, reply.text])
            return
        choice = reply.json()["choices"][0]
        counts["finished" if choice["finish_reason"] == "stop" else "unfinished"] += 1
        if choice["finish_reason"] == "stop":
            try:
                jsonschema.validate(
                    json.loads(choice["message"]["content"]), schema, format_checker=checker
                )
                counts["valid"] += 1
            except ValueError as error:
                wrong.append([number, schema, choice["message"]["content"], str(error)])
            except jsonschema.ValidationError as error:
                wrong.append([number, schema, choice["message"]["content"], error.message])

    async with httpx.AsyncClient(base_url=url, timeout=600) as http:
        await asyncio.gather(*(ask(number, schema) for number, schema in enumerate(schemas)))
    return {"schemas": len(schemas), **counts, "wrong": wrong}


if __name__ == "__main__":
    run_main(main)
