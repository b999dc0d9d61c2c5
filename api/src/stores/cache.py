"""The speech cache: finished responses on disk, shared by all processes that use one folder.

Owns which entries exist: what may be believed (`find`) and what is evicted. How files appear and vanish
safely is cache_files.py, how entries are read and written cache_entry.py, what is written about them
cache_record.py. Counts no hits and knows no requests.

All calls block and may come from any thread.
"""

from __future__ import annotations

import hashlib
import logging
import os
import threading
import time
from collections import OrderedDict
from dataclasses import dataclass
from pathlib import Path

from ..domain import AudioFormat
from .cache_entry import CacheWriter, EntryReader, Memory, Source, StoredEntry
from .cache_files import CacheFolder, Descriptor
from .cache_record import MAX_RECORD_BYTES, CacheRecord, EntryMeta, cache_key, is_key, parse_record

__all__ = ["CacheWriter", "EntryMeta", "EntryReader", "SpeechCache", "StoredEntry", "cache_key"]

_log = logging.getLogger(__name__)

_SMALL_BYTES = 256 * 1024
_BLOCK_BYTES = 1 << 20
_MEMO_ENTRIES = 4096
_TOUCH_AFTER_NS = 1_000_000_000
"""Uses closer together than this count as one: a hit need not write to the disk each time."""
_SETTLED_NS = 100_000_000
"""Longer than the tick of any file system's clock (10 ms at most on Linux)."""

_Signature = tuple[int, int, int]


class _Misfit(Exception):
    """A record and its audio do not belong together, or one of them is broken."""


@dataclass(frozen=True, slots=True)
class _Verified:
    """An entry whose checksum this process has compared, and how its files looked then."""

    record: CacheRecord
    record_signature: _Signature
    audio_signature: _Signature


class _Memo:
    """What was verified, so that it need not be again; the least recently used is forgotten first."""

    def __init__(self) -> None:
        self._known: OrderedDict[str, _Verified] = OrderedDict()
        self._lock = threading.Lock()

    def get(self, key: str) -> _Verified | None:
        with self._lock:
            if key in self._known:
                self._known.move_to_end(key)
            return self._known.get(key)

    def put(self, key: str, known: _Verified) -> None:
        with self._lock:
            self._known[key] = known
            self._known.move_to_end(key)
            if len(self._known) > _MEMO_ENTRIES:
                self._known.popitem(last=False)

    def drop(self, key: str) -> None:
        with self._lock:
            self._known.pop(key, None)


