"""The script of test_kill.py: forks workers on one cache folder and one ledger, and kills them with -9.

Each worker is a whole service on an event loop of its own, asked for a few texts in pcm, over and over. It checks every
answer against its text; what it sees it writes to a pipe, one letter for each event. Prints the counts as JSON.
"""

from __future__ import annotations

import asyncio
import json
import math
import os
import random
import select
import signal
import sqlite3
import sys
import time
import traceback
from collections import Counter
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

from api.src.building import build_service
from api.src.domain import SpeechRequest
from api.src.errors import HoldLost, InsufficientBalance
from api.src.logs import configure_logging
from api.src.observe import Metrics
from api.src.settings import Settings
from api.src.speech.service import Qwen3TTSService
from api.src.stores.ledger_check import broken_laws
from tests.speech.asking import eventually
from tests.speech.textual import TextualBackend, pcm_of

ACCOUNT = "wallet"
LEASE_S = 0.8
LONGEST_LIFE_S = 0.12
TEXTS = [
    f"Text number {number} has a first sentence of its own, that is long enough. And text {number} has a second one."
    for number in range(40)
]
EXPECTED = {text: pcm_of(text) for text in TEXTS}
PRICE_PER_TEXT = 1000
"""About: 100 characters at 10 micro-units."""


def settings(folder: Path) -> Settings:
    return Settings(
        _env_file=None,
        cache_dir=folder / "cache",
        cache_max_bytes=sum(map(len, EXPECTED.values())) // 2,  # so that there is always something to write
        ledger_url=f"sqlite:///{folder / 'ledger.db'}",
        prices_file=folder / "prices.toml",
        hold_lease_s=LEASE_S,
        log_level="error",
    )


# --- a worker ---


async def live(folder: Path, seed: int, pipe: int) -> None:
    service = build_service(settings(folder), TextualBackend(delay_s=0.001), Metrics())
    await service.start()
    await service.wait_ready()
    os.write(pipe, b"r")
    rng = random.Random(seed)
    await asyncio.gather(*(keep_asking(service, rng, f"{seed}-{number}", pipe) for number in range(3)))


async def keep_asking(service: Qwen3TTSService, rng: random.Random, name: str, pipe: int) -> None:
    for number in range(10**6):
        text = TEXTS[min(int(rng.expovariate(0.05)), len(TEXTS) - 1)]  # the first ones are asked for most
        try:
            os.write(pipe, await ask(service, text, f"{name}-{number}", rng))
        except HoldLost:
            os.write(pipe, b"l")  # this process was suspended for longer than its lease
        except InsufficientBalance:
            os.write(pipe, b"p")
            await service.ledger.credit(ACCOUNT, rng.randint(1, 3) * PRICE_PER_TEXT, f"{name}-{number}")


async def ask(service: Qwen3TTSService, text: str, name: str, rng: random.Random) -> bytes:
    """The letter of what answered: m(iss), j(oin), h(it); F if the bytes were false, g if it was left half-way."""
    request = SpeechRequest(name, ACCOUNT, "tts-1", text, "alloy", format="pcm")
    leave_early = rng.random() < 0.1
    audio = b""
    with closing(service.open(request)) as listener:
        await listener.start()
        async for chunk in listener.chunks():
            audio += chunk.data
            if leave_early:
                return b"g" if EXPECTED[text].startswith(audio) else b"F"
    return listener.cache_status[0].encode() if audio == EXPECTED[text] else b"F"


def fork(folder: Path, seed: int) -> tuple[int, int]:
    reading, writing = os.pipe()
    if child := os.fork():
        os.close(writing)
        return child, reading
    try:
        asyncio.run(live(folder, seed, writing))
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(1)  # a worker only ends by being killed


# --- the killer ---


