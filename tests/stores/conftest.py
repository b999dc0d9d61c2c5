"""Ledgers in real databases, SQLite in a folder and PostgreSQL in a server that the tests start; also behind Redis."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from pathlib import Path
from typing import TypeAlias

import pytest

from api.src.stores.ledger import Ledger
from tests.postgres import PostgresServer, running_server
from tests.redis_server import RedisServer, running_redis
from tests.stores.ledgers import BehindRedisStore, LedgerStore, PostgresStore, SqliteStore

OpenLedger: TypeAlias = Callable[..., Awaitable[Ledger]]


@pytest.fixture(scope="session")
def postgres() -> Iterator[PostgresServer]:
    """A fast server for everybody."""
    with running_server() as server:
        yield server


@pytest.fixture(scope="session")
def durable_postgres() -> Iterator[PostgresServer]:
    with running_server(durable=True) as server:
        yield server


@pytest.fixture
def mortal(durable_postgres: PostgresServer) -> PostgresServer:
    """A server that writes everything down, to be killed; alive, whatever became of it before."""
    durable_postgres.start()
    return durable_postgres


@pytest.fixture(scope="session")
def redis_server() -> Iterator[RedisServer]:
    """A server for everybody."""
    with running_redis() as server:
        yield server


@pytest.fixture
def redis(redis_server: RedisServer) -> Iterator[RedisServer]:
    """The server, empty, and as it was started."""
    yield redis_server
    with redis_server.client() as client:
        client.config_set("maxmemory", 0)
        client.config_set("appendonly", "yes")
        client.flushall()


DATABASES = ["sqlite", "postgres"]


@pytest.fixture(params=[*DATABASES, "sqlite behind redis"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[LedgerStore]:
    """An empty database, of each kind in turn."""
    yield from opened(request, tmp_path)


def opened(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[LedgerStore]:
    """An empty database of the kind that a fixture is parametrised with."""
    if request.param == "postgres":
        store = PostgresStore(request.getfixturevalue("postgres"))
        yield store
        store.drop()
        return
    sqlite = SqliteStore(tmp_path / "state" / "ledger.db")
    yield sqlite if request.param == "sqlite" else BehindRedisStore(sqlite, request.getfixturevalue("redis"))


@pytest.fixture
async def open_ledger(store: LedgerStore) -> AsyncIterator[OpenLedger]:
    """Start ledgers in the store; at the end their books must be sound."""
    opened: list[Ledger] = []

    async def open_one(**options: float) -> Ledger:
        ledger = store.ledger(**options)
        await ledger.start()
        opened.append(ledger)
        return ledger

    yield open_one
    assert [await ledger.check() for ledger in opened] == [[] for _ in opened]
    for ledger in opened:
        await ledger.close()


@pytest.fixture
async def ledger(open_ledger: OpenLedger) -> Ledger:
    return await open_ledger()
