"""What is killed: two servers on one cache folder, their books in PostgreSQL, their usage events in Redis.

Owns starting each part, killing it with -9, and starting it again where its data lie.
"""

from __future__ import annotations

import asyncio
import json
import os
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

import httpx

from tests.ports import free_port
from tests.postgres import PostgresServer, running_server
from tests.redis_server import RedisServer, running_redis

ROOT = Path(__file__).parents[2]
ADMIN_KEY = "the-admin-key-of-the-fault-run"
KEYS = {"wallet": "key-of-the-wallet", "poor": "key-of-the-poor", "postpaid": "key-of-the-postpaid"}
FULL, CACHED = 10_000, 2_000
"""Micro-units per 1000 characters of what is not free."""
PAID, FREE = "tts-1", "gpt-4o-mini-tts"
PRICES = f"""
[default]
per_1000_characters = {FULL}
cached_per_1000_characters = {CACHED}
[models.{FREE}]
per_1000_characters = 0
cached_per_1000_characters = 0
"""
LEASE_S = 2.0
ANSWERS_PER_KILL, PATIENCE_S = 3, 5.0
"""For so many a kill waits, and for so long."""


@dataclass
class Part:
    """Something that can be killed. `away`: when it was dead, by the monotonic clock."""

    name: str
    kill: Callable[[], None]
    start: Callable[[], None]
    away: list[tuple[float, float]] = field(default_factory=list)


class Server:
    """One server, at a port that it keeps over its deaths."""

    def __init__(self, zygote: subprocess.Popen[str], environment: dict[str, str]) -> None:
        self._zygote, self._environment = zygote, environment
        self._process = 0
        self.url = f"http://127.0.0.1:{environment['TTS_PORT']}"

    def start(self) -> None:
        """Start it; it may not answer yet."""
        assert self._zygote.stdin is not None
        assert self._zygote.stdout is not None
        self._zygote.stdin.write(json.dumps(self._environment) + "\n")
        self._zygote.stdin.flush()
        self._process = int(self._zygote.stdout.readline())

    def kill(self) -> None:
        os.kill(self._process, signal.SIGKILL)

    def wait_ready(self, seconds: float = 30) -> None:
        deadline = time.monotonic() + seconds
        while not self._is_ready():
            assert time.monotonic() < deadline, Path(self._environment["LOG"]).read_text()[-3000:]
            time.sleep(0.02)

    def _is_ready(self) -> bool:
        try:
            return httpx.get(f"{self.url}/ready", timeout=5).status_code == 200
        except httpx.HTTPError:
            return False


@dataclass
class House:
    """All parts, running."""

    folder: Path
    postgres: PostgresServer
    database: str
    redis: RedisServer
    servers: list[Server]
    parts: list[Part]

    async def kill_at_random(self, kills: int, seed: int, pause_s: float, answered: Callable[[], int]) -> Counter[str]:
        """Kill parts at random instants, each back after a moment; returns how often each was killed.

        On a slow machine the instants lie further apart: there are to be some answers, by `answered`, to each kill.
        """
        rng, killed = random.Random(seed), Counter[str]()
        returning: dict[str, asyncio.Task[None]] = {}
        for kill in range(kills):
            await asyncio.sleep(rng.uniform(0, 2 * pause_s))
            await _in_time(lambda: answered() >= ANSWERS_PER_KILL * kill)  # noqa: B023 (awaited here)
            while len(returning) == len(self.parts):
                await asyncio.wait(returning.values(), return_when=asyncio.FIRST_COMPLETED)
            part = rng.choice([part for part in self.parts if part.name not in returning])
            killed[part.name] += 1
            part.kill()
            returning[part.name] = asyncio.create_task(self._return(part, rng.uniform(0, 2 * pause_s)))
            returning[part.name].add_done_callback(lambda _, name=part.name: returning.pop(name))
        await asyncio.gather(*returning.values())
        return killed

    async def _return(self, part: Part, after_s: float) -> None:
        died = time.monotonic()
        await asyncio.sleep(after_s)
        await asyncio.to_thread(part.start)
        part.away.append((died, time.monotonic()))


async def _in_time(true: Callable[[], bool]) -> None:
    with suppress(TimeoutError):
        async with asyncio.timeout(PATIENCE_S):
            while not true():  # noqa: ASYNC110 (it is counted elsewhere)
                await asyncio.sleep(0.01)


@contextmanager
def built(folder: Path) -> Iterator[House]:
    """The house in `folder`; all of it is gone at the end."""
    (folder / "prices.toml").write_text(PRICES)
    command = [sys.executable, "-m", "tests.faults.zygote"]
    with (
        running_server() as postgres,
        running_redis(fsync="always") as redis,  # else its death may cost what it acknowledged last
        # Its input closes when this is left: then it ends, and its servers with it.
        subprocess.Popen(command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as zygote,
    ):
        database = postgres.new_database()
        servers = [Server(zygote, _environment(folder, postgres.url(database), redis)) for _ in range(2)]
        parts = [Part(f"server {number}", one.kill, one.start) for number, one in enumerate(servers)]
        parts += [Part("postgres", postgres.kill, postgres.start), Part("redis", redis.kill, redis.start)]
        for server in servers:
            server.start()
        for server in servers:
            server.wait_ready()
        yield House(folder, postgres, database, redis, servers, parts)


def _environment(folder: Path, ledger_url: str, redis: RedisServer) -> dict[str, str]:
    port = free_port()
    return {
        "LOG": str(folder / f"log-{port}"),
        "TTS_PORT": str(port),
        "TTS_LOG_LEVEL": "warning",
        "TTS_CACHE_DIR": str(folder / "cache"),
        "TTS_CACHE_MAX_BYTES": "400000",  # so that there is always something to make
        "TTS_LEDGER_URL": ledger_url,
        "TTS_REDIS_URL": redis.url(),
        "TTS_HOLD_LEASE_S": str(LEASE_S),
        "TTS_PRICES_FILE": str(folder / "prices.toml"),
        "TTS_API_KEYS": ",".join(f"{name}={key}" for name, key in KEYS.items()),
        "TTS_ADMIN_KEY": ADMIN_KEY,
    }
