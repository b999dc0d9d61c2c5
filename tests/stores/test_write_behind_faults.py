"""Redis, the database and servers away, late or killed, alone and together: no event is lost, none is told twice."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import TypeAlias

import pytest

from api.src.errors import Unavailable
from api.src.stores import usage_outbox
from api.src.stores.ledger_postgres import PostgresLedger
from api.src.stores.ledger_write_behind import WriteBehind, WriteBehindLedger
from tests.postgres import PostgresServer
from tests.redis_server import RedisServer, running_redis
from tests.stores.ledgers import (
    PATIENCE_S,
    BehindRedisStore,
    LedgerStore,
    PostgresStore,
    SqliteStore,
    eventually,
    free_event,
    tell,
)
from tests.stores.load_workers import Worker, work_goes_on, working
from tests.stores.lossy_proxy import LossyProxy
from tests.stores.test_ledger import CancelAt, awaiting

STREAM = "tts:{usage}:events"
NEVER_S = 1000.0
KILLS = int(os.environ.get("TTS_TEST_KILLS", "4"))

Told: TypeAlias = Callable[[], list[str]]


@pytest.fixture
def mortal_redis() -> Iterator[RedisServer]:
    """A server to be killed, which has written down what it acknowledges."""
    with running_redis(fsync="always") as server:
        yield server


@pytest.fixture(autouse=True)
def quick_breakers(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("_OPEN_S", "_DATABASE_OPEN_S"):
        monkeypatch.setattr(usage_outbox, name, 0.05)
    for name in ("_LONGEST_OPEN_S", "_LONGEST_DATABASE_OPEN_S"):
        monkeypatch.setattr(usage_outbox, name, 0.2)


@asynccontextmanager
async def started(ledger: WriteBehindLedger) -> AsyncIterator[WriteBehindLedger]:
    before = ledger._flusher._sampled
    await ledger.start()
    await eventually(lambda: ledger._flusher._sampled is not before)  # its first look is over
    try:
        yield ledger
    finally:
        await ledger.close()


def behind(**options: float) -> WriteBehind:
    """With patience for a Redis that lives, unless the options say otherwise."""
    return WriteBehind(**{"redis_timeout_s": PATIENCE_S, **options})  # type: ignore[arg-type]


def names(prefix: str, count: int) -> list[str]:
    return [f"{prefix}{number}" for number in range(count)]


async def tell_all(ledger: WriteBehindLedger, requests: list[str]) -> None:
    for request in requests:
        await tell(ledger, free_event(request))


# Redis


async def test_a_dead_redis_opens_the_breaker_and_events_go_straight_to_the_database(
    tmp_path: Path, mortal_redis: RedisServer, caplog: pytest.LogCaptureFixture
):
    books = BehindRedisStore(SqliteStore(tmp_path / "ledger.db"), mortal_redis)
    async with started(books.ledger(behind=behind(flush_interval_s=NEVER_S, failures=3))) as ledger:
        await tell_all(ledger, names("before", 2))
        mortal_redis.kill()
        for number in range(3):
            assert ledger.breakers()["usage_redis"] == "closed"
            await tell(ledger, free_event(f"during{number}"))
            assert books.told() == names("during", number + 1)
        assert ledger.breakers()["usage_redis"] != "closed"
        await tell_all(ledger, names("later", 20))
        assert books.told() == names("during", 3) + names("later", 20)
        mortal_redis.start()
        await asyncio.sleep(0.25)
        await tell(ledger, free_event("probe"))
        await eventually(lambda: ledger.breakers()["usage_redis"] == "closed")
        told = len(books.told())
        await tell(ledger, free_event("after"))
        assert len(books.told()) == told
    assert Counter(books.told()) == Counter(
        names("before", 2) + names("during", 3) + names("later", 20) + ["probe", "after"]
    )
    lines = [record.message for record in caplog.records]
    assert len([line for line in lines if "go straight to the ledger's database" in line]) == 1
    assert len([line for line in lines if "go through Redis again" in line]) == 1


async def test_a_redis_that_refuses_is_as_bad_as_none(tmp_path: Path, redis: RedisServer):
    books = BehindRedisStore(SqliteStore(tmp_path / "ledger.db"), redis)
    async with started(books.ledger(behind=behind(failures=2))) as ledger:
        with redis.client() as client:
            client.config_set("maxmemory", 1)  # reading goes on
            await tell_all(ledger, names("r", 5))
            assert books.told() == names("r", 5)
            assert ledger.breakers()["usage_redis"] != "closed"


async def test_what_a_silent_redis_has_taken_after_all_is_told_once(tmp_path: Path, redis: RedisServer):
    """It was given up, so the event went to the database; then it is found in the stream."""
    books = BehindRedisStore(SqliteStore(tmp_path / "ledger.db"), redis)
    options = behind(flush_interval_s=NEVER_S, failures=1000, redis_timeout_s=0.2)
    async with started(books.ledger(behind=options)) as ledger:
        await tell(ledger, free_event("before"))
        os.kill(redis.pid, signal.SIGSTOP)
        try:
            await asyncio.wait_for(tell(ledger, free_event("silent")), 20)
            assert books.told() == ["silent"]
        finally:
            os.kill(redis.pid, signal.SIGCONT)
        with redis.client() as client:
            await eventually(lambda: client.xlen(STREAM) == 2)
    assert Counter(books.told()) == Counter(["before", "silent"])


# The database


@pytest.fixture
async def proxy(postgres: PostgresServer) -> AsyncIterator[LossyProxy]:
    async with LossyProxy(postgres.socket) as proxy:
        yield proxy


@pytest.fixture
async def store(postgres: PostgresServer) -> AsyncIterator[PostgresStore]:
    """With its tables: to make them, an impatient ledger may take too long."""
    store = PostgresStore(postgres)
    ledger = store.ledger()
    await ledger.start()
    await ledger.close()
    yield store
    store.drop()


def behind_proxy(
    store: PostgresStore, proxy: LossyProxy, redis: RedisServer, options: WriteBehind, patience_s: float = 3
) -> WriteBehindLedger:
    ledger = PostgresLedger(store.server.url(store.database, "127.0.0.1", proxy.port), patience_s=patience_s)
    return WriteBehindLedger(ledger, redis.url(), options)


@pytest.mark.parametrize("away", ["refuse", pytest.param("silence", marks=pytest.mark.slow)])
async def test_a_database_that_is_away_keeps_no_free_request_waiting(
    store: PostgresStore, proxy: LossyProxy, redis: RedisServer, away: str
):
    books = BehindRedisStore(store, redis)
    async with started(behind_proxy(store, proxy, redis, behind(flush_interval_s=0.02))) as ledger:
        proxy.go_away(away)
        began = time.monotonic()
        await tell_all(ledger, names("r", 20))
        assert time.monotonic() - began < 5, "each waits for the database"
        with pytest.raises(Unavailable):
            async with ledger.hold("ann", "dear", 1):
                pass
        await eventually(lambda: ledger.backlog().stream == 20)
        assert books.told() == []
        proxy.recover()
        await eventually(lambda: len(books.told()) == 20, 60)
    assert books.told() == names("r", 20)


@pytest.mark.parametrize(
    "loss", ["request", "answer", *(pytest.param(loss, marks=pytest.mark.slow) for loss in ("silence", "late"))]
)
async def test_a_flush_whose_connection_breaks_happens_once(
    store: PostgresStore, proxy: LossyProxy, redis: RedisServer, loss: str
):
    books = BehindRedisStore(store, redis)
    async with started(behind_proxy(store, proxy, redis, behind(flush_interval_s=0.02))) as ledger:
        proxy.lose(loss)
        await tell_all(ledger, names("r", 5))
        await eventually(lambda: proxy.losses == 1)
        await eventually(lambda: ledger.backlog().stream == 0 and len(books.told()) == 5, 60)
        await proxy.deliver()
    assert Counter(books.told()) == Counter(names("r", 5))


# Both


@pytest.mark.slow
async def test_with_both_away_free_requests_go_on_and_their_events_wait_in_memory(
    store: PostgresStore, proxy: LossyProxy, mortal_redis: RedisServer, caplog: pytest.LogCaptureFixture
):
    books = BehindRedisStore(store, mortal_redis)
    options = behind(flush_interval_s=0.02, failures=1)
    async with started(behind_proxy(store, proxy, mortal_redis, options, patience_s=6)) as ledger:
        proxy.go_away("silence")
        mortal_redis.kill()
        began = time.monotonic()
        await tell(ledger, free_event("first"))
        assert time.monotonic() - began < 5, "it waits as long as one that costs something"
        began = time.monotonic()
        await tell_all(ledger, names("r", 50))
        assert time.monotonic() - began < 20, "each waits for the database"
        assert ledger.backlog().memory == 51
        with pytest.raises(Unavailable):
            async with ledger.hold("ann", "dear", 1):
                pass
        proxy.recover()
        await eventually(lambda: len(books.told()) == 51, 60)
        await eventually(lambda: ledger.backlog().memory == 0)
        assert books.told() == ["first", *names("r", 50)]
        assert "wait in memory" in caplog.text
        mortal_redis.start()


async def test_redis_alone_coming_back_is_enough(store: PostgresStore, proxy: LossyProxy, mortal_redis: RedisServer):
    books = BehindRedisStore(store, mortal_redis)
    options = behind(flush_interval_s=NEVER_S, failures=1)
    async with started(behind_proxy(store, proxy, mortal_redis, options)) as ledger:
        proxy.go_away("refuse")
        mortal_redis.kill()
        await tell_all(ledger, names("r", 10))
        assert ledger.backlog().memory == 10
        mortal_redis.start()
        await eventually(lambda: ledger.backlog().memory == 0)
        with mortal_redis.client() as client:
            assert client.xlen(STREAM) >= 10  # the probe's twice
        proxy.recover()
    assert Counter(books.told()) == Counter(names("r", 10))


async def test_memory_is_bounded_and_the_newest_stay(
    store: PostgresStore, proxy: LossyProxy, mortal_redis: RedisServer, caplog: pytest.LogCaptureFixture
):
    books = BehindRedisStore(store, mortal_redis)
    options = behind(flush_interval_s=NEVER_S, failures=1, memory_events=5)
    async with started(behind_proxy(store, proxy, mortal_redis, options)) as ledger:
        proxy.go_away("refuse")
        mortal_redis.kill()
        await tell_all(ledger, names("r", 12))
        assert (ledger.backlog().memory, ledger.backlog().dropped) == (5, 7)
        assert len([record for record in caplog.records if "usage events are lost" in record.message]) == 1
        proxy.recover()
        await eventually(lambda: ledger.backlog().memory == 0, 60)
        assert books.told()[0] in ("r0", "r7")  # one that is just being sent cannot be dropped
        assert books.told()[1:] == names("r", 12)[8:]
        mortal_redis.start()


@pytest.mark.parametrize("on_waking", [False, True])
async def test_no_cancellation_loses_an_event_while_redis_is_away(tmp_path: Path, mortal_redis: RedisServer, on_waking):
    books = BehindRedisStore(SqliteStore(tmp_path / "ledger.db"), mortal_redis)
    async with started(books.ledger(behind=behind(failures=1000))) as ledger:
        mortal_redis.kill()
        runs = 0
        while True:
            run = CancelAt(tell(ledger, free_event(f"r{runs}")), runs, on_waking=on_waking)
            await asyncio.wait([asyncio.ensure_future(awaiting(run))])
            runs += 1
            if run.awaits < runs:
                break
        await eventually(lambda: books.told() == names("r", runs))
        mortal_redis.start()


async def test_closing_while_both_are_away_is_bounded_and_says_what_is_lost(
    store: PostgresStore,
    proxy: LossyProxy,
    mortal_redis: RedisServer,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
):
    monkeypatch.setattr("api.src.stores.ledger_write_behind._CLOSE_S", 0.5)
    ledger = behind_proxy(store, proxy, mortal_redis, behind(failures=1), patience_s=0.5)
    await ledger.start()
    proxy.go_away("refuse")
    mortal_redis.kill()
    await tell_all(ledger, names("r", 3))
    began = time.monotonic()
    with pytest.raises(Unavailable):  # the lease, for which PostgreSQL is needed
        await ledger.close()
    assert time.monotonic() - began < 8
    assert "usage events are lost" in caplog.text
    assert ledger.backlog().dropped == 3
    mortal_redis.start()


async def test_closing_without_redis_stores_what_waits(tmp_path: Path, mortal_redis: RedisServer):
    books = BehindRedisStore(SqliteStore(tmp_path / "ledger.db"), mortal_redis)
    ledger = books.ledger(behind=behind(failures=1000))
    await ledger.start()
    mortal_redis.kill()
    telling = [asyncio.ensure_future(tell(ledger, free_event(request))) for request in names("r", 20)]
    await asyncio.sleep(0)
    await ledger.close()
    await asyncio.gather(*telling)
    assert Counter(books.told()) == Counter(names("r", 20))
    mortal_redis.start()


# Death of whole processes

FLUSHER = """
import asyncio, sys
from api.src.stores.ledger_choice import ledger_at
from api.src.stores.ledger_write_behind import WriteBehind, WriteBehindLedger
from api.src.stores.usage_stream import UsageStream

