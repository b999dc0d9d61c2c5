"""Ledgers in real databases: SQLite in a folder, PostgreSQL in a server that the tests start."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from pathlib import Path
from typing import TypeAlias

import pytest

from api.src.stores.ledger_front import StoredLedger
from tests.postgres import PostgresServer, running_server
from tests.stores.ledgers import LedgerStore, PostgresStore, SqliteStore

OpenLedger: TypeAlias = Callable[..., Awaitable[StoredLedger]]


@pytest.fixture(scope="session")
def postgres() -> Iterator[PostgresServer]:
    """A fast server for everybody."""
    with running_server() as server:
        yield server


@pytest.fixture(params=["sqlite", "postgres"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[LedgerStore]:
    """An empty database, of each kind in turn."""
    if request.param == "sqlite":
        yield SqliteStore(tmp_path / "state" / "ledger.db")
        return
    store = PostgresStore(request.getfixturevalue("postgres"))
    yield store
    store.drop()


@pytest.fixture
async def open_ledger(store: LedgerStore) -> AsyncIterator[OpenLedger]:
    """Start ledgers in the store; at the end their books must be sound."""
    opened: list[StoredLedger] = []

    async def open_one(**options: float) -> StoredLedger:
        ledger = store.ledger(**options)
        await ledger.start()
        opened.append(ledger)
        return ledger

    yield open_one
    assert [await ledger.check() for ledger in opened] == [[] for _ in opened]
    for ledger in opened:
        await ledger.close()


@pytest.fixture
async def ledger(open_ledger: OpenLedger) -> StoredLedger:
    return await open_ledger()
