"""`make bench-cpu`: the engine on the CPU beside the official package (qwen-tts 0.1.1), turn by turn in one run. Linux.

    python -m tests.bench.cpu [--official PYTHON] [--folder DIR] [--size 0.6b] [--threads N] [--frames 24] [--repeats 3]
                              [--weights auto fp32]
    python -m tests.bench.cpu --smoke        seconds, on the tiny checkpoint, without the official package

Both load the same folder of random weights (random_checkpoint.py), each in a process of its own, and speak the same
texts for the same number of frames, which their samples must confirm: the official package in fp32, ours once with each
form of the weights. What random weights cannot show is quality, and when speech ends. Prints tables, and as its last
line one JSON object; its figures are of the first form, and "forms" has those of all:

    form                    of the weights

    ratio_batch1            seconds of the official package for one request, by ours
    ratio_8_streams         of the official package for eight requests one after another, by ours for eight at once
    ratio_8_batched         of the official package for eight in one batch, by ours for eight at once
    memory_ratio            our peak resident memory by theirs; each process is measured from its start to its end
    bound_share_batch1,     what the machine allows by what was measured: 1 is as fast as reading the weights once for
    bound_share_8_streams     each frame and doing its arithmetic can be, at the speeds measured in this run
    first_sound_s           streams -> first, median and last listener, when all ask at once
    frames_per_s            streams -> frames of all together; beside it official: one at a time, and a batch of eight
    peak_mb, anonymous_mb   of each process; anonymous: what is no file's
    ready_s                 from the start of a process to its first request: files not in memory, and in memory

Ratios are medians over the turns of the run.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, get_args

from api.src.engine.cores import usable_cores
from api.src.engine.linear import Form
from tests.bench import report
from tests.bench.random_checkpoint import SIZES, build
from tests.engine.bench_frames import multiply_speed, read_speed

STREAMS = (1, 2, 4, 8)
PARTS = ("prefill", "decode", "codec")
FRAME_S = 0.08
SAMPLES_PER_FRAME = 1920
CODEC_FLOP = 4.96e9
"""Of one frame's sound, at the published size, by plain convolutions; native/codec_unit.h does with 0.8e9 fewer."""
TEXTS = [
    "The train leaves at nine.",
    "A bell rings twice.",
    "The market opens at dawn.",
    "They point at a fish.",
    "She bakes it at night.",
    "It broke nine windows.",
    "By noon it is empty.",
    "The gulls take the rest.",
]

Answer = dict[str, Any]


@dataclass
class Worker:
    """A process of cpu_worker. `ready_s`: from its start until it could speak."""

    process: subprocess.Popen[str]
    ready_s: float
    facts: Answer

    def speak(self, streams: int, frames: int, *, together: bool = True) -> Answer:
        """The first `streams` texts. Raises RuntimeError: not as many samples as frames."""
        assert self.process.stdin
        command = {"texts": TEXTS[:streams], "frames": frames, "seed": frames, "together": together}
        self.process.stdin.write(json.dumps(command) + "\n")
        self.process.stdin.flush()
        answer = _line(self.process)
        if answer["samples"] != [frames * SAMPLES_PER_FRAME] * streams:
            raise RuntimeError(f"{streams} requests of {frames} frames gave {answer['samples']} samples")
        return answer


@contextmanager
def working(kind: str, python: str, folder: Path, threads: int) -> Iterator[Worker]:
    """An engine's process, until the context is left."""
    command = [python, "-m", "tests.bench.cpu_worker", kind, str(folder), str(threads)]
    started = time.perf_counter()
    process = subprocess.Popen(
        command,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL if kind == "official" else None,  # it advises on what it does not need here
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])},
        text=True,
    )
    with process:
        try:
            facts = _line(process)
            yield Worker(process, time.perf_counter() - started, facts)
            assert process.stdin
            process.stdin.close()  # which ends it
            process.wait(60)
        finally:
            process.kill()


def _line(process: subprocess.Popen[str]) -> Answer:
    assert process.stdout
    line = process.stdout.readline()
    if not line:
        raise RuntimeError(f"{' '.join(map(str, process.args))} has ended with {process.wait()}")  # type: ignore[arg-type]
    answer: Answer = json.loads(line)
    return answer


