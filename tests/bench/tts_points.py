"""Load on a speech server: so many streams at a time, or so many requests a second, and what came of them as figures.

Owns the loops and the arithmetic. A request that failed counts as infinitely late in every percentile, so that no
figure gets better by failures; where that reaches a percentile, it has no figure (None).
"""

from __future__ import annotations

import asyncio
import gc
import math
import time
from collections import Counter
from collections.abc import AsyncIterator, Iterable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

from tests.bench.listening import Heard, Target, listen
from tests.bench.workload import FRAME_S, Ask

PERCENTILES = (50, 95, 99)
LENGTH_TOLERANCE = 2
"""Frames: servers differ in whether the last token or the first, silent frame sounds; rounding per segment."""


@dataclass
class Point:
    """One load, held for a while. Times are the client's clock."""

    kind: str
    load: float
    audio_format: str
    heard: list[Heard] = field(default_factory=list)
    started_at: float = 0.0
    full_until: float = math.inf
    """Until here all streams were busy (closed loop)."""

    ended_at: float = 0.0
    cpu_s: float = 0.0


async def closed_loop(target: Target, asks: Sequence[Ask], streams: int, seconds: float) -> Point:
    """`streams` listeners, each asking for the next text once it has heard the last; none begins after `seconds`."""
    point, waiting = Point("closed", streams, target.audio_format), iter(asks)

    async def listener() -> None:
        for ask in waiting:
            if time.perf_counter() - point.started_at > seconds:
                break
            point.heard.append(await listen(target, ask))
        point.full_until = min(point.full_until, time.perf_counter())

    async with _timed(point), asyncio.TaskGroup() as group:
        for _ in range(min(streams, len(asks))):
            group.create_task(listener())
    return point


async def open_loop(
    target: Target, asks: Sequence[Ask], times: Sequence[float], per_second: float, seconds: float
) -> Point:
    """Each text asked for at its time, whatever the server does; none that would come after `seconds`."""
    point = Point("open", per_second, target.audio_format)

    async def hear(ask: Ask, due_at: float) -> None:
        point.heard.append(await listen(target, ask, due_at))

    async with _timed(point), asyncio.TaskGroup() as group:
        for ask, at in zip(asks, times, strict=True):
            if at > seconds:
                break
            await asyncio.sleep(max(0.0, point.started_at + at - time.perf_counter()))
            group.create_task(hear(ask, point.started_at + at))
    return point


@asynccontextmanager
async def _timed(point: Point) -> AsyncIterator[None]:
    """The clock and the client's CPU time around a point; no garbage is collected meanwhile."""
    gc.collect()
    gc.disable()
    cpu, point.started_at = time.process_time(), time.perf_counter()
    try:
        yield
    finally:
        point.ended_at, point.cpu_s = time.perf_counter(), time.process_time() - cpu
        gc.enable()


def figures(point: Point, *, fixed_lengths: bool) -> dict[str, Any]:
    """What the point showed. `fixed_lengths`: every answer should be as long as was asked."""
    heard, seconds = point.heard, point.ended_at - point.started_at
    for each in heard:
        each.decode()
    good = [each for each in heard if each.error is None]
    audio_s = sum(each.audio_s for each in good)
    pcm = point.audio_format == "pcm"
    found: dict[str, Any] = {
        "kind": point.kind,
        "load": point.load,
        "format": point.audio_format,
        "requests": len(heard),
        "failed": len(heard) - len(good),
        "errors": dict(Counter(each.error for each in heard if each.error)),
        "seconds": round(seconds, 3),
        "first_byte_ms": _spread([_of(each, each.first_byte_s) for each in heard], 1000),
    }
    if pcm:
        found["first_80ms_ms"] = _spread([_of(each, each.first_frame_s) for each in heard], 1000)
        found["audible_ms"] = _spread([_of(each, each.audible_s) for each in heard], 1000)
        found["never_audible"] = sum(each.audible_s is None for each in good)
        found["underruns"] = sum(each.underruns for each in good)
        found["requests_dry"] = sum(each.underruns > 0 for each in good)
        found["dry_s"] = round(sum(each.dry_s for each in good), 3)
    found |= {
        "total_ms": _spread([_of(each, each.total_s) for each in heard], 1000),
        "audio_s": round(audio_s, 2),
        "audio_s_per_s": round(audio_s / seconds, 2),
        "requests_per_s": round(len(good) / seconds, 3),
        "in_flight_most": _in_flight(heard),
        "client_cpu_share": round(point.cpu_s / seconds, 4),
    }
    if point.kind == "closed":
        found["audio_s_per_s_full"] = _full_rate(point, good)
    else:
        found["lag_ms"] = _spread([each.lag_s for each in heard], 1000)
    if fixed_lengths:
        found["lengths_kept"] = sum(_kept(each) for each in good)
    return found


def percentile(values: Sequence[float], percent: float) -> float | None:
    """The nearest rank; None where it falls on an infinite value or there is none."""
    if not values:
        return None
    found = sorted(values)[max(0, math.ceil(percent / 100 * len(values)) - 1)]
    return found if math.isfinite(found) else None


def _of(heard: Heard, seconds: float | None) -> float:
    return math.inf if heard.error is not None or seconds is None else seconds


def _spread(values: Sequence[float], factor: float) -> dict[str, float | None]:
    spread = {f"p{percent}": percentile(values, percent) for percent in PERCENTILES}
    return {name: None if value is None else round(value * factor, 2) for name, value in spread.items()}


def _kept(heard: Heard) -> bool:
    return abs(heard.audio_s / FRAME_S - heard.ask.frames) <= LENGTH_TOLERANCE


def _full_rate(point: Point, good: Iterable[Heard]) -> float:
    """Seconds of sound that arrived in a second while all streams were busy."""
    until, audio_s = min(point.full_until, point.ended_at), 0.0
    for each in good:
        if length := sum(count for _, count in each.arrivals):
            early = sum(count for moment, count in each.arrivals if moment <= until)
            audio_s += each.audio_s * early / length
    return round(audio_s / (until - point.started_at), 2)


def _in_flight(heard: Sequence[Heard]) -> int:
    """The most requests that were under way at once."""
    ends = [(each.sent_at + each.total_s, -1) for each in heard]
    starts = [(each.sent_at, 1) for each in heard]
    now = most = 0
    for _, step in sorted(starts + ends):
        now += step
        most = max(most, now)
    return most
