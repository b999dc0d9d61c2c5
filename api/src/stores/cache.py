"""The speech cache: finished responses on disk, shared by all processes that use one folder.

Owns which entries exist: what may be believed (`find`) and what is evicted. How files appear and vanish
safely is cache_files.py, what is in them cache_form.py, how entries are read and written cache_entry.py, what
is written about them cache_record.py. Counts no hits and knows no requests.

All calls block and may come from any thread.
"""

from __future__ import annotations

import hashlib
import logging
import os
import threading
import time
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from ..domain import AudioFormat
from .cache_entry import CacheWriter, EntryReader, StoredEntry
from .cache_files import CacheFolder, Descriptor, Stored
from .cache_form import Audio, Form, Memory, PlainForm
from .cache_record import MAX_RECORD_BYTES, CacheRecord, EntryMeta, cache_key, is_key, parse_record
from .frames import BrokenFrames, Source

__all__ = ["CacheWriter", "EntryMeta", "EntryReader", "SpeechCache", "StoredEntry", "cache_key"]

_log = logging.getLogger(__name__)

_SMALL_BYTES = 256 * 1024
_BLOCK_BYTES = 1 << 20
_RECORD_FILE_BYTES = MAX_RECORD_BYTES + 4096  # what sealing adds is less
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

    def get(self, name: str) -> _Verified | None:
        with self._lock:
            if name in self._known:
                self._known.move_to_end(name)
            return self._known.get(name)

    def put(self, name: str, known: _Verified) -> None:
        with self._lock:
            self._known[name] = known
            self._known.move_to_end(name)
            if len(self._known) > _MEMO_ENTRIES:
                self._known.popitem(last=False)

    def drop(self, name: str) -> None:
        with self._lock:
            self._known.pop(name, None)


class SpeechCache:
    """A folder of verified entries, bounded to `max_bytes` of stored files, least recently used first.

    Each process counts what it adds, and looks at the folder when its count passes the bound or it has added
    a sixteenth of it since it last looked. So P processes exceed the bound by at most P sixteenths and what
    each is just storing, one process alone by the latter only. Temp files, and entries whose locks are busy
    while room is made, come on top.

    It writes in the first of its forms and finds entries in all of them. What lies there in another form, or
    sealed under another key, is a miss and grows old with the rest; but where all forms are sealed, `sweep`
    removes what is not.
    """

    def __init__(self, root: Path, max_bytes: int, forms: Sequence[Form] = (PlainForm(),)) -> None:
        """Make the folders under `root`, for the owner alone."""
        self._folder = CacheFolder(root)
        self._forms = tuple(forms)
        self._max_bytes = max_bytes
        self._slack = max_bytes // 16
        self._memo = _Memo()
        self._counting = threading.Lock()
        self._evicting = threading.Lock()
        self._no_sweep = threading.Event()
        self._stored = 0
        self._unseen = 0

    @property
    def stored_bytes(self) -> int:
        """Bytes of the stored files, as far as this process knows."""
        return self._stored

    def sweep(self) -> None:
        """At start: remove what the dead and the unsealed have left, count the rest, evict what is over the bound.

        May take minutes on a large folder. Entries are found and written meanwhile.
        """
        self._folder.remove_dead_temps()
        for name, found in self._folder.scan().items():
            if self._no_sweep.is_set():
                return
            if self._is_waste(found):
                self._remove_waste(name)
        self._make_room()

    def stop_sweeping(self) -> None:
        """The process is to end: leave the rest of a sweep to the next one."""
        self._no_sweep.set()

    def writer(self, key: str, ext: AudioFormat) -> CacheWriter:
        """A new entry for `key`, to be entered, written and committed."""
        _require_key(key)
        return CacheWriter(self._folder, self._forms[0], key, ext, max_bytes=self._max_bytes, committed=self._count)

    def find(self, key: str, ext: AudioFormat) -> StoredEntry | None:
        """The verified entry of `key`, to be closed, or None. What does not fit its record is removed."""
        _require_key(key)
        for form in self._forms:
            entry = self._find(form, key, ext)
            if entry is not None:
                return entry
        return None

    def remove(self, key: str) -> None:
        """Forget `key`. Who has it open goes on reading."""
        _require_key(key)
        for form in self._forms:
            name = form.name(key)
            self._memo.drop(name)
            with self._folder.locked(name):
                size = self._folder.stored(name).size
                self._folder.discard(name)
            with self._counting:
                self._stored = max(0, self._stored - size)

    def _find(self, form: Form, key: str, ext: AudioFormat) -> StoredEntry | None:
        name = form.name(key)
        try:
            try:
                return self._look(form, name, key, ext)
            except _Misfit:
                return self._look_again(form, name, key, ext)
        except OSError as error:
            # Out of descriptors, an unreadable disk: no reason to fail a request that can be spoken anew.
            _log.warning("cache entry %s cannot be read: %s", name, error)
            return None

    def _look_again(self, form: Form, name: str, key: str, ext: AudioFormat) -> StoredEntry | None:
        """The entry after all, if a commit was under way; else its remains are removed."""
        self._memo.drop(name)
        with self._folder.locked(name):
            try:
                return self._look(form, name, key, ext)
            except _Misfit:
                self._folder.discard(name)
                return None

    def _look(self, form: Form, name: str, key: str, ext: AudioFormat) -> StoredEntry | None:
        """The verified entry; None if there is no record of it. Raises _Misfit."""
        audio_path, record_path = (self._folder.path(name, suffix) for suffix in form.suffixes(ext))
        try:
            record_stat = os.stat(record_path)
        except FileNotFoundError:
            return None
        known = self._memo.get(name)
        if known is not None and known.record_signature != _signature(record_stat):
            known = None
        record = known.record if known is not None else _read_record(form, record_path, key)
        if record is None or (record.key, record.format) != (key, ext):
            raise _Misfit
        source, audio_stat = _open_audio(form, audio_path, record)
        try:
            if known is None or known.audio_signature != _signature(audio_stat):
                _verify(source, record.length, record)
                self._remember(name, record, record_stat, audio_stat)
        except BrokenFrames:
            source.close()
            raise _Misfit from None
        except BaseException:
            source.close()
            raise
        _touch(record_path, record_stat)
        return StoredEntry(record.meta, record.length, source)

    def _remember(
        self, name: str, record: CacheRecord, record_stat: os.stat_result, audio_stat: os.stat_result
    ) -> None:
        # A file changed within the same tick of the clock looks unchanged: remember only what has settled.
        if time.time_ns() - max(record_stat.st_mtime_ns, audio_stat.st_mtime_ns) > _SETTLED_NS:
            self._memo.put(name, _Verified(record, _signature(record_stat), _signature(audio_stat)))

    def _is_waste(self, found: Stored) -> bool:
        """A record without audio, audio without a record, or what may not lie here unsealed."""
        unsealed = all(form.sealed for form in self._forms) and not found.sealed
        return unsealed or not (found.has_record and found.has_audio)

    def _remove_waste(self, name: str) -> None:
        """Remove it, unless somebody is at work on it."""
        with self._folder.locked(name, wait=False) as held:
            if held and self._is_waste(self._folder.stored(name)):
                self._folder.discard(name)

    def _count(self, added: int) -> None:
        with self._counting:
            self._stored += added
            self._unseen += added
            look = self._stored > self._max_bytes or self._unseen > self._slack
        if look:
            self._make_room()

    def _make_room(self) -> None:
        """Evict, unless that is being done: a generation must not wait for a long sweep to store what it made."""
        if self._evicting.acquire(blocking=False):
            try:
                self._evict()
            finally:
                self._evicting.release()

    def _evict(self) -> None:
        """Look at the folder, and where it is over the bound make room for a while. `_evicting` is held."""
        with self._counting:
            self._unseen = 0
        found = self._folder.scan()
        stored = sum(files.size for files in found.values())
        if stored > self._max_bytes:
            for name in sorted(found, key=lambda name: found[name].used_ns):
                if stored <= self._max_bytes - self._slack or self._no_sweep.is_set():
                    break
                if self._evict_name(name, found[name].used_ns):
                    stored -= found[name].size
        with self._counting:
            self._stored = stored + self._unseen  # what came meanwhile may have been seen, too: rather too much

    def _evict_name(self, name: str, used_ns: int) -> bool:
        """Remove `name`, unless it is locked or was used or replaced since it was looked at."""
        with self._folder.locked(name, wait=False) as held:
            if not held or self._folder.stored(name).used_ns != used_ns:
                return False
            self._folder.discard(name)
        self._memo.drop(name)
        return True


