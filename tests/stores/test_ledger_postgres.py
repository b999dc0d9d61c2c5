"""The PostgreSQL ledger where it differs: real concurrency, lost answers, and a database that is away or killed."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
import time
import traceback
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import TypeVar

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from api.src.domain import UsageEvent
from api.src.errors import HoldLost, Unavailable
from api.src.stores import ledger_front
from api.src.stores import ledger_laws as laws
from api.src.stores.ledger import IdempotencyKey, Ledger
from api.src.stores.ledger_postgres import PostgresLedger
from tests.moments import tried_again
from tests.postgres import PostgresServer
from tests.stores.ledgers import LedgerStore, PostgresStore, SqliteStore, event, eventually, free_event, held_up
from tests.stores.load_workers import work_goes_on, working
from tests.stores.lossy_proxy import LossyProxy

T = TypeVar("T")

KEY = IdempotencyKey("k", "digest")


@pytest.fixture
def store(postgres: PostgresServer) -> Iterator[PostgresStore]:
    store = PostgresStore(postgres)
    yield store
    store.drop()


@pytest.fixture
async def ledger(store: PostgresStore) -> AsyncIterator[PostgresLedger]:
    async with started(store.ledger()) as ledger:
        yield ledger


@asynccontextmanager
async def started(ledger: PostgresLedger) -> AsyncIterator[PostgresLedger]:
    await ledger.start()
    yield ledger
    await ledger.close()


# Many at once


def test_an_url_may_name_the_driver(store: PostgresStore):
    assert PostgresLedger(store.url.replace("://", "+psycopg://"))._url == store.url


async def test_what_waits_together_is_committed_together(ledger: PostgresLedger):
    before = ledger.transactions
    async with held_up(ledger):
        waiting = [asyncio.ensure_future(ledger.credit("ann", 1, f"c{number}")) for number in range(150)]
        await asyncio.sleep(0)
    assert await asyncio.gather(*waiting) == list(range(1, 151))
    assert ledger.transactions - before <= 2


async def test_a_failing_act_harms_nobody_else(ledger: PostgresLedger):
    async with held_up(ledger):
        acts = [ledger.credit("ann", 1, reference) for reference in ("c1", "\0", "\ud800", "c2")]
        waiting = [asyncio.ensure_future(act) for act in acts]
        await asyncio.sleep(0)
    results = await asyncio.gather(*waiting, return_exceptions=True)
    assert [result if isinstance(result, int) else type(result) for result in results] == [
        1,
        Unavailable,
        UnicodeEncodeError,
        2,
    ]


@pytest.mark.parametrize("refusals", range(3, 8))
async def test_what_the_database_refuses_spoils_nothing_that_comes_later(ledger: PostgresLedger, refusals: int):
    """Whatever psycopg was about to prepare when it refused."""
    for _ in range(refusals):
        with pytest.raises(ValueError, match="does not take"):
            await ledger.record([replace(free_event("r"), characters=2**70)])
    await ledger.record([free_event("r")])
    async with ledger.hold("ann", "h", 1) as hold:
        for _ in range(refusals):
            with pytest.raises(Unavailable):
                await hold.settle(replace(event(hold, 1), characters=2**70))
        await hold.settle(event(hold, 1))
    assert len(await ledger.usage("ann", 100)) == 2


ACTS = st.lists(
    st.tuples(
        st.sampled_from(["settle", "release", "extend", "open", "credit", "charge"]),
        st.integers(0, 5),
        st.integers(0, 60),
        st.sampled_from([None, "x", "y"]),
    ),
    min_size=2,
    max_size=12,
)


@settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow]
)
@given(acts=ACTS, credited=st.sampled_from([None, 40, 200]), seed=st.integers(0, 9))
def test_a_batch_is_as_its_acts_one_after_another(
    acts: list[tuple[str, int, int, str | None]], credited: int | None, seed: int, store: PostgresStore, tmp_path: Path
):
    """All acts on one page, in PostgreSQL and in SQLite, and one by one: the same answers, the same books."""
    account = f"account {time.monotonic_ns()}"
    files = [SqliteStore(tmp_path / name) for name in ("together.db", "apart.db")]
    books = [
        asyncio.run(_act(where, account, acts, credited, seed, together=where is not files[1]))
        for where in (store, *files)
    ]
    assert books[0] == books[1] == books[2]


async def _act(
    store: LedgerStore,
    account: str,
    acts: list[tuple[str, int, int, str | None]],
    credited: int | None,
    seed: int,
    *,
    together: bool,
) -> object:
    ledger = store.ledger()
    await ledger.start()
    if credited is not None:
        await ledger.credit(account, credited, "c0")
    managers = [
        ledger.hold(account, f"r{number}", 10 * (number + seed % 3), key=_key("xy "[(number + seed) % 3]))
        for number in range(1 if credited == 40 else 4)
    ]
    holds = [await manager.__aenter__() for manager in managers]

    def start(number: int, kind: str, which: int, micros: int, key: str | None) -> asyncio.Future[object]:
        hold = holds[which % len(holds)]
        works = {
            "settle": lambda: hold._act(laws.settle, event(hold, micros)),
            "release": lambda: hold._act(laws.release, None),
            "extend": lambda: hold._act(laws.extend, micros),
            "open": lambda: ledger._opening(account, f"n{number}", micros, _key(key)),
            "credit": lambda: ledger._crediting(account, micros, f"c{which}"),
            "charge": lambda: ledger._charging(_charge(account, f"n{number}", micros), _key(key)),
        }
        return ledger.submit(works[kind]())

    if together:
        before = ledger.transactions
        async with held_up(ledger):
            acting = [start(number, *act) for number, act in enumerate(acts)]
        results = await asyncio.gather(*acting, return_exceptions=True)
        assert ledger.transactions in (before + 1, before + 2)  # in SQLite what held it up counts, too
    else:
        results = []
        for number, act in enumerate(acts):
            results += await asyncio.gather(start(number, *act), return_exceptions=True)
    mine = f"account = '{account}'"
    books = [
        [type(result) if isinstance(result, int) else str(result) for result in results],  # ids differ
        store.query(f"SELECT micros FROM balances WHERE {mine}"),
        store.query(f"SELECT request_id, price, held, wallet, state FROM holds WHERE {mine} ORDER BY request_id"),
        sorted(store.query(f"SELECT kind, micros FROM entries WHERE {mine}")),
        store.query(f"SELECT request_id, price_micros FROM usage_events WHERE {mine} ORDER BY id"),
        store.query(f"SELECT value, charged FROM idempotency_keys WHERE {mine} ORDER BY value"),
        await ledger.check(),
    ]
    await ledger.close()
    return books


def _charge(account: str, request_id: str, micros: int) -> UsageEvent:
    return UsageEvent(request_id, account, "m", "v", 1, 1, "cached", micros, 1.5)


def _key(value: str | None) -> IdempotencyKey | None:
    return None if value in (None, " ") else IdempotencyKey(str(value), "")


CROWD = """
import asyncio, random, sys, time
from api.src.domain import UsageEvent
from api.src.errors import HoldLost, InsufficientBalance
from api.src.stores.ledger import IdempotencyKey
from api.src.stores.ledger_postgres import PostgresLedger

