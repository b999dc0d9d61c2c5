"""Cache hits against a bare file server: the same bytes, turn by turn in one run, as a ratio.

Each hit opens a hold and settles it, durably, before its last byte; the bare server reads a file.
"""

from __future__ import annotations

import statistics
from dataclasses import dataclass

from tests.bench.load import Load, press
from tests.bench.processes import ServerProcess


@dataclass(frozen=True)
class Target:
    """A server to press, with the request and the length of its answer's body."""

    server: ServerProcess
    request: bytes
    length: int


@dataclass
class _Turn:
    per_second: float
    cpu_us: float
    median_ms: float


@dataclass
class Contest:
    """Turn by turn at one concurrency. CPU is of the server alone, in microseconds per answer."""

    ours: list[_Turn]
    bare: list[_Turn]

    @property
    def answers_per_second(self) -> float:
        return statistics.median(turn.per_second for turn in self.ours)

    def figures(self) -> dict[str, float]:
        ratios = [ours.per_second / bare.per_second for ours, bare in zip(self.ours, self.bare, strict=True)]
        bare_cpu = statistics.median(turn.cpu_us for turn in self.bare)
        return {
            "hits_per_s": round(self.answers_per_second, 1),
            "bare_per_s": round(statistics.median(turn.per_second for turn in self.bare), 1),
            "ratio": round(statistics.median(ratios), 3),
            "ratio_min": round(min(ratios), 3),
            "ratio_max": round(max(ratios), 3),
            "hit_median_ms": round(statistics.median(turn.median_ms for turn in self.ours), 2),
            "bare_median_ms": round(statistics.median(turn.median_ms for turn in self.bare), 2),
            "hit_cpu_us": round(statistics.median(turn.cpu_us for turn in self.ours), 0),
            "bare_cpu_us": round(statistics.median(turn.cpu_us for turn in self.bare), 0),
            "cpu_ratio": round(statistics.median(turn.cpu_us for turn in self.ours) / max(bare_cpu, 1), 3),
        }


async def compete(ours: Target, bare: Target, *, concurrency: int, rounds: int, seconds: float) -> tuple[Contest, int]:
    """`rounds` turns of `seconds` each, A B A B, after a warm-up; the contest, and how many hits there were."""
    contest = Contest([], [])
    await _warm_up(bare, concurrency, seconds)
    hits = await _warm_up(ours, concurrency, seconds)
    for _ in range(rounds):
        bare_turn, _ = await _turn(bare, concurrency, seconds)
        our_turn, answers = await _turn(ours, concurrency, seconds)
        contest.bare.append(bare_turn)
        contest.ours.append(our_turn)
        hits += answers
    return contest, hits


async def ceiling(target: Target, concurrency: int, seconds: float) -> float:
    """Answers per second of a target that does nothing: more than this the load client cannot measure."""
    await _warm_up(target, concurrency, seconds)
    return (await _turn(target, concurrency, seconds))[0].per_second


async def _warm_up(target: Target, concurrency: int, seconds: float) -> int:
    return (await _press(target, concurrency, seconds / 2)).answers


async def _turn(target: Target, concurrency: int, seconds: float) -> tuple[_Turn, int]:
    cpu = target.server.cpu_seconds()
    load = await _press(target, concurrency, seconds)
    cpu_us = 1e6 * (target.server.cpu_seconds() - cpu) / load.answers
    return _Turn(load.per_second, cpu_us, 1000 * statistics.median(load.latencies)), load.answers


async def _press(target: Target, concurrency: int, seconds: float) -> Load:
    return await press(
        target.server.port, target.request, concurrency=concurrency, seconds=seconds, length=target.length
    )
