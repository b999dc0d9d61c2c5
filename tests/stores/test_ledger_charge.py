"""Charges: a hold and its end in one, in each database in turn."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import suppress
from dataclasses import replace

import pytest

from api.src.errors import InsufficientBalance, InvalidRequest, Unavailable
from api.src.stores.ledger import MAX_MICROS, IdempotencyKey, Ledger
from api.src.stores.ledger_postgres import PostgresLedger
from api.src.stores.ledger_sqlite import SqliteLedger
from tests.postgres import PostgresServer
from tests.stores.conftest import OpenLedger
from tests.stores.ledgers import LedgerStore, PostgresStore, SqliteStore, event, eventually, free_event, held_up
from tests.stores.lossy_proxy import LossyProxy

KEY = IdempotencyKey("k", "digest")
PAID = replace(free_event("r1"), price_micros=30)


async def test_a_charge_holds_and_settles_at_once(ledger: Ledger, store: LedgerStore) -> None:
    await ledger.credit("ann", 100, "c1")
    await ledger.charge(PAID)
    assert await ledger.balance("ann") == 70
    assert await ledger.usage("ann", 10) == [PAID]
    assert store.query("SELECT request_id, price, held, wallet, state FROM holds") == [("r1", 30, 0, 1, "settled")]
    assert store.query("SELECT kind, micros FROM entries WHERE hold IS NOT NULL ORDER BY id") == [
        ("hold", 30),
        ("charge", 30),
    ]


async def test_what_costs_nothing_has_no_hold(ledger: Ledger, store: LedgerStore) -> None:
    await ledger.credit("ann", 100, "c1")
    await ledger.charge(free_event("r1"))
    await eventually(lambda: store.query("SELECT request_id FROM usage_events") == [("r1",)])
    assert await ledger.usage("ann", 10) == [free_event("r1")]
    assert (await ledger.balance("ann"), store.query("SELECT id FROM holds")) == (100, [])


async def test_a_charge_that_is_refused_leaves_nothing(ledger: Ledger, store: LedgerStore) -> None:
    await ledger.credit("ann", 29, "c1")
    with pytest.raises(InsufficientBalance):
        await ledger.charge(PAID, key=KEY)
    for micros in (-1, MAX_MICROS + 1):
        with pytest.raises(ValueError, match=str(micros)):
            await ledger.charge(replace(PAID, price_micros=micros))
    assert (await ledger.balance("ann"), await ledger.usage("ann", 10)) == (29, [])
    assert store.query("SELECT id FROM holds UNION SELECT id FROM idempotency_keys") == []


async def test_a_repeat_is_not_charged_again(ledger: Ledger) -> None:
    await ledger.credit("ann", 100, "c1")
    await ledger.charge(PAID, key=KEY)
    await ledger.charge(replace(PAID, request_id="r2"), key=KEY)
    await ledger.charge(replace(PAID, request_id="r3", price_micros=0), key=KEY)
    assert await ledger.balance("ann") == 70
    assert [used.price_micros for used in await ledger.usage("ann", 10)] == [0, 0, 30]
    for price in (0, 30):
        with pytest.raises(InvalidRequest):
            await ledger.charge(replace(PAID, price_micros=price), key=IdempotencyKey("k", "other"))


async def test_a_repeat_that_is_there_already_pays_from_the_firsts_reserve(ledger: Ledger) -> None:
    await ledger.credit("ann", 50, "c1")
    async with ledger.hold("ann", "first", 50, key=KEY) as first:
        await ledger.charge(PAID, key=KEY)
        assert await ledger.balance("ann") == 0
        await first.settle(event(first, 50))
    assert sorted(used.price_micros for used in await ledger.usage("ann", 10)) == [20, 30]


async def test_a_hundred_at_once_get_what_is_there_for_ten(open_ledger: OpenLedger) -> None:
    ledgers = [await open_ledger(), await open_ledger()]
    await ledgers[0].credit("ann", 105, "c1")
    events = [replace(PAID, request_id=f"r{number}", price_micros=10) for number in range(100)]
    results = await asyncio.gather(
        *(ledgers[number % 2].charge(told) for number, told in enumerate(events)), return_exceptions=True
    )
    assert sum(isinstance(result, InsufficientBalance) for result in results) == 90
    assert await ledgers[1].balance("ann") == 5
    assert len(await ledgers[1].usage("ann", 1000)) == 10


@pytest.fixture(params=["sqlite", "postgres"])
async def stored(request: pytest.FixtureRequest) -> AsyncIterator[SqliteLedger | PostgresLedger]:
    """A ledger with a writer of its own, and money for ann."""
    path = request.getfixturevalue("tmp_path") / "ledger.db"
    sqlite = request.param == "sqlite"
    store = SqliteStore(path) if sqlite else PostgresStore(request.getfixturevalue("postgres"))
    ledger = store.ledger()
    await ledger.start()
    await ledger.credit("ann", 100, "c1")
    yield ledger
    assert await ledger.check() == []
    await ledger.close()


async def test_what_nobody_waits_for_any_more_does_not_happen(stored: SqliteLedger | PostgresLedger) -> None:
    async with held_up(stored):
        charging = [
            asyncio.ensure_future(stored.charge(told))
            for told in (PAID, replace(PAID, request_id="r2", price_micros=0))
        ]
        await asyncio.sleep(0)
        for work in charging:
            work.cancel()
        await asyncio.gather(*charging, return_exceptions=True)
    await stored.charge(replace(PAID, request_id="r4", price_micros=1))
    assert [used.request_id for used in await stored.usage("ann", 10)] == ["r4"]
    assert await stored.balance("ann") == 99


async def test_what_waits_together_shares_a_transaction(stored: SqliteLedger | PostgresLedger) -> None:
    prices = [number % 2 for number in range(100)]
    async with held_up(stored):
        before = stored.transactions
        charging = [
            asyncio.ensure_future(stored.charge(replace(PAID, request_id=f"r{number}", price_micros=price)))
            for number, price in enumerate(prices)
        ]
        await asyncio.sleep(0)
    await asyncio.gather(*charging)
    assert stored.transactions - before <= 2  # the one that was held up may count, too
    assert await stored.balance("ann") == 50
    assert len(await stored.usage("ann", 1000)) == 100


@pytest.mark.parametrize("price", [0, 30])
async def test_a_charge_that_cannot_be_stored_harms_nobody_else(
    stored: SqliteLedger | PostgresLedger, price: int
) -> None:
    odd = replace(PAID, request_id="odd", price_micros=price, characters=2**70)
    even = [replace(PAID, request_id=f"r{number}", price_micros=number) for number in (0, 1)]
    async with held_up(stored):
        charging = [asyncio.ensure_future(stored.charge(told)) for told in (even[0], odd, even[1])]
        await asyncio.sleep(0)
    results = await asyncio.gather(*charging, return_exceptions=True)
    assert (results[0], results[2]) == (None, None)
    assert isinstance(results[1], ValueError | OverflowError | Unavailable)
    assert sorted(used.request_id for used in await stored.usage("ann", 10)) == ["r0", "r1"]
    assert await stored.balance("ann") == 99


@pytest.mark.parametrize("price", [0, 30])
@pytest.mark.parametrize("loss", ["request", "answer", "silence", "late"])
async def test_a_charge_whose_connection_breaks_happens_once(postgres: PostgresServer, loss: str, price: int) -> None:
    store = PostgresStore(postgres)
    async with LossyProxy(postgres.socket) as proxy:
        ledger = PostgresLedger(postgres.url(store.database, "127.0.0.1", proxy.port), patience_s=1.0)
        await ledger.start()
        await ledger.credit("ann", 100, "c1")
        proxy.lose(loss)
        refused = False
        try:
            await ledger.charge(replace(PAID, price_micros=price))
        except Unavailable:
            refused = True
        await proxy.deliver()
        with suppress(Unavailable):
            await ledger.balance("ann")
        charged = store.query("SELECT price_micros FROM usage_events")
        assert charged == [(price,)] or (refused and charged == [])
        assert store.query("SELECT micros FROM balances") == [(100 - sum(micros for (micros,) in charged),)]
        assert proxy.losses == 1
        await ledger.close()
    store.drop()


async def test_a_charge_takes_few_round_trips(postgres: PostgresServer, monkeypatch: pytest.MonkeyPatch) -> None:
    store = PostgresStore(postgres)
    ledger = store.ledger()
    await ledger.start()
    await ledger.credit("ann", 100, "c1")
    run: Callable[..., object] = ledger._writer._session.run
    trips: list[int] = []
    monkeypatch.setattr(ledger._writer._session, "run", lambda *queries: trips.append(len(queries)) or run(*queries))
    await ledger.charge(free_event("r1"))
    assert trips == [3]  # begin, store, commit
    await ledger.charge(replace(PAID, request_id="r2"))
    assert trips == [3, 4, 5]  # begin, lease, lock and balance; hold, balance, entries, event and commit
    await ledger.close()
    store.drop()
