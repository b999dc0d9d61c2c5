"""One thread that writes to one SQLite file, with group commit.

Owns the connection, the migrations, the queue and the thread. Knows nothing of what is written: operations
are functions that get a cursor. They run in the order in which they were submitted, all that wait within one
transaction, each in a savepoint of its own, and are answered after the commit: one fsync serves many.
"""

from __future__ import annotations

import asyncio
import logging
import sqlite3
import time
from collections.abc import Callable, Iterator
from contextlib import closing, suppress
from importlib.resources import files
from pathlib import Path
from queue import Empty, SimpleQueue
from threading import Thread
from typing import Any, TypeVar, TypeVarTuple

from ..errors import Unavailable

Cursor = sqlite3.Cursor
_T = TypeVar("_T")
_Ts = TypeVarTuple("_Ts")
_Job = tuple["asyncio.Future[Any] | None", Callable[..., Any], tuple[Any, ...], bool]
_Outcome = tuple["asyncio.Future[Any] | None", Any, BaseException | None]

_MAX_BATCH = 1000
_RETRY_S = 0.02
_log = logging.getLogger(__name__)


class SqliteWriter:
    """Runs submitted operations in its thread, and `tick` at the start and every `tick_s` seconds.

    `busy_s` is how long to wait for another process's write lock. `transactions` and `operations` count what was
    committed.
    """

    def __init__(self, path: Path, tick: Callable[[Cursor], None], tick_s: float, busy_s: float = 5.0) -> None:
        self._path = path
        self._tick = tick
        self._tick_s = tick_s
        self._busy_s = busy_s
        self._jobs: SimpleQueue[_Job] = SimpleQueue()
        self._thread: Thread | None = None
        self._last: asyncio.Future[Any] | None = None
        self._synchronous = ""
        self.transactions = 0

    async def start(self) -> None:
        """Open the file (made with mode 0600, and its folder), migrate it and run the first tick.

        Raises what went wrong: OSError, sqlite3.Error, RuntimeError for a file of a newer version.
        """
        self._loop = asyncio.get_running_loop()
        # A daemon, so that a process that forgets to close can still end: the file survives worse.
        self._thread = Thread(target=self._run, name="sqlite-writer", daemon=True)
        ready = self.submit(self._tick)
        self._thread.start()
        try:
            await ready
        except BaseException:
            await self.close(lambda _: None)
            raise

    def submit(self, operation: Callable[[Cursor, *_Ts], _T], *args: *_Ts, durable: bool = True) -> asyncio.Future[_T]:
        """Queue `operation(cursor, *args)`; the future has its result after the commit, or its exception.

        It runs even if the future is cancelled. Database trouble becomes Unavailable; then nothing was changed.
        Not `durable`: a power failure (not a crash) may undo it, unless a durable one was committed after it.
        """
        if self._thread is None or self._last is not None:
            raise Unavailable("The ledger is not open.")
        future: asyncio.Future[_T] = self._loop.create_future()
        self._jobs.put((future, operation, args, durable))
        return future

    async def close(self, last: Callable[[Cursor], None]) -> None:
        """Run all that waits, then `last`, then end the thread. Raises Unavailable if `last` fails."""
        if self._thread is None or self._last is not None:
            return
        self._last = self._loop.create_future()
        self._jobs.put((self._last, last, (), True))
        try:
            await asyncio.shield(self._last)
        finally:
            await asyncio.to_thread(self._thread.join)

    def _run(self) -> None:
        try:
            connection = _connect(self._path, self._busy_s)
        except Exception as error:
            self._thread = None  # so that nothing more is submitted
            self._answer([(job[0], None, error) for job in self._waiting()])
            return
        with closing(connection):
            db = connection.cursor()
            due = time.monotonic() + self._tick_s
            while True:
                jobs = self._take(due)
                if not jobs:
                    jobs = [(None, self._tick, (), False)]
                    due = time.monotonic() + self._tick_s
                self._answer(self._execute(db, jobs))
                if jobs[-1][0] is not None and jobs[-1][0] is self._last:
                    return

    def _take(self, due: float) -> list[_Job]:
        """All jobs that wait, at least one; none once `due` has come."""
        wait = due - time.monotonic()
        if wait <= 0:
            return []
        try:
            return [self._jobs.get(timeout=wait), *self._waiting()]
        except Empty:
            return []

    def _waiting(self) -> Iterator[_Job]:
        with suppress(Empty):
            for _ in range(_MAX_BATCH):
                yield self._jobs.get_nowait()

    def _execute(self, db: Cursor, jobs: list[_Job]) -> list[_Outcome]:
        try:
            self._sync(db, "FULL" if any(job[3] for job in jobs) else "NORMAL")
            db.execute("BEGIN IMMEDIATE")
            outcomes = [_attempt(db, job) for job in jobs]
            db.execute("COMMIT")
        except Exception as error:
            _log.warning("a ledger transaction failed: %r", error)
            with suppress(sqlite3.Error):
                db.execute("ROLLBACK")
            return [(job[0], None, _unavailable(error)) for job in jobs]
        self.transactions += 1
        return outcomes

    def _sync(self, db: Cursor, synchronous: str) -> None:
        """In WAL mode FULL syncs every commit, those before it included, and NORMAL none."""
        if synchronous != self._synchronous:
            db.execute(f"PRAGMA synchronous={synchronous}")
            self._synchronous = synchronous

    def _answer(self, outcomes: list[_Outcome]) -> None:
        with suppress(RuntimeError):  # the loop has ended without closing the ledger: nobody is left to be told
            self._loop.call_soon_threadsafe(_resolve, outcomes)


