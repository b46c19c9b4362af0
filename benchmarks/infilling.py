"""Fill in lines between the code before and after them, in held-out files of several code bases.

    python benchmarks/infilling.py folder:~/src/click git:. [--shares 0 0.5] [--tokens 40000] [--cases 100]
        [--problems HumanEval-SingleLineInfilling.jsonl [--count 200]]

A source is `folder:PATH` or `git:PATH`. For each source and each share of `--shares`, an expert is
trained on the same tokens (`deepseek expert train --infill SHARE`). Cases are lines, drawn by a
hash, of the files that all of these experts held out. `--shares` without a number compares no
experts, so that nothing is trained. The base and each expert fill in each line greedily, up to the
first line end. An interrupted run does not train or score any model again.

    exact, similarity   with the text before and after the line in the layout of
                        `deepseek/text/infilling.py`, as the server fills it in
    as_sent_*           the same without token healing (see `engine.request.Request`)
    within_word_*       the rest of the line from a character within a word, drawn by a hash; lines
                        without a word of two characters are asked for whole
    as_sent_within_word_*   the same without token healing
    left_to_right_*     without the text after the line, but with the file's name, and tokenised
                        together with the line, which reveals its indentation

A line is exact if it equals the true one up to white space at its ends; `similarity` is edit
similarity. `over` another model is the mean difference with its 95 % interval, paired by case;
`pooled` has the cases of all sources. `gain` is the expert's relative reduction of the held-out
loss on whole files.

With `--problems`, the same models fill in the lines of a benchmark in the format of HumanEval
Infilling (arXiv:2207.14255, https://github.com/openai/human-eval-infilling), `--count` of them
drawn by a hash. `problems_passed` is the share of completed programs that pass the benchmark's
tests, in a sandbox.
"""

import argparse
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from hashlib import sha256
from pathlib import Path
from secrets import token_hex
from statistics import mean
from typing import Any

from entry import Source, existing_path, run_main
from kept import kept
from results import COMMIT, add_output, write
from transformers import PreTrainedTokenizerFast

import deepseek
from deepseek.checkpoint.hub import resolve
from deepseek.checkpoint.store import file_digest, home, read_object
from deepseek.data import TokenShards, clean, read_folder
from deepseek.data.text.decode import decode_documents
from deepseek.data.text.document import Document, split, uniform
from deepseek.engine.engine import Engine
from deepseek.engine.request import ExpertChoice, Request
from deepseek.engine.sampler import Sampling
from deepseek.engine.start import start_engine
from deepseek.errors import ConfigError, DataError
from deepseek.evaluate.cases import Case, CaseEncoder, next_line_cases
from deepseek.evaluate.completion import first_line
from deepseek.evaluate.sandbox import run_program
from deepseek.evaluate.scores import Interval, edit_similarity, is_exact, paired_difference
from deepseek.text.infilling import encode_around_gap, infill_layout
from deepseek.text.tokenizer import document_start_ids, load_tokenizer
from deepseek.train.jobs.arguments import source_name
from deepseek.train.text.inputs import base_digest

TEXT_TOKENS = 256
PROBLEM_TOKENS = 640
"""Maximum number of tokens before a gap, in a held-out file and in a benchmark's problem."""

PROBLEMS = ("problems_exact", "problems_passed")
"""Scores of the benchmark's problems, which all sources share."""

