"""A code assistant: an expert on a repository completes lines at the cursor.

    python examples/applications/code_assistant.py [REPOSITORY] [--minutes 5] [--cases 100]

An expert is trained on the repository's files, half of them with gaps, and the same files are
indexed. A server then gets the requests that llama.cpp's editor plug-ins send while you type (`POST
/infill`), for lines of held-out files: for the base alone, with passages of the index (retrieval),
with the expert armed, and with both. A line is exact if it equals the true line, apart from white
space at its ends.
"""

import time
from pathlib import Path
from statistics import mean, median
from typing import Any

from serving import (
    Client,
    add_tokens,
    amount_of,
    at_least_one,
    parser_of,
    run,
    served,
    write_figures,
)

import deepseek
from deepseek.checkpoint.hub import resolve
from deepseek.checkpoint.store import home
from deepseek.data import TokenShards
from deepseek.data.text.decode import decode_documents
from deepseek.errors import DataError
from deepseek.evaluate.cases import Case, next_line_cases
from deepseek.evaluate.scores import edit_similarity, is_exact, paired_difference
from deepseek.text.tokenizer import load_tokenizer
from deepseek.train.jobs.arguments import source_name
from deepseek.train.jobs.expert_index import index_expert

SIDES = ("base", "retrieval", "expert", "expert and retrieval")

SEEN_LINES = 40
"""Number of lines before the cursor that the editor sends."""


def main() -> None:
    parser = parser_of(__doc__, minutes=5.0)
    add_tokens(parser)
    parser.add_argument("repository", nargs="?", type=Path, default=Path())
    parser.add_argument("--cases", type=at_least_one, default=100, help="lines to complete")
    options = parser.parse_args()
    repository = options.repository.resolve()
    name = f"{source_name(repository).lower()}-editor"
    pack = deepseek.train_expert(
        options.base, name=name, from_folder=repository, infill=0.5, **amount_of(options)
    )
    cases = held_out_lines(options.base, name, options.cases)
    index_expert(name)
    with served(options.base, [pack]) as client:
        found = {side: [complete(client, case, name, side) for case in cases] for side in SIDES}
    scores = {side: score(replies, cases) for side, replies in found.items()}
    show(scores, found, cases)
    if options.json:
        figures = {
            side: {key: mean(values) for key, values in one.items()} for side, one in scores.items()
        }
        write_figures(options.json, {"cases": len(cases), **figures})


def held_out_lines(base: str, name: str, count: int) -> list[Case]:
    """Return lines of code files that were held out of the expert's training."""
    shards = TokenShards(home() / "runs" / name / "corpus" / "held-out")
    documents = decode_documents(shards, load_tokenizer(resolve(base)))
    cases = next_line_cases((one for one in documents if one.kind == "code"), count)
    if not cases:
        raise DataError("no file of code was held out; name a repository with more files of code.")
    return cases


def complete(client: Client, case: Case, name: str, side: str) -> dict[str, Any]:
    """Return the completion that an editor plug-in gets for the cursor at a line, and its
    milliseconds.

    Args:
        client: sends requests to the server.
        case: the line.
        name: name of the expert.
        side: one of `SIDES`.
    """
    *lines, cursor = case.before.split("\n")
    start = time.perf_counter()
    reply = client.post(
        "/infill",
        {
            "input_prefix": "\n".join(lines[-SEEN_LINES:]) + "\n",
            "prompt": cursor,
            "input_suffix": f"\n{case.after}",
            "n_predict": 48,
            "stop": ["\n"],
            "temperature": 0,
            "experts": {"arm": [name] if "expert" in side else []},
            "retrieve": name if "retrieval" in side else False,
        },
    )
    return {"line": reply["content"], "ms": 1000 * (time.perf_counter() - start)}


def score(replies: list[dict[str, Any]], cases: list[Case]) -> dict[str, list[float]]:
    """Return the figures of each completion."""
    pairs = [(reply["line"], case.target) for reply, case in zip(replies, cases, strict=True)]
    return {
        "exact": [float(is_exact(*pair)) for pair in pairs],
        "similarity": [edit_similarity(*pair) for pair in pairs],
        "milliseconds": [reply["ms"] for reply in replies],
    }


def show(
    scores: dict[str, dict[str, list[float]]], found: dict[str, Any], cases: list[Case]
) -> None:
    """Print the figures of all sides, and the line whose completion gained most."""
    print(f"\n{len(cases)} lines of held-out files")
    for side, one in scores.items():
        print(
            f"{side:21} exact {mean(one['exact']):6.1%}  similarity {mean(one['similarity']):6.1%} "
            f" {median(one['milliseconds']):5.0f} ms a completion"
        )
    base, *others = (scores[side]["similarity"] for side in SIDES)
    for side, other in zip(SIDES[1:], others, strict=True):
        change = paired_difference(other, base, documents=[case.name for case in cases])
        print(
            f"similarity of {side} over the base's: {change.mean:+.1%} "
            f"({change.low:+.1%} to {change.high:+.1%})"
        )
    gains = [mine - other for mine, other in zip(others[-1], base, strict=True)]
    place = gains.index(max(gains))
    print(f"\nlargest gain, {cases[place].name}:\n  {'true':21} {cases[place].target}")
    for side in SIDES:
        print(f"  {side:21} {found[side][place]['line'].strip()}")


if __name__ == "__main__":
    run(main)
