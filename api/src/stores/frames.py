"""Files made of frames: written piece by piece, read at any offset, also while they are written.

    header | length (4 bytes, big endian) | frame | length | frame | ...

Each frame but the last holds FRAME_BYTES of content; the last holds at least one byte, unless the whole is
empty. So a file has one form only for its content. Owns that form and the content that is not on the disk
yet. What a frame looks like there is a cipher's affair (sealed.py) and the packing's (packing.py).
"""

from __future__ import annotations

import threading
from typing import Protocol

from .packing import pack, unpack

FRAME_BYTES = 64 * 1024
"""What a listener is handed at once: a read of a finished entry opens one frame."""

_PREFIX_BYTES = 4
_MAX_STORED_BYTES = FRAME_BYTES + 64
"""No frame takes more on the disk: the packing adds a byte, a cipher its tag."""


class BrokenFrames(OSError):
    """Not what was written: damaged, cut, put together of several files, or sealed under another key."""


class Source(Protocol):
    """Where a reader's bytes come from. Any thread may read; ValueError once closed."""

    def read(self, offset: int, size: int) -> bytes: ...

    def close(self) -> None: ...


class Target(Protocol):
    """A file that grows; `duplicate` reads it, whatever becomes of its name."""

    def write(self, offset: int, data: bytes | bytearray | memoryview) -> None: ...

    def duplicate(self) -> Source: ...


class Cipher(Protocol):
    """What is done to the frames of one file. `header` stands at its beginning."""

    @property
    def header(self) -> bytes: ...

    def seal(self, index: int, last: bool, data: bytes) -> bytes: ...

    def open(self, index: int, last: bool, data: bytes) -> bytes:
        """What was sealed. Raises BrokenFrames if this is not frame `index` of this file."""
        ...


class FrameWriter:
    """Content on its way into a file. One thread writes; what is written is readable at once.

    The last frame stays in memory, also after `finish`: nobody knows before that it is the last.
    """

    def __init__(self, file: Target, cipher: Cipher, *, compress: bool) -> None:
        self._file = file
        self._cipher = cipher
        self._compress = compress
        self._offsets = [len(cipher.header)]
        self._tail = bytearray()
        self._lock = threading.Lock()

    def write(self, data: bytes | bytearray | memoryview) -> None:
        """Append `data`. On an OSError nothing of it counts, and nothing may be written any more."""
        with self._lock:
            length = self._flushed + len(self._tail)
            self._tail += data
        try:
            while len(self._tail) > FRAME_BYTES:
                self._flush()
        except BaseException:
            with self._lock:
                del self._tail[max(0, length - self._flushed) :]
            raise

    def finish(self) -> int:
        """Write the last frame; returns the length of the file."""
        return self._put(bytes(self._tail), last=True)

    def open(self) -> Source:
        """What is written and will be. The caller knows how much that is."""
        return _GrowingReader(self, self._file.duplicate())

    def frame(self, index: int, file: Source) -> bytes:
        """The content of frame `index` as far as it is written, from memory or `file`."""
        with self._lock:
            waiting = index - len(self._offsets) + 1
            if waiting >= 0:
                return bytes(self._tail[waiting * FRAME_BYTES : (waiting + 1) * FRAME_BYTES])
            span = self._offsets[index], self._offsets[index + 1]
        return _read_frame(file, span, self._cipher, index, last=False)

    @property
    def _flushed(self) -> int:
        return (len(self._offsets) - 1) * FRAME_BYTES

    def _flush(self) -> None:
        end = self._put(bytes(self._tail[:FRAME_BYTES]), last=False)
        with self._lock:  # from here on readers take it from the file
            self._offsets.append(end)
            del self._tail[:FRAME_BYTES]

    def _put(self, data: bytes, *, last: bool) -> int:
        index, offset = len(self._offsets) - 1, self._offsets[-1]
        stored = _stored_frame(self._cipher, index, last, data, self._compress)
        if index == 0:
            stored, offset = self._cipher.header + stored, 0
        self._file.write(offset, stored)
        return offset + len(stored)


