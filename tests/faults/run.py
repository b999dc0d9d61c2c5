"""`make faults`: servers, Redis and PostgreSQL killed with -9 at random points under load, and the books read after it.

    python -m tests.faults.run [--kills 120] [--clients 8] [--seed 1] [--pause 0.25]

Prints what was broken, and as its last line one JSON object with the counts.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import httpx

from api.src.stores.ledger_choice import ledger_at
from tests.faults.house import ADMIN_KEY, LEASE_S, House, Part, built
from tests.faults.load import Clients
from tests.faults.verdict import Books, faults, read_books

CREDIT = {"wallet": 10**9, "poor": 30_000}
"""The poor one's ends during the run."""
RECONNECT_S = 4.0
"""For so long after both are back a server may not have found out."""


async def run(house: House, *, kills: int, clients: int, seed: int, pause_s: float) -> dict[str, Any]:
    """One fault run in a house that is up; returns the counts, and what was broken under "faults"."""
    _give_credit(house)
    asking = Clients(house, clients, seed)
    running = asyncio.create_task(asking.run())
    killed = await house.kill_at_random(kills, seed, pause_s, asking.answered)
    await asyncio.to_thread(_wait_ready, house)
    asking.stop()
    await running
    books, waited = await _settled(house)
    broken = faults(asking.attempts, books, both_away(house.parts))
    ledger = ledger_at(house.postgres.url(house.database))
    await ledger.start()
    try:
        broken += await ledger.check()
    finally:
        await ledger.close()
    outcomes = Counter(attempt.outcome for attempt in asking.attempts)
    return {
        "faults": broken,
        "killed": dict(killed),
        "attempts": dict(outcomes),
        "statuses": dict(Counter(attempt.status for attempt in asking.attempts)),
        "cache": dict(Counter(attempt.cache for attempt in asking.attempts if attempt.outcome == "whole")),
        "charged_micros": sum(event.price_micros for event in books.events),
        "usage_events": len(books.events),
        "holds_gone_after_s": round(waited, 1),
    }


def both_away(parts: Sequence[Part]) -> list[tuple[float, float]]:
    """When neither Redis nor PostgreSQL was there, until a server can have noticed that one is back."""
    away = {part.name: part.away for part in parts}
    return [
        (max(start, begin), min(end, stop) + RECONNECT_S)
        for start, end in away["redis"]
        for begin, stop in away["postgres"]
        if max(start, begin) < min(end, stop) + RECONNECT_S
    ]


async def _settled(house: House) -> tuple[Books, float]:
    """The books once the holds of the dead are released and the events are in, and how long that took."""
    since = time.monotonic()
    patience = LEASE_S * 4 / 3 + 30  # a busy machine's
    last = -1
    while True:
        books = await asyncio.to_thread(read_books, house)
        waited = time.monotonic() - since
        quiet, last = len(books.events) == last, len(books.events)
        if (books.open_holds == 0 and quiet and waited > 2.5) or waited > patience:
            return books, waited
        await asyncio.sleep(1.2)


def _give_credit(house: House) -> None:
    for account, micros in CREDIT.items():
        httpx.post(
            f"{house.servers[0].url}/v1/accounts/{account}/credit",
            json={"micros": micros, "reference": "start"},
            headers={"Authorization": f"Bearer {ADMIN_KEY}"},
        ).raise_for_status()


def _wait_ready(house: House) -> None:
    for server in house.servers:
        server.wait_ready()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=120)
    parser.add_argument("--clients", type=int, default=8)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--pause", type=float, default=0.25, help="seconds between kills, on average")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder, built(Path(folder)) as house:
        report = asyncio.run(
            run(house, kills=options.kills, clients=options.clients, seed=options.seed, pause_s=options.pause)
        )
    print(*report["faults"], sep="\n")
    print(json.dumps(report))
    return 1 if report["faults"] else 0


if __name__ == "__main__":
    sys.exit(main())
