"""A process that shares limits through Redis:

    python -m tests.stores.limits_process URL LEASE_S COUNT AT_ONCE {leave|hold} CAPS

Asks COUNT times for one account, AT_ONCE at a time, and prints how many were let in. Then it holds its places (or,
with `leave`, it has given each back at once, with one character heard) until it is killed or its input ends.
"""

from __future__ import annotations

import asyncio
import json
import sys

from api.src.stores.limits_redis import RedisLimiter
from tests.stores.limiting import PATIENCE_S, ask, subject


async def main(url: str, lease_s: float, count: int, at_once: int, how: str, caps: dict[str, int]) -> None:
    limiter = RedisLimiter(
        url, lambda alert: print("alert", alert.characters, flush=True), lease_s=lease_s, timeout_s=PATIENCE_S
    )
    await limiter.start()
    turns = asyncio.Semaphore(at_once)

    async def one() -> bool:
        async with turns:
            mine = ask(subject(**caps), characters=1)
            verdict = await limiter.enter(mine)
            if verdict.admitted and how == "leave":
                await limiter.leave(mine, 1)
            return verdict.admitted

    print(sum(await asyncio.gather(*(one() for _ in range(count)))), flush=True)
    await asyncio.to_thread(sys.stdin.read)
    await limiter.close()


if __name__ == "__main__":
    url, lease_s, count, at_once, how, caps = sys.argv[1:]
    asyncio.run(main(url, float(lease_s), int(count), int(at_once), how, json.loads(caps)))
