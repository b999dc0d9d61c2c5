"""The circuit breaker by a clock that is set by hand."""

from __future__ import annotations

from contextlib import ExitStack

import pytest

from api.src.breaker import Breaker, BreakerOpen


class Clock:
    now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def breaker(clock: Clock) -> Breaker:
    return Breaker(failures=3, open_s=5.0, longest_s=15.0, clock=clock)


def fail(breaker: Breaker, times: int = 1) -> None:
    for _ in range(times):
        with breaker.attempt() as attempt:
            attempt.fail()


def test_it_opens_after_failures_in_a_row(breaker: Breaker) -> None:
    fail(breaker, 2)
    with breaker.attempt() as attempt:
        attempt.succeed()
    fail(breaker, 2)
    assert (breaker.state, breaker.allows) == ("closed", True)
    fail(breaker)
    assert (breaker.state, breaker.allows, breaker.retry_after) == ("open", False, 5.0)
    with pytest.raises(BreakerOpen) as refused, breaker.attempt():
        pytest.fail("let through")
    assert refused.value.retry_after == 5.0


def test_one_probe_at_a_time(breaker: Breaker, clock: Clock) -> None:
    fail(breaker, 3)
    clock.now += 4.9
    assert not breaker.allows
    clock.now += 0.1
    assert (breaker.state, breaker.allows) == ("half_open", True)
    with breaker.attempt() as probe:
        assert not breaker.allows
        with pytest.raises(BreakerOpen), breaker.attempt():
            pytest.fail("a second probe")
        probe.succeed()
    assert (breaker.state, breaker.allows) == ("closed", True)
    fail(breaker, 2)
    assert breaker.state == "closed", "the count begins anew"


def test_a_probe_that_fails_opens_it_for_longer(breaker: Breaker, clock: Clock) -> None:
    fail(breaker, 3)
    for expected in (10.0, 15.0, 15.0):
        clock.now += breaker.retry_after
        fail(breaker)
        assert (breaker.state, breaker.retry_after) == ("open", expected)
    clock.now += 15.0
    with breaker.attempt() as probe:
        probe.succeed()
    fail(breaker, 3)
    assert breaker.retry_after == 5.0, "the time begins anew"


def test_a_probe_without_a_verdict_makes_room_for_the_next(breaker: Breaker, clock: Clock) -> None:
    fail(breaker, 3)
    clock.now += 5.0
    with pytest.raises(ZeroDivisionError), breaker.attempt():
        raise ZeroDivisionError
    assert (breaker.state, breaker.allows) == ("half_open", True)


def test_late_verdicts_change_nothing(breaker: Breaker, clock: Clock) -> None:
    with breaker.attempt() as good, breaker.attempt() as bad:
        fail(breaker, 3)
        good.succeed()
        assert breaker.state == "open"
        bad.fail()
        assert breaker.retry_after == 5.0
        clock.now += 5.0
        bad.fail()
        good.succeed()
        assert breaker.state == "half_open"
        with breaker.attempt() as probe:
            probe.succeed()
        fail(breaker, 2)
        bad.fail()
        assert breaker.state == "closed"


def test_a_probe_of_an_earlier_opening_frees_no_place(breaker: Breaker, clock: Clock) -> None:
    fail(breaker, 3)
    clock.now += 5.0
    old = ExitStack()
    old.enter_context(breaker.attempt()).fail()
    clock.now += 10.0
    with breaker.attempt():
        old.close()
        assert not breaker.allows
    assert breaker.allows
