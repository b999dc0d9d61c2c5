"""Sound into bytes into a sink, with the marks that tell how much of the text has been heard.

Everything here blocks and runs in threads, one call at a time. Knows nothing of requests or listeners.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from ..audio.encoders import Encoder
from ..domain import SAMPLE_RATE, AudioChunk

Mark = tuple[int, int]
"""(offset in the encoded stream at which a segment's sound begins, characters of text covered by its end)."""


class Sink(Protocol):
    """Where encoded bytes go."""

    def write(self, data: bytes) -> None: ...


class Relay:
    """A sink in memory for the single listener of a generation that is not stored.

    Holds only what the listener has not taken; the generation pauses while `buffered` is high.
    """

    def __init__(self) -> None:
        self._start = 0
        self._pending = bytearray()

    @property
    def buffered(self) -> int:
        return len(self._pending)

    def write(self, data: bytes) -> None:
        self._pending += data

    def read(self, offset: int, size: int) -> bytes:
        """Return bytes from `offset` on; everything before it is forgotten."""
        del self._pending[: offset - self._start]
        self._start = offset
        return bytes(self._pending[:size])

    def close(self) -> None:
        """Nothing to give back: what is pending may still be read."""


class Recording:
    """One encoder that writes into one sink. The container's header leaves together with the first sound."""

    def __init__(self, encoder: Encoder, sink: Sink) -> None:
        self._encoder = encoder
        self._sink = sink
        self._marks: list[Mark] = []
        self.length = 0

    @property
    def marks(self) -> Sequence[Mark]:
        return self._marks

    @property
    def samples(self) -> int:
        """Samples of sound so far, at SAMPLE_RATE."""
        return self._encoder.samples

    @property
    def audio_ms(self) -> int:
        return round(self.samples * 1000 / SAMPLE_RATE)

    def take(self, chunk: AudioChunk) -> None:
        self._write(self._encoder.encode(chunk), chunk.segment.end)

    def finish(self, characters: int) -> None:
        """Drain the encoder; `characters` is the length of the whole text."""
        self._write(self._encoder.finish(), characters)

    def _write(self, sound: bytes, characters: int) -> None:
        if not sound:
            return
        if not self.length:
            sound = self._encoder.header + sound
        if not self._marks or self._marks[-1][1] < characters:
            self._marks.append((self.length, characters))
        self._sink.write(sound)
        self.length += len(sound)


def characters_heard(marks: Sequence[Mark], sent: int) -> int:
    """Characters of the segments whose sound has begun within the first `sent` bytes."""
    return max((characters for offset, characters in marks if offset < sent), default=0)
