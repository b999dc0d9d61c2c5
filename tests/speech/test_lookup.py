"""Answers of a database that are remembered: how long, how many, and while it is away."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping

import pytest

from api.src.errors import Unavailable
from api.src.speech.lookup import Lookup


class Database:
    """Answers from `rows`, after `delay_s`; fails while `away`; keeps what was asked of it."""

    def __init__(self, **rows: str) -> None:
        self.rows = rows
        self.delay_s = 0.0
        self.away: Exception | None = None
        self.queries: list[list[str]] = []
        self.at_once = self.most_at_once = 0

    async def fetch(self, keys: list[str]) -> Mapping[str, str]:
        self.queries.append(keys)
        self.at_once += 1
        self.most_at_once = max(self.most_at_once, self.at_once)
        try:
            rows = dict(self.rows)
            await asyncio.sleep(self.delay_s)
        finally:
            self.at_once -= 1
        if self.away is not None:
            raise self.away
        return {key: rows[key] for key in keys if key in rows}


class Clock:
    """Stands still unless it is moved."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


async def settled(lookup: Lookup[str, str]) -> None:
    """Wait until nothing is being asked."""
    if lookup._work is not None:
        await asyncio.wait([lookup._work])


async def test_an_answer_is_asked_for_once() -> None:
    database = Database(a="1")
    lookup = Lookup(database.fetch, refresh_s=60)
    assert [await lookup.find("a") for _ in range(3)] == ["1"] * 3
    assert [await lookup.find("b") for _ in range(3)] == [None] * 3
    assert database.queries == [["a"], ["b"]]


async def test_many_at_once_share_queries_one_at_a_time() -> None:
    database = Database(**{str(number): f"v{number}" for number in range(1200)})
    database.delay_s = 0.01
    lookup = Lookup(database.fetch, refresh_s=60, patience_s=60)
    keys = [str(number) for number in range(1300)] * 3
    found = await asyncio.gather(*(lookup.find(key) for key in keys))
    assert found == [database.rows.get(key) for key in keys]
    assert [len(query) for query in database.queries] == [500, 500, 300]
    assert database.most_at_once == 1


async def test_what_changed_elsewhere_is_known_after_its_time(clock: Clock) -> None:
    database = Database(a="1")
    lookup = Lookup(database.fetch, refresh_s=5, clock=clock)
    assert await lookup.find("a") == "1"
    assert await lookup.find("b") is None
    database.rows = {"b": "2"}
    clock.now += 5
    assert await lookup.find("a") is None
    assert await lookup.find("b") == "2"
    assert database.queries == [["a"], ["b"]] * 2


async def test_an_answer_is_as_old_as_its_question(clock: Clock) -> None:
    database = Database(a="1")
    lookup = Lookup(database.fetch, refresh_s=5, clock=clock)
    database.delay_s = 0.05
    asked = asyncio.create_task(lookup.find("a"))
    await asyncio.sleep(0.01)
    clock.now += 4
    del database.rows["a"]
    assert await asked == "1"
    database.delay_s = 0
    clock.now += 1
    assert await lookup.find("a") is None


async def test_an_answer_in_use_is_renewed_before_its_time_and_nobody_waits(clock: Clock) -> None:
    database = Database(a="1")
    lookup = Lookup(database.fetch, refresh_s=5, clock=clock)
    await lookup.find("a")
    clock.now += 2
    assert await lookup.find("a") == "1"
    assert len(database.queries) == 1
    clock.now += 1
    database.rows["a"] = "2"
    assert await lookup.find("a") == "1"
    await settled(lookup)
    clock.now += 4
    assert await lookup.find("a") == "2"
    assert len(database.queries) == 2
    await settled(lookup)


async def test_what_is_forgotten_is_asked_for_anew_at_once() -> None:
    database = Database(a="1", b="1")
    lookup = Lookup(database.fetch, refresh_s=60)
    for key in "abc":
        await lookup.find(key)
    database.rows |= {"a": "2", "b": "2", "c": "2"}
    lookup.forget(lambda key, value: key == "a")
    assert [await lookup.find(key) for key in "abc"] == ["2", "1", "2"]


async def test_an_answer_from_before_the_forgetting_is_not_kept() -> None:
    database = Database(a="1")
    database.delay_s = 0.05
    lookup = Lookup(database.fetch, refresh_s=60)
    for asked_meanwhile in (True, False):
        database.rows["a"] = "1"
        lookup.forget(lambda key, value: True)
        early = asyncio.create_task(lookup.find("a"))
        await asyncio.sleep(0.01)
        database.rows["a"] = "2"
        lookup.forget(lambda key, value: True)
        if asked_meanwhile:
            assert await lookup.find("a") == "2"
        assert await early == "1"
        assert await lookup.find("a") == "2"


