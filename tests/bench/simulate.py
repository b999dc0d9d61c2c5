"""The engine's scheduler under load, simulated: first audio and underruns against the request rate, for one device.

The engine, stepper and scheduler are the real ones; the runner only moves a clock by what each call would take
(step_costs.py), so a minute of load takes a second, without a GPU, and the same seed gives the same table.
Owns the simulated clock, the arrivals and the figures. Not simulated: the host's other work, jitter, the encoders.
"""

from __future__ import annotations

import argparse
import json
import math
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import takewhile
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from api.src.engine.engine import Engine
from api.src.engine.messages import Delivery, Limits, Request, Sound
from api.src.engine.pending import Pending
from api.src.engine.scheduler import Slot, Work
from tests.bench.playback import Playback
from tests.bench.plots import Line, bars, svg
from tests.bench.report import table
from tests.bench.step_costs import PRESETS, Costs
from tests.bench.workload import FRAME_S, arrivals, ask

RATES = (1, 2, 4, 8, 10, 15, 20, *range(30, 1000, 10))
STREAMS = (1, 8, 32, 64)
ROUNDS = 20  # requests of each stream in a closed loop, on average

SATURATED_S = 1.0
"""A p95 of the first audio beyond this ends the series of rates: the queue grows as long as the load lasts."""

KINDS = ("prefill", "decode", "first", "codec")
"""Of a runner's calls; "first" is the codec on first chunks."""

_PROMPT_ROWS, _ROWS_PER_FRAME = 12, 0.27
"""Role, speaker, language; text tokens at 3.4 a second."""

_NO_SOUND = Sound(np.empty(0, np.float32))


@dataclass
class Clock:
    """Simulated seconds."""

    now: float = 0.0

    def __call__(self) -> float:
        return self.now


class Call(NamedTuple):
    """What the runner did: one of KINDS, from `at` on, for `batch` slots."""

    kind: str
    at: float
    seconds: float
    batch: int


class Coming(NamedTuple):
    """A result of the simulated device: whoever waits for it moves the clock."""

    clock: Clock
    at: float
    value: list[Any]

    def ready(self) -> bool:
        return self.clock.now >= self.at

    def get(self) -> list[Any]:
        self.clock.now = max(self.clock.now, self.at)
        return self.value


class CostRunner:
    """Implements steps.Runner: every call takes the time that it costs, and every request gets all its frames.

    A device has two queues: all work in its order, and first chunks, which wait for neither of the two that follow a
    frame: bulk sound and the next frame.
    """

    def __init__(self, costs: Costs, clock: Clock) -> None:
        self.calls: list[Call] = []
        self.step_is_new = True
        self._costs, self._clock = costs, clock
        self._free = self._free_beside = self._framed = 0.0

    def prefill(self, slots: Sequence[Slot]) -> list[int]:
        rows = sum(slot.job.request.prompt_tokens for slot in slots)
        self._main("prefill", self._costs.prefill.seconds(rows), len(slots))
        return [0] * len(slots)

    def append(self, slot: Slot, text: Any, last: bool) -> int:
        raise NotImplementedError("the simulated requests have all their text")

    def decode(self, slots: Sequence[Slot]) -> Pending[list[int | None]]:
        self._clock.now += self._costs.slot_s * len(slots)
        self._main("decode", self._costs.frame.padded(len(slots)), len(slots))
        self._framed = self._free
        return self._coming(self._free, [slot.frames_done for slot in slots])

    def codec(self, work: Sequence[Work]) -> Pending[list[Sound]]:
        if not all(slot.coded == 0 for slot, _ in work):
            self._free = max(self._free, self._free_beside)
            self._main("codec", self._costs.codec_s(self._made(*each) for each in work), len(work))
            return self._coming(self._free, [_NO_SOUND] * len(work))
        seconds = self._costs.first_codec.seconds(len(work))
        if not self._costs.queued:
            self._main("first", seconds, len(work))
            return self._coming(self._free, [_NO_SOUND] * len(work))
        self._free_beside = self._note("first", max(self._framed, self._free_beside), seconds, len(work))
        self._free = max(self._free, self._clock.now) + self._costs.shared * seconds
        return self._coming(self._free_beside, [_NO_SOUND] * len(work))

    def release(self, slot: Slot) -> None:
        """Nothing is kept."""

    def check(self) -> None:
        """Nothing is lost."""

    def _made(self, slot: Slot, frames: int) -> int:
        """Frames that the codec makes to get these: at the end of a stream more do no harm."""
        return self._costs.last_chunk(frames) if slot.ends_with(frames) else frames

    def _main(self, kind: str, seconds: float, batch: int) -> None:
        self._free = self._note(kind, self._free, seconds, batch)

    def _note(self, kind: str, free: float, seconds: float, batch: int) -> float:
        """A call that begins when its queue is `free` and the host has come to it; returns when it ends."""
        self._clock.now += self._costs.step_s if self.step_is_new else 0.0
        self.step_is_new = False
        begins = max(free, self._clock.now)
        self.calls.append(Call(kind, begins, seconds, batch))
        if not self._costs.queued:
            self._clock.now = begins + seconds
        return begins + seconds

    def _coming(self, at: float, value: list[Any]) -> Pending[list[Any]]:
        return Coming(self._clock, at, value)


