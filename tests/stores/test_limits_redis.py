"""Limits shared through a real Redis: several processes, kill -9 of either side, and what is left in its memory."""

from __future__ import annotations

import asyncio
import json
import logging
import os
import signal
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import ExitStack
from typing import Any

import pytest
import pytest_asyncio

from api.src.breaker import Breaker
from api.src.stores.limits import Ask, LimiterAway, Verdict
from api.src.stores.limits_fallback import FallbackLimiter
from api.src.stores.limits_memory import MemoryLimiter
from api.src.stores.limits_redis import TIMEOUT_S, RedisLimiter
from tests.redis_server import RedisServer, running_redis
from tests.stores.limiting import PATIENCE_S, ask, opened, subject


@pytest.fixture(scope="module")
def server() -> Iterator[RedisServer]:
    with running_redis() as server:
        yield server


@pytest.fixture
def redis(server: RedisServer) -> RedisServer:
    with server.client() as client:
        client.flushall()
        client.script_flush()
    return server


@pytest.fixture
def launch(redis: RedisServer) -> Iterator[Callable[..., subprocess.Popen[str]]]:
    """Start processes that share limits: `launch(count, at_once, how, lease_s=..., **caps)`."""
    with ExitStack() as stack:

        def start(count: int, at_once: int, how: str, lease_s: float = 30, **caps: int) -> subprocess.Popen[str]:
            words = [redis.url(), str(lease_s), str(count), str(at_once), how, json.dumps(caps)]
            command = [sys.executable, "-m", "tests.stores.limits_process", *words]
            process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
            stack.enter_context(process)
            stack.callback(process.kill)
            return process

        yield start


def told(process: subprocess.Popen[str]) -> str:
    assert process.stdout is not None
    return process.stdout.readline().strip()


@pytest_asyncio.fixture
async def limiter(redis: RedisServer) -> AsyncIterator[RedisLimiter]:
    async with opened_limiter(redis) as limiter:
        yield limiter


class opened_limiter:
    """A RedisLimiter on Redis's own clock."""

    def __init__(self, redis: RedisServer, lease_s: float = 30) -> None:
        self._limiter = RedisLimiter(redis.url(), lambda alert: None, lease_s=lease_s, timeout_s=PATIENCE_S)

    async def __aenter__(self) -> RedisLimiter:
        await self._limiter.start()
        return self._limiter

    async def __aexit__(self, *error: object) -> None:
        await self._limiter.close()


def test_processes_share_every_bound_exactly(launch: Callable[..., Any]) -> None:
    caps = {"requests_per_minute": 60, "concurrent": 45, "characters_per_day": 40}
    processes = [launch(40, 8, "hold", **caps) for _ in range(3)]
    assert sum(int(told(process)) for process in processes) == 40, "the tightest bound, to the last one"


def test_processes_share_a_bucket_exactly_but_for_what_fills_it(launch: Callable[..., Any]) -> None:
    began = time.monotonic()
    processes = [launch(60, 8, "leave", requests_per_minute=60) for _ in range(3)]
    let_in = sum(int(told(process)) for process in processes)
    assert 60 <= let_in <= 60 + (time.monotonic() - began) + 1


def test_one_of_several_processes_raises_the_alert(launch: Callable[..., Any]) -> None:
    processes = [launch(40, 4, "leave", alert_characters_per_day=70) for _ in range(3)]
    told_by = []
    for process in processes:
        lines, _ = process.communicate("", timeout=30)
        told_by += lines.split("\n")
    assert [line for line in told_by if "alert" in line] == ["alert 71"]
    assert told_by.count("40") == 3


def leases(redis: RedisServer) -> list[float]:
    """When those of all places run out, by Redis's clock in microseconds."""
    with redis.client() as client:
        (key,) = client.keys("*:places")
        return [until for _, until in client.zrange(key, 0, -1, withscores=True)]


