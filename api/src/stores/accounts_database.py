"""The ledger's database as SQLAlchemy sees it: transactions in threads, so that the event loop never waits.

Owns the engine, the threads, and what trouble with the database becomes. Connects when it is first used, so that a
database that is away at the start harms nobody. The ledger makes the file and runs the migrations.
"""

from __future__ import annotations

import asyncio
import logging
import sqlite3
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import quote

from sqlalchemy import Connection, Engine, QueuePool, create_engine, event
from sqlalchemy.exc import SQLAlchemyError

from ..errors import Unavailable
from .ledger_choice import POSTGRES, SQLITE

_T = TypeVar("_T")
_THREADS = 4
_AWAY = "Accounts and keys cannot be looked up at the moment. Please try again."
_log = logging.getLogger(__name__)


class AccountsDatabase:
    """`url` is the ledger's. A statement is waited for `timeout_s` seconds, and an answer twice that."""

    def __init__(self, url: str, timeout_s: float) -> None:
        self._engine = _engine(url, timeout_s)
        self._reading = self._engine.execution_options(read_only=True)
        self._timeout_s = timeout_s
        self._threads = ThreadPoolExecutor(_THREADS, "accounts")
        self._away = False

    async def read(self, work: Callable[[Connection], _T]) -> _T:
        """What `work` finds. Raises Unavailable."""
        return await self._answer(self._submit(self._reading, work))

    async def write(self, work: Callable[[Connection], _T], done: Callable[[], None]) -> _T:
        """Let `work` change things in one transaction. Raises Unavailable: then nothing has happened, or, where it
        is the answer that came too late, it may have.

        `done` is called on the event loop when the transaction has ended, however, also if nobody waits any more.
        """
        writing = self._submit(self._engine, work)
        writing.add_done_callback(lambda _: done())
        return await self._answer(writing)

    async def close(self) -> None:
        """Let go of threads and connections. May be called twice."""
        self._threads.shutdown(wait=False, cancel_futures=True)
        await asyncio.to_thread(self._threads.shutdown)
        self._engine.dispose()

    def _submit(self, engine: Engine, work: Callable[[Connection], _T]) -> asyncio.Future[_T]:
        try:
            return asyncio.get_running_loop().run_in_executor(self._threads, self._transact, engine, work)
        except RuntimeError:  # the threads have been let go
            raise Unavailable(_AWAY) from None

    async def _answer(self, future: asyncio.Future[_T]) -> _T:
        try:
            async with asyncio.timeout(2 * self._timeout_s):
                return await asyncio.shield(future)
        except (TimeoutError, SQLAlchemyError) as error:
            raise Unavailable(_AWAY) from error

    def _transact(self, engine: Engine, work: Callable[[Connection], _T]) -> _T:
        try:
            with engine.begin() as connection:
                result = work(connection)
        except SQLAlchemyError as error:
            self._note(error)
            raise
        if self._away:
            self._away = False
            _log.warning("the accounts' database is back")
        return result

    def _note(self, error: SQLAlchemyError) -> None:
        """Log trouble, but an absence only once."""
        cause = error.__cause__ or error
        if not self._away:
            reason = str(cause).partition("\n")[0]
            _log.warning("the accounts' database cannot be used: %s: %s", type(cause).__name__, reason)
        self._away = True


def _engine(url: str, timeout_s: float) -> Engine:
    # The parameters of a statement hold digests: they stay out of every error.
    options: dict[str, Any] = {
        "hide_parameters": True,
        "poolclass": QueuePool,
        "pool_size": _THREADS,
        "max_overflow": 0,
    }
    if url.startswith(SQLITE):
        path = Path(url.removeprefix(SQLITE))
        engine = create_engine("sqlite+pysqlite://", creator=lambda: _open_file(path, timeout_s), **options)
        event.listen(engine, "begin", _begin)
        return engine
    from .postgres_session import connector  # needs psycopg, an extra

    connect = connector(url.replace(POSTGRES[1], POSTGRES[0], 1), "qwen3-tts accounts", timeout_s)
    options |= {"pool_pre_ping": True, "use_native_hstore": False}
    return create_engine("postgresql+psycopg://", creator=connect, **options)


def _open_file(path: Path, timeout_s: float) -> sqlite3.Connection:
    # Only the ledger makes the file; and we begin transactions ourselves.
    uri = f"file:{quote(str(path.absolute()))}?mode=rw"
    connection = sqlite3.connect(uri, uri=True, timeout=timeout_s, isolation_level=None, check_same_thread=False)
    connection.execute("PRAGMA foreign_keys=ON")
    connection.execute("PRAGMA fullfsync=ON")
    return connection


def _begin(connection: Connection) -> None:
    """A transaction that began by reading could not wait for a writer: it would fail at once."""
    reading = connection.get_execution_options().get("read_only", False)
    connection.exec_driver_sql("BEGIN" if reading else "BEGIN IMMEDIATE")
