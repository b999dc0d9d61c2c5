"""What goes through Redis and what does not, before each database in turn; what becomes of odd entries and odd ends."""

from __future__ import annotations

import asyncio
import json
import logging
import sys
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import TypeAlias

import pytest

from api.src.errors import InsufficientBalance, NotReady, Unavailable
from api.src.stores.ledger import MAX_MICROS, IdempotencyKey
from api.src.stores.ledger_choice import behind_redis
from api.src.stores.ledger_write_behind import WriteBehind, WriteBehindLedger
from api.src.stores.usage_stream import StreamAway, UsageStream
from tests.redis_server import RedisServer
from tests.stores.ledgers import (
    PATIENCE_S,
    BehindRedisStore,
    PostgresStore,
    SqliteStore,
    event,
    eventually,
    free_event,
    tell,
)
from tests.stores.test_ledger import CancelAt, awaiting

STREAM, DEAD = "tts:{usage}:events", "tts:{usage}:dead"
NEVER_S = 1000.0

OpenBehind: TypeAlias = Callable[..., Awaitable[WriteBehindLedger]]


@pytest.fixture(params=["sqlite", "postgres"])
def books(request: pytest.FixtureRequest, tmp_path: Path, redis: RedisServer) -> Iterator[BehindRedisStore]:
    """A database of each kind in turn, and Redis before it, both empty."""
    if request.param == "sqlite":
        yield BehindRedisStore(SqliteStore(tmp_path / "ledger.db"), redis)
        return
    store = PostgresStore(request.getfixturevalue("postgres"))
    yield BehindRedisStore(store, redis)
    store.drop()


@pytest.fixture
async def open_behind(books: BehindRedisStore) -> AsyncIterator[OpenBehind]:
    """Start ledgers behind Redis: `await open_behind(flush_events=10)`; at the end their books must be sound."""
    opened: list[WriteBehindLedger] = []

    async def open_one(**options: float) -> WriteBehindLedger:
        given = {"flush_interval_s": 0.02, "redis_timeout_s": PATIENCE_S, **options}
        ledger = books.ledger(behind=WriteBehind(**given))
        before = ledger._flusher._sampled
        await ledger.start()
        await eventually(lambda: ledger._flusher._sampled is not before)  # its first look is over
        opened.append(ledger)
        return ledger

    yield open_one
    assert [await ledger.check() for ledger in opened] == [[] for _ in opened]
    for ledger in opened:
        await ledger.close()


def length(books: BehindRedisStore, key: str = STREAM) -> int:
    with books.redis.client() as client:
        return int(client.xlen(key))


# What goes where


async def test_a_free_request_is_told_later_and_touches_no_database(open_behind: OpenBehind, books: BehindRedisStore):
    waiting = await open_behind(flush_interval_s=NEVER_S)
    await tell(waiting, free_event("r1", user="emma"))
    assert await waiting.usage("ann", 10) == []
    assert books.query("SELECT id FROM holds") == []
    assert length(books) == 1
    flushing = await open_behind()
    await eventually(lambda: books.told() == ["r1"])
    assert await flushing.usage("ann", 10) == [free_event("r1", user="emma")]
    await eventually(lambda: length(books) == 0)
    assert books.query("SELECT hold FROM usage_events") == [(None,)]


async def test_what_costs_or_has_a_key_is_told_at_once(open_behind: OpenBehind, books: BehindRedisStore):
    ledger = await open_behind(flush_interval_s=NEVER_S)
    await ledger.credit("ann", 100, "c1")
    async with ledger.hold("ann", "r1", 30) as hold:
        assert await ledger.balance("ann") == 70
        await hold.settle(event(hold, 20))
    async with ledger.hold("ann", "r2", 0, key=IdempotencyKey("k", "")) as hold:
        await hold.settle(event(hold, 0))
    assert [used.price_micros for used in await ledger.usage("ann", 10)] == [0, 20]
    assert len(books.query("SELECT id FROM holds")) == 2
    assert length(books) == 0


async def test_no_text_and_nothing_else_is_in_redis(open_behind: OpenBehind, books: BehindRedisStore):
    ledger = await open_behind(flush_interval_s=NEVER_S)
    await tell(ledger, free_event("r1"))
    with books.redis.client() as client:
        assert client.keys("*") == [STREAM]
        ((_, fields),) = client.xrange(STREAM)
    assert json.loads(fields.pop("event")) == {
        "request_id": "r1",
        "account": "ann",
        "model": "tts-1",
        "voice": "alloy",
        "characters": 10,
        "audio_ms": 800,
        "outcome": "cached",
        "price_micros": 0,
        "at": 1.5,
    }
    assert fields == {}


