"""The thread that writes to one SQLite file.

Owns the connection, the file's migrations and its transactions. Knows nothing of what is written: operations are
functions that get a cursor. All that wait share one transaction, each in a savepoint of its own, and are answered
after the commit: one fsync serves many.
"""

from __future__ import annotations

import asyncio
import logging
import sqlite3
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import TypeVar, TypeVarTuple

from .ledger_migrations import scripts_after
from .ledger_writer import Job, LedgerWriter, Outcome, unavailable

Cursor = sqlite3.Cursor
_T = TypeVar("_T")
_Ts = TypeVarTuple("_Ts")

_RETRY_S = 0.02
_log = logging.getLogger(__name__)


class SqliteWriter(LedgerWriter):
    """Runs submitted functions, and `tick` at the start and every `tick_s` seconds.

    `busy_s` is how long to wait for another process's write lock. The file is made with mode 0600, and its folder.
    Starting raises OSError, sqlite3.Error, or RuntimeError for a file of a newer version.
    """

    def __init__(self, path: Path, tick: Callable[[Cursor], None], tick_s: float, busy_s: float = 5.0) -> None:
        super().__init__("sqlite-writer", tick, tick_s)
        self._path = path
        self._busy_s = busy_s
        self._synchronous = ""

    def submit(self, operation: Callable[[Cursor, *_Ts], _T], *args: *_Ts, durable: bool = True) -> asyncio.Future[_T]:
        """Queue `operation(cursor, *args)`; the future has its result after the commit, or its exception.

        It runs even if the future is cancelled. Database trouble becomes Unavailable; then nothing was changed.
        Not `durable`: a power failure (not a crash) may undo it, unless a durable one was committed after it.
        """
        return self._enqueue(lambda db: operation(db, *args), durable)

    def _open(self) -> None:
        self._connection = _connect(self._path, self._busy_s)
        self._synchronous = ""

    def _shut(self) -> None:
        self._connection.close()

    def _execute(self, jobs: list[Job]) -> list[Outcome]:
        db = self._connection.cursor()
        try:
            self._sync(db, "FULL" if any(job.durable for job in jobs) else "NORMAL")
            db.execute("BEGIN IMMEDIATE")
            outcomes = [_attempt(db, job) for job in jobs]
            db.execute("COMMIT")
        except Exception as error:
            _log.warning("a ledger transaction failed: %r", error)
            with suppress(sqlite3.Error):
                db.execute("ROLLBACK")
            return [Outcome(job.future, None, unavailable(error)) for job in jobs]
        self.transactions += 1
        return outcomes

    def _sync(self, db: Cursor, synchronous: str) -> None:
        """In WAL mode FULL syncs every commit, those before it included, and NORMAL none."""
        if synchronous != self._synchronous:
            db.execute(f"PRAGMA synchronous={synchronous}")
            self._synchronous = synchronous


def _attempt(db: Cursor, job: Job) -> Outcome:
    """Run one job so that its failure undoes only itself. Raises if the whole transaction is gone."""
    result, failure = None, None
    db.execute("SAVEPOINT operation")
    try:
        result = job.work(db)
    except Exception as error:
        # SQLite itself may have rolled all back (disk full); then this raises.
        db.execute("ROLLBACK TO operation")
        failure = unavailable(error) if isinstance(error, sqlite3.Error) else error
    db.execute("RELEASE operation")
    return Outcome(job.future, result, failure)


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
    connection.execute("BEGIN IMMEDIATE")
    try:
        (version,) = connection.execute("PRAGMA user_version").fetchone()
        for number, script in scripts_after("sqlite", version).items():
            for statement in _statements(script):
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
