"""The counters of the limits in this process: exact for one process alone, gone with it."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import NamedTuple

from .limits import DAY, MINUTE, Alert, Ask, Subject, Tally, Verdict, drained, refuse

SWEEP_EVERY = 1024
"""New subjects after which those that nothing is to be remembered of are forgotten."""


def wall_clock() -> int:
    """Microseconds since 1970."""
    return time.time_ns() // 1000


class _Place(NamedTuple):
    day: int
    characters: int


@dataclass(slots=True)
class _Counters:
    weight: int = 0
    at: int = 0
    day: int = 0
    used: int = 0
    reserved: int = 0
    alerted: bool = False
    places: dict[str, _Place] = field(default_factory=dict)

    def tally(self, per_minute: int, now: int) -> Tally:
        return Tally(drained(self.weight, self.at, now, per_minute), len(self.places), self._characters(now))

    def take(self, ask: Ask, subject: Subject, tally: Tally, now: int) -> Tally:
        """Count one more request, and return how things are with it."""
        if subject.caps.requests_per_minute:
            self.weight, self.at = tally.weight + MINUTE, now
        if subject.caps.lasting:
            if self.day != now // DAY:
                self.day, self.used, self.reserved, self.alerted = now // DAY, 0, 0, False
            self.places[ask.id] = _Place(self.day, ask.characters)
            self.reserved += ask.characters
        return Tally(self.weight, len(self.places), self._characters(now))

    def give_back(self, ask: Ask, characters: int) -> None:
        place = self.places.pop(ask.id, None)
        if place is not None and place.day == self.day:
            self.reserved -= place.characters
            self.used += characters

    def _characters(self, now: int) -> int:
        return self.used + self.reserved if self.day == now // DAY else 0

    def nothing_to_remember(self, now: int) -> bool:
        spent = self.used and self.day == now // DAY
        return not (spent or self.places or (self.weight and now - self.at < MINUTE))


class MemoryLimiter:
    """A Limiter within one process and one event loop. `clock`: microseconds since 1970."""

    def __init__(self, on_alert: Callable[[Alert], None], *, clock: Callable[[], int] = wall_clock) -> None:
        self._on_alert = on_alert
        self._clock = clock
        self._counters: dict[str, _Counters] = {}
        self._sweep_at = SWEEP_EVERY

    async def start(self) -> None:
        """Nothing to open."""

    async def close(self) -> None:
        """Nothing to close."""

    async def enter(self, ask: Ask) -> Verdict:
        now = self._clock()
        rows = [self._row(subject) for subject in ask.subjects]
        pairs = list(zip(ask.subjects, rows, strict=True))
        tallies = [row.tally(subject.caps.requests_per_minute, now) for subject, row in pairs]
        fits = not any(
            refuse(subject, tally, ask.characters, now) for (subject, _), tally in zip(pairs, tallies, strict=True)
        )
        if fits:
            tallies = [row.take(ask, subject, tally, now) for (subject, row), tally in zip(pairs, tallies, strict=True)]
        self._sweep(now)
        return Verdict(ask, now, tallies, fits)

    async def leave(self, ask: Ask, characters: int) -> None:
        for subject in ask.subjects:
            if (row := self._counters.get(subject.key)) is not None and ask.id in row.places:
                row.give_back(ask, characters)
                self._look(subject, row)

    def _row(self, subject: Subject) -> _Counters:
        return self._counters.setdefault(subject.key, _Counters())

    def _look(self, subject: Subject, row: _Counters) -> None:
        threshold = subject.caps.alert_characters_per_day
        if threshold and row.used > threshold and not row.alerted:
            row.alerted = True
            self._on_alert(Alert.of(subject, row.used, row.day))

    def _sweep(self, now: int) -> None:
        if len(self._counters) < self._sweep_at:
            return
        self._counters = {key: row for key, row in self._counters.items() if not row.nothing_to_remember(now)}
        self._sweep_at = len(self._counters) + SWEEP_EVERY
