"""Limiters on a clock that is set by hand, and what the tests ask of them."""

from __future__ import annotations

import itertools
import secrets
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

from api.src.stores.limits import Alert, Ask, Caps, Limiter, Subject
from api.src.stores.limits_memory import MemoryLimiter
from api.src.stores.limits_redis import RedisLimiter
from tests.redis_server import RedisServer

NOON = 1_800_014_400_000_000
"""Microseconds; 2027-01-15 12:00 UTC."""

SECOND = 1_000_000

PATIENCE_S = 20
"""A busy machine may take its time where the time-out itself is not tested."""

_numbers = itertools.count()
_process = secrets.token_hex(4)


@dataclass
class Bench:
    """A limiter, its clock and the alerts that it has raised."""

    limiter: Limiter
    now: list[int]
    alerts: list[Alert] = field(default_factory=list)


@asynccontextmanager
async def opened(kind: str, redis: RedisServer | None, lease_s: float = 1e6) -> AsyncIterator[Bench]:
    """A `memory` or `redis` limiter at noon. The lease is long enough not to matter, unless given."""
    now, alerts = [NOON], []
    clock: Callable[[], int] = lambda: now[0]  # noqa: E731
    if kind == "memory":
        limiter: Limiter = MemoryLimiter(alerts.append, clock=clock)
    else:
        assert redis is not None
        limiter = RedisLimiter(redis.url(), alerts.append, lease_s=lease_s, timeout_s=PATIENCE_S, clock=clock)
    await limiter.start()
    try:
        yield Bench(limiter, now, alerts)
    finally:
        await limiter.close()


def subject(account: str = "ann", user: str = "", **caps: int) -> Subject:
    return Subject.of(account, user, Caps(**caps))


def ask(*subjects: Subject, characters: int = 1) -> Ask:
    return Ask(f"{_process}-{next(_numbers)}", subjects, characters)
