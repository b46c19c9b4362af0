"""Processor time to compute a mask (the tokens that a grammar allows next), by kind of grammar.

    python benchmarks/grammars.py [--model smollm2-135m] [--rounds 5] [--json FILE]

Masks are computed token by token along a JSON text of 57 tokens that every grammar allows.
llama.cpp's grammar is measured in two forms: with long terminals, and with one terminal per
character, the reference.
"""

import argparse
import json
import statistics
import time
from pathlib import Path
from typing import Any

import llguidance
import llguidance.hf
from entry import run_main
from results import write

from deepseek.checkpoint.hub import resolve
from deepseek.engine.gbnf import reference_lark
from deepseek.engine.grammar import LIMITS, NO_FORCING, llguidance_form
from deepseek.engine.request import Grammar
from deepseek.text.tokenizer import load_tokenizer

TEXT = json.dumps(
    {
        "name": "Anna Karenina",
        "tags": ["one two three", "a longer text with several words", 12.5, -3, True, None],
        "inner": {"a": {"b": [1, 2, 3]}},
    }
)

GBNF = r"""
root   ::= object
value  ::= object | array | string | number | ("true" | "false" | "null") ws
object ::= "{" ws (string ":" ws value ("," ws string ":" ws value)*)? "}" ws
array  ::= "[" ws (value ("," ws value)*)? "]" ws
string ::= "\"" ([^"\\\x7F\x00-\x1F] | "\\" (["\\bfnrt] | "u" [0-9a-fA-F]{4}))* "\"" ws
number ::= "-"? ([0-9] | [1-9] [0-9]{0,15}) ("." [0-9]+)? ([eE] [-+]? [0-9]+)? ws
ws     ::= | " " | "\n" [ \t]{0,20}
"""

LARK = r"""
start: object
value: object | array | STRING | NUMBER | "true" | "false" | "null"
object: "{" (pair ("," pair)*)? "}"
pair: STRING ":" value
array: "[" (value ("," value)*)? "]"
STRING: /"([^"\\\x7F\x00-\x1F]|\\["\\bfnrt])*"/
NUMBER: /-?[0-9]+(\.[0-9]+)?/
%ignore /[ \n]{1,20}/
"""


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", type=Path, help="file to write the figures to")
    options = parser.parse_args()
    tokenizer = load_tokenizer(resolve(options.model))
    tokens = llguidance.hf.from_tokenizer(tokenizer)
    ids = tokenizer(TEXT).input_ids
    forms = {
        "JSON schema": llguidance_form(Grammar("json_schema", '{"type": "object"}')),
        "regular expression": llguidance_form(Grammar("regex", r"\{[ -~]*\}")),
        "Lark": llguidance_form(Grammar("lark", LARK)),
        "GBNF": llguidance_form(Grammar("gbnf", GBNF)),
        "GBNF by character": f"%llguidance {json.dumps(NO_FORCING)}\n{reference_lark(GBNF)}",
    }
    times: dict[str, list[float]] = {name: [] for name in forms}
    for _ in range(options.rounds):
        for name, form in forms.items():
            times[name] += masks(tokens, form, ids)
    figures = {
        "model": options.model,
        "tokens": len(ids),
        "milliseconds": {name: summary(found) for name, found in times.items()},
    }
    print(json.dumps(figures, indent=1))
    if options.json:
        write(options.json, figures)


def masks(tokens: llguidance.LLTokenizer, form: str, ids: list[int]) -> list[float]:
    """Return the processor time of each mask along a text, in seconds.

    Args:
        tokens: the vocabulary.
        form: a grammar in llguidance's format.
        ids: the text.
    """
    matcher = llguidance.LLMatcher(tokens, form, log_level=0, limits=LIMITS)
    found: list[float] = []
    for identity in ids:
        start = time.thread_time()
        mask = matcher.compute_logit_bias()
        found.append(time.thread_time() - start)
        if not mask or not mask[identity] or not matcher.consume_token(identity):
            raise RuntimeError(f"the text is not allowed: {matcher.get_error()}")
    return found


def summary(seconds: list[float]) -> dict[str, Any]:
    """Return the mean, median and 99th percentile in milliseconds."""
    ordered = sorted(1000 * each for each in seconds)
    return {
        "mean": round(statistics.mean(ordered), 4),
        "median": round(statistics.median(ordered), 4),
        "99 %": round(ordered[int(0.99 * len(ordered))], 4),
    }


if __name__ == "__main__":
    run_main(main)
