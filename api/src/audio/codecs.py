"""Clean 24 kHz samples to the bytes of one format: raw, or by an ffmpeg codec in an ffmpeg container.

Owns the byte stream of one response. Does not choose formats or their settings (encoders.py does), and
neither resamples nor cleans.
"""

from __future__ import annotations

import os
import sys
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from fractions import Fraction
from typing import Any, Protocol

import av
import numpy as np
from av.audio.stream import AudioStream
from av.codec.context import Flags
from av.container import OutputContainer
from numpy.typing import NDArray

from ..domain import SAMPLE_RATE, Samples
from .filters import audio_frame

COMMON_OPTIONS: Mapping[str, str] = {"flush_packets": "1", "fflags": "+bitexact"}
"""Of every container. bitexact leaves out version tags and makes Ogg's serial number constant, not random."""


@dataclass(frozen=True, slots=True)
class FFmpegSettings:
    """How ffmpeg makes a format. `sample_format`: "flt" or "fltp" (the same for mono), or "s16"."""

    codec: str
    container: str
    sample_format: str
    bit_rate: int = 0
    codec_options: Mapping[str, str] = field(default_factory=dict)
    container_options: Mapping[str, str] = field(default_factory=dict)


class Codec(Protocol):
    """The last stage of an encoder. `header`: what comes before any sound, known at once."""

    header: bytes

    def encode(self, samples: Samples) -> bytes:
        """Take contiguous samples, at least one; return the bytes that are ready, possibly none."""
        ...

    def finish(self) -> bytes:
        """Return the rest and the container's end."""
        ...

    def close(self) -> None:
        """Free everything. Idempotent."""
        ...


class RawCodec:
    """16-bit little-endian samples behind a constant header."""

    def __init__(self, header: bytes = b"") -> None:
        self.header = header

    def encode(self, samples: Samples) -> bytes:
        return _to_int16(samples).tobytes()

    def finish(self) -> bytes:
        return b""

    def close(self) -> None: ...


class FFmpegCodec:
    """A codec and its container, written without ever going back."""

    def __init__(self, settings: FFmpegSettings) -> None:
        self._sample_format = settings.sample_format
        self._position = 0
        self._sink = _Sink()
        self._output: tuple[OutputContainer, AudioStream] | None = _open_output(self._sink, settings)
        self.header = self._sink.take()

    def encode(self, samples: Samples) -> bytes:
        data: NDArray[Any] = _to_int16(samples) if self._sample_format == "s16" else samples
        frame = audio_frame(data, SAMPLE_RATE, self._position, self._sample_format)
        container, stream = self._opened()
        if self._position:
            packets = stream.encode(frame)
        else:
            with _one_cpu():
                packets = stream.encode(frame)
        container.mux(packets)
        self._position += len(samples)
        return self._sink.take()

    def finish(self) -> bytes:
        container, stream = self._opened()
        container.mux(stream.encode(None))
        container.close()
        return self._sink.take()

    def close(self) -> None:
        if self._output:
            self._output[0].close()
            self._output = None
            self._sink.take()

    def _opened(self) -> tuple[OutputContainer, AudioStream]:
        if self._output is None:
            raise ValueError("The encoder is closed.")
        return self._output


class _Sink:
    """What a container writes into. It cannot seek, so ffmpeg never returns to what was sent."""

    def __init__(self) -> None:
        self._data = bytearray()

    def write(self, data: bytes) -> int:
        self._data += data
        return len(data)

    def take(self) -> bytes:
        data = bytes(self._data)
        self._data.clear()
        return data


def _open_output(sink: _Sink, settings: FFmpegSettings) -> tuple[OutputContainer, AudioStream]:
    """Open codec and container; the container's header is in the sink afterwards."""
    options = {**COMMON_OPTIONS, **settings.container_options}
    container = av.open(sink, "w", format=settings.container, options=options)
    stream = container.add_stream(settings.codec, rate=SAMPLE_RATE, options=dict(settings.codec_options))
    assert isinstance(stream, AudioStream)
    context = stream.codec_context
    context.layout = "mono"
    context.format = settings.sample_format
    context.bit_rate = settings.bit_rate
    context.time_base = Fraction(1, SAMPLE_RATE)
    context.thread_count = 1
    context.flags |= Flags.bitexact
    container.start_encoding()
    return container, stream


def _to_int16(samples: Samples) -> NDArray[np.int16]:
    """Scale by 32768, as decoders divide: 16-bit sound that came as floats leaves bit for bit as it was."""
    scaled: NDArray[np.float32] = np.rint(samples * np.float32(32768))
    return np.clip(scaled, -32768, 32767).astype("<i2")


@contextmanager
def _one_cpu() -> Iterator[None]:
    """Let the calling thread see one CPU only while a codec takes its first frame.

    PyAV then puts a filter graph of its own in front of the codec, which starts about as many threads as its
    maker may use CPUs, never uses them, and has no setting for that: hundreds of idle threads on a large
    machine. Where affinity cannot be set (not Linux, a sandbox), they start and do no harm.
    """
    if sys.platform != "linux":
        yield
        return
    allowed = sorted(os.sched_getaffinity(0))
    _set_affinity([allowed[threading.get_native_id() % len(allowed)]])
    try:
        yield
    finally:
        _set_affinity(allowed)


def _set_affinity(cpus: list[int]) -> None:
    with suppress(OSError):
        os.sched_setaffinity(0, cpus)
