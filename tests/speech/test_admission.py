"""Permits: who runs, who waits, who is sent away."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from api.src.errors import Overloaded
from api.src.speech import admission
from api.src.speech.admission import MAX_RETRY_AFTER, Admission, Permit


async def is_granted(permit: Permit) -> bool:
    try:
        async with asyncio.timeout(0.001):
            await permit.granted()
    except TimeoutError:
        return False
    return True


async def test_permits_run_in_the_order_of_their_arrival() -> None:
    gate = Admission(max_concurrent=1, queue_size=10)
    order: list[int] = []

    async def visit(number: int, permit: Permit) -> None:
        with permit:
            await permit.granted()
            assert gate.running == 1
            order.append(number)
            await asyncio.sleep(0)

    permits = [gate.enter() for _ in range(8)]
    async with asyncio.TaskGroup() as tasks:
        for number in (5, 2, 7, 0, 1, 6, 3, 4):  # who waits first must not matter
            tasks.create_task(visit(number, permits[number]))
    assert order == list(range(8))
    assert (gate.running, gate.waiting) == (0, 0)


async def test_beyond_the_queue_the_answer_is_no_at_once() -> None:
    gate = Admission(max_concurrent=2, queue_size=3)
    held = [gate.enter() for _ in range(5)]
    assert (gate.running, gate.waiting) == (2, 3)
    with pytest.raises(Overloaded) as refusal:
        gate.enter()
    assert (refusal.value.status, refusal.value.code) == (503, "overloaded")
    assert 1 <= refusal.value.retry_after <= MAX_RETRY_AFTER
    assert (gate.running, gate.waiting) == (2, 3), "the refused one must not count"
    held[0].release()
    assert (gate.running, gate.waiting) == (2, 2)
    gate.enter()


async def test_without_a_queue_only_the_running_ones_are_let_in() -> None:
    gate = Admission(max_concurrent=1, queue_size=0)
    with gate.enter() as permit:
        assert await is_granted(permit)
        with pytest.raises(Overloaded):
            gate.enter()
    with gate.enter() as permit:
        assert await is_granted(permit)


async def test_who_leaves_the_queue_is_never_called_and_holds_up_nobody() -> None:
    gate = Admission(max_concurrent=1, queue_size=5)
    first, second, third = gate.enter(), gate.enter(), gate.enter()
    second.release()
    assert (gate.running, gate.waiting) == (1, 1)
    first.release()
    assert await is_granted(third)
    assert not await is_granted(second)
    assert (gate.running, gate.waiting) == (1, 0)


async def test_leaving_twice_gives_back_one_place() -> None:
    gate = Admission(max_concurrent=1, queue_size=5)
    first, second, third = gate.enter(), gate.enter(), gate.enter()
    first.release()
    first.release()
    assert await is_granted(second)
    assert not await is_granted(third)
    assert (gate.running, gate.waiting) == (1, 1)


async def test_a_failure_and_a_cancellation_give_the_place_back() -> None:
    gate = Admission(max_concurrent=1, queue_size=5)
    with pytest.raises(RuntimeError, match="planted"), gate.enter():
        raise RuntimeError("planted")
    assert gate.running == 0
    running = gate.enter()

    async def wait() -> None:
        with gate.enter() as permit:
            await permit.granted()

    task = asyncio.create_task(wait())
    await asyncio.sleep(0)
    assert gate.waiting == 1
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)
    assert gate.waiting == 0
    running.release()
    assert gate.running == 0


async def test_a_cancelled_wait_does_not_lose_the_turn() -> None:
    gate = Admission(max_concurrent=1, queue_size=5)
    first, second = gate.enter(), gate.enter()
    assert not await is_granted(second)  # a wait that was given up
    first.release()
    assert await is_granted(second)


async def test_retry_after_follows_the_length_of_generations_and_of_the_queue(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 0.0
    monkeypatch.setattr(admission, "time", SimpleNamespace(monotonic=lambda: now))
    gate = Admission(max_concurrent=2, queue_size=1000)
    for _ in range(100):
        with gate.enter():
            now += 8.0
    idle = gate.retry_after()
    assert 3 <= idle <= 8
    permits = [gate.enter() for _ in range(6)]
    assert gate.retry_after() > idle
    permits += [gate.enter() for _ in range(500)]
    assert gate.retry_after() == MAX_RETRY_AFTER


@given(
    max_concurrent=st.integers(1, 4),
    queue_size=st.integers(0, 4),
    steps=st.lists(st.one_of(st.none(), st.integers(0, 12)), max_size=60),
)
def test_places_are_neither_lost_nor_made(max_concurrent: int, queue_size: int, steps: list[int | None]) -> None:
    """A step enters (None) or lets some permit leave, possibly again; who runs is always who came first."""

    async def run() -> None:
        gate = Admission(max_concurrent, queue_size)
        everyone: list[Permit] = []
        inside: list[Permit] = []
        for step in steps:
            if step is not None:
                if step < len(everyone):
                    everyone[step].release()
                    inside = [permit for permit in inside if permit is not everyone[step]]
            elif len(inside) < max_concurrent + queue_size:
                everyone.append(gate.enter())
                inside.append(everyone[-1])
            else:
                with pytest.raises(Overloaded):
                    gate.enter()
            assert gate.running == min(len(inside), max_concurrent)
            assert gate.waiting == len(inside) - gate.running
            granted = [permit.running_seconds is not None for permit in inside]
            assert granted == [index < gate.running for index in range(len(inside))]
        for permit in inside:
            permit.release()
        assert (gate.running, gate.waiting) == (0, 0)

    asyncio.run(run())
