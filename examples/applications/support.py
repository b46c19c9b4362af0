"""Support in several languages: experts for the shop and for its customers' languages, combined in
each request.

    python examples/applications/support.py german=TEXTS spanish=TEXTS [--minutes 5] [--epochs 8]

The shop's answers are in `examples/support.jsonl`, in English, German and Spanish. One way of
asking for each answer is held out. An expert for the shop is trained on the others, and an expert
for each language on a folder of texts. Each held-out question is then asked with no expert armed,
with that of its language, with that of the shop, and with both, weighted. An answer is right if it
is word for word the shop's.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from statistics import mean
from typing import Any

from serving import (
    MODEL,
    Client,
    add_tokens,
    amount_of,
    at_least_one,
    named_folder,
    parser_of,
    run,
    served,
    write_figures,
)

import deepseek
from deepseek.checkpoint.store import home
from deepseek.evaluate.scores import edit_similarity, is_exact

CONVERSATIONS = Path(__file__).parents[1] / "support.jsonl"
LANGUAGES = ("english", "german", "spanish")
"""Languages of the conversations, in the order in which they alternate."""


@dataclass(frozen=True)
class Question:
    """A held-out question and its answer."""

    language: str
    text: str
    answer: str


def main() -> None:
    parser = parser_of(__doc__, minutes=5.0)
    add_tokens(parser)
    parser.add_argument("texts", nargs="*", type=named_folder, metavar="LANGUAGE=FOLDER")
    parser.add_argument(
        "--epochs", type=at_least_one, default=8, help="over the shop's conversations"
    )
    parser.add_argument("--layers", default="all", help="of the shop's expert")
    options = parser.parse_args()
    folders = dict(options.texts)
    if not folders.keys() <= set(LANGUAGES):
        parser.error(f"the conversations are in {', '.join(LANGUAGES)}; name texts of these")
    questions, conversations = divided(CONVERSATIONS.read_text(encoding="utf-8").splitlines())
    taught = home() / "applications" / "shop.jsonl"
    taught.parent.mkdir(parents=True, exist_ok=True)
    taught.write_text("\n".join(conversations) + "\n", encoding="utf-8")
    packs = [
        deepseek.train_expert(
            options.base,
            name="shop",
            from_jsonl=taught,
            layers=options.layers,
            epochs=options.epochs,
            tokens=0,
        )
    ]
    packs += [
        deepseek.train_expert(options.base, name=language, from_folder=folder, **amount_of(options))
        for language, folder in folders.items()
    ]
    with served(options.base, packs) as client:
        found = {language: answered(client, questions, language, folders) for language in LANGUAGES}
    print(f"{'':10}{'experts':20}{'right':>8}{'similarity':>12}")
    for language, sides in found.items():
        for side, figures in sides.items():
            print(f"{language:10}{side:20}{figures['right']:8.0%}{figures['similarity']:12.0%}")
    if options.json:
        write_figures(options.json, found)


def divided(lines: list[str]) -> tuple[list[Question], list[str]]:
    """Return the last way of asking for each answer, held out, and the other conversations."""
    by_answer: dict[str, list[str]] = {}
    for line in lines:
        by_answer.setdefault(json.loads(line)["messages"][1]["content"], []).append(line)
    questions = []
    for place, (answer, asked) in enumerate(by_answer.items()):
        text = json.loads(asked.pop())["messages"][0]["content"]
        questions.append(Question(LANGUAGES[place % len(LANGUAGES)], text, answer))
    return questions, [line for asked in by_answer.values() for line in asked]


def answered(
    client: Client, questions: list[Question], language: str, folders: dict[str, Path]
) -> dict[str, dict[str, float]]:
    """Return the figures of each combination of experts on the questions of a language."""
    compositions: dict[str, Any] = {"none": [], "shop": ["shop"]}
    if language in folders:
        compositions[language] = [language]
        compositions[f"shop and {language}"] = {"shop": 1.0, language: 0.5}
    own = [question for question in questions if question.language == language]
    figures = {}
    for name, experts in compositions.items():
        pairs = [(ask(client, question.text, experts), question.answer) for question in own]
        figures[name] = {
            "right": mean(float(is_exact(*pair)) for pair in pairs),
            "similarity": mean(edit_similarity(*pair) for pair in pairs),
        }
    return figures


def ask(client: Client, question: str, experts: Any) -> str:
    """Return the server's answer with these experts armed."""
    reply = client.post(
        "/v1/chat/completions",
        {
            "model": MODEL,
            "messages": [{"role": "user", "content": question}],
            "temperature": 0,
            "max_tokens": 64,
            "experts": {"arm": experts},
        },
    )
    return str(reply["choices"][0]["message"]["content"])


if __name__ == "__main__":
    run(main)