async def test_the_places_of_a_killed_process_come_back(
    launch: Callable[..., Any], redis: RedisServer, limiter: RedisLimiter
) -> None:
    caps = {"concurrent": 3, "characters_per_day": 3}
    process = launch(3, 3, "hold", lease_s=3, **caps)
    assert await asyncio.to_thread(told, process) == "3"
    first = leases(redis)
    while min(leases(redis)) <= max(first):  # it renews them
        assert not (await limiter.enter(ask(subject(**caps)))).admitted
        await asyncio.sleep(0.02)
    process.kill()
    process.wait()
    last = max(leases(redis))
    now = [int(last) - 1]
    limiter._clock = lambda: now[0]
    assert not (await limiter.enter(ask(subject(**caps)))).admitted
    now[0] += 2
    verdict = await limiter.enter(ask(subject(**caps)))
    assert verdict.admitted
    assert (verdict.tallies[0].running, verdict.tallies[0].characters) == (1, 1)


async def test_keys_expire_and_hold_no_names(redis: RedisServer, limiter: RedisLimiter) -> None:
    one = ask(
        subject("acme-corporation", requests_per_minute=9), subject("acme-corporation", "eve@example", concurrent=1)
    )
    await limiter.enter(one)
    with redis.client() as client:
        keys = client.keys("*")
        held = {key: client.hgetall(key) if client.type(key) == "hash" else client.zrange(key, 0, -1) for key in keys}
        assert len(keys) == 3
        assert all(key.startswith("tts:limits:") and 24 * 3600 < client.ttl(key) <= 25 * 3600 for key in keys)
    assert not any(word in str(held) for word in ("acme", "eve"))
    await limiter.leave(one, 1)


async def test_a_cancelled_ask_takes_no_place(limiter: RedisLimiter) -> None:
    ann = subject(concurrent=1, characters_per_day=10)
    for steps in range(12):  # cancelled before it is sent, on the way, and as the answer comes
        entering = asyncio.create_task(limiter.enter(one := ask(ann)))
        for _ in range(steps):
            await asyncio.sleep(0)
        entering.cancel()
        (end,) = await asyncio.gather(entering, return_exceptions=True)
        if not isinstance(end, asyncio.CancelledError):
            await limiter.leave(one, 0)
        await eventually_free(limiter, ann)


async def eventually_free(limiter: RedisLimiter, ann: Any) -> None:
    async with asyncio.timeout(30):
        while True:
            if (await limiter.enter(one := ask(ann, characters=10))).admitted:
                break
            await asyncio.sleep(0.005)
    await limiter.leave(one, 0)


async def test_scripts_that_redis_has_forgotten_are_loaded_again(redis: RedisServer, limiter: RedisLimiter) -> None:
    ann = subject(requests_per_minute=5)
    assert [(await limiter.enter(ask(ann))).admitted for _ in range(2)] == [True, True]
    with redis.client() as client:
        client.script_flush()
    verdicts = await asyncio.gather(*(limiter.enter(ask(ann)) for _ in range(5)))
    assert sum(verdict.admitted for verdict in verdicts) == 3


class Away:
    """What a FallbackLimiter was told, and its limiters on a breaker that opens for `open_s`."""

    def __init__(self, redis: RedisServer, *, timeout_s: float = PATIENCE_S, open_s: float = 0.2) -> None:
        self.changes: list[bool] = []
        self.shared = RedisLimiter(redis.url(), lambda alert: None, lease_s=60, timeout_s=timeout_s)
        self.spare = MemoryLimiter(lambda alert: None)
        self.limiter = FallbackLimiter(
            self.shared,
            self.spare,
            on_change=self.changes.append,
            breaker=Breaker(failures=2, open_s=open_s, longest_s=open_s),
        )

    async def ask(self, **caps: int) -> tuple[Ask, Verdict]:
        one = ask(subject(**caps))
        return one, await self.limiter.enter(one)


@pytest_asyncio.fixture
async def away(redis: RedisServer) -> AsyncIterator[Away]:
    away = Away(redis)
    await away.limiter.start()
    yield away
    await away.limiter.close()


