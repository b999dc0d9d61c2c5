"""A remote server's bytes as sound, or as a fault: what is believed of an answer, and what is not.

Owns the judgement of one answer: its type, its sample rate, and whether what came is a whole sound. Whether all bytes
came is the connection's to say (a body with a length or in chunks has an end of its own; others are not taken).
"""

from __future__ import annotations

from collections.abc import Mapping
from email.message import Message

import numpy as np

from ..domain import AudioChunk, Segment
from .remote_faults import invalid

TYPES = ("audio/pcm", "audio/x-pcm", "audio/raw", "application/octet-stream")
"""How servers call headerless 16-bit little-endian mono. Not audio/L16, which is big-endian by its definition."""

OTHER_FILES = (b"RIFF", b"OggS", b"fLaC", b"ID3", b"<htm", b"<HTM", b"<!do", b"<!DO", b'{"', b"data:", b"event:")
"""How answers begin that are no pcm, whatever they call themselves."""

HEAD = max(map(len, OTHER_FILES))

SAMPLE_RATES = range(8_000, 192_001)

SLOWEST = 1.0
"""Seconds that a character may take, an ideograph or a digit included; beyond them an answer does not end."""

FASTEST = 60
"""Characters a second, four times what people speak: an answer that is faster cannot be the whole text."""

LEAST_SECONDS = 10.0
"""What any text may take."""


class Sound:
    """The sound of one segment as it comes. `sample_rate` is the one to assume where the answer says none."""

    def __init__(self, headers: Mapping[str, str], sample_rate: int, segment: Segment) -> None:
        """Raises Fault if the headers promise no pcm, or none with an end."""
        media_type, parameters = _media_type(headers.get("content-type", ""))
        if media_type not in TYPES:
            raise invalid("is not of type audio/pcm")
        if headers.get("content-encoding", "identity").lower() != "identity":
            raise invalid("is compressed")
        if "content-length" not in headers and "chunked" not in headers.get("transfer-encoding", "").lower():
            raise invalid("has no end of its own, so that a lost connection would look like one")
        if parameters.get("channels", "1") != "1":
            raise invalid("is not mono")
        self._rate = _rate(parameters.get("rate") or headers.get("x-sample-rate"), sample_rate)
        self._segment = segment
        self._most = int(max(LEAST_SECONDS, SLOWEST * len(segment.text)) * self._rate) * 2
        self._pending = bytearray()
        self._head = b""
        self._received = 0
        self._audible = False

    def take(self, data: bytes) -> AudioChunk | None:
        """What can be heard by now; None while there is nothing but silence. Raises Fault."""
        self._received += len(data)
        if self._received > self._most:
            raise invalid("is longer than any speech of its text")
        self._head += data[: HEAD - len(self._head)]
        if self._head.startswith(OTHER_FILES):
            raise invalid("is not pcm")
        self._pending += data
        self._audible = self._audible or data.count(0) < len(data)
        if not self._audible:
            return None
        whole = len(self._pending) & ~1
        samples = np.frombuffer(bytes(self._pending[:whole]), "<i2").astype(np.float32) / np.float32(32768)
        del self._pending[:whole]
        return AudioChunk(samples, self._rate, self._segment) if len(samples) else None

    def finish(self) -> None:
        """All bytes have come. Raises Fault unless they are a whole sound."""
        if not self._received:
            raise invalid("is empty")
        if self._received % 2:
            raise invalid("ends in the middle of a sample")
        if not self._audible:
            raise invalid("is silence")
        if self._received / 2 / self._rate * FASTEST < len(self._segment.text):
            raise invalid("is too short for its text")


def _media_type(value: str) -> tuple[str, dict[str, str]]:
    message = Message()
    message["content-type"] = value.replace("\n", " ").replace("\r", " ")
    return message.get_content_type() if value else "", {
        name.lower(): text for name, text in message.get_params(failobj=[])[1:]
    }


def _rate(said: str | None, assumed: int) -> int:
    if said is None:
        return assumed
    if not (said.isascii() and said.isdigit() and int(said[:9]) in SAMPLE_RATES):
        raise invalid("has no sample rate that could be")
    return int(said)
