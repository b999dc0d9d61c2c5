"""What a listener listens to, and what is spoken: the words that generations and listeners share.

Owns replays of finished cache entries; a run of the backend is generation.py's.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Protocol

from ..domain import Segment, SpeechRequest, Voice
from ..stores.cache import StoredEntry
from .recording import Mark
from .threads import Threads

READ_SIZE = 64 * 1024
"""Bytes handed to a listener at once, at most."""


@dataclass(frozen=True, slots=True)
class Script:
    """A request with every name resolved and its text segmented: all that a backend needs.

    `asked_model` is the model as the client named it; `key` the cache key, None where nothing may be stored.
    """

    request: SpeechRequest
    asked_model: str
    voice: Voice
    segments: tuple[Segment, ...]
    key: str | None


class Source(Protocol):
    """Encoded bytes that may still be growing."""

    @property
    def marks(self) -> Sequence[Mark]: ...

    @property
    def audio_ms(self) -> int: ...

    @property
    def frames(self) -> int:
        """Codec frames of what the backend has made so far, before `speed` and encoder."""
        ...

    @property
    def length(self) -> int | None:
        """Bytes of the whole, where they are known from the start."""
        ...

    @property
    def in_memory(self) -> bool:
        """Whether one `read` gives the whole, without a wait."""
        ...

    @property
    def spoken_for(self) -> str | None:
        """The request in whose log the run is; None where there was none."""
        ...

    def attach(self) -> None: ...

    def detach(self) -> None: ...

    async def sounding(self) -> None:
        """Start if need be, and wait until there is sound; raise what went wrong before it."""
        ...

    async def read(self, offset: int) -> tuple[bytes, bool]:
        """Wait for bytes from `offset` on; return them and whether they are the last."""
        ...


class Replay:
    """A finished cache entry, for one listener."""

    def __init__(self, entry: StoredEntry, threads: Threads) -> None:
        self._entry = entry
        self._threads = threads
        self.marks = entry.meta.marks
        self.audio_ms = entry.meta.audio_ms
        self.frames = entry.meta.frames
        self.length = entry.length
        self.in_memory = entry.data is not None
        self.spoken_for = None

    def attach(self) -> None:
        """The entry was opened for its one listener."""

    def detach(self) -> None:
        self._entry.close()

    async def sounding(self) -> None:
        """All of it is there."""

    async def read(self, offset: int) -> tuple[bytes, bool]:
        if self._entry.data is not None:
            return self._entry.data[offset:], True
        data = await self._threads.run(partial(self._entry.read, offset, READ_SIZE))
        return data, offset + len(data) >= self._entry.length