@dataclass
class Figures:
    """All answers of one kind of turn, in their order."""

    streams: int
    frames: int
    answers: list[Answer] = field(default_factory=list)

    def median(self, key: str) -> float:
        return statistics.median(answer[key] for answer in self.answers)

    @property
    def frame_ms(self) -> float:
        """Of all streams together."""
        return 1000 * self.median("seconds") / (self.streams * self.frames)

    @property
    def frames_per_s(self) -> float:
        return 1000 / self.frame_ms

    def part_ms(self, of: Callable[[Answer], float]) -> float:
        """Milliseconds per frame of what `of` takes from an answer's seconds."""
        return 1000 * statistics.median(map(of, self.answers)) / (self.streams * self.frames)

    def first_s(self) -> list[float]:
        """First, median and last listener, from when all asked."""
        sounds = [sorted(answer["first_s"]) for answer in self.answers]
        picks = [(each[0], statistics.median(each), each[-1]) for each in sounds]
        return [round(statistics.median(column), 2) for column in zip(*picks, strict=True)]

    def row(self, name: str) -> list[object]:
        parts = [self.part_ms(lambda answer, name=part: answer["parts"][name]) for part in PARTS]  # type: ignore[misc]
        rest = self.part_ms(lambda answer: answer["seconds"] - sum(answer["parts"][part] for part in PARTS))
        times = [round(x, 1) for x in (self.frame_ms, *parts, rest)]
        return [name, *times, round(self.frames_per_s, 2), round(self.frame_ms / 1000 / FRAME_S, 2), *self.first_s()]


@dataclass
class Contest:
    """Who speaks, ours by form, and the machine's speeds, measured between the turns. Turns by name."""

    ours: dict[str, Worker]
    official: Worker | None
    frames: int
    turns: dict[str, Figures] = field(default_factory=dict)
    reads: list[float] = field(default_factory=list)
    multiplies: dict[Form, list[float]] = field(default_factory=dict)

    def run(self, repeats: int) -> None:
        """A short turn each to warm up, then `repeats` of all in turn."""
        for worker in filter(None, (*self.ours.values(), self.official)):
            worker.speak(1, 2)
        for _ in range(repeats):
            self.reads.append(read_speed())
            for form in ("fp32", "bf16", *self.ours):
                self.multiplies.setdefault(form, []).append(multiply_speed(form))  # type: ignore[arg-type]
            for streams in STREAMS:
                for form, worker in self.ours.items():
                    self._turn(f"{form}, {streams} at once", worker, streams)
                if streams == 1:
                    self._turn("official, 1", self.official, 1)
            self._turn("official, 8 in turn", self.official, 8, together=False)
            self._turn("official, batch of 8", self.official, 8)

    def _turn(self, name: str, worker: Worker | None, streams: int, *, together: bool = True) -> None:
        if worker is not None:
            turn = self.turns.setdefault(name, Figures(streams, self.frames))
            answer = worker.speak(streams, self.frames, together=together)
            turn.answers.append(answer)
            print(f"{name}: {answer['seconds']:.2f} s", file=sys.stderr)

    def ratio(self, theirs: str, ours: str) -> float | None:
        """How many times as fast ours is: the median over the turns."""
        if theirs not in self.turns:
            return None
        pairs = zip(self.turns[theirs].answers, self.turns[ours].answers, strict=True)
        return round(statistics.median(a["seconds"] / b["seconds"] for a, b in pairs), 3)

    def bound_ms(self, form: str, streams: int) -> tuple[float, float]:
        """Per frame, the least that memory and arithmetic allow: the language model's, the codec's.

        Operations count at the rate of their own kind: 8-bit ones, bf16 ones where the codec has them, fp32 ones.
        """
        read = statistics.median(self.reads)
        rates = {kind: statistics.median(rates) for kind, rates in self.multiplies.items()}
        facts = self.ours[form].facts
        arithmetic = 2 * facts["frame_weights"] / rates[form]  # type: ignore[index]
        narrow = facts["narrow_flop"]
        codec = narrow / rates["bf16"] + max(0.0, CODEC_FLOP - narrow) / rates["fp32"]
        return 1000 * max(facts["frame_bytes"] / read / streams, arithmetic), 1000 * codec

    def peak(self, kind: str, key: str) -> float | None:
        """In MB; a process knows its own, so it is that of its latest answer."""
        turns = [turn for name, turn in self.turns.items() if name.startswith(f"{kind},")]
        return round(max(turn.answers[-1][key] for turn in turns)) if turns else None


def main(arguments: Sequence[str] | None = None) -> int:
    options = _parser().parse_args(arguments)
    if options.smoke:
        from tests.engine.checkpoints import tiny

        options.folder, options.frames, options.repeats, options.official = tiny("custom_voice"), 4, 1, None
        options.weights = ["fp32", "int8"]
    else:
        options.folder = build(options.folder or Path("data/bench") / options.size, options.size, "custom_voice")
    started = time.perf_counter()
    figures = measure(options)
    if options.smoke:  # the arithmetic's bound is of the published size
        for each in (figures, *figures["forms"].values()):
            each |= dict.fromkeys(("bound_share_batch1", "bound_share_8_streams"))
    figures["seconds"] = round(time.perf_counter() - started)
    print(f"\n{json.dumps(figures)}")
    return 0


