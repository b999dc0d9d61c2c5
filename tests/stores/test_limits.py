"""The laws of the limits, the same in memory and in Redis, on a clock that is set by hand."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass, field
from fractions import Fraction
from typing import Any

import pytest
import pytest_asyncio
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from api.src.domain import Bounds
from api.src.stores.limits import DAY, LARGEST, MINUTE, Ask, Caps, Refusal, Standing
from api.src.stores.limits_memory import SWEEP_EVERY, MemoryLimiter
from tests.redis_server import RedisServer, running_redis
from tests.stores.limiting import NOON, SECOND, Bench, ask, opened, subject


@pytest.fixture(scope="module")
def redis() -> Iterator[RedisServer]:
    with running_redis() as server:
        yield server


@pytest.fixture(params=["memory", "redis"])
def kind(request: pytest.FixtureRequest, redis: RedisServer) -> str:
    with redis.client() as client:
        client.flushall()
    return str(request.param)


@pytest_asyncio.fixture
async def bench(kind: str, redis: RedisServer) -> AsyncIterator[Bench]:
    async with opened(kind, redis) as bench:
        yield bench


async def refusals(bench: Bench, *subjects: Any, characters: int = 1) -> list[Refusal]:
    return (await bench.limiter.enter(ask(*subjects, characters=characters))).refusals()


async def test_a_bucket_gives_its_requests_at_once_and_then_evenly(bench: Bench) -> None:
    ann = subject(requests_per_minute=7)
    for left in range(6, -1, -1):
        verdict = await bench.limiter.enter(ask(ann))
        assert verdict.standings() == [Standing("requests", 7, left, -(-(7 - left) * MINUTE // 7))]
    (refusal,) = await refusals(bench, ann)
    assert (refusal.kind, refusal.limit, refusal.wait) == ("requests", 7, -(-MINUTE // 7))
    bench.now[0] += refusal.wait - 1
    assert [refusal.wait for refusal in await refusals(bench, ann)] == [1]
    bench.now[0] += 1
    assert await refusals(bench, ann) == []
    assert await refusals(bench, ann) != []
    bench.now[0] += MINUTE
    assert [await refusals(bench, ann) for _ in range(7)] == [[]] * 7
    assert await refusals(bench, ann) != []


async def test_a_clock_that_is_put_back_fills_nothing_and_hurts_nobody(bench: Bench) -> None:
    ann = subject(requests_per_minute=1)
    assert await refusals(bench, ann) == []
    bench.now[0] -= 3600 * SECOND
    assert [refusal.wait for refusal in await refusals(bench, ann)] == [MINUTE]
    bench.now[0] += MINUTE + 3600 * SECOND
    assert await refusals(bench, ann) == []


async def test_places_are_taken_until_they_are_given_back(bench: Bench) -> None:
    ann = subject(concurrent=2)
    first, second = ask(ann), ask(ann)
    assert [(await bench.limiter.enter(one)).standings()[0].left for one in (first, second)] == [1, 0]
    (refusal,) = await refusals(bench, ann)
    assert (refusal.kind, refusal.limit, refusal.wait) == ("concurrent", 2, None)
    await bench.limiter.leave(first, 0)
    await bench.limiter.leave(first, 0)
    assert await refusals(bench, ann) == []
    assert await refusals(bench, ann) != []


async def test_characters_are_reserved_then_counted_and_the_day_ends_at_midnight_utc(bench: Bench) -> None:
    ann = subject(characters_per_day=100)
    running = ask(ann, characters=60)
    await bench.limiter.enter(running)
    (refusal,) = await refusals(bench, ann, characters=41)
    assert (refusal.kind, refusal.left, refusal.wait) == ("characters", 40, DAY // 2)
    await bench.limiter.leave(running, 25)
    late = ask(ann, characters=75)
    assert (await bench.limiter.enter(late)).standings() == [Standing("characters", 100, 0, DAY // 2)]
    bench.now[0] = NOON + DAY // 2 - 1
    assert [refusal.wait for refusal in await refusals(bench, ann)] == [1]
    bench.now[0] += 1
    today = ask(ann, characters=90)
    assert (await bench.limiter.enter(today)).standings() == [Standing("characters", 100, 10, DAY)]
    await bench.limiter.leave(late, 30)  # of yesterday
    assert [refusal.left for refusal in await refusals(bench, ann, characters=11)] == [10]


async def test_what_made_no_sound_counts_nothing(bench: Bench) -> None:
    ann = subject(characters_per_day=100)
    silent = ask(ann, characters=100)
    await bench.limiter.enter(silent)
    await bench.limiter.leave(silent, 0)
    assert await refusals(bench, ann, characters=100) == []


async def test_all_or_nothing_over_an_account_and_its_users(bench: Bench) -> None:
    account = subject(requests_per_minute=5, concurrent=3, characters_per_day=100)
    bob, eve = subject(user="bob", concurrent=1), subject(user="eve", characters_per_day=5)
    first = ask(account, bob, characters=10)
    assert (await bench.limiter.enter(first)).admitted
    (refusal,) = await refusals(bench, account, bob)
    assert (refusal.kind, refusal.subject) == ("concurrent", bob)
    (refusal,) = await refusals(bench, account, eve, characters=6)
    assert (refusal.kind, refusal.subject) == ("characters", eve)
    verdict = await bench.limiter.enter(ask(account, eve, characters=5))
    assert verdict.standings() == [
        Standing("requests", 5, 3, -(-2 * MINUTE // 5)),
        Standing("concurrent", 3, 1, None),
        Standing("characters", 5, 0, DAY // 2),
    ], "the refused ones count nowhere, and of two bounds of a kind the tighter one shows"


async def test_every_bound_in_the_way_is_named(bench: Bench) -> None:
    ann = subject(requests_per_minute=1, concurrent=1, characters_per_day=1)
    assert await refusals(bench, ann) == []
    assert [refusal.kind for refusal in await refusals(bench, ann)] == ["requests", "concurrent", "characters"]


async def test_bounds_may_change_between_requests(bench: Bench) -> None:
    assert [await refusals(bench, subject(requests_per_minute=4)) for _ in range(3)] == [[]] * 3
    assert [refusal.wait for refusal in await refusals(bench, subject(requests_per_minute=2))] == [MINUTE]
    assert await refusals(bench, subject(requests_per_minute=LARGEST, concurrent=1)) == []
    running = await bench.limiter.enter(ask(subject(requests_per_minute=LARGEST)))
    assert running.tallies[0].running == 1


async def test_accounts_and_users_are_told_apart(bench: Bench) -> None:
    names = [("a", ""), ("a:b", ""), ("a", "b"), ("a", "b:c"), ("a:b", "c"), ("b", ""), ("", "b")]
    for account, user in names:
        assert await refusals(bench, subject(account, user, concurrent=1)) == []
        assert await refusals(bench, subject(account, user, concurrent=1)) != []


async def test_an_alert_comes_once_a_day_and_subject(bench: Bench) -> None:
    account = subject(alert_characters_per_day=100)
    bob = subject(user="bob", alert_characters_per_day=10)

    async def speak(characters: int, heard: int) -> None:
        one = ask(account, bob, characters=characters)
        assert (await bench.limiter.enter(one)).admitted
        await bench.limiter.leave(one, heard)
        await bench.limiter.leave(one, heard)

    await speak(500, 10)
    assert bench.alerts == []
    await speak(1, 1)
    (alert,) = bench.alerts
    assert (alert.account, alert.user, alert.characters, alert.threshold) == ("ann", "bob", 11, 10)
    assert alert.day == "2027-01-15"
    for _ in range(4):
        await speak(50, 50)
    assert [(alert.user, alert.characters) for alert in bench.alerts] == [("bob", 11), ("", 111)]
    bench.now[0] += DAY
    await speak(200, 200)
    assert [(alert.user, alert.day) for alert in bench.alerts[2:]] == [("", "2027-01-16"), ("bob", "2027-01-16")]


# --- against a model that is written down differently ---


@dataclass
class Model:
    """Times and tokens as fractions of seconds and of requests; every running request by itself."""

    tokens: dict[str, Fraction] = field(default_factory=dict)
    filled_at: dict[str, int] = field(default_factory=dict)
    running: dict[str, tuple[Ask, int]] = field(default_factory=dict)
    heard: dict[tuple[str, int], int] = field(default_factory=dict)

    def enter(self, ask: Ask, now: int) -> bool:
        views = [self.fits(ask, place.key, place.caps, now) for place in ask.subjects]
        if all(views):
            for place in ask.subjects:
                if rate := place.caps.requests_per_minute:
                    self.tokens[place.key] = self.left(place.key, rate, now) - 1
                    self.filled_at[place.key] = now
            self.running[ask.id] = ask, now // DAY
        return all(views)

    def fits(self, ask: Ask, key: str, caps: Caps, now: int) -> bool:
        places, spoken = self.view(key, now)
        return not (
            (caps.requests_per_minute and self.left(key, caps.requests_per_minute, now) < 1)
            or (caps.concurrent and places >= caps.concurrent)
            or (caps.characters_per_day and spoken + ask.characters > caps.characters_per_day)
        )

    def view(self, key: str, now: int) -> tuple[int, int]:
        """Places taken, and characters of the day."""
        places = [(one, day) for one, day in self.running.values() if key in [place.key for place in one.subjects]]
        reserved = sum(one.characters for one, day in places if day == now // DAY)
        return len(places), self.heard.get((key, now // DAY), 0) + reserved

    def left(self, key: str, rate: int, now: int) -> Fraction:
        seconds = Fraction(now - self.filled_at.get(key, now), SECOND)
        return min(Fraction(rate), self.tokens.get(key, Fraction(rate)) + seconds * rate / 60)

    def leave(self, ask: Ask, heard: int) -> None:
        _, day = self.running.pop(ask.id)
        for place in ask.subjects:
            self.heard[place.key, day] = self.heard.get((place.key, day), 0) + heard


BOUNDS = st.builds(
    dict,
    requests_per_minute=st.sampled_from([0, 1, 3, 7]),
    concurrent=st.sampled_from([0, 1, 3]),
    characters_per_day=st.sampled_from([0, 20, 60]),
    alert_characters_per_day=st.just(10**9),
)
STEPS = st.lists(
    st.one_of(
        st.tuples(st.just("enter"), st.sampled_from(["", "bob", "eve"]), st.integers(1, 25)),
        st.tuples(st.just("leave"), st.integers(0, 5), st.integers(0, 25)),
        st.tuples(st.just("wait"), st.sampled_from([1, SECOND, 8_571_428, 8_571_429, MINUTE, DAY // 3]), st.just(0)),
    ),
    min_size=5,
    max_size=40,
)


@settings(
    max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow]
)
@given(bounds=st.fixed_dictionaries({"": BOUNDS, "bob": BOUNDS, "eve": BOUNDS}), steps=STEPS)
def test_any_history_gets_the_model_s_verdicts(
    kind: str, redis: RedisServer, bounds: dict[str, dict[str, int]], steps: list[tuple[str, Any, int]]
) -> None:
    async def live() -> None:
        account = f"account-{next(_accounts)}"
        model = Model()
        async with opened(kind, redis) as bench:
            for step, what, number in steps:
                if step == "wait":
                    bench.now[0] += what
                elif step == "enter":
                    subjects = [subject(account, user, **bounds[user]) for user in dict.fromkeys(["", what])]
                    one = ask(*subjects, characters=number)
                    verdict = await bench.limiter.enter(one)
                    assert verdict.admitted == model.enter(one, bench.now[0])
                    assert verdict.admitted == (not verdict.refusals())
                    seen = [(tally.running, tally.characters) for tally in verdict.tallies]
                    assert seen == [model.view(place.key, bench.now[0]) for place in subjects]
                elif model.running:
                    one, _ = list(model.running.values())[what % len(model.running)]
                    heard = min(number, one.characters)
                    await bench.limiter.leave(one, heard)
                    model.leave(one, heard)

    asyncio.run(live())


_accounts = itertools.count()


@settings(max_examples=50, deadline=None)
@given(rate=st.integers(1, 40), gaps=st.lists(st.integers(0, 3 * MINUTE), min_size=1, max_size=60))
def test_no_window_lets_more_through_than_a_bucket_and_what_fills_it(rate: int, gaps: list[int]) -> None:
    async def live() -> None:
        async with opened("memory", None) as bench:
            let_in = []
            for gap in gaps:
                bench.now[0] += gap
                while (await bench.limiter.enter(ask(subject(requests_per_minute=rate)))).admitted:
                    let_in.append(bench.now[0])
            for i, start in enumerate(let_in):
                for j in range(i, len(let_in)):
                    assert j - i + 1 <= rate + Fraction((let_in[j] - start) * rate, MINUTE)

    asyncio.run(live())


def test_an_account_s_own_bounds_go_before_the_deployment_s() -> None:
    defaults = Bounds(10, 2, 1000, 0)
    assert Caps.of(Bounds(), defaults) == Caps(10, 2, 1000, 0)
    assert Caps.of(Bounds(0, 5, None, 7), defaults) == Caps(0, 5, 1000, 7)
    assert not Caps.of(Bounds(), Bounds())
    assert Caps.of(Bounds(10**12), defaults).requests_per_minute == LARGEST


async def test_memory_forgets_whom_nothing_is_to_be_remembered_of() -> None:
    async with opened("memory", None) as bench:
        running = ask(subject("busy", concurrent=1))
        await bench.limiter.enter(running)
        for number in range(3 * SWEEP_EVERY):
            visitor = ask(subject(f"visitor {number}", requests_per_minute=1, concurrent=1))
            await bench.limiter.enter(visitor)
            await bench.limiter.leave(visitor, 0)
            bench.now[0] += SECOND
        assert isinstance(bench.limiter, MemoryLimiter)
        assert len(bench.limiter._counters) <= SWEEP_EVERY + 100
        assert await refusals(bench, running.subjects[0]) != []
