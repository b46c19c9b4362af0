"""A folder of papers: train an expert, build a search index, and compare both on questions.

    python examples/applications/papers.py FOLDER [--minutes 10] [--questions 100] [--quick]

An expert is trained on nine tenths of the papers (PDF, HTML, Markdown, LaTeX, text), and the same
papers are indexed. Questions are made from definitions and sections of the papers, and asked in
other words; an answer is right if it states what the paper states. The base, retrieval, the expert
and both together answer them, and complete lines of the held-out papers.
"""

import json
import time
from pathlib import Path
from typing import Any

from serving import at_least_one, parser_of, run, write_figures

import deepseek
from deepseek.data.builders.facts import is_right
from deepseek.data.builders.questions import Question
from deepseek.data.text.document import uniform
from deepseek.engine.engine import Engine
from deepseek.engine.request import ExpertChoice, Request
from deepseek.engine.sampler import Sampling
from deepseek.engine.start import start_engine
from deepseek.evaluate.against import Against, Row, rows_against
from deepseek.retrieval.index import Index
from deepseek.retrieval.prompt import in_question
from deepseek.text.chat_template import encode_prompt
from deepseek.train.jobs.expert_index import index_expert

QUICK = {"tokens": 4096, "epochs": 1, "held_out_tokens": 2048}
"""Settings for a quick test; the expert learns next to nothing."""

RIVALS = ("rag",)


def main() -> None:
    parser = parser_of(__doc__, minutes=10.0)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--name", default="papers-asked", help="name of the expert")
    parser.add_argument(
        "--questions", type=at_least_one, default=100, help="questions about either part"
    )
    parser.add_argument("--cases", type=at_least_one, default=200, help="held-out lines to write")
    parser.add_argument("--quick", action="store_true", help="train on little, to see it run")
    options = parser.parse_args()
    effort = QUICK if options.quick else {"layers": "all", "minutes": options.minutes}
    pack = deepseek.train_expert(
        options.base, name=options.name, from_folder=options.folder, **effort
    )
    against = Against(options.name, options.cases)
    comparison = against.compare(RIVALS)
    index = Index.load(index_expert(options.name))
    questions = {
        part: drawn(against.run, part, options.questions) for part in ("trained", "held out")
    }
    print("| | right, training papers | right, held out | held-out lines | loss | s a question |")
    print("|---|---|---|---|---|---|")
    figures: dict[str, Any] = {}
    with start_engine(options.base, experts=[pack], max_waiting=options.questions + 1) as engine:
        for row in rows_against(RIVALS):
            experts = ExpertChoice((options.name,) if row.expert else ())
            started = time.perf_counter()
            right = {
                part: right_answers(engine, row, experts, index, asked)
                for part, asked in questions.items()
            }
            seconds = time.perf_counter() - started
            scores = comparison.scores[row.name]
            asked_count = sum(map(len, questions.values()))
            figures[row.name] = {
                "right": right,
                "questions": {part: len(asked) for part, asked in questions.items()},
                "exact lines": sum(scores.exact) / len(scores.exact),
                "loss": scores.loss,
                "seconds a question": seconds / max(1, asked_count),
            }
            show(row.name, figures[row.name])
    if options.json:
        write_figures(options.json, figures)


def drawn(run: Path, part: str, count: int) -> list[Question]:
    """Return questions about the training papers or about the held-out ones, drawn by hash."""
    stored = (run / "corpus" / "questions.jsonl").read_text(encoding="utf-8")
    records = [json.loads(line) for line in stored.split("\n") if line]
    questions = [
        Question.of_record(record)
        for record in records
        if (record["set"] == "held out") == (part == "held out")
    ]
    return sorted(questions, key=lambda one: uniform(one.paraphrase))[:count]


def right_answers(
    engine: Engine, row: Row, experts: ExpertChoice, index: Index, questions: list[Question]
) -> int:
    """Return how many questions a row of the table answers correctly."""
    running = []
    for question in questions:
        asked = question.paraphrase
        if row.retrieval:
            length = lambda text: len(engine.tokenizer(text).input_ids)  # noqa: E731
            asked = in_question(index.retrieve(asked, 3, 700, length), asked)
        ids = encode_prompt(engine.tokenizer, [{"role": "user", "content": asked}])
        running.append(engine.submit(Request(tuple(ids), Sampling(64, temperature=0.0), experts)))
    answers = ["".join(event.text for event in generation) for generation in running]
    pairs = zip(answers, questions, strict=True)
    return sum(is_right(answer, question.check) for answer, question in pairs)


def show(name: str, one: dict[str, Any]) -> None:
    """Print a row of the table."""
    shares = [f"{one['right'][part]} of {count}" for part, count in one["questions"].items()]
    print(
        f"| {name} | {' | '.join(shares)} | {one['exact lines']:.1%} | {one['loss']:.3f} | "
        f"{one['seconds a question']:.2f} |",
        flush=True,
    )


if __name__ == "__main__":
    run(main)
