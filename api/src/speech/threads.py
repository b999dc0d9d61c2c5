"""Blocking work off the event loop, without leaving anything half done when the caller is cancelled."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextvars import copy_context
from typing import TypeVar

T = TypeVar("T")


class Threads:
    """A pool of threads for encoding and file work."""

    def __init__(self, size: int) -> None:
        self._pool = ThreadPoolExecutor(size, thread_name_prefix="speech")

    async def run(self, work: Callable[[], T], *, undo: Callable[[T], object] | None = None) -> T:
        """Run `work` in the pool and return its result.

        Cancellation takes effect only once `work` has ended, so that nobody closes what a thread still
        uses; `undo` then receives the result that nobody will see.
        """
        future = asyncio.get_running_loop().run_in_executor(self._pool, copy_context().run, work)  # whose request it is
        try:
            return await asyncio.shield(future)
        except asyncio.CancelledError:
            await _ended(future)
            if undo is not None and not future.cancelled() and future.exception() is None:
                await _ended(asyncio.get_running_loop().run_in_executor(self._pool, undo, future.result()))
            raise

    def close(self) -> None:
        self._pool.shutdown(wait=True, cancel_futures=True)


async def _ended(future: asyncio.Future[T]) -> None:
    """Wait for `future`, however often the waiter is cancelled meanwhile; its outcome is not raised."""
    while not future.done():
        try:
            await asyncio.wait([future])
        except asyncio.CancelledError:
            continue
    if not future.cancelled():
        future.exception()
