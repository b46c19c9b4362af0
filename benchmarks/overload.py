"""Ask for ten times what a server can do: every request gets an answer or a quick 429, and nothing hangs.

    python benchmarks/overload.py [--seconds 60] [--clients 160] [--abandon 200] [--json FILE]

A tiny random model behind a queue of 16; the clients are coroutines that ask again as soon as they are answered or
refused. Goodput is the share of the unloaded server's tokens a second that are still delivered in whole answers.
Afterwards clients leave long requests at once, and one more request is timed.
"""

import argparse
import asyncio
import contextlib
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

import httpx
from results import write

sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))

from live_server import Live, live

BODY: dict[str, Any] = {
    "model": "tiny", "prompt": "the expert of the model", "max_tokens": 64, "temperature": 0,
    "logit_bias": {"0": -100, "2": -100},
}  # fmt: skip
PAUSE = 0.05
"""Seconds after which a refused client asks again: much sooner than it was told to."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=60.0)
    parser.add_argument("--clients", type=int, default=160)
    parser.add_argument("--abandon", type=int, default=200)
    parser.add_argument("--json", type=Path, help="file to write the figures to")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder, live(Path(folder), max_running=8, max_waiting=8) as server:
        figures = asyncio.run(measure(server, options.seconds, options.clients, options.abandon))
    print(figures)
    if options.json:
        write(options.json, figures)


async def measure(server: Live, seconds: float, clients: int, abandon: int) -> dict[str, Any]:
    """Run all parts and return the figures."""
    limits = httpx.Limits(max_connections=clients + abandon + 10)
    async with httpx.AsyncClient(base_url=server.url, timeout=60, limits=limits) as http:
        await load_for(http, 2, 16)  # warm
        alone, _, _ = await load_for(http, min(seconds, 15), 16)
        statuses, refusals, others = await load_for(http, seconds, clients)
        left = await leave(http, abandon)
    refusals.sort()
    return {
        "seconds": seconds, "clients": clients, "statuses": dict(statuses), "unexpected": others,
        "refusal_p99_seconds": refusals[int(len(refusals) * 0.99)] if refusals else None,
        "answers_a_second": statuses[200] / seconds, "unloaded_answers_a_second": alone[200] / min(seconds, 15),
        "goodput": statuses[200] / seconds / (alone[200] / min(seconds, 15)),
        "abandoned": abandon, "next_reply_seconds": left,
    }  # fmt: skip


async def load_for(
    http: httpx.AsyncClient, seconds: float, clients: int
) -> tuple[Counter[int], list[float], list[str]]:
    """Ask with that many clients for that long; return statuses, times of refusals, and what should not have come."""
    statuses: Counter[int] = Counter()
    refusals: list[float] = []
    others: list[str] = []
    end = time.monotonic() + seconds

    async def ask() -> None:
        while time.monotonic() < end:
            started = time.perf_counter()
            try:
                reply = await http.post("/v1/completions", json=BODY)
            except httpx.HTTPError as error:
                others.append(repr(error))
                continue
            statuses[reply.status_code] += 1
            if reply.status_code == 429 and "retry-after" in reply.headers:
                refusals.append(time.perf_counter() - started)
                await asyncio.sleep(PAUSE)
            elif reply.status_code != 200:
                others.append(reply.text)

    await asyncio.gather(*(ask() for _ in range(clients)))
    return statuses, refusals, others


async def leave(http: httpx.AsyncClient, count: int) -> float:
    """Let `count` clients leave their long requests, and return how long the next reply takes."""

    async def go() -> None:
        with contextlib.suppress(httpx.HTTPError):
            await http.post("/v1/completions", json={**BODY, "max_tokens": 700}, timeout=0.3)

    await asyncio.gather(*(go() for _ in range(count)))
    started = time.perf_counter()
    while (await http.post("/v1/completions", json={**BODY, "max_tokens": 4})).status_code != 200:
        await asyncio.sleep(PAUSE)
    return time.perf_counter() - started


if __name__ == "__main__":
    main()
