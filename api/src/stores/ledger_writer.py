"""One thread that writes to a database, with group commit.

Owns the queue, the thread and the answers. What is queued, and how all that waits becomes one transaction, is the
subclass's: sqlite_writer.py, postgres_writer.py. A thread, because leases must be renewed while the event loop
stands still.
"""

from __future__ import annotations

import asyncio
import logging
import time
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Iterable, Sequence
from contextlib import suppress
from queue import Empty, SimpleQueue
from threading import Thread
from typing import Any, NamedTuple

from ..errors import Unavailable

_MAX_BATCH = 1000
_log = logging.getLogger(__name__)


class Job(NamedTuple):
    """`future` is None for upkeep; `since` is when it was submitted, by the monotonic clock."""

    future: asyncio.Future[Any] | None
    work: Any
    durable: bool
    since: float


class Outcome(NamedTuple):
    future: asyncio.Future[Any] | None
    result: Any
    failure: BaseException | None


class LedgerWriter(ABC):
    """Runs what is submitted in its thread and in that order; `tick` at the start and every `tick_s` seconds."""

    _max_batch = _MAX_BATCH

    def __init__(self, name: str, tick: Any, tick_s: float) -> None:
        self._name = name
        self._tick = tick
        self._tick_s = tick_s
        self._jobs: SimpleQueue[Job] = SimpleQueue()
        self._backlog: deque[Job] = deque()
        self._thread: Thread | None = None
        self._last: asyncio.Future[Any] | None = None
        self.transactions = 0
        """How many were committed; operations that wait together share one."""

    @property
    def closed(self) -> bool:
        """Whether nothing can be submitted: not started, closing or closed."""
        return self._thread is None or self._last is not None

    # To be written for each database; these run in the thread.

    @abstractmethod
    def _open(self) -> None:
        """Connect and migrate; raises what went wrong."""

    @abstractmethod
    def _execute(self, jobs: list[Job]) -> Iterable[Outcome]:
        """Run jobs; never raises."""

    @abstractmethod
    def _shut(self) -> None:
        """Disconnect."""

    async def start(self) -> None:
        """Open the database, migrate it and run the first tick. Raises what went wrong, whatever it is.

        After a failure it may be started again.
        """
        self._loop = asyncio.get_running_loop()
        self._last = None
        # A daemon, so that a process that forgets to close can still end: the database survives worse.
        self._thread = Thread(target=self._run, name=self._name, daemon=True)
        ready = self._enqueue(self._tick)
        thread = self._thread
        self._thread.start()
        try:
            await ready
        except BaseException:
            with suppress(Exception):  # what went wrong is known already
                await self._end(lambda *_: None)
            await asyncio.to_thread(thread.join)
            self._thread = None
            raise

    async def close(self, last: Any) -> None:
        """Run all that waits, then `last`, then end the thread. Raises Unavailable if `last` fails."""
        await self._end(last)

    def _enqueue(self, work: Any, durable: bool = True) -> asyncio.Future[Any]:
        if self.closed:
            raise Unavailable("The ledger is not open.")
        future: asyncio.Future[Any] = self._loop.create_future()
        future.add_done_callback(_look_at)
        self._jobs.put(Job(future, work, durable, time.monotonic()))
        return future

    async def _end(self, last: Any) -> None:
        if self._thread is None or self._last is not None:
            return
        self._last = self._loop.create_future()
        self._jobs.put(Job(self._last, last, True, time.monotonic()))
        try:
            await asyncio.shield(self._last)
        finally:
            await asyncio.to_thread(self._thread.join)

    def _run(self) -> None:
        try:
            self._open()
        except Exception as error:
            self._thread = None  # so that nothing more is submitted
            self._collect()
            self._answer(Outcome(job.future, None, error) for job in self._backlog)
            self._backlog.clear()
            return
        try:
            due = time.monotonic() + self._tick_s
            while True:
                jobs = self._take(due)
                if not jobs:
                    jobs = [Job(None, self._tick, False, time.monotonic())]
                    due = time.monotonic() + self._pause()
                self._answer(self._execute(jobs))
                if jobs[-1].future is not None and jobs[-1].future is self._last:
                    return
        finally:
            self._shut()

    def _pause(self) -> float:
        """Seconds to the next tick."""
        return self._tick_s

    def _take(self, due: float) -> list[Job]:
        """All jobs that wait, at least one; none once `due` has come."""
        wait = due - time.monotonic()
        if wait <= 0:
            return []
        if not self._backlog:
            with suppress(Empty):
                self._backlog.append(self._jobs.get(timeout=wait))
        self._collect()
        return [self._backlog.popleft() for _ in range(min(len(self._backlog), self._max_batch))]

    def _collect(self) -> None:
        """Put all that waits into the thread's own backlog."""
        with suppress(Empty):
            while True:
                self._backlog.append(self._jobs.get_nowait())

    def _answer(self, outcomes: Iterable[Outcome]) -> None:
        with suppress(RuntimeError):  # the loop has ended without closing the ledger: nobody is left to be told
            self._loop.call_soon_threadsafe(_resolve, list(outcomes))


def wanted(jobs: Sequence[Job]) -> list[Job]:
    """Those that were not cancelled meanwhile: nobody would hear of the others, so they do not happen."""
    return [job for job in jobs if job.future is None or not job.future.cancelled()]


def refused(error: Exception) -> ValueError:
    """What is told of events that a database does not take. Of a database's message the first line: the rest quotes."""
    failure = ValueError(f"The ledger does not take these events: {str(error).partition(chr(10))[0]}")
    failure.__cause__ = error
    return failure


def _look_at(future: asyncio.Future[Any]) -> None:
    """Whoever was cancelled or has given up waiting does not look any more; asyncio would complain."""
    if not future.cancelled():
        future.exception()


def unavailable(error: BaseException | None = None) -> Unavailable:
    failure = Unavailable("Billing is not available at the moment. Please try again.")
    failure.__cause__ = error
    return failure


def _resolve(outcomes: list[Outcome]) -> None:
    for future, result, failure in outcomes:
        if future is None:
            if failure is not None:
                _log.error("the ledger's upkeep failed: %r", failure.__cause__ or failure)
        elif future.done():
            continue
        elif failure is not None:
            future.set_exception(failure)
        else:
            future.set_result(result)
