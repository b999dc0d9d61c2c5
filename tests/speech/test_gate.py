"""Bounds of accounts on the way of a request: what takes a place, until when, and which characters count."""

from __future__ import annotations

import asyncio
import math
from typing import Any

import pytest

from api.src.domain import Account, Bounds
from api.src.errors import QuotaExceeded, RateLimited, SpeechError, TooManyAtOnce
from api.src.speech.listener import Listener
from api.src.speech.service import Qwen3TTSService
from api.src.stores.limits import Subject
from api.src.stores.limits_memory import MemoryLimiter
from tests.fakes import FakeBackend
from tests.speech.asking import StartService, eventually, speech_request
from tests.speech.textual import TextualBackend, sentences

TEXT = sentences(3)
ANN = Account("ann", bounds=Bounds(10, 10, 10**6))


def counters(service: Qwen3TTSService, account: str = "ann", user: str = "") -> Any:
    limiter = service._gate._limiter
    assert isinstance(limiter, MemoryLimiter)
    return limiter._counters[Subject.of(account, user, None).key]  # type: ignore[arg-type]


def figures(service: Qwen3TTSService) -> tuple[int, int, int]:
    """Places taken, characters reserved, characters used."""
    row = counters(service)
    return len(row.places), row.reserved, row.used


def refused(service: Qwen3TTSService, reason: str) -> float:
    return service._metrics.refused.labels(reason)._value.get()  # type: ignore[no-any-return]


async def begin(service: Qwen3TTSService, text: str = TEXT, caller: Account = ANN, **fields: Any) -> Listener:
    listener = service.open(speech_request(text, account=caller.name, **fields), caller=caller)
    try:
        await listener.start()
    except BaseException:
        listener.close()
        raise
    return listener


async def hear(listener: Listener) -> None:
    async for _ in listener.chunks():
        pass


async def test_a_miss_a_join_and_a_hit_count_alike_until_they_are_let_go(start_service: StartService) -> None:
    backend = TextualBackend(allowed=1)
    service = await start_service(backend)
    for expected in ("miss", "join", "hit"):
        if expected == "hit":
            await eventually(lambda: not service._running)
        listener = await begin(service)
        assert listener.cache_status == expected
        if expected == "miss":
            first = listener
        elif expected == "join":
            assert figures(service) == (2, 2 * len(TEXT), 0)
            backend.allowed = math.inf
            await asyncio.gather(hear(first), hear(listener))
            assert figures(service) == (2, 2 * len(TEXT), 0), "the last bytes are still on their way"
            first.close()
            listener.close()
            await eventually(lambda: figures(service) == (0, 0, 2 * len(TEXT)))
        else:
            await hear(listener)
            assert figures(service) == (1, len(TEXT), 2 * len(TEXT))
            listener.close()
    await eventually(lambda: figures(service) == (0, 0, 3 * len(TEXT)))
    assert [standing.limit - standing.left for standing in listener.standings] == [3, 1, 3 * len(TEXT)]


@pytest.mark.parametrize(
    ("bounds", "kind", "reason", "least_wait"),
    [
        (Bounds(requests_per_minute=2), RateLimited, "requests", 29),
        (Bounds(concurrent=2), TooManyAtOnce, "concurrent", 1),
        (Bounds(characters_per_day=3 * len(TEXT) - 1), QuotaExceeded, "characters", 1),
    ],
)
async def test_beyond_a_bound_nothing_else_is_asked(
    start_service: StartService, bounds: Bounds, kind: type[RateLimited], reason: str, least_wait: int
) -> None:
    backend = FakeBackend()
    service = await start_service(backend)
    caller = Account("ann", bounds=bounds)
    listeners = [await begin(service, caller=caller) for _ in range(2)]
    with pytest.raises(RateLimited) as error:
        await begin(service, caller=caller, text=TEXT[::-1])
    assert type(error.value) is kind
    assert error.value.retry_after >= least_wait
    assert (backend.spoken, refused(service, reason)) == (1, 1)
    assert len(service._generations) <= 1
    for listener in listeners:
        listener.close()
    await eventually(lambda: counters(service).places == {})


