"""The ledger in one SQLite file, shared by the processes of one machine.

Owns the leases and what happens to a hold when its task is cancelled or the disk is full. What moves money is
ledger_books.py's, the file, its thread and the group commit are sqlite_writer.py's.
"""

from __future__ import annotations

import asyncio
import secrets
import sqlite3
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, closing, suppress
from functools import partial
from pathlib import Path

from ..domain import UsageEvent
from ..errors import HoldLost, Unavailable
from . import ledger_books as books
from .ledger import MAX_MICROS, IdempotencyKey
from .ledger_check import broken_laws
from .sqlite_writer import Cursor, SqliteWriter

_RETRY_RELEASE_S = 1.0

_LEASED = "SELECT 1 FROM owners WHERE id = ? AND lease_until > ?"
_RENEW = """
    INSERT INTO owners (id, lease_until) VALUES (?, ?)
    ON CONFLICT (id) DO UPDATE SET lease_until = excluded.lease_until
"""
_DEAD_HOLDS = """
    SELECT id FROM holds WHERE state = 'open' AND owner <> ?
        AND owner NOT IN (SELECT id FROM owners WHERE lease_until > ?)
"""
_ACCOUNTS = """
    SELECT account, micros FROM (SELECT account FROM balances UNION SELECT account FROM usage_events)
    LEFT JOIN balances USING (account) ORDER BY account
"""


class SqliteHold:
    """A hold of SqliteLedger; see ledger.Hold."""

    __slots__ = ("_writer", "account", "closed", "id", "micros", "request_id")

    def __init__(self, writer: SqliteWriter, id: int, account: str, request_id: str, micros: int) -> None:
        self._writer = writer
        self.id = id
        self.account = account
        self.request_id = request_id
        self.micros = micros
        self.closed = False

    async def settle(self, event: UsageEvent) -> None:
        try:
            await self._writer.submit(books.settle, self.id, event)
        except HoldLost:
            self.closed = True
            raise
        self.closed = True

    async def release(self, event: UsageEvent | None = None) -> None:
        await self._writer.submit(books.release, self.id, event)
        self.closed = True

    async def extend(self, micros: int) -> None:
        await self._writer.submit(books.extend, self.id, _amount(micros), durable=False)
        self.micros += micros


class SqliteLedger:
    """See ledger.Ledger. `lease_s` and `key_ttl_s` are seconds; the file at `path` is made if need be."""

    def __init__(self, path: str | Path, *, lease_s: float = 60.0, key_ttl_s: float = 86400.0) -> None:
        self._path = Path(path)
        self._lease_s = lease_s
        self._key_ttl_s = key_ttl_s
        self._owner = secrets.token_hex(8)
        self._writer = SqliteWriter(self._path, self._upkeep, lease_s / 3)

    @property
    def transactions(self) -> int:
        """How many transactions were committed; operations that wait together share one."""
        return self._writer.transactions

    async def start(self) -> None:
        await self._writer.start()

    async def close(self) -> None:
        await self._writer.close(self._leave)

    @asynccontextmanager
    async def hold(
        self, account: str, request_id: str, micros: int, *, key: IdempotencyKey | None = None
    ) -> AsyncIterator[SqliteHold]:
        # Not durable: a hold that a power failure undoes is a hold released, and a later settle makes both durable.
        opening = self._writer.submit(self._open, account, request_id, _amount(micros), key, durable=False)
        try:
            hold_id = await asyncio.shield(opening)
        except asyncio.CancelledError:
            opening.add_done_callback(self._undo)  # it may still commit, or have committed
            raise
        hold = SqliteHold(self._writer, hold_id, account, request_id, micros)
        try:
            yield hold
        finally:
            if not hold.closed:
                await self._give_back(hold)

    async def credit(self, account: str, micros: int, reference: str) -> int:
        return await self._writer.submit(books.add_credit, account, _amount(micros), reference)

    async def balance(self, account: str) -> int | None:
        return await self._writer.submit(books.get_balance, account)

    async def usage(self, account: str | None, limit: int) -> list[UsageEvent]:
        return await self._writer.submit(books.get_usage, account, max(limit, 0))

    async def accounts(self) -> dict[str, int | None]:
        return await asyncio.to_thread(self._accounts)

    async def check(self) -> list[str]:
        return await asyncio.to_thread(broken_laws, self._path)

    def _accounts(self) -> dict[str, int | None]:
        with closing(sqlite3.connect(self._path)) as connection:
            return dict(connection.execute(_ACCOUNTS))

    # What cancellation and failures leave behind

    async def _give_back(self, hold: SqliteHold) -> None:
        """Release what was left open. A settle that is still queued comes first; then this changes nothing."""
        hold.closed = True
        releasing = self._release_later(hold.id)
        if releasing is not None:
            with suppress(Unavailable):  # tried again in the background: the caller has nothing to add
                await asyncio.shield(releasing)

    def _undo(self, opening: asyncio.Future[int]) -> None:
        if not opening.cancelled() and opening.exception() is None:
            self._release_later(opening.result())

    def _release_later(self, hold_id: int) -> asyncio.Future[None] | None:
        """Queue a release, repeated until it commits; None once the ledger is closed: that releases all."""
        try:
            releasing = self._writer.submit(books.release_if_open, hold_id, "released", durable=False)
        except Unavailable:
            return None
        releasing.add_done_callback(partial(self._retry_release, hold_id))
        return releasing

    def _retry_release(self, hold_id: int, releasing: asyncio.Future[None]) -> None:
        if not releasing.cancelled() and releasing.exception() is not None:
            releasing.get_loop().call_later(_RETRY_RELEASE_S, self._release_later, hold_id)

    # Leases; these run in the writer's transactions

    def _open(self, db: Cursor, account: str, request_id: str, micros: int, key: IdempotencyKey | None) -> int:
        now = time.time()
        if db.execute(_LEASED, (self._owner, now)).fetchone() is None:
            # This process was suspended. Without a lease its new hold would be taken for a dead one's.
            self._renew(db, now)
        return books.open_hold(db, self._owner, self._key_ttl_s, account, request_id, micros, key)

    def _renew(self, db: Cursor, now: float) -> None:
        db.execute(_RENEW, (self._owner, now + self._lease_s))

    def _upkeep(self, db: Cursor) -> None:
        """Renew the lease, release the holds of the dead, forget old keys."""
        now = time.time()
        self._renew(db, now)
        for (hold_id,) in db.execute(_DEAD_HOLDS, (self._owner, now)).fetchall():
            books.release_if_open(db, hold_id, "lost")
        db.execute("DELETE FROM owners WHERE lease_until <= ?", (now,))
        books.forget_keys(db, now - self._key_ttl_s)

    def _leave(self, db: Cursor) -> None:
        mine = "SELECT id FROM holds WHERE state = 'open' AND owner = ?"
        for (hold_id,) in db.execute(mine, (self._owner,)).fetchall():
            books.release_if_open(db, hold_id, "released")
        db.execute("DELETE FROM owners WHERE id = ?", (self._owner,))


def _amount(micros: int) -> int:
    if not 0 <= micros <= MAX_MICROS:
        raise ValueError(f"An amount is from 0 to {MAX_MICROS} micro-units, not {micros}.")
    return micros