@dataclass(slots=True)
class Worker:
    """A forked process. Its last moment is chosen once it says that it works."""

    process: int
    pipe: int
    death: float = math.inf

    def kill(self, seen: Counter[str]) -> None:
        """End it, and count what it has seen."""
        os.kill(self.process, signal.SIGKILL)
        status = os.waitpid(self.process, 0)[1]
        seen["killed" if os.WIFSIGNALED(status) else "died"] += 1
        with os.fdopen(self.pipe, "rb") as events:
            seen.update(events.read().decode())


def wait_for_death(alive: list[Worker], rng: random.Random) -> Worker:
    """The one whose time has come, taken out of `alive`."""
    while True:
        first = min(alive, key=lambda worker: worker.death)
        waking = {worker.pipe: worker for worker in alive if worker.death == math.inf}
        patience = None if first.death == math.inf else max(0.0, first.death - time.monotonic())
        awake = select.select(list(waking), [], [], patience)[0]
        if not awake:
            alive.remove(first)
            return first
        for pipe in awake:
            if os.read(pipe, 1) != b"r":
                raise RuntimeError("a worker could not start")
            waking[pipe].death = time.monotonic() + rng.uniform(0, LONGEST_LIFE_S)


def massacre(folder: Path, kills: int, seed: int, seen: Counter[str]) -> list[str]:
    """Fork and kill, two alive at a time; returns what was wrong meanwhile."""
    rng, wrong = random.Random(seed), list[str]()
    alive: list[Worker] = []
    for number in range(kills):
        while len(alive) < 2:
            alive.append(Worker(*fork(folder, rng.randrange(2**32))))
        wait_for_death(alive, rng).kill(seen)
        seen["temp files"] += len(temp_files(folder))
        if number % 10 == 0:
            wrong += broken_laws(folder / "ledger.db")
    for worker in alive:
        worker.kill(seen)
    return wrong


# --- afterwards ---


async def settle_up(folder: Path, seen: Counter[str]) -> list[str]:
    """A living process waits until the leases of the dead have run out; returns what is wrong then."""
    service = build_service(settings(folder), TextualBackend(), Metrics())
    killed_at = time.monotonic()
    await service.start()
    await service.wait_ready()
    await eventually(lambda: not holds(folder, "open"), 60)
    waited = time.monotonic() - killed_at
    wrong = await service.ledger.check() + [f"left: {name}" for name in temp_files(folder)]
    # A lease that was renewed at the last moment, until the next look at the leases, and patience with a busy machine.
    if waited > LEASE_S * 4 / 3 + 10:
        wrong.append(f"holds outlived their leases: {waited:.1f} s")
    for text in TEXTS:
        request = SpeechRequest(f"last-{text}", "unlimited", "tts-1", text, "alloy", format="pcm")
        with closing(service.open(request)) as listener:
            await listener.start()
            seen[f"in the end {listener.cache_status}"] += 1
            if await listener.whole() != EXPECTED[text]:
                wrong.append(f"a false {listener.cache_status}: {text}")
    await service.close()
    return wrong


def main(folder: Path, kills: int, seed: int) -> None:
    configure_logging("error")
    (folder / "prices.toml").write_text("[default]\nper_1000_characters = 10000\ncached_per_1000_characters = 2000\n")
    seen = Counter[str]()
    asyncio.run(fill_wallet(folder))
    wrong = massacre(folder, kills, seed, seen)
    wrong += asyncio.run(settle_up(folder, seen))
    for state in ("open", "lost", "settled"):
        seen[f"{state} holds"] = holds(folder, state)
    print(json.dumps({"seen": seen, "wrong": wrong}))


async def fill_wallet(folder: Path) -> None:
    service = build_service(settings(folder), TextualBackend(), Metrics())
    await service.start()
    await service.wait_ready()
    await service.ledger.credit(ACCOUNT, 20 * PRICE_PER_TEXT, "start")
    await service.close()


def temp_files(folder: Path) -> list[str]:
    return [path.name for path in folder.rglob("*.tmp")]


def holds(folder: Path, state: str) -> int:
    with closing(sqlite3.connect(folder / "ledger.db")) as db:
        return int(db.execute("SELECT count(*) FROM holds WHERE state = ?", (state,)).fetchone()[0])


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))