async def one(ledger, dice, name, end):
    number = 0
    while time.time() < end:
        number += 1
        account = f"account {dice.randrange(6)}"
        key = IdempotencyKey(f"k{dice.randrange(40)}", "") if dice.random() < 0.7 else None
        try:
            async with ledger.hold(account, f"{name}-{number}", dice.randrange(20), key=key) as hold:
                if dice.random() < 0.3:
                    await hold.extend(dice.randrange(5))
                if dice.random() < 0.7:
                    price = dice.randrange(hold.micros + 1)
                    await hold.settle(UsageEvent(hold.request_id, account, "m", "v", 1, 1, "completed", price, 0.0))
        except HoldLost:
            pass  # this process was suspended for longer than its lease
        except InsufficientBalance:
            await ledger.credit(account, dice.randrange(50), f"{name}-{number}")

async def main(url, name, end):
    ledgers = [PostgresLedger(url, key_ttl_s=0.5, lease_s=0.6) for _ in range(2)]
    for ledger in ledgers:
        await ledger.start()
    dice = random.Random(name)
    await asyncio.gather(*(one(ledger, dice, f"{name}-{at}-{n}", float(end))
                           for at, ledger in enumerate(ledgers) for n in range(15)))
    for ledger in ledgers:
        await ledger.close()