class Speech(NamedTuple):
    """One request's lengths: frames of its sound, rows of its prompt."""

    frames: int
    rows: int


def speech_like(seed: int) -> Callable[[int], Speech]:
    """The lengths of a request, by its number: those that the benchmark over HTTP asks for."""

    def speech(number: int) -> Speech:
        frames = ask(seed, number).frames
        return Speech(frames, _PROMPT_ROWS + round(_ROWS_PER_FRAME * frames))

    return speech


@dataclass
class Listened:
    """A request as its client sees it."""

    asked_at: float
    frames: int
    player: Playback
    ended_at: float = math.nan


class Simulation:
    """One load, from an idle engine to an idle engine. `speech`: the lengths of a request, by its number.

    requests: in the order of their submission. present_s: seconds that requests were in the engine, all together.
    """

    def __init__(self, costs: Costs, limits: Limits, speech: Callable[[int], Speech]) -> None:
        self.clock = Clock()
        self.runner = CostRunner(costs, self.clock)
        self.engine = Engine(self.runner, limits, clock=self.clock, silent_tail=lambda samples, frames: 0)
        self.requests: list[Listened] = []
        self.present_s = 0.0
        self._network_s, self._speech = costs.network_s, speech
        self._due: deque[float] = deque()
        self._repeats = self._present = 0

    def run(self, times: Iterable[float], repeats: int = 0) -> None:
        """Requests at these times (ascending), and `repeats` more, each where another one has ended: a closed loop.

        Raises:
            RuntimeError: a request did not get all its sound, so that the figures would be those of other work.
        """
        self._due.extend(times)
        self._repeats = repeats
        while self._present or self._due:
            if not self._present:
                self.clock.now = max(self.clock.now, self._due[0])
            while self._due and self._due[0] <= self.clock.now:
                self._ask(self._due.popleft())
            self._step()
        if not all(math.isclose(r.player.sound_s, r.frames * FRAME_S) for r in self.requests):
            raise RuntimeError("a request ended without all its sound")

    def _step(self) -> None:
        before, present = self.clock.now, self._present
        self.runner.step_is_new = True
        self.engine.step()
        self.present_s += present * (self.clock.now - before)

    def _ask(self, at: float) -> None:
        frames, rows = self._speech(len(self.requests))
        listened = Listened(at, frames, Playback())

        def deliver(delivery: Delivery) -> None:
            arrived = self.clock.now + self._network_s
            listened.player.arrive(arrived, delivery.frames * FRAME_S)
            ticket.taken(delivery.frames)
            if delivery.finish_reason is not None:
                listened.ended_at = arrived
                self._present -= 1
                if self._repeats:
                    self._repeats -= 1
                    self._due.append(arrived)

        ticket = self.engine.submit(Request(prompt=None, prompt_tokens=rows, max_frames=frames), deliver)
        self.requests.append(listened)
        self._present += 1


