"""`make bench-engine`: the engine alone on the device at hand, without HTTP, with random weights of the published size.

    python -m tests.bench.engine [--size 1.7b] [--folder DIR] [--device cuda:0] [--dtype bfloat16]
                                 [--streams 1 8 32 64] [--requests 4] [--costs FILE] [--profile 1 64] [--smoke]

Closed loops: each stream asks again when its request has ended. Before them each kind of step is timed by itself,
waiting for the device every time; `--costs FILE` keeps that for `make bench-simulate ARGS="--costs FILE"`. Prints
tables, and as its last line one JSON object: device, ready_s, arena and peak memory, graphs, missed (steps that no
graph fitted), costs in ms, and for each number of streams frames_per_s, realtime (seconds of sound in a second),
ms_per_frame and first_ms (50th and 95th percentile, with the queue). The floor beside a frame's time: its weights'
bytes by the speed of a plain sum over 400 MB in this run. Lengths follow from the request's number; quality is not
tested by random weights.
"""

from __future__ import annotations

import argparse
import json
import statistics
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from api.src.engine.graphs import ROWS, up_to
from api.src.engine.loading import SpeechModel, load_model
from api.src.engine.messages import Delivery
from api.src.engine.prompt import Prompt, PromptRows
from api.src.engine.sampling import Sampling
from tests.bench import report
from tests.bench.random_checkpoint import SIZES, build
from tests.bench.workload import FRAME_S, ask
from tests.engine.bench_frames import read_speed, reads_per_frame

POSITIONS = 1024
REPEATS = 20
PROMPT_ROWS = (16, 32, 64, 128)
CHUNKS = (1, 2, 4, 8, 16)
_PROFILED_FRAMES = 10


@dataclass
class Stream:
    """One listener after the other: asks, hears it out, asks again."""

    model: SpeechModel
    ids: list[int]
    mean_frames: int
    frames: int = 0
    first_s: list[float] = field(default_factory=list)
    error: Exception | None = None
    ended: threading.Event = field(default_factory=threading.Event)
    _asked: float = 0.0
    _first: bool = True

    def next(self) -> None:
        """Ask for the next request, if there is one left. Called by the engine's thread from the second on."""
        if not self.ids:
            self.ended.set()
            return
        wanted = ask(0, self.ids.pop(0), self.mean_frames)
        prompt = Prompt(wanted.text, speaker="Ryan", language="English")
        # so long that not even weights that want to stop do
        sampling = replace(self.model.sampling(wanted.id), min_new_tokens=wanted.frames + 1)
        self._asked, self._first = time.perf_counter(), True
        self.model.engine.submit(self.model.request(prompt, sampling, wanted.frames), self.hear)

    def hear(self, delivery: Delivery) -> None:
        """Count the sound."""
        if delivery.sound is not None and self._first:
            self.first_s.append(time.perf_counter() - self._asked)
            self._first = False
        self.frames += delivery.frames
        if delivery.finish_reason not in (None, "length"):
            self.error = delivery.error or RuntimeError(f"a request ended with {delivery.finish_reason}")
            self.ended.set()
        elif delivery.finish_reason is not None:
            self.next()


def closed_loop(model: SpeechModel, streams: int, requests: int, mean_frames: int) -> dict[str, Any]:
    """So many streams of so many requests each; raises what went wrong."""
    listeners = [
        Stream(model, list(range(number * requests, (number + 1) * requests)), mean_frames) for number in range(streams)
    ]
    begun = time.perf_counter()
    for listener in listeners:
        listener.next()
    for listener in listeners:
        listener.ended.wait()
        if listener.error is not None:
            raise listener.error
    seconds = time.perf_counter() - begun
    frames = sum(listener.frames for listener in listeners)
    first = sorted(each for listener in listeners for each in listener.first_s)
    return {
        "streams": streams,
        "frames_per_s": round(frames / seconds, 1),
        "realtime": round(frames * FRAME_S / seconds, 2),
        "ms_per_frame": round(1000 * seconds * streams / frames, 2),
        "first_ms": [round(1000 * first[int(share * (len(first) - 1))], 1) for share in (0.5, 0.95)],
    }


