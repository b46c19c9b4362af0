"""Write everyday questions in eight languages for `chat_neutrality.py`, from public sets.

    for name in lm-sys/FastChat Modalities/MT-Bench-X dmitrymailk/mt_bench_ru THUDM/AlignBench \\
            yuzu-ai/japanese-llm-ranking; do git clone --depth 1 https://github.com/$name CLONES/$name; done
    python benchmarks/chat_questions.py CLONES QUESTIONS.jsonl

MT-Bench and its translations give two turns, AlignBench (every twelfth question) and Rakuda one.
No design decision of this project used them. Clones may be bare; their newest commit is read.
"""

import argparse
import json
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from entry import existing_path, run_main


@dataclass(frozen=True)
class QuestionSet:
    """Questions of one language in a repository, one JSON object per line.

    Attributes:
        language: ISO 639-1 code.
        repository: owner and name.
        path: file in the repository.
        field: key of the question, or of a list of turns.
        every: one question out of this many is taken.
    """

    language: str
    repository: str
    path: str
    field: str = "turns"
    every: int = 1


TRANSLATED = "Modalities/MT-Bench-X"
SETS = (
    QuestionSet("en", "lm-sys/FastChat", "fastchat/llm_judge/data/mt_bench/question.jsonl"),
    QuestionSet("de", TRANSLATED, "data/mt_bench_DE/question.jsonl"),
    QuestionSet("es", TRANSLATED, "data/mt_bench_ES/question.jsonl"),
    QuestionSet("fr", TRANSLATED, "data/mt_bench_FR/question.jsonl"),
    QuestionSet("it", TRANSLATED, "data/mt_bench_IT/question.jsonl"),
    QuestionSet("ru", "dmitrymailk/mt_bench_ru", "llm_judge/data/mt_bench/question_ru.jsonl"),
    QuestionSet("zh", "THUDM/AlignBench", "data/data_v1.1_release.jsonl", "question", every=12),
    QuestionSet(
        "ja", "yuzu-ai/japanese-llm-ranking", "jrank/data/rakuda_v1/questions.jsonl", "text"
    ),
)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("clones", type=existing_path, help="folder of OWNER/NAME clones")
    parser.add_argument("questions", type=Path, help="file to write, a conversation a line")
    options = parser.parse_args()
    records = [record for one in SETS for record in conversations(one, options.clones)]
    lines = [json.dumps(record, ensure_ascii=False) + "\n" for record in records]
    options.questions.write_text("".join(lines), encoding="utf-8")
    print(f"{len(records)} conversations")


def conversations(questions: QuestionSet, clones: Path) -> list[dict[str, Any]]:
    """Return the conversations of a set."""
    shown = subprocess.run(
        ["git", "-C", clones / questions.repository, "show", f"HEAD:{questions.path}"],
        capture_output=True,
        text=True,
        check=True,
    )
    asked = [json.loads(line)[questions.field] for line in shown.stdout.splitlines()]
    return [
        {"lang": questions.language, "turns": [one] if isinstance(one, str) else one}
        for one in asked[:: questions.every]
    ]


if __name__ == "__main__":
    run_main(main)