asyncio.run(main(*sys.argv[1:]))
"""


def python(code: str, *arguments: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", code, *arguments]
    pipe = subprocess.PIPE
    return subprocess.Popen(command, cwd=Path(__file__).parents[2], stdout=pipe, stderr=pipe, text=True)


@pytest.mark.slow
async def test_many_writers_in_many_processes_break_no_law(store: PostgresStore, ledger: PostgresLedger):
    """Every batch has several accounts, shared keys and reserves; nobody may fail, deadlock or lose count."""
    for number in range(0, 6, 2):
        await ledger.credit(f"account {number}", 500, "c0")
    end = time.time() + 5
    crowd = [python(CROWD, store.url, str(number), str(end)) for number in range(3)]
    while time.time() < end:
        assert await ledger.check() == []
        await asyncio.sleep(0.2)
    for process in crowd:
        _, errors = await asyncio.to_thread(process.communicate)
        assert (process.returncode, errors) == (0, "")
    assert await ledger.check() == []
    assert store.open_holds() == 0
    settled = len(await ledger.usage(None, 10**6))
    deadlocks = f"SELECT deadlocks FROM pg_stat_database WHERE datname = '{store.database}'"
    print(f"{settled} settled")
    assert settled > 200
    assert store.query(deadlocks) == [(0,)]


@pytest.mark.parametrize(
    ("url", "error"),
    [
        ("postgresql://ledger:sk-planted@127.0.0.1:1/nowhere", Unavailable),
        ("postgresql://ledger:sk-planted@127.0.0.1:sk-planted/nowhere", ValueError),
        ("postgresql://ledger:sk@sk-planted@127.0.0.1/nowhere", ValueError),
        ("postgresql://ledger:x/sk-planted@127.0.0.1/nowhere", ValueError),
        ("postgresql://ledger@127.0.0.1/nowhere?sk-planted=1", ValueError),
    ],
)
async def test_a_start_that_fails_says_why_and_no_password(url: str, error: type[Exception]):
    with pytest.raises(error) as raised:
        await PostgresLedger(url, patience_s=0.1).start()
    assert "sk-planted" not in "".join(traceback.format_exception(raised.value))


# Answers that get lost


impatient = tried_again(Unavailable)
"""A ledger that gives up after a second does so too where the machine stands still. What became of money is not tried
again."""


@asynccontextmanager
async def through_proxy(server: PostgresServer) -> AsyncIterator[tuple[PostgresLedger, LossyProxy, PostgresStore]]:
    """A ledger behind a proxy, with a credit of 100 for ann; the proxy is harmless until it is told otherwise."""
    store = PostgresStore(server)
    try:
        async with started(store.ledger()) as patient:
            await patient.credit("ann", 100, "c1")
        async with LossyProxy(server.socket) as proxy:
            ledger = PostgresLedger(server.url(store.database, "127.0.0.1", proxy.port), patience_s=1.0)
            async with started(ledger):
                yield ledger, proxy, store
    finally:
        store.drop()


async def persist(work: Callable[[], Awaitable[T]]) -> T:
    """Try again while the database is taken to be away."""
    deadline = time.monotonic() + 30
    while True:
        try:
            return await work()
        except Unavailable:
            assert time.monotonic() < deadline
            await asyncio.sleep(0.1)


@impatient
@pytest.mark.parametrize("loss", ["request", "answer", "silence", "late"])
async def test_a_settle_whose_connection_breaks_happens_once(postgres: PostgresServer, loss: str):
    async with through_proxy(postgres) as (ledger, proxy, store):
        async with ledger.hold("ann", "r1", 30, key=KEY) as hold:
            proxy.lose(loss)
            with suppress(Unavailable):
                await hold.settle(event(hold, 20))
            assert proxy.losses == 1
            if not hold.closed:
                await persist(lambda: hold.settle(event(hold, 20)))
            await proxy.deliver()
        assert [used.price_micros for used in await ledger.usage("ann", 10)] == [20]
        assert (await ledger.balance("ann"), await ledger.check(), store.open_holds()) == (80, [], 0)


@impatient
@pytest.mark.parametrize("loss", ["request", "answer", "silence", "late"])
async def test_a_credit_whose_connection_breaks_happens_once(postgres: PostgresServer, loss: str):
    async with through_proxy(postgres) as (ledger, proxy, _):
        proxy.lose(loss)
        try:
            assert await ledger.credit("ann", 1, "c2") == 101
        except Unavailable:
            assert await persist(lambda: ledger.credit("ann", 1, "c2")) == 101
        await proxy.deliver()
        assert (proxy.losses, await ledger.balance("ann"), await ledger.check()) == (1, 101, [])


@impatient
@pytest.mark.parametrize("loss", ["request", "answer", "silence", "late"])
async def test_a_hold_whose_connection_breaks_is_had_or_undone(postgres: PostgresServer, loss: str):
    async with through_proxy(postgres) as (ledger, proxy, store):
        proxy.lose(loss)
        try:
            async with ledger.hold("ann", "r1", 30, key=KEY):
                await proxy.deliver()
                assert (await ledger.balance("ann"), store.open_holds()) == (70, 1)
        except Unavailable:
            await proxy.deliver()
            await eventually(lambda: store.open_holds() == 0)
        assert proxy.losses == 1
        assert (await ledger.balance("ann"), await ledger.check(), store.open_holds()) == (100, [], 0)


@impatient
async def test_an_answer_that_comes_after_the_patience_is_not_forgotten(
    postgres: PostgresServer, monkeypatch: pytest.MonkeyPatch
):
    """The hold and the settlement were committed, but the database could not be asked for long."""
    monkeypatch.setattr(ledger_front, "_RETRY_RELEASE_S", 0.05)
    async with through_proxy(postgres) as (ledger, proxy, store):
        async with ledger.hold("ann", "r1", 30) as hold:
            proxy.lose("answer", then="refuse")
            for _ in range(2):
                with pytest.raises(Unavailable):
                    await hold.settle(event(hold, 20))
            proxy.recover()
            await persist(lambda: hold.settle(event(hold, 20)))
        proxy.lose("answer", then="refuse")
        with pytest.raises(Unavailable):
            async with ledger.hold("ann", "r2", 30):
                pass
        assert store.open_holds() == 1
        proxy.recover()
        await eventually(lambda: store.open_holds() == 0)
        assert [used.price_micros for used in await ledger.usage("ann", 10)] == [20]
        assert (await ledger.balance("ann"), await ledger.check()) == (80, [])


@impatient
async def test_a_database_that_is_away_is_unavailable_in_bounded_time(
    postgres: PostgresServer, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(ledger_front, "_RETRY_RELEASE_S", 0.05)
    async with through_proxy(postgres) as (ledger, proxy, store):
        async with ledger.hold("ann", "r1", 30) as hold, ledger.hold("ann", "r2", 30):
            for away in ("refuse", "silence"):
                proxy.go_away(away)
                for work in (ledger.balance("ann"), hold.settle(event(hold, 20)), opened(ledger), hold.extend(1)):
                    with pytest.raises(Unavailable):
                        await asyncio.wait_for(work, 20)
                proxy.recover()
                assert await persist(lambda: ledger.balance("ann")) == 40
            proxy.go_away("refuse")
        assert store.open_holds() == 2
        proxy.recover()
        await eventually(lambda: store.open_holds() == 0)
        assert (await ledger.balance("ann"), await ledger.usage("ann", 10)) == (100, [])


async def opened(ledger: Ledger) -> None:
    async with ledger.hold("ann", "never", 1):
        pass


async def test_closing_does_not_wait_for_a_database_that_is_away(store: PostgresStore):
    async with LossyProxy(store.server.socket) as proxy:
        ledger = PostgresLedger(store.server.url(store.database, "127.0.0.1", proxy.port), patience_s=0.5)
        await ledger.start()
        async with ledger.hold("ann", "r1", 30):
            proxy.go_away("silence")
            with pytest.raises(Unavailable):
                await asyncio.wait_for(ledger.close(), 30)
    assert store.open_holds() == 1


async def test_a_stopped_process_does_not_keep_an_account_locked(store: PostgresStore, ledger: PostgresLedger):
    """Its transaction ends with its patience, in the server."""
    from api.src.stores.postgres_page import lock
    from api.src.stores.postgres_session import Session

    stopped = Session(store.url, "stopped", 0.5)
    stopped.run(("BEGIN", ()), lock(["ann"]))
    began = time.monotonic()
    assert await ledger.credit("ann", 1, "c1") == 1
    assert time.monotonic() - began > 0.3
    stopped.close()


# A database that dies


@pytest.fixture
def mortal_store(mortal: PostgresServer) -> Iterator[PostgresStore]:
    store = PostgresStore(mortal)
    yield store
    store.drop()


@pytest.mark.slow
async def test_an_outage_longer_than_the_lease_loses_nobodys_hold(mortal_store: PostgresStore):
    async with (
        started(mortal_store.ledger(lease_s=2)) as first,
        started(mortal_store.ledger(lease_s=2)) as second,
        first.hold("ann", "r1", 30) as mine,
        second.hold("ann", "r2", 30) as theirs,
    ):
        mortal_store.server.stop()
        await asyncio.sleep(2.5)
        await asyncio.to_thread(mortal_store.server.start)
        now = "extract(epoch FROM clock_timestamp())"
        await eventually(lambda: mortal_store.query(f"SELECT count(*) FROM owners WHERE lease_until > {now}") == [(2,)])
        await asyncio.sleep(1)  # they have looked around once more
        await mine.settle(event(mine, 1))
        await theirs.settle(event(theirs, 1))


async def test_reading_goes_on_after_a_restart(mortal_store: PostgresStore):
    async with started(mortal_store.ledger()) as ledger:
        await ledger.credit("ann", 5, "c1")
        assert await ledger.balance("ann") == 5
        mortal_store.server.kill()
        await asyncio.to_thread(mortal_store.server.start)
        assert await ledger.balance("ann") == 5
        assert await ledger.credit("ann", 5, "c2") == 10


async def test_a_hold_that_the_database_has_forgotten_is_lost(store: PostgresStore, ledger: PostgresLedger):
    """Holds are not synced: a server that is killed at once forgets the last ones."""
    await ledger.credit("ann", 100, "c1")
    async with ledger.hold("ann", "r1", 30) as hold:
        store.drop_guards()
        store.query("DELETE FROM entries WHERE kind = 'hold'")
        store.query("DELETE FROM holds")
        store.query("UPDATE balances SET micros = 100")
        with pytest.raises(HoldLost):
            await hold.settle(event(hold, 20))
    assert (await ledger.balance("ann"), await ledger.check()) == (100, [])


LOAD = """
import asyncio, time
from contextlib import suppress
from api.src.domain import UsageEvent
from api.src.errors import HoldLost, Unavailable
from api.src.stores.ledger import IdempotencyKey
from api.src.stores.ledger_postgres import PostgresLedger

