"""The words of the speech cache: the key of an entry and the JSON record that lies beside its audio.

Owns the exact form of both. Knows no files: what cannot be read exactly is simply no record.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from itertools import pairwise
from typing import Any, NoReturn, cast, get_args

from ..domain import SAMPLE_RATE, AudioFormat

FORMATS: tuple[AudioFormat, ...] = get_args(AudioFormat)

MAX_RECORD_BYTES = 1 << 20
"""No record is longer: ours take some hundred bytes, and about 15 for each segment of the text."""

_VERSION = 2
"""Version 1 did not say how many frames there were: its entries are spoken anew."""
_FIELDS = {"version", "key", "format", "length", "sha256"}
_META_FIELDS = {"model", "voice", "audio_samples", "frames", "text_digest", "marks", "created"}
_DIGEST = re.compile("[0-9a-f]{64}")
_MAX_NAME = 512
_MAX_COUNT = 1 << 53


@dataclass(frozen=True, slots=True)
class EntryMeta:
    """What the service says of an entry.

    `audio_samples` counts samples at domain.SAMPLE_RATE, `frames` the codec frames that the backend made for
    them. `text_digest` is 64 hex digits that stand for the text. `marks` are pairs (byte offset in the encoded
    stream at which a segment's sound begins, characters of the text that are covered once the segment has been
    sent); neither ever falls. `created` is Unix time in seconds.
    """

    model: str
    voice: str
    audio_samples: int
    frames: int
    text_digest: str
    marks: tuple[tuple[int, int], ...] = ()
    created: float = field(default_factory=time.time)

    @property
    def audio_ms(self) -> int:
        return round(self.audio_samples * 1000 / SAMPLE_RATE)


@dataclass(frozen=True, slots=True)
class CacheRecord:
    """The JSON beside the audio: whose it is, and the length in bytes and SHA-256 that the audio has."""

    key: str
    format: AudioFormat
    length: int
    sha256: str
    meta: EntryMeta


def cache_key(fields: Mapping[str, object]) -> str:
    """64 hex digits that stand for `fields`, whatever their order.

    Values are str, int, float, bool, None, and lists and mappings of these. Types count: 1, 1.0, "1" and True
    are four different values (-0.0 is 0.0, a tuple is a list). Raises TypeError for anything else, ValueError
    for NaN and infinity.
    """
    canonical = json.dumps(_plain(fields), sort_keys=True, allow_nan=False, separators=(",", ":"))
    return hashlib.sha256(canonical.encode("ascii")).hexdigest()


def is_key(text: str) -> bool:
    """Whether `text` has the form of a key, and so is safe in a file name."""
    return _DIGEST.fullmatch(text) is not None


def _plain(value: object) -> object:
    if isinstance(value, Mapping):
        # json.dumps would write the keys 1 and "1" alike.
        if not all(type(name) is str for name in value):
            raise TypeError("the names of a cache key's fields are strings")
        return {name: _plain(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return value + 0.0 if isinstance(value, float) else value


def encode_record(record: CacheRecord) -> bytes:
    """The record as JSON. Raises ValueError for one that `parse_record` would not give back."""
    fields = asdict(record)
    fields |= fields.pop("meta") | {"version": _VERSION}
    data = json.dumps(fields, allow_nan=False).encode("ascii")
    if len(data) > MAX_RECORD_BYTES or parse_record(data) != record:
        raise ValueError("the description does not fit the entry")
    return data


def parse_record(data: bytes) -> CacheRecord | None:
    """The record in `data`, or None if it is not exactly one of this version."""
    try:
        return _record(json.loads(data, parse_constant=_refuse))
    except (ValueError, RecursionError):
        return None


def _record(document: Any) -> CacheRecord:
    _require(type(document) is dict and document.keys() == _FIELDS | _META_FIELDS)
    _require(_count(document["version"]) == _VERSION)
    length = _count(document["length"])
    _require(type(document["format"]) is str and document["format"] in FORMATS)
    return CacheRecord(
        key=_digest(document["key"]),
        format=cast(AudioFormat, document["format"]),
        length=length,
        sha256=_digest(document["sha256"]),
        meta=EntryMeta(
            model=_name(document["model"]),
            voice=_name(document["voice"]),
            audio_samples=_count(document["audio_samples"]),
            frames=_count(document["frames"]),
            text_digest=_digest(document["text_digest"]),
            marks=_marks(document["marks"], length),
            created=_instant(document["created"]),
        ),
    )


def _marks(value: Any, length: int) -> tuple[tuple[int, int], ...]:
    _require(type(value) is list and all(type(mark) is list and len(mark) == 2 for mark in value))
    marks = tuple((_count(offset), _count(characters)) for offset, characters in value)
    for earlier, later in pairwise(marks):
        _require(earlier[0] <= later[0] and earlier[1] <= later[1])
    _require(not marks or marks[-1][0] <= length)
    return marks


def _count(value: Any) -> int:
    _require(type(value) is int and 0 <= value < _MAX_COUNT)
    return cast(int, value)


def _instant(value: Any) -> float:
    _require(type(value) in (int, float) and 0 <= value < _MAX_COUNT and math.isfinite(value))
    return cast(float, value)


def _digest(value: Any) -> str:
    _require(type(value) is str and _DIGEST.fullmatch(value) is not None)
    return cast(str, value)


def _name(value: Any) -> str:
    _require(type(value) is str and 0 < len(value) <= _MAX_NAME)
    value.encode()  # a lone surrogate is a ValueError
    return cast(str, value)


def _require(fits: bool) -> None:
    if not fits:
        raise ValueError("not a record of the cache")


def _refuse(constant: str) -> NoReturn:
    raise ValueError(f"{constant} is not JSON")
