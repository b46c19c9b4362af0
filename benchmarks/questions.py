"""Right answers of base, retrieval, expert, and both to questions about a taught source, asked in a
chat.

    python benchmarks/questions.py RUN PACK [--each 100] [--questions FILE] [--arms base,expert,always,retrieval,both]

RUN is the run folder of `deepseek expert train --questions SHARE`, PACK its expert. There are three
sets, and no question was trained on in the words used here: `asked` (training had the question in
other words), `unasked` (the source was trained on, the question was not) and `held out` (neither,
so no weights can know the answer). `--questions` takes the sets of another run on the same source,
for an expert that was trained without questions. A right answer contains everything that the
question's check requires (`deepseek.data.builders.facts.is_right`); answers are greedy, up to 64
tokens. If the run trained on only part of its text (`--tokens`), only part of `asked` was seen.

Twenty everyday questions are asked as well: `replies_changed` counts replies that differ from those
of the first arm.

`expert` is armed and contributes where its gate fires, `always` at every token. `retrieval` puts
passages of the training documents before the question for the base, `both` for the armed expert.
"""

import argparse
import json
from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from entry import existing_path, run_main
from results import save, write

from deepseek.data.builders.facts import is_right
from deepseek.data.builders.questions import Question
from deepseek.data.text.document import silent, uniform
from deepseek.engine.engine import Engine
from deepseek.engine.request import ExpertChoice, Request
from deepseek.engine.sampler import Sampling
from deepseek.engine.start import start_engine
from deepseek.packs.pack import ExpertPack, read_pack
from deepseek.retrieval.index import Index
from deepseek.retrieval.prompt import in_question
from deepseek.text.chat_template import encode_prompt
from deepseek.train.text.corpus import NONE_KNOWN, Source, read_sides

SETS = ("asked", "unasked", "held out")
ARMS = ("base", "expert", "always", "retrieval", "both")
MAX_TOKENS = 64
PASSAGES = 3
PASSAGE_TOKENS = 700

EVERYDAY = (
    "What is the capital of France?",
    "How long should I boil an egg?",
    "Write a short poem about the sea.",
    "Why is the sky blue?",
    "Give me three tips for a job interview.",
    "What is the difference between weather and climate?",
    "Recommend a book about the history of Rome.",
    "How do I get rid of a headache?",
    "Translate 'good morning' into Spanish.",
    "What can I cook with rice and tomatoes?",
    "Explain photosynthesis to a child.",
    "Who wrote Romeo and Juliet?",
    "How many legs does a spider have?",
    "Plan a weekend in Berlin for me.",
    "What should I give my sister for her birthday?",
    "How does a bicycle stay upright?",
    "Was ist der Unterschied zwischen Tee und Kaffee?",
    "¿Cuál es el río más largo de América del Sur?",
    "Quels sont les ingrédients d'une ratatouille ?",
    "Tell me a joke about cats.",
)
"""Questions that no source answers; any change in these replies is harm."""

Retriever = Callable[[str], str]
"""Returns the prompt for a question: passages and the question itself."""


@dataclass(frozen=True)
class Answer:
    """An arm's answer, whether it is right, and the number of its tokens by the expert."""

    text: str
    right: bool
    tokens: int
    by_expert: int


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("run", type=existing_path)
    parser.add_argument("pack", type=existing_path)
    parser.add_argument("--base", default="smollm2-135m")
    parser.add_argument("--each", type=int, default=100, help="questions of each set")
    parser.add_argument(
        "--questions", type=existing_path, help="default: RUN/corpus/questions.jsonl"
    )
    parser.add_argument("--arms", default=",".join(ARMS))
    parser.add_argument(
        "--json", type=Path, help="file to write the figures to; default: results/questions.json"
    )
    options = parser.parse_args()
    arms = options.arms.split(",")
    if not set(arms) <= set(ARMS):
        parser.error(f"--arms takes some of {','.join(ARMS)}, not {options.arms}")
    sets = question_sets(
        options.questions or options.run / "corpus" / "questions.jsonl", options.each
    )
    retriever = training_retriever(options.run) if {"retrieval", "both"} & {*arms} else None
    figures: dict[str, dict[str, Any]] = {}
    sets["everyday"] = [Question(text, text, "", "everyday", (), "") for text in EVERYDAY]
    replies: list[str] = []
    with start_engine(options.base, max_waiting=10_000) as engine:
        for arm in arms:
            found = answers_of(engine, sets, options.pack, arm, retriever)
            figures[arm] = {name: summary(sets[name], answers) for name, answers in found.items()}
            everyday = [answer.text for answer in found["everyday"]]
            replies = replies or everyday  # the first arm's, which should be the base
            figures[arm]["replies_changed"] = sum(map(str.__ne__, everyday, replies))
            print(arm, json.dumps(figures[arm], ensure_ascii=False), flush=True)
    result = json.loads((options.run / "result.json").read_text())
    held_out = {
        "held_out_before": round(result["before"], 4),
        "held_out_after": round(result["after"], 4),
    }
    record = {"figures": {**held_out, "arms": figures}}
    print(write(options.json, record) if options.json else save("questions", record))