async def test_redis_killed_and_restarted_in_the_middle(
    redis: RedisServer, away: Away, caplog: pytest.LogCaptureFixture
) -> None:
    before, verdict = await away.ask(concurrent=2)
    assert verdict.admitted
    redis.kill()
    meanwhile = [await away.ask(concurrent=2) for _ in range(4)]
    assert [verdict.admitted for _, verdict in meanwhile] == [True, True, False, False], "by its own counters"
    await away.limiter.leave(before, 1)
    await asyncio.sleep(0.05)  # nobody is there to be told
    redis.start()
    async with asyncio.timeout(30):
        while away.changes != [True, False]:
            one, verdict = await away.ask(requests_per_minute=1000)
            await away.limiter.leave(one, 1)
            await asyncio.sleep(0.05)
    for one, verdict in meanwhile:
        if verdict.admitted:
            await away.limiter.leave(one, 1)
    places = []
    async with asyncio.timeout(30):
        while len(places) < 2:  # the place from before comes back as soon as the debt is paid, before its lease ends
            one, verdict = await away.ask(concurrent=2)
            if verdict.admitted:
                places.append(one)
            else:
                await asyncio.sleep(0.05)
    many = await asyncio.gather(*(away.ask(requests_per_minute=1000) for _ in range(20)))
    assert all(verdict.admitted for _, verdict in many)
    assert away.limiter._in_spare == set(), "all of them are asked of Redis again"
    warnings = [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]
    assert [line.split(" (")[0] for line in warnings] == ["Redis cannot be had"]
    for one in places:
        await away.limiter.leave(one, 1)


async def test_a_redis_that_hangs_holds_nobody_up_for_long(redis: RedisServer, monkeypatch: pytest.MonkeyPatch) -> None:
    away = Away(redis, timeout_s=TIMEOUT_S, open_s=600)
    await away.limiter.start()
    os.kill(redis.pid, signal.SIGSTOP)
    try:
        began = time.monotonic()
        verdicts = await asyncio.gather(*(away.ask(concurrent=9) for _ in range(20)))
        assert time.monotonic() - began < 16 * TIMEOUT_S, "one waits after the other"
        assert sum(verdict.admitted for _, verdict in verdicts) == 9
        with monkeypatch.context() as patched:
            patched.setattr(away.shared, "enter", lambda one: pytest.fail("it is asked again at once"))
            await away.ask(concurrent=9)
    finally:
        os.kill(redis.pid, signal.SIGCONT)
    await away.limiter.close()


async def test_those_that_wait_behind_a_call_in_vain_are_told_at_once(redis: RedisServer) -> None:
    limiter = RedisLimiter(redis.url(), lambda alert: None)
    await limiter.start()
    ends = []

    async def ask_in_vain() -> None:
        with pytest.raises(LimiterAway):
            await limiter.enter(ask(subject(requests_per_minute=9)))
        ends.append(time.monotonic())

    await limiter.enter(ask(subject(requests_per_minute=9)))
    os.kill(redis.pid, signal.SIGSTOP)
    try:
        first = asyncio.create_task(ask_in_vain())
        await asyncio.sleep(0)
        while limiter._courier._waiting:  # noqa: ASYNC110 (until the call is on its way: the next one waits behind it)
            await asyncio.sleep(0)
        await asyncio.gather(first, ask_in_vain())
    finally:
        os.kill(redis.pid, signal.SIGCONT)
    assert abs(ends[0] - ends[1]) < TIMEOUT_S / 2
    await limiter.close()


async def test_without_a_spare_it_says_that_redis_is_away(redis: RedisServer) -> None:
    async with opened_limiter(redis) as limiter:
        redis.kill()
        try:
            with pytest.raises(LimiterAway, match="ConnectionError"):
                await limiter.enter(ask(subject(concurrent=1)))
        finally:
            redis.start()


async def test_a_paused_process_that_lost_its_lease_gives_back_nothing_twice(redis: RedisServer) -> None:
    async with opened("redis", redis, lease_s=10) as bench:
        ann = subject(concurrent=1, characters_per_day=10)
        slow, next_one = ask(ann, characters=4), ask(ann, characters=5)
        assert (await bench.limiter.enter(slow)).admitted
        bench.now[0] += 11_000_000
        assert (await bench.limiter.enter(next_one)).admitted
        await bench.limiter.leave(slow, 4)
        verdict = await bench.limiter.enter(ask(ann))
        assert (verdict.admitted, verdict.tallies[0].running, verdict.tallies[0].characters) == (False, 1, 5)