class SpeechCache:
    """A folder of verified entries, bounded to `max_bytes` of stored files, least recently used first.

    Each process counts what it adds, and looks at the folder when its count passes the bound or it has added
    a sixteenth of it since it last looked. So P processes exceed the bound by at most P sixteenths and what
    each is just storing, one process alone by the latter only. Temp files, and entries whose locks are busy
    while room is made, come on top.
    """

    def __init__(self, root: Path, max_bytes: int) -> None:
        """Make the folders under `root`, for the owner alone."""
        self._folder = CacheFolder(root)
        self._max_bytes = max_bytes
        self._slack = max_bytes // 16
        self._memo = _Memo()
        self._counting = threading.Lock()
        self._stored = 0
        self._unseen = 0

    @property
    def stored_bytes(self) -> int:
        """Bytes of the stored files, as far as this process knows."""
        return self._stored

    def sweep(self) -> None:
        """At start: remove what the dead have left, count what there is, evict what is over the bound."""
        self._folder.remove_dead_temps()
        for key, found in self._folder.scan().items():
            if not (found.has_record and found.has_audio):
                self._remove_half(key)
        with self._counting:
            self._evict()

    def writer(self, key: str, ext: AudioFormat) -> CacheWriter:
        """A new entry for `key`, to be entered, written and committed."""
        _require_key(key)
        return CacheWriter(self._folder, key, ext, max_bytes=self._max_bytes, committed=self._count)

    def find(self, key: str, ext: AudioFormat) -> StoredEntry | None:
        """The verified entry of `key`, to be closed, or None. What does not fit its record is removed."""
        _require_key(key)
        try:
            try:
                return self._look(key, ext)
            except _Misfit:
                return self._look_again(key, ext)
        except OSError as error:
            # Out of descriptors, an unreadable disk: no reason to fail a request that can be spoken anew.
            _log.warning("cache entry %s cannot be read: %s", key, error)
            return None

    def remove(self, key: str) -> None:
        """Forget `key`. Who has it open goes on reading."""
        _require_key(key)
        self._memo.drop(key)
        with self._folder.locked(key):
            size = self._folder.stored(key).size
            self._folder.discard(key)
        with self._counting:
            self._stored = max(0, self._stored - size)

    def _look_again(self, key: str, ext: AudioFormat) -> StoredEntry | None:
        """The entry after all, if a commit was under way; else its remains are removed."""
        self._memo.drop(key)
        with self._folder.locked(key):
            try:
                return self._look(key, ext)
            except _Misfit:
                self._folder.discard(key)
                return None

    def _look(self, key: str, ext: AudioFormat) -> StoredEntry | None:
        """The verified entry; None if there is no record of it. Raises _Misfit."""
        try:
            record_stat = os.stat(self._folder.record_path(key))
        except FileNotFoundError:
            return None
        known = self._memo.get(key)
        if known is not None and known.record_signature != _signature(record_stat):
            known = None
        record = known.record if known is not None else self._read_record(key)
        if record is None or (record.key, record.format) != (key, ext):
            raise _Misfit
        try:
            audio = _open(self._folder.audio_path(key, ext))
        except FileNotFoundError:
            raise _Misfit from None
        try:
            audio_stat = audio.stat()
            source = _read_small(audio, audio_stat.st_size)
            if known is None or known.audio_signature != _signature(audio_stat):
                _verify(source, audio_stat.st_size, record)
                self._remember(record, record_stat, audio_stat)
        except BaseException:
            audio.close()
            raise
        self._touch(key, record_stat)
        return StoredEntry(record.meta, record.length, source)

    def _read_record(self, key: str) -> CacheRecord | None:
        try:
            record = _open(self._folder.record_path(key))
        except FileNotFoundError:
            return None
        try:
            return parse_record(record.read(0, MAX_RECORD_BYTES + 1))
        finally:
            record.close()

    def _remember(self, record: CacheRecord, record_stat: os.stat_result, audio_stat: os.stat_result) -> None:
        # A file changed within the same tick of the clock looks unchanged: remember only what has settled.
        if time.time_ns() - max(record_stat.st_mtime_ns, audio_stat.st_mtime_ns) > _SETTLED_NS:
            self._memo.put(record.key, _Verified(record, _signature(record_stat), _signature(audio_stat)))

    def _touch(self, key: str, stat: os.stat_result) -> None:
        """Note the use in the record's access time; its other times are what the memo goes by."""
        now = time.time_ns()
        if abs(now - stat.st_atime_ns) > _TOUCH_AFTER_NS:
            try:
                os.utime(self._folder.record_path(key), ns=(now, stat.st_mtime_ns))
            except OSError as error:
                _log.debug("the use of cache entry %s cannot be noted: %s", key, error)

    def _remove_half(self, key: str) -> None:
        """Remove a record without audio or audio without a record, unless somebody is at work on it."""
        with self._folder.locked(key, wait=False) as held:
            if held:
                found = self._folder.stored(key)
                if not (found.has_record and found.has_audio):
                    self._folder.discard(key)

    def _count(self, added: int) -> None:
        with self._counting:
            self._stored += added
            self._unseen += added
            if self._stored > self._max_bytes or self._unseen > self._slack:
                self._evict()

    def _evict(self) -> None:
        """Look at the folder, and where it is over the bound make room for a while. `_counting` is held."""
        found = self._folder.scan()
        stored = sum(files.size for files in found.values())
        if stored > self._max_bytes:
            for key in sorted(found, key=lambda key: found[key].used_ns):
                if stored <= self._max_bytes - self._slack:
                    break
                if self._evict_key(key, found[key].used_ns):
                    stored -= found[key].size
        self._stored = stored
        self._unseen = 0

    def _evict_key(self, key: str, used_ns: int) -> bool:
        """Remove `key`, unless it is locked or was used or replaced since it was looked at."""
        with self._folder.locked(key, wait=False) as held:
            if not held or self._folder.stored(key).used_ns != used_ns:
                return False
            self._folder.discard(key)
        self._memo.drop(key)
        return True


def _open(path: str) -> Descriptor:
    return Descriptor(os.open(path, os.O_RDONLY | os.O_CLOEXEC))


def _signature(stat: os.stat_result) -> _Signature:
    return stat.st_ino, stat.st_size, stat.st_mtime_ns


def _read_small(audio: Descriptor, size: int) -> Source:
    """Where the audio is to be read from: memory if it is small, else `audio`."""
    if size > _SMALL_BYTES:
        return audio
    data = audio.read(0, size)
    audio.close()
    return Memory(data)


def _verify(source: Source, size: int, record: CacheRecord) -> None:
    """Raises _Misfit if the audio is not what the record says."""
    if size != record.length:
        raise _Misfit
    digest = hashlib.sha256()
    for offset in range(0, size, _BLOCK_BYTES):
        digest.update(source.read(offset, _BLOCK_BYTES))
    if digest.hexdigest() != record.sha256:
        raise _Misfit


def _require_key(key: str) -> None:
    if not is_key(key):
        raise ValueError("a cache key is 64 hex digits")
