"""The databases that a ledger can be in, behind one face: what the tests of every ledger need of them."""

from __future__ import annotations

import asyncio
import sqlite3
import threading
import time
from abc import ABC, abstractmethod
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, closing
from pathlib import Path
from typing import Any

from api.src.domain import Outcome, UsageEvent
from api.src.stores.ledger import Hold, Ledger
from api.src.stores.ledger_postgres import PostgresLedger
from api.src.stores.ledger_sqlite import SqliteLedger
from api.src.stores.ledger_write_behind import WriteBehind, WriteBehindLedger
from tests.postgres import PostgresServer
from tests.redis_server import RedisServer

PATIENCE_S = 30.0
"""With a Redis that lives: where the time-out itself is not tested, a busy machine may take its time."""


def event(hold: Hold, price: int, outcome: Outcome = "completed") -> UsageEvent:
    return UsageEvent(hold.request_id, hold.account, "tts-1", "alloy", 10, 800, outcome, price, 1.5)


async def eventually(condition: Callable[[], bool], seconds: float = 30.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not come to pass"
        await asyncio.sleep(0.01)


def free_event(request_id: str, account: str = "ann", user: str = "") -> UsageEvent:
    """Of a request that cost nothing."""
    return UsageEvent(request_id, account, "tts-1", "alloy", 10, 800, "cached", 0, 1.5, user)


@asynccontextmanager
async def held_up(ledger: SqliteLedger | PostgresLedger) -> AsyncIterator[None]:
    """What is submitted here is done together afterwards."""
    reached, gate = threading.Event(), threading.Event()

    def wait(*_: object) -> None:
        reached.set()
        gate.wait(10)

    waiting = ledger._writer._enqueue(wait)
    await asyncio.to_thread(reached.wait)
    try:
        yield
    finally:
        gate.set()
        await waiting


async def tell(ledger: Ledger, event: UsageEvent) -> None:
    """Make a free request that used so much."""
    async with ledger.hold(event.account, event.request_id, 0) as hold:
        await hold.settle(event)


class LedgerStore(ABC):
    """An empty database for ledgers; `url` is what the settings call it."""

    url: str
    kind: str
    """The folder of its migrations."""

    @abstractmethod
    def ledger(self, **options: float) -> Ledger:
        """A ledger in it, not started."""

    @abstractmethod
    def query(self, sql: str) -> list[tuple[Any, ...]]:
        """Run a statement, committed at once, beside whatever the ledgers do."""

    @abstractmethod
    def schema(self) -> int:
        """The number of the last migration."""

    @abstractmethod
    def script(self, first: str) -> None:
        """Make a new database with the first migration alone."""

    @abstractmethod
    def pretend_schema(self, number: int) -> None: ...

    @abstractmethod
    def drop_guards(self) -> None:
        """Let the tests do damage that the database itself would refuse."""

    def open_holds(self) -> int:
        return len(self.query("SELECT id FROM holds WHERE state = 'open'"))

    def expire_leases(self) -> None:
        self.query("UPDATE owners SET lease_until = 0")


class SqliteStore(LedgerStore):
    kind = "sqlite"

    def __init__(self, path: Path) -> None:
        self.path = path
        self.url = f"sqlite:///{path}"

    def ledger(self, **options: float) -> SqliteLedger:
        return SqliteLedger(self.path, **options)

    def query(self, sql: str) -> list[tuple[Any, ...]]:
        with closing(sqlite3.connect(self.path)) as connection, connection:
            connection.execute("PRAGMA ignore_check_constraints=ON")
            return connection.execute(sql).fetchall()

    def schema(self) -> int:
        return int(self.query("PRAGMA user_version")[0][0])

    def script(self, first: str) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with closing(sqlite3.connect(self.path)) as connection:
            connection.executescript(f"{first}; PRAGMA user_version = 1")

    def pretend_schema(self, number: int) -> None:
        self.query(f"PRAGMA user_version = {number}")

    def drop_guards(self) -> None:
        self.query("DROP TRIGGER entries_keep")
        self.query("DROP TRIGGER entries_stay")
        self.query("DROP INDEX usage_events_once")


_GUARDS = """
    SELECT format('ALTER TABLE %I DROP CONSTRAINT %I', conrelid::regclass, conname)
    FROM pg_constraint WHERE contype IN ('c', 'f') AND connamespace = 'public'::regnamespace
"""


class PostgresStore(LedgerStore):
    kind = "postgres"

    def __init__(self, server: PostgresServer) -> None:
        self.server = server
        self.database = server.new_database()
        self.url = server.url(self.database)

    def ledger(self, **options: float) -> PostgresLedger:
        return PostgresLedger(self.url, **options)

    def query(self, sql: str) -> list[tuple[Any, ...]]:
        return self.server.execute(self.database, sql)

    def schema(self) -> int:
        return int(self.query("SELECT max(number) FROM ledger_migrations")[0][0])

    def script(self, first: str) -> None:
        self.query(f"{first}; CREATE TABLE ledger_migrations (number INTEGER PRIMARY KEY)")
        self.pretend_schema(1)

    def pretend_schema(self, number: int) -> None:
        self.query(f"DELETE FROM ledger_migrations WHERE number > {number}")
        self.query(f"INSERT INTO ledger_migrations VALUES ({number}) ON CONFLICT DO NOTHING")

    def drop_guards(self) -> None:
        self.query("DROP TRIGGER entries_keep ON entries")
        self.query("DROP INDEX usage_events_once")
        for (statement,) in self.query(_GUARDS):
            self.query(statement)

    def drop(self) -> None:
        self.server.drop_database(self.database)


class BehindRedisStore(LedgerStore):
    """Another store, with the events of free requests going through Redis."""

    def __init__(self, store: LedgerStore, redis: RedisServer) -> None:
        self.store = store
        self.redis = redis
        self.url = store.url
        self.kind = store.kind

    def ledger(self, *, behind: WriteBehind | None = None, **options: float) -> WriteBehindLedger:
        behind = behind or WriteBehind(flush_interval_s=0.02, redis_timeout_s=PATIENCE_S)
        return WriteBehindLedger(self.store.ledger(**options), self.redis.url(), behind)

    def query(self, sql: str) -> list[tuple[Any, ...]]:
        return self.store.query(sql)

    def schema(self) -> int:
        return self.store.schema()

    def script(self, first: str) -> None:
        self.store.script(first)

    def pretend_schema(self, number: int) -> None:
        self.store.pretend_schema(number)

    def drop_guards(self) -> None:
        self.store.drop_guards()

    def told(self) -> list[str]:
        """The requests of the usage events that the ledger has, as often as it has them, oldest first."""
        return [request for (request,) in self.query("SELECT request_id FROM usage_events ORDER BY id")]
