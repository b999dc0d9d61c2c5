"""How much an account may ask for: the laws of its limits, and the protocol of those who keep the counters.

Times are in microseconds since 1970, by the clock of whoever keeps the counters; a day is a UTC day. Owns no counter
and no HTTP. limits_memory.py keeps them in this process, limits_redis.py for several, limits_fallback.py joins the two.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Literal, Protocol

from ..domain import Bounds

MINUTE = 60_000_000
"""Microseconds; and what one request weighs in a bucket, so that a bound of n drains n a microsecond: all integers."""

DAY = 24 * 60 * MINUTE

LARGEST = 1_000_000
"""Requests a minute, as a bound: what a Lua number counts exactly (MINUTE times this) and no server reaches."""

Kind = Literal["requests", "concurrent", "characters"]


class LimiterAway(Exception):
    """Whoever keeps the counters cannot be asked now. Says what kind of fault it was, and no address."""


@dataclass(frozen=True, slots=True)
class Caps:
    """Bounds with the deployment's defaults filled in; 0: none."""

    requests_per_minute: int = 0
    concurrent: int = 0
    characters_per_day: int = 0
    alert_characters_per_day: int = 0

    @classmethod
    def of(cls, bounds: Bounds, defaults: Bounds) -> Caps:
        def pick(own: int | None, default: int | None) -> int:
            return (default or 0) if own is None else own

        return cls(
            min(LARGEST, pick(bounds.requests_per_minute, defaults.requests_per_minute)),
            pick(bounds.concurrent, defaults.concurrent),
            pick(bounds.characters_per_day, defaults.characters_per_day),
            pick(bounds.alert_characters_per_day, defaults.alert_characters_per_day),
        )

    @property
    def lasting(self) -> bool:
        """Whether a request counts for as long as it runs, and not at its beginning alone."""
        return bool(self.concurrent or self.characters_per_day or self.alert_characters_per_day)

    def __bool__(self) -> bool:
        return bool(self.requests_per_minute) or self.lasting


@dataclass(frozen=True, slots=True)
class Subject:
    """Who is counted: an account, or an end user of it. `key` names its counters and tells nobody's name."""

    account: str
    user: str
    caps: Caps
    key: str

    @classmethod
    def of(cls, account: str, user: str, caps: Caps) -> Subject:
        key = f"{{{_digest(account)}}}"  # braces: the counters of an account and of its users are kept together
        return cls(account, user, caps, f"{key}:{_digest(user)}" if user else key)


def _digest(name: str) -> str:
    return hashlib.blake2b(name.encode("utf-8", "surrogatepass"), digest_size=16).hexdigest()


@dataclass(frozen=True, slots=True)
class Ask:
    """One request: its own `id`, whom it counts for, and the characters of its text."""

    id: str
    subjects: tuple[Subject, ...]
    characters: int


@dataclass(frozen=True, slots=True)
class Tally:
    """Counters of one subject at one time.

    `weight`: what is in its bucket of requests, MINUTE for each. `running`: its places that are taken. `characters`:
    those of its day, reserved ones included.
    """

    weight: int = 0
    running: int = 0
    characters: int = 0


@dataclass(frozen=True, slots=True)
class Refusal:
    """A bound that a request does not fit into; `wait` is microseconds until it may, None where nobody knows."""

    kind: Kind
    subject: Subject
    limit: int
    left: int
    wait: int | None


@dataclass(frozen=True, slots=True)
class Standing:
    """What is left of one bound; `reset` is microseconds until all of it is, None where nobody knows."""

    kind: Kind
    limit: int
    left: int
    reset: int | None


@dataclass(frozen=True, slots=True)
class Verdict:
    """What the counters said at `at` of each subject of an ask: after it where it is `admitted`, else before it."""

    ask: Ask
    at: int
    tallies: Sequence[Tally]
    admitted: bool

    def refusals(self) -> list[Refusal]:
        """Every bound that stood in the way; empty where the ask is admitted."""
        if self.admitted:
            return []
        pairs = zip(self.ask.subjects, self.tallies, strict=True)
        return [refusal for subject, tally in pairs for refusal in refuse(subject, tally, self.ask.characters, self.at)]

    def standings(self) -> list[Standing]:
        """Of each kind of bound the one with the least left."""
        tightest: dict[Kind, Standing] = {}
        for subject, tally in zip(self.ask.subjects, self.tallies, strict=True):
            for standing in _standings(subject.caps, tally, self.at):
                known = tightest.get(standing.kind)
                if known is None or (standing.left, -(standing.reset or 0)) < (known.left, -(known.reset or 0)):
                    tightest[standing.kind] = standing
        return list(tightest.values())


def drained(weight: int, since: int, now: int, per_minute: int) -> int:
    """What is left in a bucket (a token bucket upside down: full is empty-handed). A clock put back drains nothing."""
    return max(0, weight - per_minute * max(0, min(now - since, MINUTE)))


def refuse(subject: Subject, tally: Tally, characters: int, now: int) -> list[Refusal]:
    """The bounds into which one more request of so many characters does not fit. The law; the Lua script has it too."""
    caps, found = subject.caps, []
    too_heavy = tally.weight + MINUTE - caps.requests_per_minute * MINUTE
    if caps.requests_per_minute and too_heavy > 0:
        wait = -(-too_heavy // caps.requests_per_minute)
        found.append(Refusal("requests", subject, caps.requests_per_minute, 0, wait))
    if caps.concurrent and tally.running >= caps.concurrent:
        found.append(Refusal("concurrent", subject, caps.concurrent, 0, None))
    if caps.characters_per_day and tally.characters + characters > caps.characters_per_day:
        left = max(0, caps.characters_per_day - tally.characters)
        found.append(Refusal("characters", subject, caps.characters_per_day, left, to_midnight(now)))
    return found


def _standings(caps: Caps, tally: Tally, now: int) -> list[Standing]:
    found = []
    if rate := caps.requests_per_minute:
        left = max(0, (rate * MINUTE - tally.weight) // MINUTE)
        found.append(Standing("requests", rate, left, -(-tally.weight // rate)))
    if places := caps.concurrent:
        found.append(Standing("concurrent", places, max(0, places - tally.running), None))
    if quota := caps.characters_per_day:
        found.append(Standing("characters", quota, max(0, quota - tally.characters), to_midnight(now)))
    return found


def to_midnight(now: int) -> int:
    """Microseconds until the next UTC day."""
    return DAY - now % DAY


@dataclass(frozen=True, slots=True)
class Alert:
    """A subject's characters of the day have passed its threshold. `day` is an ISO date."""

    account: str
    user: str
    characters: int
    threshold: int
    day: str

    @classmethod
    def of(cls, subject: Subject, characters: int, day: int) -> Alert:
        """`day` is counted from 1970."""
        date = (datetime(1970, 1, 1, tzinfo=UTC) + timedelta(days=day)).date().isoformat()
        return cls(subject.account, subject.user, characters, subject.caps.alert_characters_per_day, date)


class Limiter(Protocol):
    """Keeps the counters. It calls back with an Alert once for each subject, threshold and day."""

    async def start(self) -> None: ...

    async def close(self) -> None: ...

    async def enter(self, ask: Ask) -> Verdict:
        """Count `ask` for all its subjects if it fits into every bound of each, for none of them otherwise.

        Raises LimiterAway. Whoever was admitted leaves; who was not, or was cancelled on the way, has nothing to leave.
        """
        ...

    async def leave(self, ask: Ask, characters: int) -> None:
        """Give the place of `ask` back; of its characters only these count. Never raises LimiterAway."""
        ...