TOGETHER = 16


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("sources", nargs="+", type=Source.of, metavar="KIND:PATH")
    parser.add_argument("--base", default="smollm2-135m")
    parser.add_argument(
        "--root", type=existing_path, default=Path(), help="folder that paths start from"
    )
    parser.add_argument("--shares", type=float, nargs="*", default=[0.0, 0.5])
    parser.add_argument("--tokens", type=int, default=40_000)
    parser.add_argument("--layers", default="last:3")
    parser.add_argument("--cases", type=int, default=100)
    parser.add_argument("--problems", type=existing_path, help="JSONL file of HumanEval Infilling")
    parser.add_argument("--count", type=int, default=200, help="of its problems")
    parser.add_argument(
        "--work", type=Path, default=home() / "infilling", help="scores are kept here"
    )
    add_output(parser, "infilling")
    options = parser.parse_args()
    together: dict[str, list[Outcomes]] = {}
    figures: dict[str, Any] = {}
    paths = {source: source.path(options.root) for source in options.sources}
    for source, path in paths.items():
        found = one_source(source, path, options)
        figures[source_name(path)] = described(found)
        for name, outcomes in found.items():
            together.setdefault(name, []).append(outcomes)
        figures["pooled"] = described({name: pool(parts) for name, parts in together.items()})
        write(options.json, {"figures": figures})


@dataclass(frozen=True)
class Outcomes:
    """Scores of a model, case by case.

    Attributes:
        scores: measure -> score of each case or problem.
        documents: document that each case comes from.
        gain: relative reduction of the held-out loss on whole files; None for the base.
    """

    scores: dict[str, list[float]]
    documents: list[str]
    gain: float | None = None

    def difference(self, other: "Outcomes", measure: str) -> Interval:
        """Return the mean difference from another model, paired by case, with its interval; cases
        are grouped by document, problems are not.
        """
        documents = None if measure in PROBLEMS else self.documents
        return paired_difference(self.scores[measure], other.scores[measure], documents=documents)


def pool(parts: Sequence[Outcomes]) -> Outcomes:
    """Return the cases of several sources together; problems, which all sources share, are
    averaged.
    """
    gains = [part.gain for part in parts if part.gain is not None]
    scores = {
        name: [mean(each) for each in zip(*(part.scores[name] for part in parts), strict=True)]
        if name in PROBLEMS
        else [score for part in parts for score in part.scores[name]]
        for name in parts[0].scores
    }
    documents = [f"{place}: {name}" for place, part in enumerate(parts) for name in part.documents]
    return Outcomes(scores, documents, mean(gains) if gains else None)


def described(found: dict[str, Outcomes]) -> dict[str, Any]:
    """Return the mean scores of each model, and its differences from the models before it."""
    rows: dict[str, Any] = {}
    for place, (name, outcomes) in enumerate(found.items()):
        row: dict[str, Any] = {key: mean(scores) for key, scores in outcomes.scores.items()}
        row["cases"] = len(outcomes.scores["exact"])
        row["gain"] = outcomes.gain
        for other in list(found)[:place]:
            row[f"over {other}"] = {
                key: asdict(outcomes.difference(found[other], key)) for key in outcomes.scores
            }
        rows[name] = row
    return rows


def one_source(source: Source, path: Path, options: argparse.Namespace) -> dict[str, Outcomes]:
    """Train the experts of a source unless they exist, and return the scores of each model."""
    text: dict[str, Any] = {f"from_{source.kind}": path}
    names = {share: f"{source_name(path)}-gaps-{round(100 * share)}" for share in options.shares}
    packs = [
        deepseek.train_expert(
            options.base,
            name=name,
            layers=options.layers,
            tokens=options.tokens,
            infill=share,
            **text,
        )
        for share, name in names.items()
    ]
    runs = {share: home() / "runs" / name for share, name in names.items()}
    if runs:
        documents = held_out_by_all(list(runs.values()), load_tokenizer(resolve(options.base)))
    else:
        documents = held_out_code(source, path)
    cases = next_line_cases(documents, options.cases)
    problems = drawn(options.problems, options.count) if options.problems else []
    names_of_cases = [case.name for case in cases]
    weights = base_digest(options.base)
    with start_engine(options.base, experts=packs) as engine:
        scorer = Scorer(options.work, engine, cases, problems)
        base = f"{source_name(path)}-base"
        found = {"base": Outcomes(scorer.scores(base, weights, ExpertChoice(())), names_of_cases)}
        for (share, name), pack in zip(names.items(), packs, strict=True):
            result = read_object(runs[share] / "result.json")
            gain = 1 - result["after"] / result["before"]
            digest = f"{weights} {file_digest(pack)}"
            scores = scorer.scores(name, digest, ExpertChoice((name,)))
            found[f"gaps {share:g}"] = Outcomes(scores, names_of_cases, gain)
    print(source.text, {name: one["exact"] for name, one in described(found).items()}, flush=True)
    return found