async def busy(ledger, name):
    number = 0
    while not told.is_set():
        number += 1
        request = f"{name}-{number}"
        key = IdempotencyKey(f"{name}-{number // 3}", "") if number % 2 else None
        try:
            async with ledger.hold("ann", request, 10, key=key) as hold:
                await hold.extend(5)
                await hold.settle(UsageEvent(request, "ann", "m", "v", 1, 1, "completed", number % 16, time.time()))
                print("settled", request, flush=True)
        except (HoldLost, Unavailable) as error:
            print(type(error).__name__, request, flush=True)

async def main(url, name):
    ledger = PostgresLedger(url, lease_s=2, patience_s=1)
    await ledger.start()
    await asyncio.gather(*(busy(ledger, f"{name}-{n}") for n in range(8)))
    with suppress(Unavailable):  # the database may be slow to come back
        await ledger.close()

asyncio.run(main(*sys.argv[1:]))
"""


KILLS = int(os.environ.get("TTS_TEST_KILLS", "6"))


@pytest.mark.slow
async def test_kill_9_of_the_database_under_load_loses_no_settlement(mortal_store: PostgresStore):
    server = mortal_store.server
    async with started(mortal_store.ledger(lease_s=2, patience_s=1)) as ledger:
        await ledger.credit("ann", 10**9, "c1")
        async with working(2, LOAD, mortal_store.url) as workers:
            for number in range(KILLS):
                await work_goes_on(workers, 20)
                server.kill()
                await asyncio.sleep((0.0, 0.3)[number % 2])
                await asyncio.to_thread(server.start)
            await work_goes_on(workers, 100)
        told = [line.split() for worker in workers for line in worker.lines]
        await eventually(lambda: mortal_store.open_holds() == 0)
        assert await persist(ledger.check) == []
        used = await persist(lambda: ledger.usage(None, 10**6))
        charged = {used.request_id: used.price_micros for used in used}
        settled = [request for word, request in told if word == "settled"]
        print(f"{KILLS} kills, {len(settled)} settled, {len(told) - len(settled)} failed")
        assert len(settled) > 100
        assert len(charged) == len(used)  # nobody twice
        assert set(settled) <= set(charged)
        assert await persist(lambda: ledger.balance("ann")) == 10**9 - sum(charged.values())