async def test_a_question_that_waits_survives_the_forgetting() -> None:
    database = Database(a="1", b="1")
    database.delay_s = 0.05
    lookup = Lookup(database.fetch, refresh_s=60)
    asked = asyncio.create_task(lookup.find("a"))
    await asyncio.sleep(0.01)
    waiting = asyncio.create_task(lookup.find("b"))
    await asyncio.sleep(0)
    lookup.forget(lambda key, value: True)
    assert [await lookup.find("b"), await asked, await waiting] == ["1"] * 3
    assert database.queries == [["a"], ["b"]]


async def test_only_so_many_are_kept_and_absences_push_out_nothing_real() -> None:
    database = Database(**{str(number): "v" for number in range(12)})
    lookup = Lookup(database.fetch, refresh_s=60, size=10)
    for number in range(12):
        await lookup.find(str(number))
        await lookup.find("0")
    for guess in range(100):
        await lookup.find(f"guess{guess}")
    assert (len(lookup._present), len(lookup._absent)) == (10, 10)
    asked = len(database.queries)
    assert await lookup.find("0") == "v"  # just used
    assert await lookup.find("guess99") is None
    assert len(database.queries) == asked
    assert await lookup.find("1") == "v"
    assert len(database.queries) == asked + 1


async def test_while_the_database_is_away_what_was_known_is_believed_for_a_while(clock: Clock) -> None:
    database = Database(a="1")
    lookup = Lookup(database.fetch, refresh_s=5, believe_s=600, clock=clock)
    assert await lookup.find("a") == "1"
    assert await lookup.find("b") is None
    database.away = Unavailable("away")
    for seconds in (6, 593):
        clock.now += seconds
        assert await lookup.find("a") == "1"
        for key in ("b", "c"):  # that there was no b is not believed
            with pytest.raises(Unavailable):
                await lookup.find(key)
        await settled(lookup)
    clock.now += 1
    with pytest.raises(Unavailable):
        await lookup.find("a")


async def test_an_absence_is_believed_where_that_is_wanted(clock: Clock) -> None:
    database = Database()
    lookup = Lookup(database.fetch, refresh_s=5, believe_absence=True, clock=clock)
    assert await lookup.find("b") is None
    database.away = Unavailable("away")
    clock.now += 6
    assert await lookup.find("b") is None
    with pytest.raises(Unavailable):
        await lookup.find("c")


async def test_a_database_that_is_away_is_not_pressed_and_its_return_is_noticed(clock: Clock) -> None:
    database = Database(a="1")
    lookup = Lookup(database.fetch, refresh_s=5, clock=clock)
    await lookup.find("a")
    database.away = Unavailable("away")
    clock.now += 6
    for _ in range(100):
        assert await lookup.find("a") == "1"
        with pytest.raises(Unavailable):
            await lookup.find("b")
    assert database.queries == [["a"], ["a"]]
    clock.now += 1.1
    assert await lookup.find("a") == "1"  # without waiting: it is known to be away
    await settled(lookup)
    assert len(database.queries) == 3
    database.away, database.rows = None, {"a": "2", "b": "2"}
    clock.now += 1.1
    assert await lookup.find("b") == "2"
    assert await lookup.find("a") == "2"


async def test_a_database_that_does_not_answer_delays_nobody_for_long(clock: Clock) -> None:
    database = Database(a="1")
    lookup = Lookup(database.fetch, refresh_s=5, patience_s=0.05, clock=clock)
    await lookup.find("a")
    database.delay_s = 3600
    clock.now += 6
    assert await lookup.find("a") == "1"  # after patience_s
    for _ in range(100):  # and from now on at once
        assert await lookup.find("a") == "1"
        with pytest.raises(Unavailable):
            await lookup.find("b")
    assert database.queries == [["a"], ["a"]]
    await lookup.close()


async def test_a_cancelled_caller_harms_nobody_who_waits_with_it() -> None:
    database = Database(a="1")
    database.delay_s = 0.05
    lookup = Lookup(database.fetch, refresh_s=60)
    first, second = (asyncio.create_task(lookup.find("a")) for _ in range(2))
    await asyncio.sleep(0.01)
    first.cancel()
    assert await second == "1"
    assert first.cancelled()
    assert len(database.queries) == 1


async def test_a_fault_of_ours_is_raised_and_the_next_question_is_asked(caplog: pytest.LogCaptureFixture) -> None:
    database = Database(a="1")
    lookup = Lookup(database.fetch, refresh_s=60)
    database.away = KeyError("planted")
    with pytest.raises(KeyError):
        await lookup.find("a")
    assert "a look-up failed" in caplog.text
    database.away, lookup._away_until = None, 0.0
    assert await lookup.find("a") == "1"


async def test_closing_answers_whoever_waits() -> None:
    database = Database(a="1")
    database.delay_s = 3600
    lookup = Lookup(database.fetch, refresh_s=60)
    asked = asyncio.create_task(lookup.find("a"))
    await asyncio.sleep(0.01)
    waiting = asyncio.create_task(lookup.find("b"))
    await asyncio.sleep(0.01)
    await lookup.close()
    for task in (asked, waiting):
        with pytest.raises(Unavailable):
            await task
    await lookup.close()