async def never(*_):
    print("committed", flush=True)
    await asyncio.Event().wait()

async def main(url, redis):
    UsageStream.done = never
    ledger = WriteBehindLedger(ledger_at(url), redis, WriteBehind(flush_interval_s=0.02))
    await ledger.start()
    await asyncio.Event().wait()

asyncio.run(main(*sys.argv[1:]))
"""

LOAD = """
import asyncio, time
from contextlib import suppress
from api.src.domain import UsageEvent
from api.src.errors import HoldLost, Unavailable
from api.src.stores import usage_outbox
from api.src.stores.ledger_choice import ledger_at
from api.src.stores.ledger_write_behind import WriteBehind, WriteBehindLedger

async def busy(ledger, name):
    number = 0
    while not told.is_set():
        number += 1
        request, price = f"{name}-{number}", 5 * (number % 4 == 0)
        try:
            async with ledger.hold("ann", request, price) as hold:
                await hold.settle(UsageEvent(request, "ann", "m", "v", 1, 1, "cached", price, time.time()))
                print("settled", request, price, flush=True)
        except (HoldLost, Unavailable) as error:
            print(type(error).__name__, request, price, flush=True)
        await asyncio.sleep(0.002)

async def main(url, redis, name):
    usage_outbox._OPEN_S = usage_outbox._LONGEST_OPEN_S = 0.1
    ledger = WriteBehindLedger(
        ledger_at(url, lease_s=2), redis,
        WriteBehind(flush_events=50, flush_interval_s=0.05, failures=2, lease_s=1.0, memory_events=100000))
    await ledger.start()
    await asyncio.gather(*(busy(ledger, f"{name}-{n}") for n in range(8)))
    deadline = time.time() + 60
    while ledger.backlog().memory and time.time() < deadline:
        await asyncio.sleep(0.05)
    with suppress(Unavailable):  # the database may be slow to come back
        await ledger.close()

