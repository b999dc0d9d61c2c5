"""What the parts of an engine's step take: estimates for some devices, or figures that a measurement wrote.

Owns the arithmetic from batches and lengths to seconds. Decides nothing and runs nothing.
"""

from __future__ import annotations

import json
from bisect import bisect_left
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ESTIMATE = "an ESTIMATE, not a measurement"


class Curve:
    """Milliseconds at some sizes, straight lines between; before the first point flat, after the last on as before."""

    def __init__(self, points: Mapping[int, float]) -> None:
        if not points:
            raise ValueError("a table of costs needs an entry")
        self._sizes = sorted(points)
        self._times = [points[size] for size in self._sizes]

    def seconds(self, size: int) -> float:
        """Of `size`, by the lines."""
        sizes, times = self._sizes, self._times
        if size <= sizes[0] or len(sizes) == 1:
            return times[0] / 1000
        right = min(bisect_left(sizes, size), len(sizes) - 1)
        slope = (times[right] - times[right - 1]) / (sizes[right] - sizes[right - 1])
        return (times[right] + (size - sizes[right]) * slope) / 1000

    def padded(self, size: int) -> float:
        """Of the smallest point with room for `size`: a graph costs what its bucket costs."""
        place = bisect_left(self._sizes, size)
        return self.seconds(self._sizes[place] if place < len(self._sizes) else size)


@dataclass(frozen=True, kw_only=True)
class Costs:
    """What a device takes for each part of a step.

    frame: talker and predictor, by the batch, of which the points are the buckets. prefill: of all prompts of a step,
    by their rows. codec: one call, by batch x frames. first_codec: the first chunks of a step, by their number.
    step_s, slot_s: of the host, each step and for each of its slots. queued: the device works while the host goes on;
    then a first chunk goes beside other work, which it slows down by `shared` of what it takes. network_s: fixed, of a
    request and its sound on their way. codec_lengths: a chunk is a sum of them, chunks of one length share a call.
    source: which device, and measured how.
    """

    source: str
    frame: Curve
    prefill: Curve
    codec: Curve
    first_codec: Curve
    step_s: float = 0.0
    slot_s: float = 0.0
    queued: bool = False
    shared: float = 1.0
    network_s: float = 0.0
    codec_lengths: tuple[int, ...] = (16, 8, 4, 2, 1)

    @classmethod
    def of(cls, figures: Mapping[str, Any]) -> Costs:
        """From what JSON holds: milliseconds in `frame`, `prefill`, `codec`, `first_codec` (objects, size to time),
        `step`, `slot`, `network`; `queued`, `shared`, `codec_lengths` and `source`. Other names are ignored.

        Raises:
            ValueError: one of the tables, or the source, is missing.
        """
        tables = ("frame", "prefill", "codec", "first_codec")
        missing = [name for name in ("source", *tables) if name not in figures]
        if missing:
            raise ValueError(f"the costs have no {', '.join(missing)}")
        curves = {name: Curve({int(size): float(ms) for size, ms in figures[name].items()}) for name in tables}
        return cls(
            source=figures["source"],
            step_s=figures.get("step", 0.0) / 1000,
            slot_s=figures.get("slot", 0.0) / 1000,
            queued=bool(figures.get("queued", False)),
            shared=float(figures.get("shared", 1.0)),
            network_s=figures.get("network", 0.0) / 1000,
            codec_lengths=tuple(sorted(figures.get("codec_lengths", cls.codec_lengths), reverse=True)),
            **curves,
        )

    @classmethod
    def read(cls, file: Path) -> Costs:
        """From a JSON file: all of it, or what stands there under "costs". Raises as `of`."""
        found = json.loads(file.read_text())
        return cls.of(found.get("costs", found))

    def codec_s(self, chunks: Iterable[int]) -> float:
        """Of chunks of so many frames in one step: one call for each length."""
        return sum(self.codec.seconds(length * batch) for length, batch in self._parts(chunks).items())

    def last_chunk(self, frames: int) -> int:
        """The length of one call for them, if there is one."""
        return min((length for length in self.codec_lengths if length >= frames), default=frames)

    def _parts(self, chunks: Iterable[int]) -> Counter[int]:
        parts: Counter[int] = Counter()
        for frames in chunks:
            for length in self.codec_lengths:
                parts[length] += frames // length
                frames %= length
        return +parts


_ON_A_GPU: dict[str, Any] = {
    "step_s": 0.0003,  # of which 0.1 ms for Python, the rest for launches and copies
    "slot_s": 0.000015,  # of which a third was measured without a device: scheduling 64 slots takes 0.35 ms
    "queued": True,
    "shared": 0.5,
    "network_s": 0.0025,
}

PRESETS: dict[str, Costs] = {
    # One H200: frames and sound in chunks of 16 take 4.2, 5, 8 and 12 ms a step at batch 1, 8, 32 and 64.
    "h200-1.7b": Costs(
        source=f"one H200, 1.7B, bf16: {ESTIMATE}",
        frame=Curve({1: 4.0, 2: 4.0, 4: 4.05, 8: 4.1, 16: 4.4, 32: 5.1, 48: 6.1, 64: 7.2}),
        prefill=Curve({32: 3.0, 1024: 12.0}),
        codec=Curve({1: 1.0, 64: 4.8}),
        first_codec=Curve({1: 3.0, 8: 3.5, 64: 7.0}),
        **_ON_A_GPU,
    ),
    # The same, less the bytes that the smaller talker does not read.
    "h200-0.6b": Costs(
        source=f"one H200, 0.6B, bf16: {ESTIMATE}",
        frame=Curve({1: 3.5, 2: 3.5, 4: 3.55, 8: 3.6, 16: 3.9, 32: 4.6, 48: 5.6, 64: 6.7}),
        prefill=Curve({32: 2.5, 1024: 8.0}),
        codec=Curve({1: 1.0, 64: 4.8}),
        first_codec=Curve({1: 3.0, 8: 3.5, 64: 7.0}),
        **_ON_A_GPU,
    ),
    # One RTX 4090: 8, 9.5, 15 and 23 ms with the codec.
    "4090-1.7b": Costs(
        source=f"one RTX 4090, 1.7B, bf16: {ESTIMATE}",
        frame=Curve({1: 7.8, 2: 7.8, 4: 7.9, 8: 8.0, 16: 8.8, 32: 10.3, 48: 12.7, 64: 15.1}),
        prefill=Curve({32: 5.0, 1024: 30.0}),
        codec=Curve({1: 1.5, 64: 7.9}),
        first_codec=Curve({1: 4.0, 8: 5.0, 64: 10.0}),
        **_ON_A_GPU,
    ),
    # Two threads of a server's processor, int8 linears, codec in float32: slower than sound even for one stream.
    "cpu-0.6b": Costs(
        source=f"two CPU threads, 0.6B, int8: {ESTIMATE}",
        frame=Curve({1: 151.0, 8: 185.0}),
        prefill=Curve({1: 50.0, 32: 150.0, 1024: 4000.0}),
        codec=Curve({1: 110.0, 4: 328.0, 64: 5248.0}),
        first_codec=Curve({1: 110.0, 8: 700.0}),
        step_s=0.0002,
        network_s=0.0025,
        codec_lengths=tuple(range(16, 0, -1)),
    ),
}
"""From what is publicly known of the devices. Who has one measures, and gives the figures to `Costs.read`."""
