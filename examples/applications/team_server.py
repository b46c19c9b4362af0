"""A team's server: experts on several sources, keys limited to some experts, and an update that is
plugged in while the server runs.

    python examples/applications/team_server.py shop=FOLDER manual=FOLDER ... [--minutes 2]

An expert is trained on each folder, and gets a key that may use no other expert. Each team requests
continuations of held-out passages, without naming an expert, and requests another team's expert
once, which is refused. The newest text of one source is left out of the first training; its expert
is then updated and replaced while its team keeps sending requests. Prints the counts, with those of
the metrics.
"""

import re
import secrets
import shutil
import threading
import time
import urllib.error
from http.client import HTTPException
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
from deepseek.data.text.source import Skipped, folder_documents
from deepseek.errors import DataError
from deepseek.evaluate.cases import next_line_cases
from deepseek.server.settings import Settings
from deepseek.text.tokenizer import load_tokenizer

CHARACTERS = 600
"""Maximum number of characters of a passage that is sent as a prompt."""


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
        prompts = passages(options.base, updated, options.asked)
        with Asking(teams[updated], prompts) as asking:
            start = time.perf_counter()
            copy_text(options.sources[0][1], sources[updated], kept)
            deepseek.train_expert(update=updated, **amount)
            Client(client.url, admin).post("/v1/experts", {"name": updated, "replace": True})
            seconds = time.perf_counter() - start
        counts = {"replies": asking.replies, "failures": asking.failures}
        figures["update"] = {"seconds": seconds, **counts}
        metrics = Client(client.url, admin).get("/metrics")
        figures["tokens"] = {
            name: int(float(count))
            for name, count in re.findall(r'expert_tokens_total{expert="(.*?)"} (\S+)', metrics)
        }
    show(figures, updated)
    if options.json:
        write_figures(options.json, figures)


def show(figures: dict[str, Any], updated: str) -> None:
    """Print the figures of the teams, of the update and of the metrics."""
    print(
        f"\n{'team':16}{'replies':>8}{'tokens':>8}{'own expert':>12}{'others':>8}{'in metrics':>12}"
    )
    for name, team in figures["teams"].items():
        own = team["experts"].get(name, 0)
        others = sum(team["experts"].values()) - own
        counted = figures["tokens"].get(name, 0)
        print(f"{name:16}{team['replies']:8}{team['tokens']:8}{own:12}{others:8}{counted:12}")
    update = figures["update"]
    print(
        f"\nrequests for another's expert: {figures['refused']} of {figures['experts']} refused"
        f"\n{updated} updated and replaced in {update['seconds']:.0f} s; meanwhile its team got "
        f"{update['replies']} replies, and {update['failures']} requests failed"
    )


def without_newest(source: Path, name: str) -> tuple[Path, Path]:
    """Return the path of the newest text in a folder, and a copy of the others.

    Args:
        source: the folder.
        name: name of the expert that learns from the copy.

    Raises:
        DataError: there are fewer than two texts.
    """
    times = {
        Path(*Path(document.name).parts[1:]): document.time  # the first part is the folder's name
        for document in folder_documents(source.resolve(), Skipped())
    }
    if len(times) < 2:
        raise DataError(
            f"{source} holds {len(times)} files with text; give two or more, one for the update."
        )
    newest = max(times, key=times.__getitem__)
    copied = home() / "applications" / name
    shutil.rmtree(copied, ignore_errors=True)
    for place in times.keys() - {newest}:
        copy_text(source, copied, place)
    return newest, copied


def copy_text(source: Path, target: Path, place: Path) -> None:
    """Copy one file from a folder to the same place in another."""
    (target / place).parent.mkdir(parents=True, exist_ok=True)
    shutil.copy2(source / place, target / place)


def passages(base: str, name: str, count: int) -> list[str]:
    """Return the beginnings of passages that were held out of an expert's training."""
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
    """Return the number of tokens in the replies, in all and by expert."""
    experts: dict[str, int] = {}
    tokens = 0
    for prompt in prompts:
        reply = continued(team, prompt)
        tokens += reply["usage"]["completion_tokens"]
        for name, count in reply.get("experts", {}).items():
            experts[name] = experts.get(name, 0) + count
    return {"replies": len(prompts), "tokens": tokens, "experts": experts}


def refused(teams: dict[str, Client]) -> int:
    """Return how many teams are refused when they request the next team's expert."""
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


class Asking:
    """A team that sends one passage after another until the block ends.

    Attributes:
        replies: number of replies.
        failures: number of requests that failed.
    """

    def __init__(self, team: Client, prompts: list[str]) -> None:
        self.team = team
        self.prompts = prompts
        self.replies = 0
        self.failures = 0
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._run)

    def __enter__(self) -> "Asking":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._done.set()
        self._thread.join()

    def _run(self) -> None:
        while not self._done.is_set():
            try:
                continued(self.team, self.prompts[self.replies % len(self.prompts)])
                self.replies += 1
            except (OSError, HTTPException):
                self.failures += 1


if __name__ == "__main__":
    run(main)
