"""Entries of the speech cache as their users hold them: one being written, and what reads it then and later.

All offsets and lengths are those of the audio, not of the file that holds it: how it lies there is
cache_form.py's affair. Which entries exist, and for how long, is decided in cache.py.
"""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Callable
from types import TracebackType
from typing import Self

from ..domain import AudioFormat
from .cache_files import CacheFolder
from .cache_form import Form, Memory
from .cache_record import CacheRecord, EntryMeta, encode_record
from .frames import Source


class EntryReader:
    """Reads an entry at any offset, from any thread, until closed: also once it was evicted or given up."""

    def __init__(self, source: Source, length: Callable[[], int]) -> None:
        """`length` says how many bytes of audio there are by now."""
        self._source = source
        self._length = length

    @property
    def length(self) -> int:
        """Bytes of audio that can be read now."""
        return self._length()

    def read(self, offset: int, size: int) -> bytes:
        """At most `size` bytes from `offset`, fewer only at the present end. ValueError once closed.

        OSError if the disk fails, or a sealed file is not what it was.
        """
        if offset < 0 or size < 0:
            raise ValueError("offset and size are not negative")
        return self._source.read(offset, min(size, max(0, self.length - offset)))

    def close(self) -> None:
        self._source.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


class StoredEntry(EntryReader):
    """A finished, verified entry. `data` is the whole audio where it is small; then `read` never blocks."""

    def __init__(self, meta: EntryMeta, length: int, source: Source) -> None:
        super().__init__(source, lambda: length)
        self.meta = meta
        self.data = source.data if isinstance(source, Memory) else None


class CacheWriter:
    """An entry being written: a context manager that undoes itself unless `commit` was called.

    One thread writes at a time; any number may `open` and read meanwhile.
    """

    def __init__(
        self,
        folder: CacheFolder,
        form: Form,
        key: str,
        ext: AudioFormat,
        *,
        max_bytes: int,
        committed: Callable[[int], None],
    ) -> None:
        """`committed` is called with the bytes stored, once the entry stands."""
        self._folder = folder
        self._form = form
        self._name = form.name(key)
        self._key = key
        self._ext: AudioFormat = ext
        self._max_bytes = max_bytes
        self._committed = committed
        self._digest = hashlib.sha256()
        self._length = 0
        self._finished = False
        # Leaving waits for a write or commit under way in another thread: its asker may have been cancelled.
        self._busy = threading.Lock()

    def __enter__(self) -> Self:
        self._temp = self._folder.temp(self._name)
        self._body = self._form.body(self._temp, self._key, self._ext)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with self._busy:
            self._finished = True
            self._temp.close()

    @property
    def length(self) -> int:
        """Bytes of audio written so far, all of them readable."""
        return self._length

    def write(self, data: bytes | bytearray | memoryview) -> None:
        """Append `data`. Raises OSError (a full disk), and ValueError from then on, as after commit or exit."""
        with self._busy:
            self._require_unfinished()
            try:
                self._body.write(data)
            except OSError:
                self._finished = True
                raise
            self._digest.update(data)
            self._length += len(data)

    def open(self) -> EntryReader:
        """A reader of what is written and will be. Raises ValueError once the writer was left."""
        return EntryReader(self._body.open(), lambda: self._length)

    def commit(self, meta: EntryMeta) -> None:
        """Make the entry what `find` finds, durably; one that is larger than the cache is not kept.

        Raises OSError (a full disk) or ValueError (`meta` is not fit to be stored): then there is no entry.
        """
        with self._busy:
            self._require_unfinished()
            self._finished = True
            record = encode_record(self._record(meta))
            stored = self._store(self._form.encode_record(record, self._key))
        if stored:
            self._committed(stored)

    def _store(self, record: bytes) -> int:
        """Returns the bytes stored, 0 if they are too many."""
        size = self._body.finish() + len(record)
        if size > self._max_bytes:
            return 0
        self._temp.sync()
        with self._folder.temp(self._name) as record_file:
            record_file.write(0, record)
            record_file.sync()
            self._folder.publish(self._name, self._form.suffixes(self._ext), self._temp, record_file)
        return size

    def _record(self, meta: EntryMeta) -> CacheRecord:
        return CacheRecord(self._key, self._ext, self._length, self._digest.hexdigest(), meta)

    def _require_unfinished(self) -> None:
        if self._finished:
            raise ValueError("the entry was committed or given up")
