"""Lines filled in between what is before and after them, on held-out files of several code bases.

    python benchmarks/infilling.py folder:~/src/click git:. [--shares 0.25 0.5] [--tokens 40000] [--cases 100]
        [--problems HumanEval-SingleLineInfilling.jsonl [--count 200]]

A source is `folder:PATH` or `git:PATH`. For each source and each share of `--shares`, and for the
share 0, an expert is trained on the same tokens (`deepseek expert train --infill SHARE`; it resumes,
and is not trained again); the files that all of them hold out give the cases, lines drawn by a
hash. Greedily filled, up to the first line end, are: the line by the base and by each expert, with
the text before and after it in the layout of `deepseek/text/infilling.py`; and, as `left to right`,
by the same models without the text after it, which says what training on gaps costs. A line is
exact if it is the true one but for white space at its ends; edit similarity is told beside it.
`gain` is the relative reduction of the held-out loss by the expert on whole files.

With `--problems`, the same models fill in the lines of a benchmark in the format of HumanEval
Infilling (arXiv:2207.14255, https://github.com/openai/human-eval-infilling), `--count` of them drawn
by a hash. `passed` is the share of programs that then pass the benchmark's tests, in a sandbox.
"""

import argparse
import json
from collections.abc import Sequence
from hashlib import sha256
from pathlib import Path
from statistics import mean
from typing import Any

from results import FOLDER, write

import deepseek
from deepseek.checkpoint.hub import resolve
from deepseek.checkpoint.store import home, read_object
from deepseek.data import TokenShards
from deepseek.data.text.decode import decode_documents
from deepseek.engine.engine import Engine
from deepseek.engine.request import ExpertChoice, Request
from deepseek.engine.sampler import Sampling
from deepseek.engine.start import start_engine
from deepseek.evaluate.cases import Case, CaseEncoder, next_line_cases
from deepseek.evaluate.completion import first_line
from deepseek.evaluate.sandbox import run_program
from deepseek.evaluate.scores import edit_similarity, is_exact
from deepseek.text.infilling import infill_layout
from deepseek.text.tokenizer import document_start_ids, encode_plain, load_tokenizer
from deepseek.train.jobs.arguments import source_name

TEXT_TOKENS = 256
PROBLEM_TOKENS = 640
"""Most tokens before a gap: of a held-out file, and of a benchmark's problem."""

TOGETHER = 16


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("sources", nargs="+", metavar="KIND:PATH")
    parser.add_argument("--base", default="smollm2-135m")
    parser.add_argument("--shares", type=float, nargs="+", default=[0.25, 0.5])
    parser.add_argument("--tokens", type=int, default=40_000)
    parser.add_argument("--layers", default="last:3")
    parser.add_argument("--cases", type=int, default=100)
    parser.add_argument("--problems", type=Path, help="JSONL file of HumanEval Infilling")
    parser.add_argument("--count", type=int, default=200, help="of its problems")
    parser.add_argument("--json", type=Path, default=FOLDER / "infilling.json")
    options = parser.parse_args()
    figures = {source: one_source(source, options) for source in options.sources}
    write(options.json, {"figures": figures})


def one_source(source: str, options: argparse.Namespace) -> dict[str, Any]:
    """Train the experts of a source unless they are there, and return the scores."""
    kind, place = source.split(":", 1)
    path = Path(place).expanduser().resolve()
    text: dict[str, Any] = {f"from_{kind}": path}
    runs = {}
    packs = {}
    for share in (0.0, *options.shares):
        name = f"{source_name(path)}-gaps-{round(100 * share)}"
        packs[name] = deepseek.train_expert(
            options.base,
            name=name,
            layers=options.layers,
            tokens=options.tokens,
            infill=share,
            **text,
        )
        runs[name] = home() / "runs" / name
    folder = resolve(options.base)
    tokenizer = load_tokenizer(folder)
    held_out = TokenShards(next(iter(runs.values())) / "corpus" / "held-out")
    documents = [
        document for document in decode_documents(held_out, tokenizer) if document.kind == "code"
    ]
    cases = next_line_cases(documents, options.cases)
    problems = drawn(options.problems, options.count) if options.problems else []
    rows: dict[str, Any] = {}
    engine = start_engine(options.base, experts=[*packs.values()])
    with engine:
        for name in ("base", *packs):
            experts = ExpertChoice(() if name == "base" else (name,))
            row = scored(engine, cases, experts)
            if name != "base":
                result = read_object(runs[name] / "result.json")
                row["gain"] = round(1 - result["after"] / result["before"], 4)
            if problems:
                row["problems"] = solved(engine, problems, experts)
            rows[name] = row
            print(source, name, row, flush=True)
    return {"cases": len(cases), "documents": len({case.name for case in cases}), "rows": rows}


