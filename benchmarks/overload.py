"""Overload a server with ten times the requests it can answer: each must get an answer or a quick
429, and none may hang.

    python benchmarks/overload.py [--seconds 60] [--times 10] [--abandon 200] [--json FILE]

The server runs in its own process with a batch of 16 and a queue of 64; this process is the load.
Capacity is the tokens per second with as many clients as fill the batch and half of the queue, each
sending its next request when it is answered. Under overload, requests arrive at random (Poisson) at
`--times` the rate of answers at capacity, regardless of earlier requests. Goodput is the tokens per
second in complete answers under overload as a share of capacity. Both are counted over `--seconds`
after the load has settled; capacity is measured before and after the overload, so that a change in
the machine's speed shows. Finally, `--abandon` clients disconnect from long requests at once, and
the next request is timed.
"""

import argparse
import asyncio
import random
import re
import time
from collections import Counter, deque
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from entry import run_main
from results import write
from served import WORDS, percentile, served

BATCH, QUEUE, TOKENS, SETTLE = 16, 64, 128, 10.0


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--seconds", type=float, default=60.0)
    parser.add_argument("--times", type=float, default=10.0)
    parser.add_argument("--abandon", type=int, default=200)
    parser.add_argument("--json", type=Path, help="file to write the figures to")
    options = parser.parse_args()
    with served(options.model, "--max-running", str(BATCH), "--max-waiting", str(QUEUE)) as server:
        figures = asyncio.run(measure(Load(server.url, options.model), options))
    print(figures)
    if options.json:
        write(options.json, figures)


class Connection(asyncio.Protocol):
    """A persistent connection for one request at a time; parses only the HTTP that our server
    sends.
    """

    def __init__(self) -> None:
        self.reply: asyncio.Future[bytes] | None = None
        self.data = b""

    def connection_made(self, transport: Any) -> None:
        self.transport = transport

    def data_received(self, data: bytes) -> None:
        self.data += data
        head, found, body = self.data.partition(b"\r\n\r\n")
        length = re.search(rb"(?i)content-length: (\d+)", head)
        whole = len(body) >= int(length[1]) if length else body.endswith(b"\r\n0\r\n\r\n")
        if found and whole and self.reply and not self.reply.done():
            self.reply.set_result(self.data)

    def connection_lost(self, error: Exception | None) -> None:
        if self.reply and not self.reply.done():
            self.reply.set_exception(error or ConnectionError("closed"))

    async def ask(self, request: bytes) -> bytes:
        """Send a request and return the reply with its headers."""
        self.data, self.reply = b"", asyncio.get_running_loop().create_future()
        self.transport.write(request)
        return await self.reply


class Load:
    """Requests to one server, and counts of the replies."""

    def __init__(self, url: str, model: str) -> None:
        self.host, self.port, self.model = "127.0.0.1", urlsplit(url).port, model
        self.free: deque[Connection] = deque()
        self.random = random.Random(0)
        self.forget()

    def forget(self) -> None:
        """Reset the counts."""
        self.started, self.tokens = time.perf_counter(), 0
        self.statuses: Counter[str] = Counter()
        self.refusals: list[float] = []
        self.unexpected: list[str] = []

    def request(self, tokens: int = TOKENS) -> bytes:
        """Return a request with a random prompt of about 100 tokens."""
        prompt = " ".join(self.random.choices(WORDS, k=100))
        body = (
            f'{{"model":"{self.model}","prompt":"{prompt}","max_tokens":{tokens},"temperature":0}}'
        )
        head = f"POST /v1/completions HTTP/1.1\r\nHost: {self.host}\r\nContent-Type: application/json\r\n"
        return f"{head}Content-Length: {len(body)}\r\n\r\n{body}".encode()

    async def connection(self) -> Connection:
        """Return an idle connection, or a new one."""
        while self.free:
            connection = self.free.pop()
            if not connection.transport.is_closing():
                return connection
        return (
            await asyncio.get_running_loop().create_connection(Connection, self.host, self.port)
        )[1]

    async def ask(self) -> str:
        """Ask once and count the reply; return its status."""
        started = time.perf_counter()
        try:
            connection = await self.connection()
            reply = await connection.ask(self.request())
        except OSError as error:
            self.unexpected.append(repr(error))
            return "broken"
        self.free.append(connection)
        status = reply[9:12].decode()
        self.statuses[status] += 1
        if status == "200":
            self.tokens += int(re.search(rb'"completion_tokens": ?(\d+)', reply)[1])  # type: ignore[index]
        elif status == "429" and b"retry-after:" in reply.lower():
            self.refusals.append(time.perf_counter() - started)
        else:
            self.unexpected.append(reply.decode())
        return status

    def rates(self) -> dict[str, float]:
        """Return tokens and answers per second since `forget`."""
        seconds = time.perf_counter() - self.started
        return {
            "tokens_per_second": self.tokens / seconds,
            "answers_per_second": self.statuses["200"] / seconds,
        }


