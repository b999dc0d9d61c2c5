"""The ledger in one SQLite file, shared by the processes of one machine.

Owns the leases and the reading. The laws are ledger_laws.py's, the life of holds is ledger_front.py's, the rows are
sqlite_page.py's, the file and the group commit are sqlite_writer.py's.
"""

from __future__ import annotations

import asyncio
import sqlite3
import time
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path
from typing import Any, TypeVar

from ..domain import UsageEvent
from . import ledger_laws as laws
from .ledger_check import broken_laws
from .ledger_front import StoredLedger, usage_query
from .ledger_page import Act, Attempt
from .sqlite_page import perform
from .sqlite_writer import Cursor, SqliteWriter

_T = TypeVar("_T")

_LEASED = "SELECT 1 FROM owners WHERE id = ? AND lease_until > ?"
_RENEW = """
    INSERT INTO owners (id, lease_until) VALUES (?, ?)
    ON CONFLICT (id) DO UPDATE SET lease_until = excluded.lease_until
"""
_DEAD_HOLDS = """
    SELECT id, account FROM holds WHERE state = 'open' AND owner <> ?
        AND owner NOT IN (SELECT id FROM owners WHERE lease_until > ?)
"""
_MY_HOLDS = "SELECT id, account FROM holds WHERE state = 'open' AND owner = ?"
_FORGET_KEYS = """
    DELETE FROM idempotency_keys WHERE at <= ?
        AND NOT EXISTS (SELECT 1 FROM holds WHERE holds.key = idempotency_keys.id AND state = 'open')
"""
_ACCOUNTS = """
    SELECT account, micros FROM (SELECT account FROM balances UNION SELECT account FROM usage_events)
    LEFT JOIN balances USING (account) ORDER BY account
"""


class SqliteLedger(StoredLedger):
    """See ledger.Ledger. `lease_s` and `key_ttl_s` are seconds; the file at `path` is made if need be."""

    def __init__(self, path: str | Path, *, lease_s: float = 60.0, key_ttl_s: float = 86400.0) -> None:
        super().__init__(lease_s, key_ttl_s)
        self._path = Path(path)
        self._writer = SqliteWriter(self._path, self._perform, self._upkeep, lease_s / 3)

    @property
    def transactions(self) -> int:
        """How many transactions were committed; operations that wait together share one."""
        return self._writer.transactions

    async def start(self) -> None:
        await self._writer.start()

    async def close(self) -> None:
        await self._writer.close(self._leave)

    def submit(self, act: Act[_T], *, durable: bool = True) -> asyncio.Future[_T]:
        return self._writer.submit_act(act, durable=durable)

    async def balance(self, account: str) -> int | None:
        return await self._writer.submit(_balance, account)

    async def usage(self, account: str | None, limit: int, *, user: str | None = None) -> list[UsageEvent]:
        rows = await self._writer.submit(_rows, *usage_query(account, user, limit, "?"))
        return [UsageEvent(*row) for row in rows]

    async def accounts(self) -> dict[str, int | None]:
        return await asyncio.to_thread(self._accounts)

    async def check(self) -> list[str]:
        return await asyncio.to_thread(broken_laws, self._path)

    def _accounts(self) -> dict[str, int | None]:
        with closing(sqlite3.connect(self._path)) as connection:
            return dict(connection.execute(_ACCOUNTS))

    # These run in the writer's transactions

    def _perform(self, db: Cursor, acts: Sequence[Act[Any]]) -> list[Attempt]:
        now = time.time()
        opening = any(act.hold is None for act in acts)
        if opening and db.execute(_LEASED, (self._owner, now)).fetchone() is None:
            # This process was suspended. Without a lease its new holds would be taken for a dead one's.
            self._renew(db, now)
        return perform(db, acts, now)

    def _renew(self, db: Cursor, now: float) -> None:
        db.execute(_RENEW, (self._owner, now + self._lease_s))

    def _upkeep(self, db: Cursor) -> None:
        """Renew the lease, release the holds of the dead, forget old keys."""
        now = time.time()
        self._renew(db, now)
        dead = db.execute(_DEAD_HOLDS, (self._owner, now)).fetchall()
        perform(db, [laws.releasing(account, hold_id, "lost") for hold_id, account in dead], now)
        db.execute("DELETE FROM owners WHERE lease_until <= ?", (now,))
        db.execute(_FORGET_KEYS, (now - self._key_ttl_s,))

    def _leave(self, db: Cursor) -> None:
        mine = db.execute(_MY_HOLDS, (self._owner,)).fetchall()
        perform(db, [laws.releasing(account, hold_id, "released") for hold_id, account in mine], time.time())
        db.execute("DELETE FROM owners WHERE id = ?", (self._owner,))


def _balance(db: Cursor, account: str) -> int | None:
    found = db.execute("SELECT micros FROM balances WHERE account = ?", (account,)).fetchone()
    return None if found is None else int(found[0])


def _rows(db: Cursor, query: str, values: tuple[object, ...]) -> list[Any]:
    return db.execute(query, values).fetchall()
