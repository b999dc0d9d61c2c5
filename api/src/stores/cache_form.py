"""The forms in which an entry of the speech cache lies on the disk: as it is, or in frames that may be sealed.

Owns the names of files and the bytes in them, seen from the key and the audio. Which entries exist is decided
in cache.py; how files appear and vanish, in cache_files.py.
"""

from __future__ import annotations

import hashlib
from typing import Protocol

from ..domain import AudioFormat
from .cache_files import FRAMES, PLAIN_RECORD, SEALED_RECORD, Descriptor, TempFile
from .frames import FRAME_BYTES, BrokenFrames, Cipher, FrameReader, FrameWriter, Source, encode_frames

_PACKED_FORMATS = ("wav", "pcm")
"""The others are compressed already."""

_AT_ONCE_BYTES = FRAME_BYTES + 256
"""Files up to this size, one frame, are read in one go."""


class Memory:
    """A whole entry in memory."""

    def __init__(self, data: bytes) -> None:
        self.data = data

    def read(self, offset: int, size: int) -> bytes:
        return self.data[offset : offset + size]

    def close(self) -> None:
        """Nothing to give back."""


class Body(Protocol):
    """The audio of an entry on its way to the disk. One thread writes, any number read."""

    def write(self, data: bytes | bytearray | memoryview) -> None:
        """Append `data`, or nothing of it and OSError: then nothing more may be written."""
        ...

    def open(self) -> Source: ...

    def finish(self) -> int:
        """Put all of it into the file; returns the length of the file."""
        ...


class Audio(Source, Protocol):
    """The audio of a finished entry."""

    @property
    def length(self) -> int: ...


class Form(Protocol):
    """How entries are named, written and read. What cannot be read is BrokenFrames, an OSError that says so."""

    @property
    def sealed(self) -> bool:
        """Whether names and files tell nothing of what is in them."""
        ...

    def name(self, key: str) -> str:
        """64 hex digits; two forms have no name in common."""
        ...

    def suffixes(self, ext: AudioFormat) -> tuple[str, str]:
        """Of the audio and the record."""
        ...

    def body(self, file: TempFile, key: str, ext: AudioFormat) -> Body: ...

    def audio(self, file: Descriptor, size: int, key: str) -> Audio:
        """Owns `file`, which has `size` bytes, unless it raises."""
        ...

    def encode_record(self, record: bytes, key: str) -> bytes: ...

    def decode_record(self, stored: bytes, key: str) -> bytes: ...


class PlainForm:
    """The audio as a file that can be played, its record as JSON; the name is the key."""

    sealed = False

    def name(self, key: str) -> str:
        return key

    def suffixes(self, ext: AudioFormat) -> tuple[str, str]:
        return ext, PLAIN_RECORD

    def body(self, file: TempFile, key: str, ext: AudioFormat) -> Body:
        return _PlainBody(file)

    def audio(self, file: Descriptor, size: int, key: str) -> Audio:
        return _PlainAudio(file, size)

    def encode_record(self, record: bytes, key: str) -> bytes:
        return record

    def decode_record(self, stored: bytes, key: str) -> bytes:
        return stored


class _PlainBody:
    def __init__(self, file: TempFile) -> None:
        self._file = file
        self._length = 0

    def write(self, data: bytes | bytearray | memoryview) -> None:
        self._file.write(self._length, data)
        self._length += len(data)

    def open(self) -> Source:
        return self._file.duplicate()

    def finish(self) -> int:
        return self._length


class _PlainAudio:
    def __init__(self, file: Descriptor, size: int) -> None:
        self.length = size
        self.read = file.read
        self.close = file.close


class Ciphers(Protocol):
    """Names and ciphers under one secret: a sealed.SealingKey, or none."""

    @property
    def header_bytes(self) -> int: ...

    def name(self, plain: str) -> str: ...

    def new(self, context: str) -> Cipher: ...

    def existing(self, context: str, header: bytes) -> Cipher: ...


class FramedForm:
    """In frames, packed where asked for and worth it, sealed where there is a key. Unpacks whatever is packed."""

    def __init__(self, key: Ciphers | None = None, *, compress: bool = False) -> None:
        """Without `key` nothing is sealed."""
        self.sealed = key is not None
        self._ciphers: Ciphers = key or _NoCiphers()
        self._compress = compress

    def name(self, key: str) -> str:
        return self._ciphers.name(key)

    def suffixes(self, ext: AudioFormat) -> tuple[str, str]:
        return FRAMES, SEALED_RECORD if self.sealed else PLAIN_RECORD

    def body(self, file: TempFile, key: str, ext: AudioFormat) -> Body:
        cipher = self._ciphers.new(f"audio {key}")
        return FrameWriter(file, cipher, compress=self._compress and ext in _PACKED_FORMATS)

    def audio(self, file: Descriptor, size: int, key: str) -> Audio:
        if size > _AT_ONCE_BYTES:
            return self._reader(file, size, f"audio {key}")
        reader = self._reader(Memory(file.read(0, size)), size, f"audio {key}")
        file.close()
        return reader

    def encode_record(self, record: bytes, key: str) -> bytes:
        return encode_frames(self._ciphers.new(f"record {key}"), record) if self.sealed else record

    def decode_record(self, stored: bytes, key: str) -> bytes:
        if not self.sealed:
            return stored
        reader = self._reader(Memory(stored), len(stored), f"record {key}")
        return reader.read(0, reader.length)

    def _reader(self, file: Source, size: int, context: str) -> FrameReader:
        header = file.read(0, self._ciphers.header_bytes)
        return FrameReader(file, size, self._ciphers.existing(context, header))


class _NoCiphers:
    """Frames as they are; that they belong together is for the record's checksum to say."""

    header = b"TTSFRAM1"
    header_bytes = len(header)

    def name(self, plain: str) -> str:
        # Not the plain form's name: a pair that is half of one form and half of the other must not arise.
        return hashlib.sha256(f"frames {plain}".encode()).hexdigest()

    def new(self, context: str) -> Cipher:
        return self

    def existing(self, context: str, header: bytes) -> Cipher:
        if header != self.header:
            raise BrokenFrames("not a file of frames")
        return self

    def seal(self, index: int, last: bool, data: bytes) -> bytes:
        return data

    def open(self, index: int, last: bool, data: bytes) -> bytes:
        return data