def question_sets(path: Path, each: int) -> dict[str, list[Question]]:
    """Return up to `each` questions of every set, drawn by hash."""
    found: dict[str, list[Question]] = defaultdict(list)
    for line in path.read_text(encoding="utf-8").splitlines():
        record = json.loads(line)
        found[record["set"]].append(Question.of_record(record))
    drawn = {
        name: sorted(found[name], key=lambda one: uniform(f"evaluate:{one.paraphrase}"))
        for name in SETS
    }
    return {name: questions[:each] for name, questions in drawn.items() if questions}


def answers_of(
    engine: Engine,
    sets: dict[str, list[Question]],
    pack: Path,
    arm: str,
    retriever: Retriever | None,
) -> dict[str, list[Answer]]:
    """Return the answers of one arm; the expert is plugged meanwhile if the arm uses it."""
    if arm in ("expert", "both", "always"):
        engine.plug(with_open_gates(read_pack(pack)) if arm == "always" else pack)
    told = retriever if arm in ("retrieval", "both") else None
    answers = {name: ask(engine, questions, told) for name, questions in sets.items()}
    for expert in engine.experts():
        engine.unplug(expert.name)
    return answers


def with_open_gates(pack: ExpertPack) -> ExpertPack:
    """Return the same expert with gates that fire at every token."""
    tensors = dict(pack.tensors)
    for name, gate in pack.tensors.items():
        if name.startswith("gate."):
            tensors[name] = torch.zeros_like(gate)
            tensors[name][-1] = 1.0
    return ExpertPack.seal(pack.manifest, tensors)


def ask(engine: Engine, questions: Sequence[Question], retriever: Retriever | None) -> list[Answer]:
    """Ask all questions in their held-out paraphrases."""
    names = tuple(expert.name for expert in engine.experts())
    greedy = Sampling(MAX_TOKENS, temperature=0.0)
    running = []
    for question in questions:
        content = retriever(question.paraphrase) if retriever else question.paraphrase
        ids = encode_prompt(engine.tokenizer, [{"role": "user", "content": content}])
        running.append(engine.submit(Request(tuple(ids), greedy, ExpertChoice(names))))
    answers = []
    for question, generation in zip(questions, running, strict=True):
        text = "".join(event.text for event in generation)
        usage = generation.usage
        own = sum(count for name, count in usage.experts.items() if name is not None)
        answers.append(Answer(text, is_right(text, question.check), usage.completion_tokens, own))
    return answers


def summary(questions: Sequence[Question], answers: Sequence[Answer]) -> dict[str, object]:
    """Return the number of right answers, in total and by kind, the share of tokens by the expert,
    and a few examples.
    """
    right = Counter(
        question.kind for question, answer in zip(questions, answers, strict=True) if answer.right
    )
    asked = Counter(question.kind for question in questions)
    tokens = sum(answer.tokens for answer in answers)
    pairs = zip(questions, answers, strict=True)
    return {
        "right": sum(right.values()),
        "questions": len(questions),
        "kinds": {kind: f"{right[kind]}/{count}" for kind, count in sorted(asked.items())},
        "tokens_by_expert": round(sum(answer.by_expert for answer in answers) / max(1, tokens), 3),
        "examples": [[q.paraphrase, q.answer, a.text, a.right] for q, a in list(pairs)[:8]],
    }


def training_retriever(run: Path) -> Retriever:
    """Return a retriever over the training documents of a run."""
    stored = json.loads((run / "request.json").read_text())["source"]
    paths = [stored[name] for name in ("git", "folder", "jsonl", "parquet")]
    source = Source.at(*paths, held_out=stored["held_out"], by=stored["by"], seed=stored["seed"])
    index = Index.build(read_sides(source, silent, NONE_KNOWN).train)

    def prompt(question: str) -> str:
        found = index.retrieve(question, PASSAGES, PASSAGE_TOKENS, lambda text: len(text) // 3)
        return in_question(found, question)

    return prompt


if __name__ == "__main__":
    run_main(main)
