"""Free requests behind a real Redis, over HTTP: they are served and told whatever is away; money stays where it was."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest

from api.src.stores import usage_outbox
from api.src.stores.ledger_write_behind import WriteBehind
from tests.api.stderr import until
from tests.api.test_metrics import samples
from tests.api.wire import speak, usage
from tests.conftest import Server
from tests.fakes import FakeBackend
from tests.redis_server import RedisServer, running_redis

PRICES = "[default]\nper_1000_characters = 1000000\n"  # hits are free
ALICE = {"Authorization": "Bearer alices-key"}
STREAM = "tts:{usage}:events"


@pytest.fixture(scope="module")
def shared_redis() -> Iterator[RedisServer]:
    with running_redis() as server:
        yield server


@pytest.fixture
def start(
    start_server: Callable[..., Server], shared_redis: RedisServer, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Callable[..., Server]]:
    started: list[Server] = []
    *others, _ = WriteBehind.__init__.__defaults__
    monkeypatch.setattr(WriteBehind.__init__, "__defaults__", (*others, 30.0))  # Redis is waited for, unless it is dead

    def start(redis: RedisServer = shared_redis, **settings: Any) -> Server:
        settings = {"redis_url": redis.url(), "usage_flush_interval_s": 0.05, **settings}
        started.append(start_server(FakeBackend(), **settings))
        return started[-1]

    yield start
    for server in started:
        server.wait_idle()
        assert server.call(server.service.ledger.check) == []
    with shared_redis.client() as client:
        client.flushall()


def outcomes(server: Server, headers: Mapping[str, str] = {}) -> list[str]:
    """Of the caller's usage events, oldest first."""
    return [entry["outcome"] for entry in reversed(usage(server.client, headers)["data"])]


def test_free_requests_are_told_a_moment_later(start: Callable[..., Server]) -> None:
    server = start()
    answers = [speak(server.client) for _ in range(3)]
    assert [answer.headers["x-cache"] for answer in answers] == ["miss", "hit", "hit"]
    until(lambda: outcomes(server) == ["completed", "cached", "cached"])
    entries = usage(server.client)["data"]
    assert [entry["request_id"] for entry in reversed(entries)] == [a.headers["x-request-id"] for a in answers]
    assert {entry["price_micros"] for entry in entries} == {0}
    assert all(entry["user"] == "" for entry in entries)


def test_money_is_told_at_once_and_not_through_redis(
    start: Callable[..., Server], tmp_path: Path, shared_redis: RedisServer
) -> None:
    prices = tmp_path / "prices.toml"
    prices.write_text(PRICES)
    server = start(prices_file=prices, api_keys=[("alice", "alices-key")], usage_flush_interval_s=1000.0)
    speak(server.client, headers=ALICE)
    assert outcomes(server, ALICE) == ["completed"]
    speak(server.client, headers={**ALICE, "Idempotency-Key": "k"})
    assert outcomes(server, ALICE) == ["completed", "cached"]
    speak(server.client, headers=ALICE)
    assert outcomes(server, ALICE) == ["completed", "cached"]
    with shared_redis.client() as client:
        assert client.xlen(STREAM) == 1


def test_metrics_show_what_is_on_its_way(start: Callable[..., Server], shared_redis: RedisServer) -> None:
    server = start()
    assert samples(server, "tts_usage") == {
        ("tts_usage_stream_events",): 0,
        ("tts_usage_stream_oldest_seconds",): 0,
        ("tts_usage_memory_events",): 0,
        ("tts_usage_dead_letters",): 0,
        ("tts_usage_dropped_events_total",): 0,
    }
    breakers = samples(server, "tts_breaker_state")
    assert {labels[1] for labels in breakers} == {"usage_redis", "usage_ledger", "limits_redis"}
    assert {labels[1:]: 1 for labels, now in breakers.items() if now} == {
        (name, "closed"): 1 for name in ("usage_redis", "usage_ledger", "limits_redis")
    }
    with shared_redis.client() as client:
        client.xadd(STREAM, {"nothing": "known"})
    until(lambda: samples(server, "tts_usage_dead_letters") == {("tts_usage_dead_letters",): 1})


def test_without_redis_there_is_nothing_of_it(server: Server) -> None:
    assert samples(server, "tts_usage") == {}


def closed(server: Server) -> bool:
    return samples(server, "tts_breaker_state")["tts_breaker_state", "usage_redis", "closed"] == 1


def test_redis_may_die_and_come_back(start: Callable[..., Server], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(usage_outbox, "_OPEN_S", 0.1)
    monkeypatch.setattr(usage_outbox, "_LONGEST_OPEN_S", 0.2)
    with running_redis(fsync="always") as redis:
        server = start(redis, redis_failures=2)
        speak(server.client)
        redis.kill()
        began = time.monotonic()
        for _ in range(5):
            assert speak(server.client).status_code == 200
        assert time.monotonic() - began < 30
        assert outcomes(server).count("cached") == 5
        assert not closed(server)
        redis.start()
        until(lambda: speak(server.client) and closed(server))
        until(lambda: outcomes(server).count("completed") == 1)


def test_it_starts_without_redis(start: Callable[..., Server], tmp_path: Path) -> None:
    server = start(redis_url=f"unix://{tmp_path}/nowhere.sock")
    assert speak(server.client).status_code == 200
    assert outcomes(server) == ["completed"]
