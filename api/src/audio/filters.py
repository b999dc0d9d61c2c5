"""Streaming ffmpeg filters over float32 mono samples, and the resampler built on them. Knows no codec."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from fractions import Fraction

import av
import av.filter
import numpy as np
from av.audio.frame import AudioFrame

from ..domain import SAMPLE_RATE, Samples

SILENCE: Samples = np.zeros(0, np.float32)
"""No samples at all: what a stage returns while it waits for more."""

BLOCK = 960
"""Samples that a filter is fed at a time: slowing down, atempo's output depends on the size of what it gets first."""


def audio_frame(samples: Samples, sample_rate: int, position: int, sample_format: str = "flt") -> AudioFrame:
    """One mono frame for ffmpeg. `samples`: contiguous, in `sample_format`; `position`: in samples."""
    frame = AudioFrame.from_ndarray(samples[np.newaxis], format=sample_format, layout="mono")
    frame.sample_rate = sample_rate
    frame.pts = position
    frame.time_base = Fraction(1, sample_rate)
    return frame


class FilterChain:
    """ffmpeg filters in a row. What comes out does not depend on how the input was cut into pushes."""

    def __init__(self, sample_rate: int, filters: Sequence[tuple[str, str]]) -> None:
        """`sample_rate`: Hz of the input; `filters`: ffmpeg names and arguments, in order."""
        self._sample_rate = sample_rate
        self._position = 0
        self._pending = SILENCE
        self._graph = av.filter.Graph()
        self._graph.threads = 1  # by default each graph starts one thread per CPU, which these filters never use
        self._source = self._graph.add_abuffer(
            sample_rate=sample_rate, format="flt", layout="mono", time_base=Fraction(1, sample_rate)
        )
        stages = [self._graph.add(name, arguments) for name, arguments in filters]
        typed = self._graph.add("aformat", "sample_fmts=flt")
        self._sink = self._graph.add("abuffersink")
        self._graph.link_nodes(self._source, *stages, typed, self._sink).configure()

    def push(self, samples: Samples) -> Samples:
        """Take samples (contiguous float32) and return those that are ready, possibly none."""
        pending = np.concatenate([self._pending, samples])
        whole = len(pending) - len(pending) % BLOCK
        for start in range(0, whole, BLOCK):
            self._feed(pending[start : start + BLOCK])
        self._pending = pending[whole:]
        return self._pull()

    def flush(self) -> Samples:
        """Return the rest. Nothing may be pushed afterwards."""
        if len(self._pending):
            self._feed(self._pending)
        self._source.push(None)
        return self._pull()

    def _feed(self, samples: Samples) -> None:
        self._source.push(audio_frame(samples, self._sample_rate, self._position))
        self._position += len(samples)

    def _pull(self) -> Samples:
        return np.concatenate([SILENCE, *self._frames()])

    def _frames(self) -> Iterator[Samples]:
        while True:
            try:
                frame = self._sink.pull()
            except (BlockingIOError, EOFError):
                return
            assert isinstance(frame, AudioFrame)
            yield frame.to_ndarray()[0]


class Resampler:
    """Anything to SAMPLE_RATE. Samples that have that rate already pass through untouched.

    The rate may change between pushes: what the filter still held of the old rate comes first. A stretch of n
    samples at one rate r becomes n * SAMPLE_RATE / r samples, give or take one.
    """

    def __init__(self) -> None:
        self._sample_rate = SAMPLE_RATE
        self._chain: FilterChain | None = None

    def push(self, samples: Samples, sample_rate: int) -> Samples:
        """Take contiguous samples at `sample_rate` Hz; return those that are ready at SAMPLE_RATE."""
        if sample_rate == self._sample_rate:
            return self._convert(samples)
        rest = self.flush()
        self._sample_rate = sample_rate
        if sample_rate != SAMPLE_RATE:
            self._chain = FilterChain(sample_rate, [("aresample", str(SAMPLE_RATE))])
        return np.concatenate([rest, self._convert(samples)])

    def _convert(self, samples: Samples) -> Samples:
        return self._chain.push(samples) if self._chain else samples

    def flush(self) -> Samples:
        """Return the rest; a later push begins anew."""
        rest = self._chain.flush() if self._chain else SILENCE
        self.close()
        return rest

    def close(self) -> None:
        """Free the filter. Idempotent."""
        self._chain = None
        self._sample_rate = SAMPLE_RATE
