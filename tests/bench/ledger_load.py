"""`make bench-ledger`: what the ledger costs a cache hit, by where it is kept. Linux only (/proc).

    python -m tests.bench.ledger_load [--quick] [--connections 16]

Real servers around the tests' fake backend, each with its own ledger: none at all (off: one that does nothing), SQLite,
PostgreSQL, and PostgreSQL behind Redis with each of its two ways to write its append-only file down. All databases sync
to the disk. The servers are pressed turn by turn in one run; before the next turn each has passed on what it had in
Redis. At the end every hit must be in its ledger, once, at its price. Prints tables, and as its last line one JSON
object:

    machine      cpu, cores, memory_gb, python, system, fsync_ms (of the disk that all of it is on)
    connections  how many at once
    bytes        of one answer
    free | paid  (hits that cost nothing, or money) -> ledger -> hits_per_s, median_ms, cpu_us (of the server, per hit):
                 medians of the turns; ratio, ratio_min, ratio_max: to `off` in the same round; cpu_ratio: of CPU, to
                 `off`, the least noisy on a shared machine
    stored       ledger -> usage events in it at the end
    seconds      how long the benchmark took
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import uvloop

from api.src.building import build_ledger
from api.src.settings import Settings
from tests.bench import report, speech
from tests.bench.load import http_request, press
from tests.bench.processes import ServerProcess, running
from tests.ports import free_port
from tests.postgres import PostgresServer, running_server
from tests.redis_server import RedisServer, running_redis

TEXT = "This sentence is spoken once, and from then on it comes out of the cache each time."
KINDS = {"free": "tts-1", "paid": "tts-1-hd"}
"""By what it is asked for; the sound is the same."""

PRICES = "[models.tts-1-hd]\nper_1000_characters = 15000\ncached_per_1000_characters = 1500\n"
CREDIT_MICROS = 10**15
STREAM = "tts:{usage}:events"
KEY = "sk-bench"


@dataclass(frozen=True)
class Effort:
    """How often and how long things are measured; the shortest turns are as long as a few flushes."""

    rounds: int = 5
    turn_s: float = 3.0


QUICK = Effort(rounds=3, turn_s=1.5)


@dataclass
class Candidate:
    """A server with its ledger; `url` is None for none, `redis` what is before it."""

    name: str
    server: ServerProcess
    url: str | None
    redis: RedisServer | None
    hits: dict[str, int] = field(default_factory=lambda: dict.fromkeys(KINDS, 0))

    def request(self, kind: str) -> bytes:
        body = {"model": KINDS[kind], "input": TEXT, "voice": "alloy", "response_format": "mp3"}
        headers = {"Authorization": f"Bearer {KEY}", "Content-Type": "application/json"}
        return http_request("POST", "/v1/audio/speech", json.dumps(body).encode(), headers)

    def settle_down(self) -> None:
        """Wait until nothing is in Redis any more."""
        if self.redis is not None:
            with self.redis.client() as client:
                while client.xlen(STREAM):
                    time.sleep(0.02)


@dataclass(frozen=True)
class Turn:
    per_second: float
    cpu_us: float
    median_ms: float


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.bench.ledger_load", description=__doc__.partition("\n")[0])
    parser.add_argument("--quick", action="store_true", help="fewer and shorter turns")
    parser.add_argument("--connections", type=int, default=16, help="requests at once")
    options = parser.parse_args(arguments)
    if not Path("/proc/self/stat").exists():
        print("The benchmark reads /proc: it needs Linux.", file=sys.stderr)
        return 1
    print(f"\n{json.dumps(measure(QUICK if options.quick else Effort(), options.connections))}")
    return 0


def measure(effort: Effort, connections: int) -> dict[str, Any]:
    """Run everything and print the tables; the figures."""
    started = time.perf_counter()
    with contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="tts-bench-")))
        figures: dict[str, Any] = {"machine": report.machine(folder), "connections": connections}
        print(", ".join(f"{key} {value}" for key, value in figures["machine"].items()), flush=True)
        candidates = _start(stack, folder)
        bodies = [speech.speak(c.server.port, TEXT, "mp3", _headers(), store=True).body for c in candidates]
        figures["bytes"] = len(bodies[0])
        for kind in KINDS:
            turns = uvloop.run(_press_all(candidates, kind, connections, effort, figures["bytes"]))
            figures[kind] = {name: _figures(own, turns["off"]) for name, own in turns.items()}
            _print(kind, connections, figures[kind])
        figures["stored"] = {c.name: asyncio.run(_audit(c)) for c in candidates if c.url is not None}
    figures["seconds"] = round(time.perf_counter() - started, 1)
    return figures


def _headers() -> dict[str, str]:
    return {"Authorization": f"Bearer {KEY}"}


def _start(stack: contextlib.ExitStack, folder: Path) -> list[Candidate]:
    postgres = stack.enter_context(running_server(durable=True))
    everysec, always = (stack.enter_context(running_redis(fsync=fsync)) for fsync in ("everysec", "always"))
    places: dict[str, tuple[str | None, RedisServer | None]] = {
        "off": (None, None),
        "sqlite": (f"sqlite:///{folder / 'ledger.db'}", None),
        "postgres": (_database(postgres), None),
        "postgres+redis everysec": (_database(postgres), everysec),
        "postgres+redis always": (_database(postgres), always),
    }
    return [stack.enter_context(_serving(folder, name, *place)) for name, place in places.items()]


def _database(postgres: PostgresServer) -> str:
    return postgres.url(postgres.new_database())


@contextlib.contextmanager
def _serving(folder: Path, name: str, url: str | None, redis: RedisServer | None) -> Iterator[Candidate]:
    """A server of that name on a free port, with prices, and a client with a filled wallet."""
    port, own = free_port(), folder / name.replace(" ", "-")
    own.mkdir()
    prices = own / "prices.toml"
    prices.write_text(PRICES)
    environment = {
        "TTS_PORT": str(port),
        "TTS_CACHE_DIR": str(own / "cache"),
        "TTS_LEDGER_URL": url or f"sqlite:///{own / 'unused.db'}",
        "TTS_PRICES_FILE": str(prices),
        "TTS_API_KEYS": f"bench={KEY}",
        "TTS_REDIS_URL": redis.url() if redis else "",
    }
    if url is not None:
        asyncio.run(_fill(url))
    command = [sys.executable, "-m", "tests.bench.ledger_server", "off" if url is None else "on"]
    with running(command, port, own / "log", environment=environment, ready="/ready") as server:
        yield Candidate(name, server, url, redis)


async def _fill(url: str) -> None:
    async with _opened(url) as ledger:
        await ledger.credit("bench", CREDIT_MICROS, "bench")


async def _press_all(
    candidates: list[Candidate], kind: str, connections: int, effort: Effort, length: int
) -> dict[str, list[Turn]]:
    turns: dict[str, list[Turn]] = {candidate.name: [] for candidate in candidates}
    for candidate in candidates:
        await _press(candidate, kind, connections, effort.turn_s / 2, length)
    for _ in range(effort.rounds):
        for candidate in candidates:
            turns[candidate.name].append(await _press(candidate, kind, connections, effort.turn_s, length))
    return turns


async def _press(candidate: Candidate, kind: str, connections: int, seconds: float, length: int) -> Turn:
    cpu = candidate.server.cpu_seconds()
    request = candidate.request(kind)
    load = await press(candidate.server.port, request, concurrency=connections, seconds=seconds, length=length)
    cpu_us = 1e6 * (candidate.server.cpu_seconds() - cpu) / load.answers
    candidate.hits[kind] += load.answers
    await asyncio.to_thread(candidate.settle_down)
    return Turn(load.per_second, cpu_us, 1000 * statistics.median(load.latencies))


def _figures(own: list[Turn], off: list[Turn]) -> dict[str, float]:
    ratios = [turn.per_second / without.per_second for turn, without in zip(own, off, strict=True)]
    off_cpu = statistics.median(turn.cpu_us for turn in off)
    return {
        "hits_per_s": round(statistics.median(turn.per_second for turn in own), 1),
        "ratio": round(statistics.median(ratios), 3),
        "ratio_min": round(min(ratios), 3),
        "ratio_max": round(max(ratios), 3),
        "median_ms": round(statistics.median(turn.median_ms for turn in own), 2),
        "cpu_us": round(statistics.median(turn.cpu_us for turn in own), 0),
        "cpu_ratio": round(statistics.median(turn.cpu_us for turn in own) / max(off_cpu, 1), 3),
    }


def _print(kind: str, connections: int, figures: dict[str, dict[str, float]]) -> None:
    what = "that cost nothing" if kind == "free" else "that cost money"
    head = ["ledger", "hits/s", "ratio to off", "min", "max", "hit ms", "server CPU us", "CPU ratio"]
    rows = [[name, *values.values()] for name, values in figures.items()]
    report.table(f"Cache hits {what}, {connections} connections, turn by turn; medians", head, rows)


async def _audit(candidate: Candidate) -> int:
    """How many usage events are stored; raises RuntimeError unless they are those of the hits, at their price."""
    assert candidate.url is not None
    price = -(-len(TEXT) * 1500 // 1000)
    async with _opened(candidate.url) as ledger:
        used = await ledger.usage(None, 10**7)
        faults = await ledger.check()
        balance = await ledger.balance("bench")
    hits = [event for event in used if event.outcome == "cached"]
    paid = sum(event.price_micros for event in hits)
    told = (len(hits), len({event.request_id for event in used}), paid, balance)
    due = candidate.hits["paid"] * price
    expected = (sum(candidate.hits.values()), len(used), due, CREDIT_MICROS - due)
    if faults or told != expected:
        raise RuntimeError(f"{candidate.name}: {told} instead of {expected}; {faults}")
    return len(used)


@contextlib.asynccontextmanager
async def _opened(url: str) -> Any:
    ledger = build_ledger(Settings(_env_file=None, ledger_url=url))
    await ledger.start()
    try:
        yield ledger
    finally:
        await ledger.close()


if __name__ == "__main__":
    raise SystemExit(main())