def scored(engine: Engine, cases: Sequence[Case], experts: ExpertChoice) -> dict[str, Any]:
    """Return exact matches and edit similarity with the text after the line, and without."""
    gaps = [gap_ids(engine, case.before, case.after, TEXT_TOKENS) for case in cases]
    filled = written(engine, gaps, experts, heals(engine))
    encoder = CaseEncoder(engine.tokenizer, TEXT_TOKENS)
    plain = written(engine, [encoder.next_line(case).ids for case in cases], experts)
    return {
        "exact": exact_share(filled, cases),
        "similarity": similarity(filled, cases),
        "left_to_right_exact": exact_share(plain, cases),
        "left_to_right_similarity": similarity(plain, cases),
    }


def drawn(path: Path, count: int) -> list[dict[str, str]]:
    """Return problems of a benchmark, drawn by hashes of their names."""
    problems = [json.loads(line) for line in path.read_text().splitlines() if line.strip()]
    problems.sort(key=lambda problem: sha256(problem["task_id"].encode()).digest())
    return problems[:count]


def solved(
    engine: Engine, problems: Sequence[dict[str, str]], experts: ExpertChoice
) -> dict[str, float]:
    """Return the share of problems whose line is the true one, and of those that pass their tests."""
    prompts = [
        gap_ids(engine, problem["prompt"], problem["suffix"], PROBLEM_TOKENS)
        for problem in problems
    ]
    lines = written(engine, prompts, experts, heals(engine))
    pairs = [*zip(lines, problems, strict=True)]
    exact = [is_exact(line, problem["canonical_solution"].strip()) for line, problem in pairs]
    passed = [run_program(program(line, problem)).passed for line, problem in pairs]
    return {"exact": round(mean(exact), 4), "passed": round(mean(passed), 4), "count": len(pairs)}


def heals(engine: Engine) -> bool:
    """Whether the server samples the last token before a gap again."""
    return not infill_layout(engine.tokenizer).has_tokens


def program(line: str, problem: dict[str, str]) -> str:
    """Return the program of a problem with its gap filled in, and its tests."""
    filled = f"{problem['prompt']}{line}\n{problem['suffix']}"
    return f"{filled}\n{problem['test']}\ncheck({problem['entry_point']})\n"


def gap_ids(engine: Engine, before: str, after: str, tokens: int) -> tuple[int, ...]:
    """Return a prompt with a gap: at most `tokens` before it, and half as many after it."""
    tokenizer = engine.tokenizer
    before_ids, after_ids = encode_plain(tokenizer, [before, after])
    layout = infill_layout(tokenizer)
    ids = layout.join(before_ids[-tokens:], after_ids[: tokens // 2])
    return (*document_start_ids(tokenizer), *ids)


def written(
    engine: Engine, prompts: Sequence[tuple[int, ...]], experts: ExpertChoice, heal: bool = False
) -> list[str]:
    """Return the line that continues each prompt, whose last token may be cut if `heal`."""
    greedy = Sampling(48, temperature=0.0)
    lines: list[str] = []
    for start in range(0, len(prompts), TOGETHER):
        running = [
            engine.submit(Request(ids, greedy, experts, stop=("\n",), heal=heal))
            for ids in prompts[start : start + TOGETHER]
        ]
        lines += [first_line(generation) for generation in running]
    return lines


def exact_share(lines: Sequence[str], cases: Sequence[Case]) -> float:
    """Return the share of lines that are the true ones."""
    pairs = zip(lines, cases, strict=True)
    return round(mean(float(is_exact(line, case.target)) for line, case in pairs), 4)


def similarity(lines: Sequence[str], cases: Sequence[Case]) -> float:
    """Return the mean edit similarity of lines to the true ones."""
    pairs = zip(lines, cases, strict=True)
    return round(mean(edit_similarity(line, case.target) for line, case in pairs), 4)


if __name__ == "__main__":
    main()