def held_out_code(source: Source, path: Path) -> list[Document]:
    """Return the code files that a training on a source would hold out.

    Raises:
        ConfigError: the source is no folder.
    """
    if source.kind != "folder":
        raise ConfigError(f"Without experts sources are folders; {source.text} is none.")
    _, held_out = split(clean(read_folder(path))[0])
    return [document for document in held_out if document.kind == "code"]


def held_out_by_all(runs: Sequence[Path], tokenizer: PreTrainedTokenizerFast) -> list[Document]:
    """Return the code files that all runs held out with the same text."""
    sides = [
        {
            document.digest: document
            for document in decode_documents(TokenShards(run / "corpus" / "held-out"), tokenizer)
            if document.kind == "code"
        }
        for run in runs
    ]
    first, *others = sides
    found = [one for digest, one in first.items() if all(digest in other for other in others)]
    if not found:
        raise DataError(
            f"The source of {runs[0].name} has changed between its trainings, which hold out no "
            "file in common; remove them and start again."
        )
    return found


@dataclass(frozen=True)
class Scorer:
    """Scores models on the same lines and problems, and keeps the scores.

    Attributes:
        folder: folder that scores are kept in.
        engine: runs the models.
        cases: lines of the held-out files.
        problems: problems of a benchmark; may be empty.
    """

    folder: Path
    engine: Engine
    cases: Sequence[Case]
    problems: Sequence[dict[str, str]]

    def scores(self, name: str, model: str, experts: ExpertChoice) -> dict[str, list[float]]:
        """Return the scores of one model on each line and each problem.

        Args:
            name: name of the file to keep them in.
            model: digest of the model.
            experts: experts to arm.
        """
        settings = {"model": model, "commit": COMMIT}
        of_lines = settings | {"lines": digest_of(self.cases), "tokens": TEXT_TOKENS}
        scores = kept(
            self.folder / f"{name}.json", of_lines, lambda: scored(self.engine, self.cases, experts)
        )
        if not self.problems:
            return scores
        of_problems = settings | {"problems": digest_of(self.problems), "tokens": PROBLEM_TOKENS}
        # The problems belong to no source, so the base is measured on them only once.
        asked = f"{name}-problems" if experts.arm else "base-problems"
        return scores | kept(
            self.folder / f"{asked}.json",
            of_problems,
            lambda: solved(self.engine, self.problems, experts),
        )


def digest_of(asked: Sequence[object]) -> str:
    """Return a digest of lines or problems."""
    return sha256(repr(asked).encode()).hexdigest()


def scored(engine: Engine, cases: Sequence[Case], experts: ExpertChoice) -> dict[str, list[float]]:
    """Return the scores of each line, whole and from within a word, filled in with and without the
    text after it.
    """
    encoder = CaseEncoder(engine.tokenizer, TEXT_TOKENS)
    plain = written(engine, [encoder.next_line(case).ids for case in cases], experts)
    scores = {
        "left_to_right_exact": exact(plain, cases),
        "left_to_right_similarity": similarity(plain, cases),
    }
    for name, asked in (("", cases), ("within_word_", [*map(within_word, cases)])):
        gaps = [gap_ids(engine, case.before, case.after, TEXT_TOKENS) for case in asked]
        for sent, heal in (("", heals(engine)), ("as_sent_", False)):
            lines = written(engine, gaps, experts, heal)
            scores[f"{sent}{name}exact"] = exact(lines, asked)
            scores[f"{sent}{name}similarity"] = similarity(lines, asked)
    return scores


