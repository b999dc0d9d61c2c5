"""Entries of the speech cache for its tests: putting, getting, ageing, and the names on the disk.

All of it works on caches of one kind at a time, which `using` sets.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from api.src.stores.cache import EntryMeta, SpeechCache, cache_key
from api.src.stores.cache_form import Form, FramedForm, PlainForm
from api.src.stores.sealed import SealingKey

MIB = 1 << 20
KEY = cache_key({"text": "hello"})
SECOND_NS = 10**9

KINDS: dict[str, Sequence[Form]] = {
    "plain": [PlainForm()],
    "packed": [FramedForm(compress=True), PlainForm()],
    "sealed": [FramedForm(SealingKey(b"n" * 32), compress=True), FramedForm(SealingKey(b"o" * 32))],
}

_kind = ["plain"]


@contextmanager
def using(kind: str) -> Iterator[None]:
    """The kind of the caches that the functions below are about."""
    _kind.append(kind)
    yield
    _kind.pop()


def forms() -> Sequence[Form]:
    return KINDS[_kind[-1]]


def open_cache(root: Path, max_bytes: int) -> SpeechCache:
    return SpeechCache(root, max_bytes, forms())


def meta(length: int = 0, voice: str = "alloy") -> EntryMeta:
    return EntryMeta("tts-1", voice, 48_000, 25, "ab" * 32, ((0, 3), (length, 7)), created=1.5)


def put(cache: SpeechCache, key: str, data: bytes, voice: str = "alloy") -> None:
    with cache.writer(key, "mp3") as writer:
        writer.write(data)
        writer.commit(meta(len(data), voice))


def get(cache: SpeechCache, key: str) -> bytes | None:
    entry = cache.find(key, "mp3")
    if entry is None:
        return None
    with entry:
        return entry.read(0, entry.length)


def names(root: Path) -> set[str]:
    return {path.name for path in (root / "audio" / "speech").iterdir() if path.name != ".locks"}


def record_path(root: Path, key: str = KEY) -> Path:
    return root / "audio" / "speech" / f"{forms()[0].name(key)}.{forms()[0].suffixes('mp3')[1]}"


def audio_path(root: Path, key: str = KEY) -> Path:
    return root / "audio" / "speech" / f"{forms()[0].name(key)}.{forms()[0].suffixes('mp3')[0]}"


def lock_path(root: Path, key: str = KEY) -> Path:
    return root / "audio" / "speech" / ".locks" / forms()[0].name(key)[:2]


def read_record(root: Path) -> bytes:
    """The JSON of KEY's record. OSError if it cannot be had."""
    return forms()[0].decode_record(record_path(root).read_bytes(), KEY)


def write_record(root: Path, document: bytes) -> None:
    """Put `document` in the place of KEY's record, as the holder of the key could."""
    record_path(root).write_bytes(forms()[0].encode_record(document, KEY))


def used_at(root: Path, key: str, seconds: int) -> None:
    path = record_path(root, key)
    os.utime(path, ns=(seconds * SECOND_NS, path.stat().st_mtime_ns))


def settle(root: Path, key: str = KEY) -> None:
    """Make the files look old enough to be remembered as verified."""
    for path in (record_path(root, key), audio_path(root, key)):
        os.utime(path, ns=(time.time_ns(), path.stat().st_mtime_ns - SECOND_NS))
