"""The thread that writes to one SQLite file.

Owns the connection, the file's migrations and its transactions. Knows nothing of what is written: operations are
functions that get a cursor, and acts are given to one that performs all of them. All that wait share one transaction,
the acts that follow each other in one savepoint, each operation in its own, and are answered after the commit: one
fsync serves many.
"""

from __future__ import annotations

import asyncio
import logging
import sqlite3
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from itertools import groupby
from pathlib import Path
from typing import Any, TypeVar, TypeVarTuple

from .ledger_migrations import scripts_after
from .ledger_page import Act, Attempt
from .ledger_writer import Job, LedgerWriter, Outcome, refused, unavailable, wanted

Cursor = sqlite3.Cursor
_T = TypeVar("_T")
_Ts = TypeVarTuple("_Ts")

_RETRY_S = 0.02
_REFUSALS = (
    sqlite3.IntegrityError,
    sqlite3.DataError,
    sqlite3.ProgrammingError,
    sqlite3.InterfaceError,
    OverflowError,
)
"""What the values themselves can cause."""

_log = logging.getLogger(__name__)


class SqliteWriter(LedgerWriter):
    """Runs submitted functions and acts, and `tick` at the start and every `tick_s` seconds.

    `perform` gets acts that follow each other; what it raises is of one of them, and undoes all it did.

    `busy_s` is how long to wait for another process's write lock. The file is made with mode 0600, and its folder.
    Starting raises OSError, sqlite3.Error, or RuntimeError for a file of a newer version.
    """

    def __init__(
        self,
        path: Path,
        perform: Callable[[Cursor, Sequence[Act[Any]]], list[Attempt]],
        tick: Callable[[Cursor], None],
        tick_s: float,
        busy_s: float = 5.0,
    ) -> None:
        super().__init__("sqlite-writer", tick, tick_s)
        self._perform = perform
        self._path = path
        self._busy_s = busy_s
        self._synchronous = ""

    def submit(self, operation: Callable[[Cursor, *_Ts], _T], *args: *_Ts, durable: bool = True) -> asyncio.Future[_T]:
        """Queue `operation(cursor, *args)`; the future has its result after the commit, or its exception.

        Database trouble becomes Unavailable; then nothing was changed. Cancelled, or not `durable`: see
        StoredLedger.submit.
        """
        return self._enqueue(lambda db: operation(db, *args), durable)

    def submit_act(self, act: Act[_T], *, durable: bool) -> asyncio.Future[_T]:
        """Queue an act; as `submit`."""
        return self._enqueue(act, durable)

    def _open(self) -> None:
        self._connection = _connect(self._path, self._busy_s)
        self._synchronous = ""

    def _shut(self) -> None:
        self._connection.close()

    def _execute(self, jobs: list[Job]) -> list[Outcome]:
        db = self._connection.cursor()
        jobs = wanted(jobs)
        try:
            self._sync(db, "FULL" if any(job.durable for job in jobs) else "NORMAL")
            db.execute("BEGIN IMMEDIATE")
            outcomes = self._run_jobs(db, jobs)
            db.execute("COMMIT")
        except Exception as error:
            _log.warning("a ledger transaction failed: %r", error)
            with suppress(sqlite3.Error):
                db.execute("ROLLBACK")
            return [Outcome(job.future, None, unavailable(error)) for job in jobs]
        self.transactions += 1
        return outcomes

    def _run_jobs(self, db: Cursor, jobs: list[Job]) -> list[Outcome]:
        outcomes: list[Outcome] = []
        for are_acts, group in groupby(jobs, key=lambda job: isinstance(job.work, Act)):
            if are_acts:
                outcomes += self._run_acts(db, list(group))
            else:
                outcomes += [_run_operation(db, job) for job in group]
        return outcomes

    def _run_acts(self, db: Cursor, jobs: list[Job]) -> list[Outcome]:
        try:
            with _savepoint(db):
                attempts = self._perform(db, [job.work for job in jobs])
        except _TransactionGone:
            raise
        except Exception as error:
            if len(jobs) > 1:  # one of them harms nobody else
                return [outcome for job in jobs for outcome in self._run_acts(db, [job])]
            attempts = [Attempt(None, _failure(error, of_events=jobs[0].work.account is None))]
        return [Outcome(job.future, *attempt) for job, attempt in zip(jobs, attempts, strict=True)]

    def _sync(self, db: Cursor, synchronous: str) -> None:
        """In WAL mode FULL syncs every commit, those before it included, and NORMAL none."""
        if synchronous != self._synchronous:
            db.execute(f"PRAGMA synchronous={synchronous}")
            self._synchronous = synchronous


class _TransactionGone(Exception):
    """SQLite itself has rolled all back, as where the disk is full."""


@contextmanager
def _savepoint(db: Cursor) -> Iterator[None]:
    """What fails within is undone, alone. Raises _TransactionGone if that is no longer possible."""
    db.execute("SAVEPOINT operation")
    try:
        yield
    except Exception as error:
        try:
            db.execute("ROLLBACK TO operation")
        except sqlite3.Error:
            raise _TransactionGone from error
        db.execute("RELEASE operation")
        raise
    db.execute("RELEASE operation")


def _run_operation(db: Cursor, job: Job) -> Outcome:
    try:
        with _savepoint(db):
            return Outcome(job.future, job.work(db), None)
    except _TransactionGone:
        raise
    except Exception as error:
        return Outcome(job.future, None, _failure(error))


def _failure(error: Exception, *, of_events: bool = False) -> Exception:
    """What is told of something that failed; of events that the file does not take, that they are at fault."""
    if of_events and isinstance(error, _REFUSALS):
        return refused(error)
    return unavailable(error) if isinstance(error, sqlite3.Error) else error


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
