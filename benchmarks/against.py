"""Compare expert, retrieval and fine-tuning on several sources with `deepseek eval --against`.

    python benchmarks/against.py folder:~/src/click git:. [--against rag,lora,full] [--tokens 40000] [--cases 200]

A source is `folder:PATH`, `git:PATH` (the last tenth of the commits is held out) or `jsonl:PATH`.
`NAME=` before it gives it another name than the last part of its path. Experts that do not exist
yet are trained; an interrupted run resumes. Training text is limited by tokens, not by time, so
that every machine trains on the same; LoRA and full fine-tuning get as much time as the expert
took. `pooled` has the cases of all sources.
"""

import argparse
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from entry import Source, existing_path, run_main
from results import FOLDER, write
from rich.console import Console

import deepseek
from deepseek.cli.against import against_tables
from deepseek.evaluate.against import Against, Result
from deepseek.evaluate.completion import CompletionScores
from deepseek.evaluate.verdict import compared, draw, verdicts
from deepseek.train.jobs.arguments import source_name


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("sources", nargs="+", type=Source.of, metavar="[NAME=]KIND:PATH")
    parser.add_argument("--base", default="smollm2-135m")
    parser.add_argument(
        "--root", type=existing_path, default=Path(), help="folder that paths start from"
    )
    parser.add_argument("--against", default="rag,lora,full")
    parser.add_argument("--tokens", type=int, default=40_000)
    parser.add_argument("--layers", default="last:3")
    parser.add_argument("--cases", type=int, default=200)
    parser.add_argument(
        "--json", type=Path, default=FOLDER / "against.json", help="file to write the figures to"
    )
    options = parser.parse_args()
    paths = {source: source.path(options.root) for source in options.sources}
    results = [one_source(source, path, options) for source, path in paths.items()]
    figures = {result.name: summary(result) for result in results}
    if len(results) > 1:
        pooled = pool(results)
        figures["pooled"] = described(pooled, all_sources(results))
        print("pooled", *verdicts(pooled, all_sources(results)), sep="\n")
    sources = [source.text for source in options.sources]
    write(options.json, {"sources": sources, "tokens": options.tokens, "figures": figures})
    if len(results) > 1:
        draw(pooled, f"{len(results)} sources", options.json.with_suffix(".png"))


def one_source(source: Source, path: Path, options: argparse.Namespace) -> Result:
    """Train the expert of a source unless it exists, and compare it with its rivals."""
    name = source.title or source_name(path)
    split = "time" if source.kind == "git" else "file"
    text: dict[str, Any] = {f"from_{source.kind}": path, "split": split}
    deepseek.train_expert(
        options.base, name=name, layers=options.layers, tokens=options.tokens, **text
    )
    result = Against(name, options.cases).compare(options.against.split(","))
    console = Console(width=110)
    for table in against_tables(result):
        console.print(table)
    print(*verdicts(result.scores, result.sources), *result.notes, sep="\n", flush=True)
    return result


def summary(result: Result) -> dict[str, Any]:
    """Return the figures of a source, without the scores of single cases."""
    counts = {
        "cases": len(result.cases),
        "documents": result.documents,
        "dials": asdict(result.dials),
    }
    return {
        **counts,
        "training_seconds": result.training_seconds,
        "notes": result.notes,
        **described(result.scores, result.sources),
    }


def described(scores: dict[str, CompletionScores], documents: Sequence[str]) -> dict[str, Any]:
    """Return means, intervals and differences for each row.

    Args:
        scores: scores of each row.
        documents: document that each case comes from.
    """
    rows = {}
    for name, row in compared(scores, documents).items():
        means = {
            key: value for key, value in asdict(scores[name]).items() if not isinstance(value, list)
        }
        rows[name] = {**means, **asdict(row)}
    return {"rows": rows, "verdicts": verdicts(scores, documents)}


def pool(results: list[Result]) -> dict[str, CompletionScores]:
    """Return the rows that all sources have, over all their cases; means are weighted by the number
    of cases.
    """
    names = [name for name in results[0].scores if all(name in result.scores for result in results)]
    return {name: joined([result.scores[name] for result in results]) for name in names}


def all_sources(results: list[Result]) -> list[str]:
    """Return the document of each case of all results, prefixed with the name of its source."""
    return [f"{result.name}: {name}" for result in results for name in result.sources]


def joined(parts: list[CompletionScores]) -> CompletionScores:
    """Return the scores of several sets of cases together."""
    sizes = [len(part.exact) for part in parts]

    def mean(values: list[float]) -> float:
        return sum(value * size for value, size in zip(values, sizes, strict=True)) / sum(sizes)

    exact = [value for part in parts for value in part.exact]
    similarity = [value for part in parts for value in part.similarity]
    costs = {
        key: mean([getattr(part, key) for part in parts])
        for key in ("prompt_tokens", "reply_tokens", "seconds")
    }
    return CompletionScores(
        mean([part.loss for part in parts]), exact, similarity, None, None, **costs
    )


if __name__ == "__main__":
    run_main(main)
