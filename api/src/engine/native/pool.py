"""The kernel's threads, from Python.

Owns when they are there: from the first call on, until `close`, after which the next call starts them again.
"""

from __future__ import annotations

import ctypes
import threading
import weakref
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from .library import NoKernel


class Pool:
    """Threads for one call at a time; others wait. As many as torch has in the thread that calls first."""

    def __init__(self, library: ctypes.CDLL) -> None:
        self._library, self._lock = library, threading.Lock()
        self._end: weakref.finalize[..., Pool] | None = None
        self._address = 0

    @contextmanager
    def borrow(self) -> Iterator[int]:
        """The threads' address, for a call."""
        with self._lock:
            if not self._address:
                self._start()
            yield self._address

    def close(self) -> None:
        """End the threads; when this returns, none is left."""
        with self._lock:
            self._address = 0
            if self._end is not None:
                self._end()

    @property
    def running(self) -> bool:
        """Whether there are threads."""
        return bool(self._address)

    def _start(self) -> None:
        address = self._library.pool_new(torch.get_num_threads())
        if not address:
            raise NoKernel("there is no memory for threads")
        self._address = address
        self._end = weakref.finalize(self, self._library.pool_free, address)
        self._end.atexit = False  # a thread may still be calling then
