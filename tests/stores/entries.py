"""Entries of the speech cache for its tests: putting, getting, ageing, and the names on the disk."""

from __future__ import annotations

import os
import time
from pathlib import Path

from api.src.stores.cache import EntryMeta, SpeechCache, cache_key

MIB = 1 << 20
KEY = cache_key({"text": "hello"})
SECOND_NS = 10**9


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
    return root / "audio" / "speech" / f"{key}.json"


def audio_path(root: Path, key: str = KEY) -> Path:
    return root / "audio" / "speech" / f"{key}.mp3"


def used_at(root: Path, key: str, seconds: int) -> None:
    path = record_path(root, key)
    os.utime(path, ns=(seconds * SECOND_NS, path.stat().st_mtime_ns))


def settle(root: Path, key: str = KEY) -> None:
    """Make the files look old enough to be remembered as verified."""
    for path in (record_path(root, key), audio_path(root, key)):
        os.utime(path, ns=(time.time_ns(), path.stat().st_mtime_ns - SECOND_NS))
