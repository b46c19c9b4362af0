"""How many replies to everyday questions change when experts are plugged and armed automatically.

    python benchmarks/chat_neutrality.py QUESTIONS.jsonl EXPERT [EXPERT ...] [--json FILE]

QUESTIONS holds one conversation per line, `{"lang": "en", "turns": ["first message", "second
message"]}`, as `chat_questions.py` writes them. Replies are greedy, up to 32 tokens, from the
engine with its serving settings. The second message of a conversation always follows the base's
first reply, so that all sides answer the same text. Every message is answered by the base, with all
experts plugged, and with each expert plugged alone.
"""

import argparse
import json
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from entry import existing_path, run_main
from results import add_output, write

from deepseek.engine.engine import Engine
from deepseek.engine.request import ExpertChoice, Request
from deepseek.engine.sampler import Sampling
from deepseek.engine.start import start_engine
from deepseek.packs.library import find_pack
from deepseek.text.chat_template import encode_prompt, user_ids

TOKENS = 32
AT_ONCE = 64


@dataclass(frozen=True)
class Answered:
    """A reply, with the number of tokens at which each expert had the largest weight."""

    tokens: tuple[int | None, ...]
    text: str
    speakers: Counter[str]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("questions", type=existing_path)
    parser.add_argument("experts", nargs="+", help="names of trained experts, or paths of packs")
    parser.add_argument("--base", default="smollm2-135m")
    parser.add_argument("--limit", type=int, help="conversations to ask; default: all")
    parser.add_argument(
        "--together", action="store_true", help="leave out the replies with each expert alone"
    )
    parser.add_argument(
        "--show", action="store_true", help="print the replies that changed (never for a final set)"
    )
    add_output(parser, "chat_neutrality")
    options = parser.parse_args()
    started = time.monotonic()
    with start_engine(options.base, max_waiting=2 * AT_ONCE) as engine:
        asked = conversations(engine, options.questions, options.limit)
        packs = {pack.stem: pack for pack in (find_pack(expert) for expert in options.experts)}
        messages = [one["messages"] for one in asked]
        base = replies(engine, messages, ExpertChoice(()))
        rows = {}
        alone = {} if options.together else {pack: [pack] for pack in packs}
        for name, plugged in {"all together": list(packs), **alone}.items():
            for pack in plugged:
                engine.plug(packs[pack])
            found = replies(engine, messages, ExpertChoice())
            rows[name] = compare(asked, base, found)
            print_row(name, rows[name])
            if options.show:
                show(asked, base, found)
            for pack in plugged:
                engine.unplug(pack)
    seconds = round(time.monotonic() - started)
    write(options.json, {"replies": len(asked), "seconds": seconds, "rows": rows})


def conversations(engine: Engine, path: Path, limit: int | None) -> list[dict[str, Any]]:
    """Return the prompts: every first message, and every second one after the base's reply to the
    first.
    """
    records = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()][:limit]
    first = [[{"role": "user", "content": record["turns"][0]}] for record in records]
    asked = [
        {"lang": record["lang"], "turn": 1, "messages": messages}
        for record, messages in zip(records, first, strict=True)
    ]
    both = [
        (record, messages)
        for record, messages in zip(records, first, strict=True)
        if len(record["turns"]) > 1
    ]
    answers = replies(engine, [messages for _, messages in both], ExpertChoice(()))
    for (record, messages), answer in zip(both, answers, strict=True):
        later = [
            *messages,
            {"role": "assistant", "content": answer.text},
            {"role": "user", "content": record["turns"][1]},
        ]
        asked.append({"lang": record["lang"], "turn": 2, "messages": later})
    return asked


def replies(
    engine: Engine, asked: Sequence[list[dict[str, str]]], choice: ExpertChoice
) -> list[Answered]:
    """Return the greedy replies to conversations, computed in batches."""
    found = []
    for start in range(0, len(asked), AT_ONCE):
        generations = []
        for messages in asked[start : start + AT_ONCE]:
            ids = encode_prompt(engine.tokenizer, messages)
            spoken = user_ids(engine.tokenizer, messages)
            request = Request(tuple(ids), Sampling(TOKENS), choice, user_ids=spoken)
            generations.append(engine.submit(request))
        for generation in generations:
            events = list(generation)
            speakers = Counter(event.expert for event in events if event.expert is not None)
            text = "".join(event.text for event in events)
            found.append(Answered(tuple(event.token_id for event in events), text, speakers))
    return found


def compare(
    asked: list[dict[str, Any]], base: list[Answered], found: list[Answered]
) -> dict[str, Any]:
    """Return shares in per cent of replies that changed and of tokens by experts, and counts of
    changed replies by language and turn.
    """
    changed = [one.tokens != other.tokens for one, other in zip(base, found, strict=True)]
    groups = Counter(f"{one['lang']} {one['turn']}" for one in asked)
    of_group = Counter(
        f"{one['lang']} {one['turn']}" for one, yes in zip(asked, changed, strict=True) if yes
    )
    speakers = sum((one.speakers for one in found), Counter())
    tokens = sum(len(one.tokens) for one in found)
    return {
        "changed_percent": round(100 * sum(changed) / len(changed), 2),
        "tokens_by_experts_percent": round(100 * speakers.total() / tokens, 3),
        "speakers": dict(speakers),
        "changed_by_language_and_turn": {
            group: [of_group[group], count] for group, count in sorted(groups.items())
        },
    }


def print_row(name: str, row: dict[str, Any]) -> None:
    groups = ", ".join(
        f"{g} {n}/{m}" for g, (n, m) in row["changed_by_language_and_turn"].items() if n
    )
    print(
        f"{name:16} replies changed {row['changed_percent']:6.2f} %   tokens by experts "
        f"{row['tokens_by_experts_percent']:6.3f} %   {groups}",
        flush=True,
    )


def show(asked: list[dict[str, Any]], base: list[Answered], found: list[Answered]) -> None:
    for one, before, after in zip(asked, base, found, strict=True):
        if before.tokens != after.tokens:
            print(
                f"  {one['messages'][-1]['content']!r:.120}\n    {before.text!r}\n    {after.text!r} {after.speakers}"
            )


if __name__ == "__main__":
    run_main(main)