def _attempt(db: Cursor, job: _Job) -> _Outcome:
    """Run one job so that its failure undoes only itself. Raises if the whole transaction is gone."""
    future, operation, args, _ = job
    result, failure = None, None
    db.execute("SAVEPOINT operation")
    try:
        result = operation(db, *args)
    except Exception as error:
        # SQLite itself may have rolled all back (disk full); then this raises.
        db.execute("ROLLBACK TO operation")
        failure = _unavailable(error) if isinstance(error, sqlite3.Error) else error
    db.execute("RELEASE operation")
    return future, result, failure


def _unavailable(error: Exception) -> Unavailable:
    failure = Unavailable("Billing is not available at the moment. Please try again.")
    failure.__cause__ = error
    return failure


def _resolve(outcomes: list[_Outcome]) -> None:
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


def _connect(path: Path, busy_s: float) -> sqlite3.Connection:
    path.parent.mkdir(parents=True, exist_ok=True)
    fresh = not path.exists()
    connection = sqlite3.connect(path, timeout=busy_s, isolation_level=None)
    try:
        if fresh:
            path.chmod(0o600)  # before anything is in it; the files beside it inherit the mode
        _use_wal(connection, time.monotonic() + busy_s)
        connection.execute("PRAGMA fullfsync=ON")  # macOS: a plain fsync there does not survive a power loss
        _migrate(connection)
    except BaseException:
        connection.close()
        raise
    return connection


def _use_wal(connection: sqlite3.Connection, deadline: float) -> None:
    while True:
        try:
            connection.execute("PRAGMA journal_mode=WAL")
            return
        except sqlite3.OperationalError:
            # SQLite does not apply the busy time-out when two processes switch a new file at once.
            if time.monotonic() > deadline:
                raise
            time.sleep(_RETRY_S)


def _migrate(connection: sqlite3.Connection) -> None:
    """Apply the numbered scripts that the file has not seen, all in one transaction."""
    scripts = sorted((files(__package__) / "migrations").iterdir(), key=lambda script: script.name)
    numbered = {int(script.name[:4]): script for script in scripts if script.name.endswith(".sql")}
    connection.execute("BEGIN IMMEDIATE")
    try:
        (version,) = connection.execute("PRAGMA user_version").fetchone()
        if version > max(numbered):
            raise RuntimeError(f"The ledger file has schema {version}; this version knows {max(numbered)}.")
        for number, script in numbered.items():
            if number > version:
                for statement in _statements(script.read_text("utf-8")):
                    connection.execute(statement)
                connection.execute(f"PRAGMA user_version = {number}")
        connection.execute("COMMIT")
    finally:
        if connection.in_transaction:
            connection.execute("ROLLBACK")


def _statements(script: str) -> Iterator[str]:
    """The statements of a script one by one: `executescript` would commit before the first."""
    statement = ""
    for line in script.splitlines(keepends=True):
        statement += line
        if sqlite3.complete_statement(statement):
            yield statement
            statement = ""
    if statement.strip():
        raise ValueError("A migration ends in the middle of a statement.")