# --- steps by themselves ---


class StepTimes:
    """Milliseconds of each kind of step, in slots that nobody else uses: the engine's thread must not run yet."""

    def __init__(self, model: SpeechModel, repeats: int) -> None:
        self._steps, self._repeats = model.steps, repeats
        self._slots = model.engine.slots
        config = model.config.talker_config
        self._row = torch.randn(config.hidden_size).to(model.steps.model.weight)
        self._groups = config.num_code_groups
        self._device = self._row.device

    def all(self) -> dict[str, Any]:
        """By size: as step_costs.Costs.of reads it."""
        batches = up_to(ROWS, self._slots)
        chunks = {frames: self.sound(1, frames) for frames in CHUNKS}
        most = {CHUNKS[-1] * batch: self.sound(batch, CHUNKS[-1]) for batch in (2, 4) if batch <= self._slots}
        return {
            "frame": {batch: self.frames(batch) for batch in batches},
            "prefill": {rows: self.prompt(rows) for rows in PROMPT_ROWS},
            "codec": chunks | most,
            "first_codec": {batch: self.sound(batch, 1, first=True) for batch in batches},
        } | (self.host() if self._device.type == "cuda" else {})

    def host(self) -> dict[str, Any]:
        """What asking for a frame costs the host, by a line through one slot and all of them."""
        few, many = self.frames(1, asked=True), self.frames(self._slots, asked=True)
        slot = max(0.0, many - few) / max(1, self._slots - 1)
        return {"queued": True, "step": round(few - slot, 4), "slot": round(slot, 4)}

    def frames(self, batch: int, asked: bool = False) -> float:
        slots = list(range(batch))
        self._enter(slots, 30)
        took = self._timed(lambda: self._steps.frame(slots), asked)
        self._leave(slots)
        return took

    def prompt(self, rows: int) -> float:
        def once() -> None:
            self._enter([0], rows)
            self._leave([0])

        return self._timed(once)

    def sound(self, batch: int, frames: int, first: bool = False) -> float:
        codes = torch.randint(0, 1000, (batch, frames, self._groups), device=self._device)
        sound = self._steps.first_sound if first else self._steps.sound
        return self._timed(lambda: sound(list(range(batch)), codes).float().cpu())

    def profile(self, batch: int, rows: int = 25) -> str:
        """What frames of `batch` slots are made of: the operations or kernels that take the most time."""
        slots = list(range(batch))
        self._enter(slots, 30)
        on_gpu = self._device.type == "cuda"
        kinds = [ProfilerActivity.CUDA] if on_gpu else [ProfilerActivity.CPU]
        with profile(activities=kinds) as profiler:
            for _ in range(_PROFILED_FRAMES):
                self._steps.frame(slots)
            if on_gpu:
                torch.cuda.synchronize()
        self._leave(slots)
        order = "self_device_time_total" if on_gpu else "self_cpu_time_total"
        table: str = profiler.key_averages().table(sort_by=order, row_limit=rows, max_name_column_width=80)
        return table

    def _enter(self, slots: Sequence[int], rows: int) -> None:
        x = self._row.expand(rows, -1)
        entries = [(slot, PromptRows(x, x[:0], self._row), Sampling(seed=slot)) for slot in slots]
        self._steps.prefill(entries)

    def _leave(self, slots: Sequence[int]) -> None:
        for slot in slots:
            self._steps.slots.leave(slot)

    def _timed(self, run: Callable[[], object], asked: bool = False) -> float:
        """The median of several, after one that does not count. `asked`: only until the device was told."""
        times = []
        for _ in range(self._repeats + 1):
            begun = time.perf_counter()
            run()
            told = time.perf_counter()
            if self._device.type == "cuda":
                torch.cuda.synchronize()
            times.append(1000 * ((told if asked else time.perf_counter()) - begun))
        return round(statistics.median(times[1:]), 3)