@dataclass(frozen=True, kw_only=True)
class Point:
    """One load's figures.

    load: requests a second, or streams. first_ms_*: from the submission to the first sound. underruns: of all players;
    broken: requests with one. present: requests in the engine, mean over time. batch: slots of a decode, mean over
    calls. audio_s_per_s: as made by the device. shares: of the time, what it did.
    """

    load: float
    requests: int
    first_ms_p50: float
    first_ms_p95: float
    first_ms_p99: float
    total_ms_p95: float
    underruns: int
    broken: int
    dry_s: float
    audio_s_per_s: float
    present: float
    batch: float
    shares: dict[str, float]


def figures(load: float, simulation: Simulation) -> Point:
    """Of a simulation that has run. The throughput is that until the last request came, so without the run-out."""
    heard, calls = simulation.requests, simulation.runner.calls
    began, end = heard[0].asked_at, max(call.at + call.seconds for call in calls)
    until = heard[-1].asked_at if heard[-1].asked_at > began else end
    decodes = [call for call in calls if call.kind == "decode"]
    first = [1000 * (r.player.first_at - r.asked_at) for r in heard if r.player.first_at is not None]
    return Point(
        load=load,
        requests=len(heard),
        first_ms_p50=percentile(first, 50),
        first_ms_p95=percentile(first, 95),
        first_ms_p99=percentile(first, 99),
        total_ms_p95=percentile([1000 * (r.ended_at - r.asked_at) for r in heard], 95),
        underruns=sum(r.player.underruns for r in heard),
        broken=sum(r.player.underruns > 0 for r in heard),
        dry_s=sum(r.player.dry_s for r in heard),
        audio_s_per_s=FRAME_S * sum(call.batch for call in decodes if call.at < until) / (until - began),
        present=simulation.present_s / (end - began),
        batch=sum(call.batch for call in decodes) / len(decodes),
        shares={kind: sum(c.seconds for c in calls if c.kind == kind) / (end - began) for kind in KINDS},
    )


def percentile(values: Iterable[float], percent: float) -> float:
    """The nearest rank."""
    ranked = sorted(values)
    return ranked[max(0, math.ceil(percent / 100 * len(ranked)) - 1)]


def open_loop(costs: Costs, limits: Limits, *, rate: float, requests: int, seed: int = 0) -> Point:
    """Requests of a Poisson process, whether the engine keeps up or not."""
    simulation = Simulation(costs, limits, speech_like(seed))
    simulation.run(arrivals(seed, rate, requests))
    return figures(rate, simulation)


def closed_loop(costs: Costs, limits: Limits, *, streams: int, seed: int = 0) -> Point:
    """So many listeners, each asking anew when it has heard the last."""
    simulation = Simulation(costs, limits, speech_like(seed))
    simulation.run([0.0] * streams, repeats=(ROUNDS - 1) * streams)
    return figures(streams, simulation)


def up_to_saturation(rates: Iterable[float], measure: Callable[[float], Point]) -> list[Point]:
    """The points of these rates, up to and with the first that is more than the engine can do."""
    points: list[Point] = []
    for rate in rates:
        points.append(measure(rate))
        if points[-1].first_ms_p95 > 1000 * SATURATED_S:
            break
    return points


def sustainable(points: Iterable[Point], bound_ms: float) -> float | None:
    """The highest rate that is sustained, as are all below it."""
    good = list(takewhile(lambda p: p.first_ms_p95 <= bound_ms and p.underruns == 0, points))
    return good[-1].load if good else None


def show(title: str, unit: str, points: Sequence[Point]) -> None:
    """The points as a table."""
    rows = [{unit: f"{p.load:g}"} | _row(p) for p in points]
    table(title, list(rows[0]), [list(row.values()) for row in rows])