async def test_a_free_hold_that_is_extended_is_a_real_one(open_behind: OpenBehind, books: BehindRedisStore):
    ledger = await open_behind()
    await ledger.credit("ann", 100, "c1")
    async with ledger.hold("ann", "r1", 0) as hold:
        await hold.extend(0)
        assert (hold.id, hold.micros, books.open_holds()) == (0, 0, 0)
        with pytest.raises(InsufficientBalance):
            await hold.extend(101)
        with pytest.raises(ValueError, match=str(MAX_MICROS + 1)):
            await hold.extend(MAX_MICROS + 1)
        await hold.extend(30)
        await hold.extend(20)
        assert (hold.micros, await ledger.balance("ann"), books.open_holds()) == (50, 50, 1)
        await hold.settle(event(hold, 40))
        with pytest.raises(RuntimeError):
            await hold.extend(1)
    async with ledger.hold("ann", "r2", 0) as left:
        await left.extend(10)
    assert (await ledger.balance("ann"), books.open_holds()) == (60, 0)
    async with ledger.hold("ann", "r3", 0) as failed:
        await failed.extend(10)
        await failed.release(event(failed, 10, "failed"))
    assert await ledger.balance("ann") == 60
    assert [used.price_micros for used in await ledger.usage("ann", 10)] == [0, 40]


async def test_a_free_hold_ends_once_and_charges_nothing(open_behind: OpenBehind, books: BehindRedisStore):
    ledger = await open_behind()
    async with ledger.hold("ann", "r1", 0) as hold:
        with pytest.raises(ValueError, match="1 micro-units"):
            await hold.settle(event(hold, 1))
        for other in (free_event("r9"), free_event("r1", account="eve")):
            with pytest.raises(ValueError, match="another request"):
                await hold.settle(other)
        await hold.settle(free_event("r1"))
        for again in (hold.settle(free_event("r1")), hold.release(), hold.extend(1)):
            with pytest.raises(RuntimeError):
                await again
    async with ledger.hold("ann", "r2", 0):
        pass
    async with ledger.hold("ann", "r3", 0) as released:
        await released.release()
    async with ledger.hold("ann", "r4", 0) as failed:
        await failed.release(event(failed, 7, "failed"))
    with pytest.raises(RuntimeError):
        await failed.settle(free_event("r4"))
    await eventually(lambda: books.told() == ["r1", "r4"])
    assert await ledger.usage("ann", 1) == [replace(event(failed, 0, "failed"), request_id="r4")]


@pytest.mark.parametrize("on_waking", [False, True])
async def test_no_cancellation_loses_or_doubles_what_was_settled(
    open_behind: OpenBehind, books: BehindRedisStore, on_waking: bool
):
    ledger = await open_behind()
    runs = 0
    while True:
        run = CancelAt(tell(ledger, free_event(f"r{runs}")), runs, on_waking=on_waking)
        await asyncio.wait([asyncio.ensure_future(awaiting(run))])
        runs += 1
        if run.awaits < runs:
            break
    assert runs >= 2
    await eventually(lambda: books.told() == [f"r{number}" for number in range(runs)])


# Batches


async def test_what_is_told_together_goes_together(open_behind: OpenBehind, books: BehindRedisStore):
    ledger = await open_behind(flush_events=20, flush_interval_s=NEVER_S)
    with books.redis.client() as client:
        client.config_resetstat()
        await asyncio.gather(*(tell(ledger, free_event(f"r{number}")) for number in range(50)))
        assert client.info("commandstats")["cmdstat_xadd"]["calls"] == 50
        assert client.info("stats")["total_reads_processed"] <= 10
    before = ledger._ledger.transactions
    flushing = await open_behind(flush_events=20)
    await eventually(lambda: len(books.told()) == 50)
    assert flushing._ledger.transactions <= 3 + 1  # and the start
    assert ledger._ledger.transactions == before
    assert sorted(books.told()) == sorted(f"r{number}" for number in range(50))


async def test_the_backlog_says_how_much_and_how_old(open_behind: OpenBehind, books: BehindRedisStore):
    stream = UsageStream(books.redis.url())
    await stream.add([free_event("r1"), free_event("r2")])
    assert await stream.read(1)  # by somebody who then does not go on
    await asyncio.sleep(0.2)
    ledger = await open_behind(lease_s=60)
    await eventually(lambda: books.told() == ["r2"])
    await eventually(lambda: ledger.backlog().stream == 1)
    now = ledger.backlog()
    assert 0.2 < now.oldest_s < 60
    assert ledger.backlog().oldest_s > now.oldest_s
    assert (now.memory, now.dead_letters, now.dropped) == (0, 0, 0)
    await stream.close()


# Several servers


