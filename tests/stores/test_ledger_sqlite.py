"""The SQLite ledger's file and its writer: locked, full, refused, synced."""

from __future__ import annotations

import asyncio
import sqlite3
import stat
import threading
from collections.abc import AsyncIterator
from contextlib import closing
from pathlib import Path

import pytest

from api.src.errors import Unavailable
from api.src.stores import ledger_front
from api.src.stores.ledger import Ledger
from api.src.stores.ledger_sqlite import SqliteLedger
from api.src.stores.sqlite_writer import SqliteWriter
from tests.stores.ledgers import SqliteStore, event, eventually


@pytest.fixture
def store(tmp_path: Path) -> SqliteStore:
    return SqliteStore(tmp_path / "state" / "ledger.db")


@pytest.fixture
def path(store: SqliteStore) -> Path:
    return store.path


async def test_an_enter_that_is_cancelled_before_its_commit_is_undone(ledger: SqliteLedger, store: SqliteStore):
    await ledger.credit("ann", 10, "c1")
    gate = threading.Event()
    held_up = ledger._writer.submit(lambda _: gate.wait(10))
    entering = asyncio.ensure_future(ledger.hold("ann", "r1", 10).__aenter__())
    await asyncio.sleep(0)
    entering.cancel()
    with pytest.raises(asyncio.CancelledError):
        await entering
    gate.set()
    await held_up
    await eventually(lambda: store.query("SELECT state FROM holds") == [("released",)])
    assert await ledger.balance("ann") == 10


async def test_a_file_that_cannot_be_opened_fails_the_start(tmp_path: Path):
    ledger = SqliteLedger(tmp_path)
    with pytest.raises(sqlite3.OperationalError):
        await ledger.start()


async def test_only_its_user_may_read_the_file(ledger: Ledger, path: Path):
    await ledger.credit("ann", 1, "c1")
    modes = {file.name: stat.S_IMODE(file.stat().st_mode) for file in path.parent.iterdir()}
    assert modes.pop("ledger.db-shm", 0o600) == 0o600
    assert modes == {"ledger.db": 0o600, "ledger.db-wal": 0o600}


async def test_what_waits_together_is_committed_together(ledger: SqliteLedger):
    gate = threading.Event()
    held_up = ledger._writer.submit(lambda _: gate.wait(10))
    before = ledger.transactions
    waiting = [asyncio.ensure_future(ledger.credit("ann", 1, f"c{number}")) for number in range(200)]
    await asyncio.sleep(0)
    gate.set()
    await held_up
    assert sorted(await asyncio.gather(*waiting)) == list(range(1, 201))
    assert ledger.transactions - before <= 2


async def test_a_failing_operation_harms_nobody_else(ledger: SqliteLedger):
    def half_done(db: sqlite3.Cursor, then: str) -> None:
        db.execute("INSERT INTO balances VALUES ('thief', 1)")
        db.execute(then)
        raise ZeroDivisionError

    gate = threading.Event()
    held_up = ledger._writer.submit(lambda _: gate.wait(10))
    before = ledger.transactions
    jobs = [
        asyncio.ensure_future(ledger.credit("ann", 1, "c1")),
        ledger._writer.submit(half_done, "SELECT 1"),
        ledger._writer.submit(half_done, "SELECT nonsense"),
        asyncio.ensure_future(ledger.credit("\ud800", 1, "c1")),
        asyncio.ensure_future(ledger.credit("ann", 1, "c2")),
    ]
    await asyncio.sleep(0)
    gate.set()
    await held_up
    results = await asyncio.gather(*jobs, return_exceptions=True)
    assert sorted(result for result in results if isinstance(result, int)) == [1, 2]
    assert {type(error) for error in results} == {int, ZeroDivisionError, Unavailable, UnicodeEncodeError}
    assert ledger.transactions - before <= 2
    assert await ledger.balance("thief") is None


async def test_a_full_disk_is_a_clean_error_and_passes(ledger: SqliteLedger):
    await ledger.credit("ann", 1, "c1")

    def limit(db: sqlite3.Cursor, pages: int) -> None:
        db.execute(f"PRAGMA max_page_count = {pages}").fetchone()

    await ledger._writer.submit(limit, 1)
    big = "x" * 100_000
    results = await asyncio.gather(
        *(ledger.credit("ann", 1, f"{big}{number}") for number in range(5)), return_exceptions=True
    )
    assert {type(result) for result in results} == {Unavailable}
    await ledger._writer.submit(limit, 10**6)
    assert await ledger.credit("ann", 1, big) == 2


async def test_a_failing_commit_undoes_the_batch_and_the_thread_goes_on(ledger: SqliteLedger):
    def deny_commits(db: sqlite3.Cursor) -> None:
        db.connection.set_authorizer(
            lambda action, what, *_: (
                sqlite3.SQLITE_DENY if (action, what) == (sqlite3.SQLITE_TRANSACTION, "COMMIT") else sqlite3.SQLITE_OK
            )
        )

    async with ledger.hold("ann", "r1", 10) as hold:
        denied = [ledger._writer.submit(deny_commits), asyncio.ensure_future(hold.settle(event(hold, 10)))]
        results = await asyncio.gather(*denied, return_exceptions=True)
        assert {type(result) for result in results} == {Unavailable}
        await ledger._writer.submit(lambda db: db.connection.set_authorizer(None))
        assert await ledger.usage("ann", 10) == []
        await hold.settle(event(hold, 10))
    assert [used.price_micros for used in await ledger.usage("ann", 10)] == [10]


@pytest.fixture
async def impatient(ledger: SqliteLedger, path: Path) -> AsyncIterator[SqliteLedger]:
    """A ledger that waits 50 ms for the write lock."""
    impatient = SqliteLedger(path)
    impatient._writer = SqliteWriter(path, impatient._perform, impatient._upkeep, 20.0, busy_s=0.05)
    await impatient.start()
    yield impatient
    await impatient.close()


async def test_what_a_locked_file_refused_can_be_tried_again(impatient: SqliteLedger, path: Path):
    async with impatient.hold("ann", "r1", 10) as hold:
        with closing(sqlite3.connect(path, isolation_level=None)) as other:
            other.execute("BEGIN IMMEDIATE")
            for refused in (hold.settle(event(hold, 10)), impatient.balance("ann"), hold.extend(1)):
                with pytest.raises(Unavailable):
                    await refused
        await hold.settle(event(hold, 10))
    assert [used.price_micros for used in await impatient.usage("ann", 10)] == [10]


async def test_a_hold_left_while_the_file_is_locked_is_released_later(
    impatient: SqliteLedger, store: SqliteStore, path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(ledger_front, "_RETRY_RELEASE_S", 0.05)
    await impatient.credit("ann", 10, "c1")
    with closing(sqlite3.connect(path, isolation_level=None)) as other:
        async with impatient.hold("ann", "r1", 10):
            other.execute("BEGIN IMMEDIATE")
        assert store.open_holds() == 1
    await eventually(lambda: store.open_holds() == 0)
    assert await impatient.balance("ann") == 10


async def test_only_settles_and_credits_wait_for_the_disk(ledger: SqliteLedger):
    def synchronous(db: sqlite3.Cursor) -> int:
        return int(db.execute("PRAGMA synchronous").fetchone()[0])

    assert await ledger._writer.submit(synchronous, durable=False) == 1
    assert await ledger._writer.submit(synchronous) == 2
    async with ledger.hold("ann", "r1", 10) as hold:
        assert ledger._writer._synchronous == "NORMAL"
        await hold.settle(event(hold, 10))
        assert ledger._writer._synchronous == "FULL"