def measure(options: argparse.Namespace) -> Answer:
    """Run everything and print the tables; the figures."""
    import torch

    folder, threads = options.folder, options.threads
    torch.set_num_threads(threads)
    machine = report.machine(folder)
    print(
        f"{machine['cpu']}, {threads} threads, {options.frames} frames a request, {options.repeats} turns of each",
        flush=True,
    )
    engines = dict.fromkeys(options.weights, sys.executable)
    engines |= {"official": options.official} if options.official else {}
    ready = {kind: [_cold_ready(kind, python, folder, threads)] for kind, python in engines.items()}
    with ExitStack() as stack:
        workers = {k: stack.enter_context(working(k, python, folder, threads)) for k, python in engines.items()}
        for kind, worker in workers.items():
            ready[kind].append(worker.ready_s)
        contest = Contest(
            {worker.facts["form"]: worker for kind, worker in workers.items() if kind != "official"},
            workers.get("official"),
            options.frames,
        )
        contest.run(options.repeats)
        return _report(contest, {worker.facts.get("form", kind): ready[kind] for kind, worker in workers.items()})


def _cold_ready(kind: str, python: str, folder: Path, threads: int) -> float:
    """Seconds until ready when the system has no page of the files in memory."""
    for path in folder.rglob("*.safetensors"):
        with path.open("rb") as file:
            os.fsync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    with working(kind, python, folder, threads) as worker:
        return worker.ready_s


def _report(contest: Contest, ready: dict[str, list[float]]) -> Answer:
    turns = contest.turns
    head = ["", "ms/frame", "prefill", "talker+predictor", "codec", "rest", "frames/s", "real-time factor"]
    rows = [turn.row(name) for name, turn in turns.items()]
    report.table(
        "Medians; times are per frame of all streams together", [*head, "first sound s", "median", "last"], rows
    )
    memory = {kind: [contest.peak(kind, key) for key in ("peak_mb", "anonymous_mb")] for kind in ready}
    rows = [[kind, *memory[kind], *(round(s, 1) for s in times)] for kind, times in ready.items()]
    report.table("Memory and start", ["", "peak MB", "anonymous MB", "ready s, cold", "warm"], rows)
    read = statistics.median(contest.reads) / 1e9
    rates = {form: round(statistics.median(rates) / 1e9, 1) for form, rates in contest.multiplies.items()}
    print(f"\nThe machine reads {read:.1f} GB/s; it does {_listed(rates)} billion operations a second.")
    forms = {form: _of_form(contest, form, memory) for form in contest.ours}
    first = next(iter(forms))
    return {
        "form": first,
        **forms[first],
        "forms": forms,
        "frames_per_s": {name: round(turn.frames_per_s, 2) for name, turn in turns.items()},
        "peak_mb": {kind: values[0] for kind, values in memory.items()},
        "anonymous_mb": {kind: values[1] for kind, values in memory.items()},
        "ready_s": {kind: [round(s, 1) for s in times] for kind, times in ready.items()},
        "read_gb_per_s": round(read, 1),
        "gflop_per_s": rates,
    }


def _of_form(contest: Contest, form: str, memory: dict[str, list[float | None]]) -> Answer:
    """The figures of one form of ours; prints its bounds."""
    turns, theirs = contest.turns, memory.get("official", [None])[0]
    one, eight = contest.bound_ms(form, 1), contest.bound_ms(form, 8)
    shares = [round(sum(bound) / turns[f"{form}, {n} at once"].frame_ms, 3) for bound, n in ((one, 1), (eight, 8))]
    print(
        f"With {form} a frame needs {one[0]:.0f} ms of language model and {one[1]:.0f} ms of codec with one stream, "
        f"{eight[0]:.0f} and {eight[1]:.0f} ms with eight. Shares of it: {shares[0]} and {shares[1]}."
    )
    return {
        "ratio_batch1": contest.ratio("official, 1", f"{form}, 1 at once"),
        "ratio_8_streams": contest.ratio("official, 8 in turn", f"{form}, 8 at once"),
        "ratio_8_batched": contest.ratio("official, batch of 8", f"{form}, 8 at once"),
        "memory_ratio": round((memory[form][0] or 0) / theirs, 3) if theirs else None,
        "bound_share_batch1": shares[0],
        "bound_share_8_streams": shares[1],
        "first_sound_s": {f"{n} at once": turns[f"{form}, {n} at once"].first_s() for n in STREAMS},
    }


def _listed(rates: dict[Form, float]) -> str:
    return ", ".join(f"{rate:.0f} in {form}" for form, rate in rates.items())


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m tests.bench.cpu", description=__doc__.partition("\n")[0])
    parser.add_argument(
        "--official", metavar="PYTHON", help="of the virtual environment with qwen-tts; none: ours alone"
    )
    parser.add_argument("--folder", type=Path, help="of the random checkpoint, made if need be; default: in data/bench")
    parser.add_argument("--size", choices=SIZES, default="0.6b")
    parser.add_argument("--threads", type=int, default=usable_cores(), help="default: all cores that may be used")
    parser.add_argument("--weights", nargs="+", choices=["auto", *get_args(Form)], default=["auto", "fp32"])
    parser.add_argument("--frames", type=int, default=24, help="of each request")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--smoke", action="store_true", help="the tiny checkpoint, ours alone")
    return parser


if __name__ == "__main__":
    raise SystemExit(main())