def within_word(case: Case) -> Case:
    """Return a case of the rest of its line from a character within a word, drawn by a hash; the
    case itself if its line has no word of two characters.
    """
    line = case.target
    places = [place for place in range(1, len(line)) if line[place - 1 : place + 1].isalnum()]
    if not places:
        return case
    place = places[int(uniform(f"{case.name}:{case.line}") * len(places))]
    return replace(case, before=case.before + line[:place], target=line[place:])


def drawn(path: Path, count: int) -> list[dict[str, str]]:
    """Return `count` problems of a benchmark, drawn by hashes of their names."""
    problems = [json.loads(line) for line in path.read_text().splitlines() if line.strip()]
    problems.sort(key=lambda problem: sha256(problem["task_id"].encode()).digest())
    return problems[:count]


def solved(
    engine: Engine, problems: Sequence[dict[str, str]], experts: ExpertChoice
) -> dict[str, list[float]]:
    """Return whether each problem's line is the true one, and whether its program passes."""
    prompts = [
        gap_ids(engine, problem["prompt"], problem["suffix"], PROBLEM_TOKENS)
        for problem in problems
    ]
    lines = written(engine, prompts, experts, heals(engine))
    pairs = [*zip(lines, problems, strict=True)]
    return {
        "problems_exact": [
            float(is_exact(line, problem["canonical_solution"])) for line, problem in pairs
        ],
        "problems_passed": [float(passes_tests(line, problem)) for line, problem in pairs],
    }


def heals(engine: Engine) -> bool:
    """Whether the server uses token healing: it samples the last tokens before a gap again."""
    return not infill_layout(engine.tokenizer).has_tokens


def passes_tests(line: str, problem: dict[str, str]) -> bool:
    """Return whether a problem's program, with the gap filled in, passes its tests.

    It must print a random word at its end: a line that exits early succeeds by exit code too.
    """
    end = token_hex()
    filled = f"{problem['prompt']}{line}\n{problem['suffix']}"
    tests = f"{problem['test']}\ncheck({problem['entry_point']})\nprint('{end}')\n"
    result = run_program(f"{filled}\n{tests}")
    return result.passed and result.output.endswith(f"{end}\n")


def gap_ids(engine: Engine, before: str, after: str, tokens: int) -> tuple[int, ...]:
    """Return a prompt with a gap: at most `tokens` before it, and at most half as many after."""
    tokenizer = engine.tokenizer
    layout = infill_layout(tokenizer)
    around = encode_around_gap(tokenizer, layout, before, after)
    ids = layout.join(around.prefix[-tokens:], around.suffix[: tokens // 2])
    return (*document_start_ids(tokenizer), *ids)


def written(
    engine: Engine, prompts: Sequence[tuple[int, ...]], experts: ExpertChoice, heal: bool = False
) -> list[str]:
    """Return the line that continues each prompt; `heal` samples its end again."""
    greedy = Sampling(48, temperature=0.0)
    lines: list[str] = []
    for start in range(0, len(prompts), TOGETHER):
        running = [
            engine.submit(Request(ids, greedy, experts, stop=("\n",), heal=heal))
            for ids in prompts[start : start + TOGETHER]
        ]
        lines += [first_line(generation) for generation in running]
    return lines


def exact(lines: Sequence[str], cases: Sequence[Case]) -> list[float]:
    """Return whether each line is the true one."""
    return [float(is_exact(line, case.target)) for line, case in zip(lines, cases, strict=True)]


def similarity(lines: Sequence[str], cases: Sequence[Case]) -> list[float]:
    """Return the edit similarity of each line to the true one."""
    return [edit_similarity(line, case.target) for line, case in zip(lines, cases, strict=True)]


if __name__ == "__main__":
    run_main(main)