def _row(p: Point) -> dict[str, str]:
    return {
        "first ms p50": f"{p.first_ms_p50:.1f}",
        "p95": f"{p.first_ms_p95:.1f}",
        "p99": f"{p.first_ms_p99:.1f}",
        "total ms p95": f"{p.total_ms_p95:.0f}",
        "underruns": f"{p.underruns}",
        "broken": f"{p.broken}/{p.requests}",
        "dry s": f"{p.dry_s:.2f}",
        "audio-s/s": f"{p.audio_s_per_s:.1f}",
        "present": f"{p.present:.1f}",
        "batch": f"{p.batch:.1f}",
    } | {f"{kind} %": f"{100 * share:.0f}" for kind, share in p.shares.items()}


def main(arguments: Sequence[str] | None = None) -> int:
    """Print tables, plots, and all figures as JSON in the last line."""
    asked = _parser().parse_args(arguments)
    costs = Costs.read(asked.costs) if asked.costs else PRESETS[asked.preset]
    if asked.in_turn:
        costs = replace(costs, queued=False)
    limits = Limits(**{"slots": asked.slots, "codec_frames": max(64, asked.slots)} | dict(asked.limit))
    print(f"SIMULATED with step costs of {costs.source}\n{limits}\nseed {asked.seed}")

    def measure(rate: float) -> Point:
        requests = max(asked.requests, round(rate * asked.seconds))
        return open_loop(costs, limits, rate=rate, requests=requests, seed=asked.seed)

    opened = up_to_saturation(asked.rates, measure)
    closed = [closed_loop(costs, limits, streams=int(streams), seed=asked.seed) for streams in asked.streams]
    best = sustainable(opened, asked.bound)
    show("Open loop: requests of a Poisson process", "requests/s", opened)
    show("Closed loop: each stream asks anew when it has heard the last", "streams", closed)
    rates = [p.load for p in opened]
    first = Line("p95 first audio, ms", "blue", [p.first_ms_p95 for p in opened], 4 * asked.bound)
    broken = Line("underruns, % of requests", "red", [100 * p.broken / p.requests for p in opened], 100)
    bars("requests/s", rates, first)
    bars("requests/s", rates, broken)
    rate = f"{best:g} requests a second" if best is not None else "none of these rates"
    print(f"\nSustainable (p95 first audio within {asked.bound:g} ms, no underrun): {rate}")
    if asked.plot:
        asked.plot.write_text(svg("requests/s", rates, [first, broken]))
    found = {"source": costs.source, "limits": asdict(limits), "seed": asked.seed, "bound_ms": asked.bound}
    points = {"open": [*map(asdict, opened)], "closed": [*map(asdict, closed)]}
    print(json.dumps(found | {"sustainable_per_s": best} | points))
    return 0


def _parser() -> argparse.ArgumentParser:
    def numbers(text: str) -> list[float]:
        return [float(word) for word in text.split(",")]

    def limit(text: str) -> tuple[str, float]:
        name, _, value = text.partition("=")
        return name, json.loads(value)

    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--preset", choices=PRESETS, default="h200-1.7b", help="estimated step costs")
    parser.add_argument("--costs", type=Path, help="a JSON file of measured step costs instead")
    parser.add_argument("--in-turn", action="store_true", help="host and device wait for each other, for comparison")
    parser.add_argument("--rates", type=numbers, default=RATES, help="requests a second, ascending")
    parser.add_argument("--streams", type=numbers, default=STREAMS, help="of the closed loops")
    parser.add_argument("--requests", type=int, default=400, help="at each rate, at least")
    parser.add_argument("--seconds", type=float, default=30.0, help="of each rate, at least")
    parser.add_argument("--bound", type=float, default=40.0, help="of p95 first audio, ms")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--slots", type=int, default=64)
    parser.add_argument("--limit", type=limit, action="append", default=[], help="name=value of the engine's Limits")
    parser.add_argument("--plot", type=Path, help="an SVG file to write")
    return parser


if __name__ == "__main__":
    raise SystemExit(main())