async def test_servers_share_one_stream(open_behind: OpenBehind, books: BehindRedisStore):
    ledgers = [await open_behind(flush_events=7) for _ in range(3)]
    await asyncio.gather(*(tell(ledgers[number % 3], free_event(f"r{number}")) for number in range(100)))
    await eventually(lambda: len(books.told()) == 100)
    assert set(books.told()) == {f"r{number}" for number in range(100)}
    await eventually(lambda: length(books) == 0)
    with books.redis.client() as client:
        await eventually(lambda: len(client.xinfo_consumers(STREAM, "ledger")) == 3)
        await ledgers[0].close()
        assert len(client.xinfo_consumers(STREAM, "ledger")) == 2


async def test_what_a_dead_server_has_taken_is_taken_over(open_behind: OpenBehind, books: BehindRedisStore):
    dead = UsageStream(books.redis.url())
    await dead.add([free_event(f"r{number}") for number in range(5)])
    assert len(await dead.read(3)) == 3
    await open_behind(flush_events=2, lease_s=0.3)
    await eventually(lambda: set(books.told()) >= {"r3", "r4"})
    await eventually(lambda: set(books.told()) == {"r0", "r1", "r2", "r3", "r4"})
    with books.redis.client() as client:
        await eventually(lambda: len(client.xinfo_consumers(STREAM, "ledger")) == 1)  # the dead one is forgotten
    assert length(books) == 0
    await dead.close()


async def test_a_consumer_with_something_pending_is_not_forgotten(redis: RedisServer):
    """Nobody could claim it any more."""
    dead, living = UsageStream(redis.url()), UsageStream(redis.url())
    await dead.add([free_event("r1")])
    entries = await dead.read(1)
    await living.forget_dead(0)
    assert await living.claim(1, 0) == entries
    await living.forget_dead(0)
    with redis.client() as client:
        assert len(client.xinfo_consumers(STREAM, "ledger")) == 1
    await dead.close()
    await living.close()


async def test_it_is_taken_over_however_busy_the_others_are(open_behind: OpenBehind, books: BehindRedisStore):
    dead = UsageStream(books.redis.url())
    await dead.add([free_event("left")])
    await dead.read(1)
    ledger = await open_behind(flush_events=1, lease_s=0.2)
    number = 0
    while "left" not in books.told():
        await tell(ledger, free_event(f"r{number}"))
        number += 1
        assert number < 5000
    await dead.close()


async def test_a_stream_that_redis_has_lost_is_made_anew(open_behind: OpenBehind, books: BehindRedisStore):
    ledger = await open_behind()
    await tell(ledger, free_event("r1"))
    await eventually(lambda: books.told() == ["r1"])
    with books.redis.client() as client:
        client.flushall()
    await tell(ledger, free_event("r2"))
    await eventually(lambda: books.told() == ["r1", "r2"])


# Odd entries


@pytest.mark.parametrize("content", [{}, {"event": "no JSON"}, {"event": '{"request_id": "r9"}'}])
async def test_what_nobody_can_read_is_put_aside(
    content: dict[str, str], tmp_path: Path, redis: RedisServer, caplog: pytest.LogCaptureFixture
):
    books = BehindRedisStore(SqliteStore(tmp_path / "ledger.db"), redis)
    with redis.client() as client:
        client.xadd(STREAM, content or {"nothing": "known"})
        stream = UsageStream(redis.url())
        await stream.add([free_event("r1")])
        ledger = books.ledger()
        await ledger.start()
        await eventually(lambda: length(books) == 0)
        assert books.told() == ["r1"]
        await eventually(lambda: ledger.backlog().dead_letters == 1)
        ((_, letter),) = client.xrange(DEAD)
        assert letter.get("event") == content.get("event")
        assert letter["reason"]
        assert f"entry {letter['id']} of the usage stream is a dead letter" in caplog.text
    await stream.close()
    await ledger.close()


async def test_an_event_that_the_ledger_refuses_does_not_block_the_others(
    open_behind: OpenBehind, books: BehindRedisStore, monkeypatch: pytest.MonkeyPatch
):
    """Whatever the reading lets through."""
    monkeypatch.setattr("api.src.stores.usage_entry._MAX_COUNT", 2**80)
    stream = UsageStream(books.redis.url())
    events = [free_event(f"r{number}") for number in range(9)]
    events[4] = replace(events[4], characters=2**70)
    await stream.add(events)
    await open_behind()
    await eventually(lambda: length(books) == 0)
    assert sorted(books.told()) == [f"r{number}" for number in range(9) if number != 4]
    assert length(books, DEAD) == 1
    await stream.close()


async def test_an_entry_of_a_newer_server_is_read(open_behind: OpenBehind, books: BehindRedisStore):
    stream = UsageStream(books.redis.url())
    await stream.add([free_event("r1")])
    with books.redis.client() as client:
        ((_, fields),) = client.xrange(STREAM)
        newer = {**json.loads(fields["event"]), "request_id": "r2", "mood": "gay"}
        client.xadd(STREAM, {"event": json.dumps(newer), "version": "9"})
    await open_behind()
    await eventually(lambda: books.told() == ["r1", "r2"])
    await stream.close()


