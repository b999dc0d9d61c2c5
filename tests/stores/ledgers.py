"""The databases that a ledger can be in, behind one face: what the tests of every ledger need of them."""

from __future__ import annotations

import asyncio
import sqlite3
import time
from abc import ABC, abstractmethod
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

from api.src.domain import Outcome, UsageEvent
from api.src.stores.ledger import Hold
from api.src.stores.ledger_front import StoredLedger
from api.src.stores.ledger_postgres import PostgresLedger
from api.src.stores.ledger_sqlite import SqliteLedger
from tests.postgres import PostgresServer


def event(hold: Hold, price: int, outcome: Outcome = "completed") -> UsageEvent:
    return UsageEvent(hold.request_id, hold.account, "tts-1", "alloy", 10, 800, outcome, price, 1.5)


async def eventually(condition: Callable[[], bool], seconds: float = 10.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not come to pass"
        await asyncio.sleep(0.01)


class LedgerStore(ABC):
    """An empty database for ledgers; `url` is what the settings call it."""

    url: str

    @abstractmethod
    def ledger(self, **options: float) -> StoredLedger:
        """A ledger in it, not started."""

    @abstractmethod
    def query(self, sql: str) -> list[tuple[Any, ...]]:
        """Run a statement, committed at once, beside whatever the ledgers do."""

    @abstractmethod
    def schema(self) -> int:
        """The number of the last migration."""

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

    def pretend_schema(self, number: int) -> None:
        self.query(f"PRAGMA user_version = {number}")

    def drop_guards(self) -> None:
        self.query("DROP TRIGGER entries_keep")
        self.query("DROP TRIGGER entries_stay")


_GUARDS = """
    SELECT format('ALTER TABLE %I DROP CONSTRAINT %I', conrelid::regclass, conname)
    FROM pg_constraint WHERE contype IN ('c', 'f') AND connamespace = 'public'::regnamespace
"""


class PostgresStore(LedgerStore):
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

    def pretend_schema(self, number: int) -> None:
        self.query(f"INSERT INTO ledger_migrations VALUES ({number})")

    def drop_guards(self) -> None:
        self.query("DROP TRIGGER entries_keep ON entries")
        for (statement,) in self.query(_GUARDS):
            self.query(statement)

    def drop(self) -> None:
        self.server.drop_database(self.database)
