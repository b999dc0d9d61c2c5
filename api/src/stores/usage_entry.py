"""A usage event as it stands in the stream: one field that holds JSON. Owns that form; knows no Redis.

Fields that this version does not know are left alone, so that servers of different versions may share a stream.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from typing import Any

from ..domain import UsageEvent

FIELD = b"event"

_TEXTS = ("request_id", "account", "model", "voice", "outcome")
_COUNTS = ("characters", "audio_ms", "price_micros")
_MAX_COUNT = 2**63 - 1
_JSON = json.JSONEncoder(separators=(",", ":"))


class Unreadable(Exception):
    """An entry that is no usage event of ours."""


def pack(event: UsageEvent) -> bytes:
    """The event as JSON."""
    content: dict[str, object] = {
        "request_id": event.request_id,
        "account": event.account,
        "model": event.model,
        "voice": event.voice,
        "characters": event.characters,
        "audio_ms": event.audio_ms,
        "outcome": event.outcome,
        "price_micros": event.price_micros,
        "at": event.at,
    }
    if event.user:
        content["user"] = event.user
    return _JSON.encode(content).encode()


def unpack(fields: Mapping[bytes, bytes]) -> UsageEvent:
    """The event of an entry's fields. Raises Unreadable for all that no database would take, or not as it stands."""
    try:
        content = json.loads(fields[FIELD])
        texts = {name: _text(content[name]) for name in _TEXTS}
        counts = {name: _count(content[name]) for name in _COUNTS}
        event = UsageEvent(**texts, **counts, at=_time(content["at"]), user=_text(content.get("user", "")))  # type: ignore[arg-type]
    except (KeyError, TypeError, ValueError, OverflowError, RecursionError) as error:
        raise Unreadable(f"{type(error).__name__}: {error}") from error
    if event.price_micros:
        raise Unreadable("it costs something, which needs a hold")
    return event


def _text(value: Any) -> str:
    if not isinstance(value, str) or "\0" in value:
        raise ValueError("a text is expected")
    value.encode()  # raises for unpaired surrogates
    return value


def _count(value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value <= _MAX_COUNT:
        raise ValueError("a whole number is expected")
    return value


def _time(value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise ValueError("a time is expected")
    return float(value)
