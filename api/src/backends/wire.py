"""Messages between the server and its worker processes: a JSON header and a binary payload.

Owns the bytes on the pipe and nothing else: who starts a worker and what is asked of it is not known here. A
message is two big-endian 32-bit lengths, the header as UTF-8 JSON, the payload.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Mapping
from typing import Any, BinaryIO, NamedTuple

LENGTHS = struct.Struct("!II")


class Message(NamedTuple):
    header: dict[str, Any]
    payload: bytes = b""


def pack(header: Mapping[str, object], payload: bytes = b"") -> bytes:
    """The message as one string of bytes."""
    text = json.dumps(header).encode()
    return LENGTHS.pack(len(text), len(payload)) + text + payload


def unpack(header: bytes, payload: bytes) -> Message:
    """The message from its two parts, as cut out by LENGTHS."""
    return Message(json.loads(header), payload)


def read(stream: BinaryIO) -> Message | None:
    """Wait for the next message of a blocking stream; None when the other side has closed it."""
    lengths = stream.read(LENGTHS.size)
    if len(lengths) < LENGTHS.size:
        return None
    header_length, payload_length = LENGTHS.unpack(lengths)
    body = stream.read(header_length + payload_length)
    if len(body) < header_length + payload_length:
        return None
    return unpack(body[:header_length], body[header_length:])
