"""A team's server: experts of several sources, keys with the experts that they may use, and an
update that is plugged in while it serves.

    python examples/applications/team_server.py shop=FOLDER manual=FOLDER ... [--minutes 2]

An expert is trained on each folder. Each gets a key that may use no other expert. Its team asks for
continuations of passages that the training held out, without naming an expert; asks once for
an expert of another team, which is refused; and goes on asking while one expert is replaced by its
update: the newest file of its source is kept from the first training. Prints what the metrics
count.
"""

import json
import re
import secrets
import shutil
import threading
import time
import urllib.error
from pathlib import Path
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
from deepseek.checkpoint.hub import resolve
from deepseek.checkpoint.store import home
from deepseek.data import TokenShards
from deepseek.data.text.decode import decode_documents
from deepseek.errors import DataError
from deepseek.evaluate.cases import next_line_cases
from deepseek.server.service import Settings
from deepseek.text.tokenizer import load_tokenizer

CHARACTERS = 600
"""Characters of a passage that is sent as a prompt."""


def main() -> None:
    parser = parser_of(__doc__, minutes=2.0)
    add_tokens(parser)
    parser.add_argument("sources", nargs="+", type=named_folder, metavar="NAME=FOLDER")
    parser.add_argument("--asked", type=at_least_one, default=16, help="passages of each team")
    options = parser.parse_args()
    sources = dict(options.sources)
    if len(sources) < max(2, len(options.sources)):
        parser.error("name at least two sources, for two teams, each with a name of its own")
    updated = next(iter(sources))
    kept, sources[updated] = without_newest(sources[updated], updated)
    amount = amount_of(options)
    packs = [
        deepseek.train_expert(options.base, name=name, from_folder=folder, **amount)
        for name, folder in sources.items()
    ]
    keys = {name: secrets.token_urlsafe(32) for name in sources}
    admin = secrets.token_urlsafe(32)
    settings = Settings(
        api_keys=frozenset(keys.values()),
        key_experts={key: frozenset({name}) for name, key in keys.items()},
        admin_keys=frozenset({admin}),
    )
    figures: dict[str, Any] = {"experts": len(packs), "teams": {}}
    with served(options.base, packs, settings) as client:
        teams = {name: Client(client.url, key) for name, key in keys.items()}
        for name, team in teams.items():
            figures["teams"][name] = asked(team, passages(options.base, name, options.asked))
        figures["refused"] = refused(teams)
        ask = Asking(teams[updated], passages(options.base, updated, options.asked))
        start = time.perf_counter()
        shutil.copy(options.sources[0][1] / kept, sources[updated] / kept)
        deepseek.train_expert(update=updated, **amount)
        replace(Client(client.url, admin), updated)
        figures["update"] = {"seconds": time.perf_counter() - start, **ask.stop()}
        metrics = Client(client.url, admin).get("/metrics")
        figures["tokens"] = {
            name: int(float(count))
            for name, count in re.findall(r'expert_tokens_total{expert="(.*?)"} (\S+)', metrics)
        }
    print(json.dumps(figures, indent=1))
    if options.json:
        write_figures(options.json, figures)


def without_newest(source: Path, name: str) -> tuple[Path, Path]:
    """Return the path of a folder's newest file in it, and a copy of the folder without it."""
    files = [path for path in source.rglob("*") if path.is_file()]
    if len(files) < 2:
        raise DataError(f"{source} holds {len(files)} files; give two or more, one for the update.")
    newest = max(files, key=lambda path: path.stat().st_mtime)
    copied = home() / "applications" / name
    shutil.rmtree(copied, ignore_errors=True)
    shutil.copytree(source, copied)
    place = newest.relative_to(source)
    (copied / place).unlink()
    return place, copied


def passages(base: str, name: str, count: int) -> list[str]:
    """Return beginnings of passages that the training of an expert held out."""
    shards = TokenShards(home() / "runs" / name / "corpus" / "held-out")
    documents = decode_documents(shards, load_tokenizer(resolve(base)))
    found = [case.before[-CHARACTERS:] for case in next_line_cases(documents, count)]
    if not found:
        raise DataError(f"no lines of {name} were held out; give it longer files.")
    return found


def continued(team: Client, passage: str) -> dict[str, Any]:
    """Return the reply to a passage."""
    body = {"model": MODEL, "prompt": passage, "max_tokens": 24, "temperature": 0}
    return team.post("/v1/completions", body)


def asked(team: Client, prompts: list[str]) -> dict[str, Any]:
    """Return how many tokens of the replies were written, and by which experts."""
    experts: dict[str, int] = {}
    tokens = 0
    for prompt in prompts:
        reply = continued(team, prompt)
        tokens += reply["usage"]["completion_tokens"]
        for name, count in reply.get("experts", {}).items():
            experts[name] = experts.get(name, 0) + count
    return {"replies": len(prompts), "tokens": tokens, "experts": experts}


def refused(teams: dict[str, Client]) -> int:
    """Return how many teams are refused when they ask for the expert of the next one."""
    count = 0
    names = list(teams)
    for place, name in enumerate(names):
        other = names[(place + 1) % len(names)]
        body = {"model": MODEL, "prompt": "x", "max_tokens": 1, "experts": {"arm": [other]}}
        try:
            teams[name].post("/v1/completions", body)
        except urllib.error.HTTPError as error:
            count += error.code == 403
    return count


def replace(admin: Client, name: str) -> None:
    """Replace a plugged expert by its pack in the experts folder."""
    admin.delete(f"/v1/experts/{name}")
    admin.post("/v1/experts", {"name": name})


class Asking:
    """A team that asks one passage after another until it is stopped."""

    def __init__(self, team: Client, prompts: list[str]) -> None:
        self.team = team
        self.prompts = prompts
        self.replies = 0
        self.failures = 0
        self.done = threading.Event()
        self.thread = threading.Thread(target=self.run)
        self.thread.start()

    def run(self) -> None:
        while not self.done.is_set():
            try:
                continued(self.team, self.prompts[self.replies % len(self.prompts)])
                self.replies += 1
            except urllib.error.URLError:
                self.failures += 1

    def stop(self) -> dict[str, int]:
        """Stop, and return how many replies came and how many requests failed."""
        self.done.set()
        self.thread.join()
        return {"replies": self.replies, "failures": self.failures}


if __name__ == "__main__":
    run(main)
