"""The speech cache's folder: names, temp files, locks, and the order in which files appear and vanish.

    audio/speech/<name>.<format>        the audio of an entry, as it is; .frames where it is in frames
    audio/speech/<name>.json            its record, which appears last and vanishes first: the commit mark; .record
                                        where it is sealed
    audio/speech/<name>.<nonce>.tmp     a file being written; alive while its lock is held, whoever wrote it
    audio/speech/.locks/<two digits>    locked while a pair whose name begins so is changed; never deleted

A name is 64 hex digits, which cache_form.py makes of a key. Owns no policy: what is believed or evicted is
decided in cache.py. All locks are flock on descriptors of
their own, so they hold between threads as well as between processes, and the kernel frees those of the dead.
"""

from __future__ import annotations

import fcntl
import os
import re
import secrets
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Self

from .cache_record import FORMATS

PLAIN_RECORD, SEALED_RECORD, FRAMES = "json", "record", "frames"
_RECORDS = (PLAIN_RECORD, SEALED_RECORD)
_SUFFIXES = (*_RECORDS, FRAMES, *FORMATS)
_PAIR_NAME = re.compile(rf"([0-9a-f]{{64}})\.({'|'.join(_SUFFIXES)})")
_TEMP_NAME = re.compile(r"[0-9a-f]{64}\.[0-9a-f]{16}\.tmp")


class Descriptor:
    """An open file: positional reads until it is closed, whatever becomes of the file's name."""

    def __init__(self, number: int) -> None:
        """Own the open file `number`."""
        self._number = number
        self._lock = threading.Lock()

    def read(self, offset: int, size: int) -> bytes:
        """At most `size` bytes from `offset`; fewer only where the file ends. ValueError once closed."""
        # close() waits for a read under way: a freed number could by then stand for somebody else's file.
        with self._lock:
            return os.pread(self._open_number(), size, offset)

    def stat(self) -> os.stat_result:
        with self._lock:
            return os.fstat(self._open_number())

    def duplicate(self) -> Descriptor:
        """The same open file under a descriptor of its own."""
        with self._lock:
            return Descriptor(os.dup(self._open_number()))

    def close(self) -> None:
        with self._lock:
            number, self._number = self._number, -1
        if number >= 0:
            os.close(number)

    def __del__(self) -> None:
        # An entry found by a thread whose asker was cancelled has nobody to close it.
        self.close()

    def _open_number(self) -> int:
        if self._number < 0:
            raise ValueError("the entry is closed")
        return self._number


class TempFile(Descriptor):
    """A new file under a name of its own, locked. Closing it removes that name, unless it was renamed."""

    def __init__(self, stem: str) -> None:
        super().__init__(-1)
        while not self._take(f"{stem}.{secrets.token_hex(8)}.tmp"):
            pass

    def _take(self, path: str) -> bool:
        self.path = path
        self._number = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(self._number, fcntl.LOCK_EX)
            if os.fstat(self._number).st_nlink:
                return True
        except BaseException:
            self.close()
            raise
        # A sweep that came between creation and lock took the file for a dead one's.
        self.close()
        return False

    def write(self, offset: int, data: bytes | bytearray | memoryview) -> None:
        """Put all of `data` at `offset`."""
        rest = memoryview(data)
        with self._lock:
            while rest:
                written = os.pwrite(self._open_number(), rest, offset)
                rest, offset = rest[written:], offset + written

    def sync(self) -> None:
        """Wait until the content is on the disk. Must not overlap close(); reads go on."""
        os.fsync(self._open_number())

    def close(self) -> None:
        try:
            with self._lock:
                if self._number >= 0:
                    with suppress(FileNotFoundError):
                        os.unlink(self.path)
                    # Readers' duplicates share the lock, and would keep it.
                    fcntl.flock(self._number, fcntl.LOCK_UN)
        finally:
            super().close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


