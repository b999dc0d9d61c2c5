"""Where sound begins in an encoded body: behind the container's headers, which can be sent before any is made."""

from __future__ import annotations

from collections.abc import Callable, Mapping


def sound_offset(audio_format: str, body: bytes) -> int:
    """Offset in `body` of the first byte of sound; 0 for formats without a header."""
    return _OFFSETS.get(audio_format, _no_header)(body)


def _no_header(body: bytes) -> int:
    return 0


def _wav(body: bytes) -> int:
    return body.index(b"data") + 8


def _ogg(body: bytes) -> int:
    """Header pages have a granule position of 0."""
    offset = 0
    while body[offset + 6 : offset + 14] == bytes(8):
        segments = body[offset + 26]
        offset += 27 + segments + sum(body[offset + 27 : offset + 27 + segments])
    return offset


def _flac(body: bytes) -> int:
    """Metadata blocks: the last one has the top bit set."""
    offset, last = 4, False
    while not last:
        last = bool(body[offset] & 0x80)
        offset += 4 + int.from_bytes(body[offset + 1 : offset + 4])
    return offset


_OFFSETS: Mapping[str, Callable[[bytes], int]] = {"wav": _wav, "opus": _ogg, "ogg": _ogg, "flac": _flac}