async def test_entries_that_somebody_has_deleted_are_forgotten(open_behind: OpenBehind, books: BehindRedisStore):
    dead = UsageStream(books.redis.url())
    await dead.add([free_event("r1"), free_event("r2")])
    (first, _) = await dead.read(2)
    with books.redis.client() as client:
        client.xdel(STREAM, first.id)
        assert await dead.read(2)  # one of the two has nothing in it now
        await open_behind(lease_s=0.1)
        await eventually(lambda: books.told() == ["r2"])
        await eventually(lambda: length(books) == 0)
    await dead.close()


# Odd ends


async def test_closing_flushes_what_there_is(open_behind: OpenBehind, books: BehindRedisStore):
    ledger = await open_behind(flush_interval_s=NEVER_S, flush_events=3)
    for number in range(10):
        await tell(ledger, free_event(f"r{number}"))
    assert books.told() == []
    await ledger.close()
    assert len(books.told()) == 10
    with books.redis.client() as client:
        assert client.xinfo_consumers(STREAM, "ledger") == []
    await ledger.close()
    async with ledger.hold("ann", "late", 0) as hold:
        for _ in range(2):
            with pytest.raises(Unavailable):
                await hold.settle(free_event("late"))


async def test_a_ledger_that_never_started_can_be_closed(books: BehindRedisStore):
    ledger = books.ledger()
    async with ledger.hold("ann", "early", 0) as hold:
        with pytest.raises(Unavailable):
            await hold.settle(free_event("early"))
    await ledger.close()


@pytest.mark.parametrize(
    ("setting", "value", "warning"),
    [("appendonly", "no", "appendonly yes"), ("maxmemory", "100mb", "maxmemory-policy noeviction"), ("hz", "10", "")],
)
async def test_dangerous_settings_of_redis_are_warned_of(
    open_behind: OpenBehind,
    books: BehindRedisStore,
    setting: str,
    value: str,
    warning: str,
    caplog: pytest.LogCaptureFixture,
):
    with books.redis.client() as client:
        client.config_set(setting, value)
        client.config_set("maxmemory-policy", "allkeys-lru")
        await open_behind()
        await eventually(lambda: len(client.xinfo_groups(STREAM)) == 1 if client.exists(STREAM) else False)
        client.config_set("maxmemory-policy", "noeviction")
    lines = [record.message for record in caplog.records if record.levelno >= logging.WARNING]
    assert [warning in line for line in lines] == ([True] if warning else [])


@pytest.mark.parametrize(
    "url",
    ["redis://u:sk-planted@127.0.0.1:sk-planted/0", "redis://u:sk#planted@127.0.0.1:1/0", "redis://[sk-planted/0"],
)
def test_a_url_that_is_not_understood_is_not_quoted(tmp_path: Path, url: str):
    with pytest.raises(ValueError, match="not understood") as raised:
        UsageStream(url)
    assert "planted" not in str(raised.value)
    assert raised.value.__cause__ is None
    assert raised.value.__suppress_context__


async def test_what_redis_says_of_a_wrong_password_does_not_quote_it(redis: RedisServer):
    stream = UsageStream(f"unix://user:sk-planted@{redis.socket}")
    with pytest.raises(StreamAway) as raised:
        await stream.read(1)
    assert "sk-planted" not in str(raised.value)
    await stream.close()


def test_without_the_package_it_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    for name in ("ledger_write_behind", "usage_stream"):
        monkeypatch.delitem(sys.modules, f"api.src.stores.{name}")
    monkeypatch.setitem(sys.modules, "redis.asyncio", None)
    options = {"flush_events": 1, "flush_interval_s": 1.0, "failures": 1, "memory_events": 1, "lease_s": 1.0}
    with pytest.raises(NotReady, match=r"qwen3-tts-server\[redis\]"):
        behind_redis(SqliteStore(tmp_path / "l.db").ledger(), "redis://localhost", **options)


async def test_it_starts_and_ends_without_redis(tmp_path: Path):
    store = SqliteStore(tmp_path / "ledger.db")
    options = WriteBehind(failures=2, redis_timeout_s=0.2)
    ledger = WriteBehindLedger(store.ledger(), f"unix://{tmp_path}/nowhere.sock", options)
    await ledger.start()
    for number in range(5):
        await tell(ledger, free_event(f"r{number}"))
    assert [used.request_id for used in await ledger.usage("ann", 10)] == ["r4", "r3", "r2", "r1", "r0"]
    assert ledger.breakers()["usage_redis"] == "open"
    await asyncio.wait_for(ledger.close(), 30)