async def measure(load: Load, options: argparse.Namespace) -> dict[str, Any]:
    """Run all phases and return the figures."""
    before = await capacity(load, options.seconds)
    rate = options.times * before["answers_per_second"]
    over, told = await overload(load, options.seconds, rate)
    after = await capacity(load, options.seconds)
    usual = (before["tokens_per_second"] + after["tokens_per_second"]) / 2
    return {
        "capacity_before": before,
        "capacity_after": after,
        "overload": over,
        "offered_per_second": rate,
        **told,
        "goodput": over["tokens_per_second"] / usual,
        "abandoned": options.abandon,
        "next_reply_seconds": await leave(load, options.abandon),
    }


async def capacity(load: Load, seconds: float) -> dict[str, float]:
    """Return the rates of clients that keep the batch full and are never refused."""
    over = False

    async def client() -> None:
        while not over:
            await load.ask()

    clients = [asyncio.create_task(client()) for _ in range(BATCH + QUEUE // 2)]
    await asyncio.sleep(SETTLE)
    load.forget()
    await asyncio.sleep(seconds)
    rates, over = load.rates(), True
    await asyncio.gather(*clients)
    return rates


async def overload(
    load: Load, seconds: float, rate: float
) -> tuple[dict[str, float], dict[str, Any]]:
    """Send `rate` requests per second; return the rates, and refusals with their times."""
    asked: set[asyncio.Task[str]] = set()
    late, start = 0.0, time.perf_counter()
    counted = arrival = 0.0
    while arrival < SETTLE + seconds:
        arrival += load.random.expovariate(rate)
        if not counted and arrival > SETTLE:
            load.forget()
            counted = arrival
        await asyncio.sleep(start + arrival - time.perf_counter())
        late = max(late, time.perf_counter() - start - arrival)
        task = asyncio.create_task(load.ask())
        asked.add(task)
        task.add_done_callback(asked.discard)
    rates, refusals = load.rates(), list(load.refusals)
    left = len(asked)
    await asyncio.wait_for(asyncio.gather(*asked), 30 + 10 * seconds)  # nothing hangs
    times = (
        {str(share): percentile(refusals, share) for share in (0.5, 0.9, 0.99, 1.0)}
        if refusals
        else {}
    )
    told = {
        "statuses": dict(load.statuses),
        "unexpected": load.unexpected,
        "refusal_seconds": times,
        "under_way_at_end": left,
        "latest_arrival_seconds": late,
    }
    return rates, told


async def leave(load: Load, count: int) -> float:
    """Let `count` clients abandon long requests; return the seconds until the next reply."""

    async def go() -> None:
        connection = await load.connection()
        connection.reply = None
        connection.transport.write(load.request(1024))
        await asyncio.sleep(0.5)
        connection.transport.abort()

    await asyncio.gather(*(go() for _ in range(count)))
    started = time.perf_counter()
    while True:
        reply = await (await load.connection()).ask(load.request(4))
        if reply[9:12] == b"200":
            return time.perf_counter() - started
        await asyncio.sleep(0.05)


if __name__ == "__main__":
    run_main(main)
