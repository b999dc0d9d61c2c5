"""Usage events that have no hold, those of end users, and the books of an earlier version, in each database in turn."""

from __future__ import annotations

import asyncio
from dataclasses import replace

import pytest

from api.src.domain import UsageEvent
from api.src.stores.ledger import Ledger
from api.src.stores.ledger_migrations import scripts_after
from tests.stores.conftest import OpenLedger
from tests.stores.ledgers import LedgerStore, event, free_event


async def test_an_event_without_a_hold_is_recorded_once(ledger: Ledger, open_ledger: OpenLedger) -> None:
    events = [free_event(f"r{number}") for number in range(5)]
    other = await open_ledger()
    await asyncio.gather(*(books.record(events[:count]) for books in (ledger, other) for count in (3, 0, 5, 4)))
    assert sorted(used.request_id for used in await ledger.usage("ann", 10)) == ["r0", "r1", "r2", "r3", "r4"]
    assert await ledger.accounts() == {"ann": None}


@pytest.mark.parametrize(
    "wrong", [{"price_micros": 1}, {"characters": 2**70}, {"voice": "\ud800"}, {"audio_ms": None}, {"model": None}]
)
async def test_of_events_that_cannot_be_stored_none_is(ledger: Ledger, wrong: dict[str, object]) -> None:
    with pytest.raises(ValueError, match=r"events|needs a hold|surrogates"):
        await ledger.record([free_event("r1"), replace(free_event("r2"), **wrong), free_event("r3")])
    await ledger.record([free_event("r4")])
    assert [used.request_id for used in await ledger.usage("ann", 10)] == ["r4"]


async def test_usage_can_be_of_one_end_user(ledger: Ledger) -> None:
    told: list[UsageEvent] = []
    for number, user in enumerate(["emma", "", "emil", "emma"]):
        async with ledger.hold("ann", f"r{number}", 1) as hold:
            told.append(replace(event(hold, 1), user=user))
            await hold.settle(told[-1])
    await ledger.record([free_event("r4", account="bob", user="emma")])
    assert await ledger.usage("ann", 10) == told[::-1]
    assert await ledger.usage("ann", 10, user="emma") == [told[3], told[0]]
    assert await ledger.usage("ann", 1, user="emma") == [told[3]]
    assert await ledger.usage("ann", 10, user="") == [told[1]]
    assert await ledger.usage("ann", 10, user="nobody") == []
    assert [used.request_id for used in await ledger.usage(None, 10, user="emma")] == ["r4", "r3", "r0"]


async def test_books_of_the_first_version_are_taken_over(store: LedgerStore) -> None:
    first = scripts_after(store.kind, 0)[1]
    store.script(first)
    store.query(
        "INSERT INTO holds (id, account, request_id, owner, price, held, wallet, state, at)"
        " VALUES (7, 'ann', 'r1', 'old', 5, 0, 0, 'settled', 1)"
    )
    store.query("INSERT INTO entries (kind, account, hold, micros, at) VALUES ('hold', 'ann', 7, 5, 1)")
    store.query("INSERT INTO entries (kind, account, hold, micros, at) VALUES ('charge', 'ann', 7, 5, 1)")
    columns = "hold, request_id, account, model, voice, characters, audio_ms, outcome, price_micros, at"
    store.query(f"INSERT INTO usage_events ({columns}) VALUES (7, 'r1', 'ann', 'm', 'v', 3, 40, 'completed', 5, 1.5)")
    ledger = store.ledger()
    await ledger.start()
    assert await ledger.usage("ann", 10) == [UsageEvent("r1", "ann", "m", "v", 3, 40, "completed", 5, 1.5)]
    assert await ledger.check() == []
    await ledger.record([free_event("r1"), free_event("r2")])  # told once among those without a hold
    assert [used.request_id for used in await ledger.usage("ann", 10)] == ["r2", "r1", "r1"]
    await ledger.close()