@dataclass(slots=True)
class Stored:
    """The files of one name: bytes in all, and when the entry was last used (ns; 0 without a record)."""

    size: int = 0
    used_ns: int = 0
    has_record: bool = False
    has_audio: bool = False
    sealed: bool = True

    def add(self, suffix: str, stat: os.stat_result) -> None:
        self.size += stat.st_size
        self.sealed &= suffix in (SEALED_RECORD, FRAMES)
        if suffix in _RECORDS:
            self.has_record, self.used_ns = True, stat.st_atime_ns
        else:
            self.has_audio = True


class CacheFolder:
    """The files under `root`/audio/speech. Names that are not the cache's own are left alone."""

    def __init__(self, root: Path) -> None:
        self._folders = [
            root,
            root / "audio",
            root / "audio" / "speech",
            root / "audio" / "speech" / ".locks",
        ]
        self._path = str(root / "audio" / "speech")
        self._prepare()

    def path(self, name: str, suffix: str) -> str:
        return f"{self._path}/{name}.{suffix}"

    def temp(self, name: str) -> TempFile:
        self._prepare()  # somebody may have emptied the cache's folder by hand
        return TempFile(f"{self._path}/{name}")

    @contextmanager
    def locked(self, name: str, *, wait: bool = True) -> Iterator[bool]:
        """Hold the lock of `name`; yields whether it is held, which without `wait` it may not be."""
        number = os.open(f"{self._path}/.locks/{name[:2]}", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            try:
                fcntl.flock(number, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)
                held = True
            except BlockingIOError:
                held = False
            yield held
        finally:
            fcntl.flock(number, fcntl.LOCK_UN)  # a forked child's copy would keep it
            os.close(number)

    def publish(self, name: str, suffixes: tuple[str, str], audio: TempFile, record: TempFile) -> None:
        """Make the two synced files the entry `name`, durably. On any error no such entry is left.

        `suffixes` are those of the audio and the record.
        """
        audio_path, record_path = (self.path(name, suffix) for suffix in suffixes)
        with self.locked(name):
            try:
                with suppress(FileNotFoundError):
                    os.unlink(record_path)  # the old record must not stand beside the new audio
                os.rename(audio.path, audio_path)
                os.rename(record.path, record_path)
                self._sync()
            except BaseException:
                with suppress(OSError):
                    self.discard(name)
                raise

    def discard(self, name: str) -> None:
        """Remove what is stored as `name`, the record first. The caller holds its lock."""
        for suffix in _SUFFIXES:
            with suppress(FileNotFoundError):
                os.unlink(self.path(name, suffix))

    def stored(self, name: str) -> Stored:
        """What there is of `name` now."""
        found = Stored()
        for suffix in _SUFFIXES:
            with suppress(FileNotFoundError):
                found.add(suffix, os.stat(self.path(name, suffix), follow_symlinks=False))
        return found

    def scan(self) -> dict[str, Stored]:
        """What there is of every name; temp files are not counted."""
        found: dict[str, Stored] = {}
        with os.scandir(self._path) as entries:
            for entry in entries:
                parts = _PAIR_NAME.fullmatch(entry.name)
                with suppress(FileNotFoundError):
                    if parts and entry.is_file(follow_symlinks=False):
                        found.setdefault(parts[1], Stored()).add(parts[2], entry.stat(follow_symlinks=False))
        return found

    def remove_dead_temps(self) -> None:
        """Remove the temp files whose writers are gone."""
        with os.scandir(self._path) as entries:
            paths = [
                entry.path
                for entry in entries
                if _TEMP_NAME.fullmatch(entry.name) and entry.is_file(follow_symlinks=False)
            ]
        for path in paths:
            _remove_if_dead(path)

    def _prepare(self) -> None:
        for folder in self._folders:
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)

    def _sync(self) -> None:
        number = os.open(self._path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            os.fsync(number)
        finally:
            os.close(number)


def _remove_if_dead(path: str) -> None:
    try:
        number = os.open(path, os.O_RDWR | os.O_CLOEXEC)
    except FileNotFoundError:
        return
    try:
        fcntl.flock(number, fcntl.LOCK_EX | fcntl.LOCK_NB)
        os.unlink(path)
    except (BlockingIOError, FileNotFoundError):
        pass  # alive, or renamed in the meantime
    finally:
        os.close(number)