# --- the whole ---


def measure(options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Load, time the steps, run the loops."""
    device, slots = torch.device(options.device), max(options.streams)
    dtype = getattr(torch, options.dtype)
    speed = read_speed(dtype, device)
    begun = time.perf_counter()
    model = load_model(folder, slots=slots, device=device, dtype=dtype, positions=POSITIONS)
    with torch.inference_mode():
        model.steps.prepare()
        ready = time.perf_counter() - begun
        times = StepTimes(model, options.repeats)
        costs = times.all()
        for batch in options.profile or []:
            print(f"{_PROFILED_FRAMES} frames of {batch} slots:\n{times.profile(batch)}")
    model.engine.start()
    loops = [closed_loop(model, streams, options.requests, options.mean_frames) for streams in options.streams]
    model.engine.stop(30)
    return {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else report.machine(folder)["cpu"],
        "size": options.size,
        "dtype": options.dtype,
        "torch": torch.__version__,
        "ready_s": round(ready, 1),
        "how": model.steps.describe(),
        "missed": model.steps.missed,
        "arena_mb": round(model.steps.nbytes / 1e6),
        "peak_gpu_mb": round(torch.cuda.max_memory_allocated(device) / 1e6) if device.type == "cuda" else None,
        "frame_floor_ms": round(1000 * reads_per_frame(model.steps.model)[0] / speed, 2),
        "costs": {"source": f"measured on {options.device}, {options.size}, {options.dtype}", **costs},
        "loops": loops,
    }


def show(figures: dict[str, Any]) -> None:
    """The tables, then the JSON line."""
    print(
        f"{figures['device']}, {figures['size']} {figures['dtype']}, torch {figures['torch']}: {figures['how']}, ",
        end="",
    )
    print(f"ready after {figures['ready_s']} s, {figures['missed']} steps without a graph")
    for name, times in figures["costs"].items():
        if isinstance(times, dict):
            floor = f"; the weights' bytes alone {figures['frame_floor_ms']} ms" if name == "frame" else ""
            report.table(f"{name}, ms by size{floor}", list(map(str, times)), [list(times.values())])
    names = list(figures["loops"][0])
    report.table("closed loops", names, [[loop[name] for name in names] for loop in figures["loops"]])
    print(json.dumps(figures))


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure and show."""
    options = _parser().parse_args(arguments)
    if options.smoke:
        from tests.engine.checkpoints import tiny

        options.streams, options.requests, options.repeats, options.mean_frames = [1, 2], 2, 2, 20
        folder = tiny("custom_voice")
    else:
        folder = build(options.folder or Path("data/bench") / options.size, options.size)
    figures = measure(options, folder)
    show(figures)
    if options.costs:
        options.costs.write_text(json.dumps(figures["costs"]))
    return 0


def _parser() -> argparse.ArgumentParser:
    on_gpu = torch.cuda.is_available()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", default="1.7b" if on_gpu else "0.6b", choices=list(SIZES))
    parser.add_argument("--folder", type=Path, help="of the random checkpoint, made if need be; default: in data/bench")
    parser.add_argument("--device", default="cuda:0" if on_gpu else "cpu")
    parser.add_argument("--dtype", default="bfloat16" if on_gpu else "float32")
    parser.add_argument("--streams", type=int, nargs="+", default=[1, 8, 32, 64] if on_gpu else [1, 2, 4, 8])
    parser.add_argument("--requests", type=int, default=4, help="of each stream, one after the other")
    parser.add_argument("--mean-frames", type=int, default=52)
    parser.add_argument("--repeats", type=int, default=REPEATS, help="of each step that is timed by itself")
    parser.add_argument("--profile", type=int, nargs="+", help="also say what frames of so many slots are made of")
    parser.add_argument("--costs", type=Path, help="write what the steps take, for bench-simulate")
    parser.add_argument("--smoke", action="store_true", help="the tiny checkpoint, in seconds")
    return parser


if __name__ == "__main__":
    raise SystemExit(main())
