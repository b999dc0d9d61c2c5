"""The ledger in a PostgreSQL database, shared by processes on any machines.

Owns the reading, and how long an answer is waited for. The laws are ledger_laws.py's, the life of holds is
ledger_front.py's, the rows and their locks are postgres_page.py's, transactions and leases are postgres_writer.py's.
Leases compare the database's clock alone.
"""

from __future__ import annotations

import asyncio
import re
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

import psycopg

from ..domain import UsageEvent
from ..errors import Unavailable
from .ledger_check import find_broken
from .ledger_front import StoredLedger, usage_query
from .ledger_page import Act
from .ledger_writer import unavailable
from .postgres_session import Query, Rows, Session
from .postgres_writer import PostgresWriter

_T = TypeVar("_T")

_CHECK_S = 600.0
_SHORT_WAIT_S = 0.25
"""For an answer of a database that is known to be away."""

_SNAPSHOT: Query = ("BEGIN ISOLATION LEVEL REPEATABLE READ READ ONLY", ())
_ACCOUNTS = """
    SELECT account, micros FROM (SELECT account FROM balances UNION SELECT account FROM usage_events) AS known
    LEFT JOIN balances USING (account) ORDER BY account
"""


class PostgresLedger(StoredLedger):
    """See ledger.Ledger. `url` is libpq's, also with a driver in its scheme (postgresql+psycopg://); times in seconds.

    A database that is away for `patience_s` seconds is Unavailable; shorter absences are waited out.
    """

    def __init__(self, url: str, *, lease_s: float = 60.0, key_ttl_s: float = 86400.0, patience_s: float = 5.0) -> None:
        super().__init__(lease_s, key_ttl_s)
        self._url = re.sub(r"^(postgres(?:ql)?)\+\w+://", r"\1://", url)
        self._patience_s = patience_s
        self._writer = PostgresWriter(self._url, self._owner, lease_s, key_ttl_s, patience_s)
        self._reading = Session(self._url, f"qwen3-tts reader {self._owner}", patience_s)
        self._reader = ThreadPoolExecutor(1, "postgres-reader")

    @property
    def transactions(self) -> int:
        """How many transactions were committed; operations that wait together share one."""
        return self._writer.transactions

    async def start(self) -> None:
        try:
            await self._writer.start()
        except psycopg.Error as error:
            reason = str(error).partition("\n")[0]
            raise Unavailable(f"The ledger's database cannot be used: {reason}") from error

    async def close(self) -> None:
        self._reader.shutdown(wait=False, cancel_futures=True)
        try:
            await self._writer.close(self._writer.leave)
        finally:
            await asyncio.to_thread(self._reader.shutdown)
            self._reading.close()

    def submit(self, act: Act[_T], *, durable: bool = True) -> asyncio.Future[_T]:
        return self._writer.submit(act, durable)

    async def answer(self, future: asyncio.Future[_T]) -> _T:
        # What is still queued after that is given up, too; only what was sent off may yet come to pass.
        away = self._writer.away_since
        known_to_be_away = away is not None and time.monotonic() - away > self._patience_s
        try:
            async with asyncio.timeout(_SHORT_WAIT_S if known_to_be_away else 2 * self._patience_s):
                return await asyncio.shield(future)
        except TimeoutError as error:
            raise unavailable(error) from None

    async def balance(self, account: str) -> int | None:
        found = await self._read("SELECT micros FROM balances WHERE account = %s", account)
        return int(found[0][0]) if found else None

    async def usage(self, account: str | None, limit: int, *, user: str | None = None) -> list[UsageEvent]:
        query, values = usage_query(account, user, limit, "%s")
        return [UsageEvent(*row) for row in await self._read(query, *values)]

    async def accounts(self) -> dict[str, int | None]:
        return dict(await self._read(_ACCOUNTS))

    async def check(self) -> list[str]:
        return await asyncio.to_thread(self._check)

    def _check(self) -> list[str]:
        session = Session(self._url, f"qwen3-tts check {self._owner}", _CHECK_S)
        try:
            session.run(_SNAPSHOT)  # one snapshot: ongoing writes neither wait for it nor confuse it
            return find_broken(lambda query: session.run((query, ()))[0])
        except psycopg.Error as error:
            raise unavailable(error) from None
        finally:
            session.close()

    async def _read(self, sql: str, *values: Any) -> Rows:
        """The rows of one query, in a thread and on a connection that wait for no writer."""
        if self._writer.closed:
            raise Unavailable("The ledger is not open.")
        try:
            async with asyncio.timeout(2 * self._patience_s):
                return await asyncio.get_running_loop().run_in_executor(self._reader, self._ask, (sql, values))
        except (TimeoutError, psycopg.Error) as error:
            raise unavailable(error) from None

    def _ask(self, query: Query) -> Rows:
        if self._reading.connected:
            try:
                return self._reading.run(query)[0]
            except psycopg.OperationalError:
                self._reading.close()  # the server may have been restarted since
        return self._reading.run(query)[0]