asyncio.run(main(*sys.argv[1:]))
"""


def python(code: str, *arguments: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", code, *arguments]
    pipe = subprocess.PIPE
    return subprocess.Popen(command, cwd=Path(__file__).parents[2], stdout=pipe, stderr=pipe, text=True)


@pytest.mark.parametrize("kind", ["sqlite", "postgres"])
async def test_kill_9_between_commit_and_acknowledgement_doubles_nothing(
    kind: str, store: PostgresStore, tmp_path: Path, redis: RedisServer
):
    books = BehindRedisStore(SqliteStore(tmp_path / "l.db") if kind == "sqlite" else store, redis)
    async with started(books.ledger(behind=behind(flush_interval_s=NEVER_S))) as ledger:
        await tell_all(ledger, names("r", 5))
        process = python(FLUSHER, books.url, redis.url())
        assert process.stdout is not None
        assert await asyncio.to_thread(process.stdout.readline) == "committed\n"
        process.kill()
        process.communicate()
        assert books.told() == names("r", 5)
        assert ledger.backlog().stream == 0  # as it was before; now they are pending with the dead one
        with redis.client() as client:
            assert client.xlen(STREAM) == 5
            async with started(books.ledger(behind=behind(flush_interval_s=0.02, lease_s=0.1))):
                await eventually(lambda: client.xlen(STREAM) == 0)
    assert books.told() == names("r", 5)


async def audit(books: BehindRedisStore, workers: Sequence[Worker]) -> None:
    """Whatever was settled is in the ledger exactly once, at its price; what was refused, at most once."""
    told = [(word, request, int(price)) for worker in workers for word, request, price in map(str.split, worker.lines)]
    with books.redis.client() as client:
        async with started(books.ledger(behind=behind(flush_interval_s=0.02, lease_s=0.2), lease_s=2)) as ledger:
            await eventually(lambda: client.xlen(STREAM) == 0)
            await eventually(lambda: books.open_holds() == 0)
            assert await ledger.check() == []
            used = await ledger.usage(None, 10**6)
            balance = await ledger.balance("ann")
    stored = {used_event.request_id: used_event.price_micros for used_event in used}
    settled = {request: price for word, request, price in told if word == "settled"}
    print(f"{len(settled)} settled, {len(told) - len(settled)} refused, {len(stored)} stored")
    assert len(stored) == len(used)
    assert {request: stored.get(request) for request in settled} == settled
    assert balance == 10**9 - sum(stored.values())
    assert len(settled) > 100


async def prepare(store: LedgerStore) -> None:
    ledger = store.ledger()
    await ledger.start()
    await ledger.credit("ann", 10**9, "c1")
    await ledger.close()


@pytest.mark.slow
async def test_kill_9_of_redis_under_load_loses_and_doubles_nothing(store: PostgresStore, mortal_redis: RedisServer):
    books = BehindRedisStore(store, mortal_redis)
    await prepare(store)
    async with working(2, LOAD, store.url, mortal_redis.url()) as workers:
        for number in range(KILLS):
            await work_goes_on(workers, 20)
            mortal_redis.kill()
            await asyncio.sleep((0.0, 0.3)[number % 2])
            await asyncio.to_thread(mortal_redis.start)
        await work_goes_on(workers, 150)
    await audit(books, workers)


@pytest.mark.slow
async def test_kill_9_of_the_database_during_flushes_loses_and_doubles_nothing(
    mortal: PostgresServer, redis: RedisServer
):
    store = PostgresStore(mortal)
    books = BehindRedisStore(store, redis)
    await prepare(store)
    async with working(2, LOAD, store.url, redis.url()) as workers:
        for number in range(KILLS):
            await work_goes_on(workers, 20)
            mortal.kill()
            await asyncio.sleep((0.0, 0.3)[number % 2])
            await asyncio.to_thread(mortal.start)
        await work_goes_on(workers, 150)
    await audit(books, workers)
    store.drop()


@pytest.mark.slow
async def test_kill_9_of_a_server_under_load_loses_and_doubles_nothing(store: PostgresStore, redis: RedisServer):
    books = BehindRedisStore(store, redis)
    await prepare(store)
    async with working(2, LOAD, store.url, redis.url()) as workers:
        await work_goes_on(workers, 100)
        workers[0].kill()
        await work_goes_on(workers, 100)
    await audit(books, workers)