def _open(path: str) -> Descriptor:
    return Descriptor(os.open(path, os.O_RDONLY | os.O_CLOEXEC))


def _read_record(form: Form, path: str, key: str) -> CacheRecord | None:
    """None if there is none, or what is there is not one of `key`."""
    try:
        file = _open(path)
    except FileNotFoundError:
        return None
    try:
        return parse_record(form.decode_record(file.read(0, _RECORD_FILE_BYTES), key))
    except BrokenFrames:
        return None
    finally:
        file.close()


def _open_audio(form: Form, path: str, record: CacheRecord) -> tuple[Source, os.stat_result]:
    """Where the audio is to be read from, memory if it is small; and how its file looks. Raises _Misfit."""
    try:
        file = _open(path)
    except FileNotFoundError:
        raise _Misfit from None
    try:
        stat = file.stat()
        audio = form.audio(file, stat.st_size, record.key)
        if audio.length != record.length:
            raise _Misfit
        return _read_small(audio), stat
    except BrokenFrames:
        file.close()
        raise _Misfit from None
    except BaseException:
        file.close()
        raise


def _read_small(audio: Audio) -> Source:
    if audio.length > _SMALL_BYTES:
        return audio
    data = audio.read(0, audio.length)
    audio.close()
    return Memory(data)


def _touch(record_path: str, stat: os.stat_result) -> None:
    """Note the use in the record's access time; its other times are what the memo goes by."""
    now = time.time_ns()
    if abs(now - stat.st_atime_ns) > _TOUCH_AFTER_NS:
        try:
            os.utime(record_path, ns=(now, stat.st_mtime_ns))
        except OSError as error:
            _log.debug("the use of a cache entry cannot be noted: %s", error)


def _signature(stat: os.stat_result) -> _Signature:
    return stat.st_ino, stat.st_size, stat.st_mtime_ns


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
