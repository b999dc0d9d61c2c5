"""One connection to PostgreSQL on which nothing waits for ever.

Owns connecting and the time-outs. Knows nothing of what is asked.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from contextlib import suppress
from typing import Any, TypeVar

import psycopg
from psycopg.abc import PQGen
from psycopg.conninfo import conninfo_to_dict
from psycopg.pq import TransactionStatus

_RV = TypeVar("_RV")

Query = tuple[str, tuple[Any, ...]]
Rows = list[tuple[Any, ...]]

_SCRIPT_S = 600.0


class _Connection(psycopg.Connection[tuple[Any, ...]]):
    """Gives up at `deadline` (monotonic), or `patience_s` after it began to wait, also where the server's host lives
    but nothing answers."""

    deadline = math.inf
    patience_s = math.inf

    def wait(self, gen: PQGen[_RV], interval: float = 0.1, timeout: float | None = None) -> _RV:
        until = min(self.deadline, time.monotonic() + self.patience_s)
        try:
            return super().wait(gen, interval, max(0.0, until - time.monotonic()))
        except psycopg.OperationalError:
            if time.monotonic() >= until:
                self.pgconn.finish()  # what was asked may happen yet: nobody must take this for a refusal
            raise


class Session:
    """A connection, made anew when it is needed. Used by one thread at a time.

    `url` is what libpq takes; `name` is shown in pg_stat_activity; each `run` takes at most `timeout_s` seconds,
    and connecting as long again.
    """

    def __init__(self, url: str, name: str, timeout_s: float) -> None:
        self._parameters = _parameters(url, name, timeout_s)
        self._timeout_s = timeout_s
        self._connection: _Connection | None = None
        self._spoilt = False

    @property
    def connected(self) -> bool:
        return self._connection is not None and not self._connection.closed

    def connect(self) -> None:
        """Connect afresh. Raises psycopg.OperationalError."""
        self.close()
        self._spoilt = False
        self._connection = _Connection.connect(autocommit=True, **self._parameters)
        # One pipeline for life: leaving one sends a message that keeps the server from ever ending an idle transaction.
        self._pipelining = self._connection.pipeline()
        self._pipeline = self._pipelining.__enter__()

    def run(self, *queries: Query) -> list[Rows]:
        """Send all queries at once and return the rows of each; after an error the rest is not run.

        Raises psycopg.Error, or ValueError for what cannot be sent. A transaction that this leaves behind is rolled
        back, if still `connected`; if not, and the queries ended one, nobody knows whether it was committed.
        """
        if not self.connected or self._spoilt:
            self.connect()
        connection = self._connection
        assert connection is not None
        connection.deadline = time.monotonic() + self._timeout_s
        try:
            cursors = [connection.execute(sql.encode(), values) for sql, values in queries]
            self._pipeline.sync()
        except BaseException:
            self._roll_back(connection)
            raise
        return [cursor.fetchall() if cursor.description else [] for cursor in cursors]

    def script(self, work: Callable[[Callable[[str], Rows]], None]) -> None:
        """Let `work` run statements, several at once if they have no rows, in a transaction of its own connection."""
        connection = _Connection.connect(**self._parameters)
        connection.deadline = time.monotonic() + _SCRIPT_S

        def run(statements: str) -> Rows:
            cursor = connection.execute(statements.encode())
            return cursor.fetchall() if cursor.description else []

        with connection:
            work(run)

    def close(self) -> None:
        if self._connection is not None:
            self._connection.close()
            with suppress(psycopg.Error):
                self._pipelining.__exit__(None, None, None)
            self._connection = None

    def _roll_back(self, connection: _Connection) -> None:
        # What came after the error was not parsed, but psycopg may take it for prepared, as long as it is connected.
        self._spoilt = True
        try:
            with suppress(psycopg.Error):
                self._pipeline.sync()
            if connection.info.transaction_status != TransactionStatus.IDLE:
                connection.execute("ROLLBACK")
                self._pipeline.sync()
        except psycopg.Error:
            self.close()


def connector(url: str, name: str, timeout_s: float) -> Callable[[], psycopg.Connection[tuple[Any, ...]]]:
    """Makes connections for others than Session, which take at most `timeout_s` seconds for an answer.

    Raises ValueError for a URL that is not understood; calling it, psycopg.OperationalError.
    """
    parameters = _parameters(url, name, timeout_s)

    def connect() -> psycopg.Connection[tuple[Any, ...]]:
        connection = _Connection.connect(**parameters)
        connection.patience_s = timeout_s
        return connection

    return connect


def _parameters(url: str, name: str, timeout_s: float) -> dict[str, Any]:
    """libpq's parameters: those of the URL go before ours. Raises ValueError."""
    milliseconds = round(timeout_s * 1000)
    given = _understood(url)
    bounds = {
        "statement_timeout": milliseconds,
        "lock_timeout": milliseconds // 2,
        "idle_in_transaction_session_timeout": milliseconds,  # a stopped process must not keep its locks
        "jit": "off",
    }
    options = " ".join(f"-c {setting}={value}" for setting, value in bounds.items())
    defaults = {
        "connect_timeout": max(2, math.ceil(timeout_s)),
        "tcp_user_timeout": milliseconds,
        "keepalives_idle": max(1, math.ceil(timeout_s)),
        "keepalives_interval": 1,
        "keepalives_count": 3,
    }
    given_options = given.pop("options", None)
    return {**defaults, **given, "options": f"{options} {given_options or ''}".strip(), "application_name": name}


def _understood(url: str) -> dict[str, Any]:
    """Raises ValueError without quoting the URL; libpq would quote what it stumbles over, a part of the password."""
    with suppress(psycopg.ProgrammingError):
        given = conninfo_to_dict(url)
        if url.count("@") <= 1 and str(given.get("port") or "0").replace(",", "").isdigit():
            return dict(given)
    raise ValueError("The ledger's URL is not understood; special characters of a password are written as %XX.")