async def test_of_several_bounds_the_one_that_lasts_longest_is_named(start_service: StartService) -> None:
    service = await start_service(FakeBackend())
    caller = Account("ann", bounds=Bounds(requests_per_minute=60, concurrent=1, characters_per_day=len(TEXT)))
    listener = await begin(service, caller=caller)
    with pytest.raises(QuotaExceeded):
        await begin(service, caller=caller)
    listener.close()


async def test_an_end_user_has_bounds_of_its_own(start_service: StartService) -> None:
    service = await start_service(FakeBackend(), concurrent_per_account=5)
    bob = Account("ann", user="bob", user_bounds=Bounds(concurrent=1))
    eve = Account("ann", user="eve", user_bounds=Bounds(concurrent=0))
    listeners = [await begin(service, caller=bob)]
    with pytest.raises(TooManyAtOnce, match="This user"):
        await begin(service, caller=bob)
    listeners += [await begin(service, caller=eve) for _ in range(4)]
    with pytest.raises(TooManyAtOnce, match="This account"):
        await begin(service, caller=eve)
    for listener in listeners:
        listener.close()


async def test_who_is_not_bounded_is_not_counted(start_service: StartService) -> None:
    service = await start_service(FakeBackend(), requests_per_minute=1, concurrent_per_account=1)
    free = Account("free", bounds=Bounds(0, 0))
    callers = [Account("admin", admin=True), free, None]
    listeners = [service.open(speech_request(TEXT), caller=caller) for caller in callers for _ in range(3)]
    listeners += [service.open_preview("tone", "req_preview") for _ in range(3)]
    for listener in listeners:
        await listener.start()
        assert listener.standings == ()
        listener.close()
    assert service._gate._limiter._counters == {}


async def spoken(start_service: StartService, text: str, *, take: int | None = None, **backend: Any) -> tuple[int, int]:
    """Places left, and characters used, by one request of which `take` bytes are taken (None: all)."""
    voice = TextualBackend(**backend)
    service = await start_service(voice)
    try:
        listener = await begin(service, text)
        try:
            async for _ in listener.chunks():
                voice.allowed += 1
                if take is not None and listener._sent >= take:
                    break
        finally:
            listener.close()
    except SpeechError:
        pass
    await eventually(lambda: not service._tasks)
    places, reserved, used = figures(service)
    assert reserved == 0
    return places, used


async def test_no_sound_counts_nothing(start_service: StartService) -> None:
    assert await spoken(start_service, "This sentence must FAIL at once, before anything is heard.") == (0, 0)


async def test_our_own_failure_counts_nothing(start_service: StartService) -> None:
    assert await spoken(start_service, f"{TEXT} But this one must FAIL, after the others.", delay_s=0.02) == (0, 0)


async def test_of_a_cut_answer_what_was_heard_counts(start_service: StartService) -> None:
    places, used = await spoken(start_service, TEXT, take=1, allowed=1)
    assert places == 0
    assert 0 < used < len(TEXT)


async def test_the_rest_of_a_text_after_its_last_byte_counts(start_service: StartService) -> None:
    assert await spoken(start_service, f"{TEXT} \n\n") == (0, len(TEXT) + 3)


async def test_who_leaves_before_the_first_sound_frees_the_place(start_service: StartService) -> None:
    service = await start_service(TextualBackend(allowed=0))
    waiting = asyncio.create_task(begin(service))
    await eventually(lambda: service.admission.running == 1)
    assert figures(service) == (1, len(TEXT), 0)
    waiting.cancel()
    await asyncio.gather(waiting, return_exceptions=True)
    await eventually(lambda: figures(service) == (0, 0, 0))


async def test_a_place_is_expected_after_the_mean_time_that_one_is_taken(start_service: StartService) -> None:
    service = await start_service(FakeBackend())
    gate = service._gate
    turn = gate.turn(Account("ann", bounds=Bounds(concurrent=1)), 1)
    assert turn is not None
    await gate.dismiss(turn._ask, 0, 12.0)
    async with turn:
        late = gate.turn(Account("ann", bounds=Bounds(concurrent=1)), 1)
        assert late is not None
        with pytest.raises(TooManyAtOnce) as error:
            await late.__aenter__()
    assert error.value.retry_after == 12
    await gate.dismiss(turn._ask, 0, 6.0)
    assert gate._mean_s == pytest.approx(0.8 * (0.8 * 12) + 0.2 * 6, abs=1)
    assert math.ceil(gate._mean_s / 4) == 3