class _FrameSource:
    """Reads across frames, and keeps the one read last: readers ask for less than a frame, one after another."""

    def __init__(self, file: Source) -> None:
        self._file = file
        self._kept: tuple[int, bytes] = (-1, b"")
        self._closed = False

    def read(self, offset: int, size: int) -> bytes:
        """At most `size` bytes from `offset`, fewer only at the end. Raises BrokenFrames."""
        if self._closed:
            raise ValueError("the entry is closed")
        pieces = []
        while size > 0:
            index, start = divmod(offset, FRAME_BYTES)
            piece = self._frame(index)[start : start + size]
            if not piece:
                break
            pieces.append(piece)
            offset, size = offset + len(piece), size - len(piece)
        return pieces[0] if len(pieces) == 1 else b"".join(pieces)

    def close(self) -> None:
        self._closed = True
        self._file.close()

    def _frame(self, index: int) -> bytes:
        kept, data = self._kept
        if kept != index:
            data = self._load(index)
            if len(data) == FRAME_BYTES:  # a shorter one may still grow
                self._kept = index, data
        return data

    def _load(self, index: int) -> bytes:
        raise NotImplementedError


class _GrowingReader(_FrameSource):
    def __init__(self, writer: FrameWriter, file: Source) -> None:
        super().__init__(file)
        self._writer = writer

    def _load(self, index: int) -> bytes:
        return self._writer.frame(index, self._file)


class FrameReader(_FrameSource):
    """The content of a finished file; `length` is known, and that the file has its beginning and its end."""

    def __init__(self, file: Source, size: int, cipher: Cipher) -> None:
        """`size` bytes of `file`, which this owns once it is made. Raises BrokenFrames."""
        super().__init__(file)
        self._cipher = cipher
        self._offsets = _walk(file, len(cipher.header), size)
        self._last = len(self._offsets) - 2
        self._tail = self._read(self._last, last=True)
        self.length = self._last * FRAME_BYTES + len(self._tail)

    def _load(self, index: int) -> bytes:
        if index >= self._last:
            return self._tail if index == self._last else b""
        return self._read(index, last=False)

    def _read(self, index: int, *, last: bool) -> bytes:
        span = self._offsets[index], self._offsets[index + 1]
        return _read_frame(self._file, span, self._cipher, index, last=last)


def encode_frames(cipher: Cipher, data: bytes) -> bytes:
    """The whole file that holds `data`, which is small."""
    starts = range(0, max(1, len(data)), FRAME_BYTES)
    frames = (
        _stored_frame(cipher, index, start == starts[-1], data[start : start + FRAME_BYTES], compress=False)
        for index, start in enumerate(starts)
    )
    return cipher.header + b"".join(frames)


def _stored_frame(cipher: Cipher, index: int, last: bool, data: bytes, compress: bool) -> bytes:
    frame = cipher.seal(index, last, pack(data, compress=compress))
    return len(frame).to_bytes(_PREFIX_BYTES) + frame


def _read_frame(file: Source, span: tuple[int, int], cipher: Cipher, index: int, *, last: bool) -> bytes:
    start, end = span
    frame = file.read(start + _PREFIX_BYTES, end - start - _PREFIX_BYTES)
    try:
        data = unpack(cipher.open(index, last, frame), FRAME_BYTES)
    except ValueError as error:
        raise BrokenFrames(str(error)) from None
    if len(data) != FRAME_BYTES and not (last and len(data) < FRAME_BYTES and (data or index == 0)):
        raise BrokenFrames("a frame has not the length that it must have")
    return data


def _walk(file: Source, start: int, size: int) -> list[int]:
    """Where the frames begin, and where the last one ends. Raises BrokenFrames."""
    offsets = [start]
    while offsets[-1] < size:
        length = int.from_bytes(file.read(offsets[-1], _PREFIX_BYTES))
        if not 0 < length <= _MAX_STORED_BYTES:
            raise BrokenFrames("no frame is as long as this one says it is")
        offsets.append(offsets[-1] + _PREFIX_BYTES + length)
    if offsets[-1] != size or len(offsets) < 2:
        raise BrokenFrames("the file does not end with a frame")
    return offsets
