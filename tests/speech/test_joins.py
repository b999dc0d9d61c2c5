"""Many listeners, one generation: who joins, who does not, and what they share when it fails."""

from __future__ import annotations

import asyncio
import math
import random
import threading
import time
from collections.abc import Awaitable, Callable
from contextlib import aclosing, closing
from typing import Any

import httpx
import pytest

from api.src.errors import InsufficientBalance, SynthesisFailed
from tests.conftest import Server
from tests.speech.asking import StartService, collect, eventually, speech_request, wait_until
from tests.speech.caller import Caller
from tests.speech.textual import TextualBackend, pcm_of, sentences

CROWD = 100
TEXT = sentences(4)
FAILS_FIRST = "This very first sentence is bound to FAIL before there is any sound at all."
FAILS_LATE = f"{sentences(2)} But this third sentence is bound to FAIL, long after the first sound."


@pytest.fixture
def backend() -> TextualBackend:
    return TextualBackend()


async def ask(client: httpx.AsyncClient, text: str, **headers: str) -> httpx.Response:
    return await client.post("/v1/audio/speech", json={"input": text, "response_format": "pcm"}, headers=headers)


def crowd(
    server: Server, visit: Callable[[httpx.AsyncClient], Awaitable[Any]], count: int = CROWD, **options: Any
) -> list[Any]:
    """What so many visitors at once got, exceptions included; nothing sounds before all of them are there."""

    async def run() -> list[Any]:
        limits = httpx.Limits(max_connections=None)
        server.backend.allowed = 0
        async with httpx.AsyncClient(base_url=server.url, timeout=60, limits=limits) as client:
            visits = [asyncio.ensure_future(visit(client)) for _ in range(count)]
            await eventually(lambda: len(server.service._listeners) >= count or all(one.done() for one in visits))
            server.backend.allowed = math.inf
            return await asyncio.gather(*visits, **options)

    return asyncio.run(run())


def records(server: Server) -> list[str]:
    return [path.name for path in (server.folder / "cache").rglob("*.json")]


def test_a_hundred_at_once_share_one_generation(server: Server) -> None:
    answers = crowd(server, lambda client: ask(client, TEXT))
    assert {answer.status_code for answer in answers} == {200}
    assert {answer.content for answer in answers} == {pcm_of(TEXT)}
    statuses = [answer.headers["x-cache"] for answer in answers]
    assert (statuses.count("miss"), statuses.count("join")) == (1, CROWD - 1)
    assert server.backend.spoken == 1
    server.wait_idle()
    assert ask_once(server, TEXT).headers["x-cache"] == "hit"
    assert server.backend.spoken == 1


@pytest.mark.parametrize("reset", [False, True])
def test_the_first_one_hangs_up_and_harms_nobody(server: Server, backend: TextualBackend, reset: bool) -> None:
    backend.allowed = 0
    first = Caller(server.url)
    first.ask(input=TEXT, response_format="pcm")
    wait_until(lambda: backend.open == 1)

    async def visit(client: httpx.AsyncClient) -> httpx.Response:
        return await ask(client, TEXT)

    async def run() -> list[httpx.Response]:
        async with httpx.AsyncClient(base_url=server.url, timeout=60, limits=httpx.Limits()) as client:
            visits = [asyncio.create_task(visit(client)) for _ in range(CROWD - 1)]
            await eventually(lambda: len(server.service._listeners) == CROWD)
            first.hang_up(reset=reset)
            await eventually(lambda: len(server.service._listeners) == CROWD - 1)
            backend.allowed = math.inf
            return await asyncio.gather(*visits)

    answers = asyncio.run(run())
    assert {answer.content for answer in answers} == {pcm_of(TEXT)}
    assert {answer.headers["x-cache"] for answer in answers} == {"join"}
    assert backend.spoken == 1
    server.wait_idle()


def test_a_failure_before_the_sound_reaches_everyone_and_is_not_kept(server: Server) -> None:
    answers = crowd(server, lambda client: ask(client, FAILS_FIRST), 30)
    assert {answer.status_code for answer in answers} == {500}
    assert {answer.json()["error"]["code"] for answer in answers} == {"synthesis_failed"}
    assert "planted" not in answers[0].text
    assert server.backend.spoken == 1
    server.wait_idle()
    assert records(server) == []
    assert ask_once(server, FAILS_FIRST).status_code == 500
    assert server.backend.spoken == 2, "a failure must not be remembered"


def test_a_failure_after_the_sound_cuts_everyone_and_is_not_kept(server: Server) -> None:
    results = crowd(server, lambda client: ask(client, FAILS_LATE), 30, return_exceptions=True)
    assert {type(result) for result in results} == {httpx.RemoteProtocolError}
    assert server.backend.spoken == 1
    server.wait_idle()
    assert records(server) == []
    with pytest.raises(httpx.RemoteProtocolError):
        ask_once(server, FAILS_LATE)
    assert server.backend.spoken == 2
    server.wait_idle()


def test_who_comes_in_the_middle_hears_it_from_the_start(server: Server, backend: TextualBackend) -> None:
    backend.allowed = 2
    with Caller(server.url) as first, Caller(server.url) as second:
        first.ask(input=TEXT, response_format="pcm")
        wait_until(lambda: len(backend.segments) == 2)
        second.ask(input=TEXT, response_format="pcm")
        assert "x-cache: join" in second.read_head()
        backend.allowed = math.inf
        assert first.read_answer() == pcm_of(TEXT)
        assert second.read_answer() == pcm_of(TEXT)
    assert backend.spoken == 1


def test_no_store_neither_joins_nor_keeps_nor_reads_what_is_kept(server: Server, backend: TextualBackend) -> None:
    def private(client: httpx.AsyncClient) -> Awaitable[httpx.Response]:
        return ask(client, TEXT, **{"Cache-Control": "private, No-Store"})

    answers = crowd(server, private, 3)
    assert {answer.content for answer in answers} == {pcm_of(TEXT)}
    assert {answer.headers["x-cache"] for answer in answers} == {"bypass"}
    assert backend.spoken == 3
    assert records(server) == []
    with Caller(server.url) as stored:
        stored.ask(input=TEXT, response_format="pcm")
        wait_until(lambda: backend.spoken == 4)
        assert crowd(server, private, 1)[0].headers["x-cache"] == "bypass"
        assert stored.read_answer() == pcm_of(TEXT)
    assert backend.spoken == 5
    assert crowd(server, private, 1)[0].headers["x-cache"] == "bypass"
    assert ask_once(server, TEXT).headers["x-cache"] == "hit"
    assert backend.spoken == 6


async def test_at_the_instant_of_the_end_it_is_a_join_or_a_hit(start_service: StartService) -> None:
    """The second request comes so and so many steps of the event loop, or moments, after the first began.

    A moment is some part of what the last text took, or a little more, so that it strikes the end on any machine.
    """
    backend = TextualBackend(seconds_per_segment=0.02)
    service = await start_service(backend)
    rng = random.Random(5)
    seen, took = set(), 0.01
    for number in range(240):
        text = f"Number {number}. {sentences(1)}"

        async def second(text: str = text, number: int = number) -> bytes:
            if number % 2:
                await asyncio.sleep(rng.uniform(0, 1.5) * took)
            else:
                for _ in range(number // 3):
                    await asyncio.sleep(0)
            with closing(service.open(speech_request(text))) as listener:
                await listener.start()
                seen.add(listener.cache_status)
                return b"".join([chunk.data async for chunk in listener.chunks()])

        async def first(text: str = text) -> bytes:
            nonlocal took
            began = time.monotonic()
            answer = await collect(service, speech_request(text))
            took = time.monotonic() - began
            return answer

        answers = await asyncio.gather(first(), second())
        assert set(answers) == {pcm_of(text, 480)}
        assert backend.spoken == number + 1, f"a second generation of text {number}"
    assert {"join", "hit"} <= seen, "the moments were badly chosen"


async def test_a_look_up_that_began_before_the_commit_is_made_again(start_service: StartService) -> None:
    """The second one looks and finds nothing; before it can act, the first generation has come and gone."""
    backend = TextualBackend()
    service = await start_service(backend)
    looked, ended = threading.Event(), threading.Event()
    find = service._cache.find

    def slow_find(*place: Any) -> Any:
        found = find(*place)
        if not looked.is_set():
            looked.set()
            assert ended.wait(30)
        return found

    service._cache.find = slow_find  # type: ignore[method-assign]
    second = asyncio.create_task(collect(service, speech_request(TEXT)))
    await asyncio.to_thread(looked.wait)
    assert await collect(service, speech_request(TEXT)) == pcm_of(TEXT)
    await eventually(lambda: not service._running)
    ended.set()
    assert await second == pcm_of(TEXT)
    assert backend.spoken == 1


async def test_right_after_the_last_chunk_it_is_a_hit(start_service: StartService) -> None:
    backend = TextualBackend(seconds_per_segment=0.02)
    service = await start_service(backend)
    for number in range(100):
        text = f"Number {number}. {sentences(1)}"
        async with aclosing(service.generate_speech(speech_request(text))) as chunks:
            async for chunk in chunks:
                if chunk.is_last:
                    assert await collect(service, speech_request(text)) == pcm_of(text, 480)
        assert backend.spoken == number + 1


async def test_the_last_to_leave_stops_it_and_the_next_one_starts_anew(start_service: StartService) -> None:
    """Nobody joins a generation that is being stopped."""
    backend = TextualBackend(allowed=1)
    service = await start_service(backend)
    first, second = (service.open(speech_request(TEXT)) for _ in range(2))
    for listener in (first, second):
        await listener.start()
    first.close()
    second.close()
    backend.allowed = math.inf
    assert await collect(service, speech_request(TEXT)) == pcm_of(TEXT)
    assert backend.spoken == 2


async def test_the_second_one_starts_what_the_first_one_cannot_pay(start_service: StartService, tmp_path: Any) -> None:
    """The first listener fails at its hold; who joined meanwhile still gets the generation."""
    prices = tmp_path / "prices.toml"
    prices.write_text("[default]\nper_1000_characters = 1000\n")
    backend = TextualBackend()
    service = await start_service(backend, prices_file=prices)
    await service.ledger.credit("poor", 1, "start")

    for number in range(30):
        text = f"Number {number}. {TEXT}"
        answers = await asyncio.gather(
            collect(service, speech_request(text, account="poor")),
            collect(service, speech_request(text)),
            return_exceptions=True,
        )
        assert isinstance(answers[0], InsufficientBalance)
        assert answers[1] == pcm_of(text)
    assert await service.ledger.check() == []


async def test_one_failure_is_raised_in_every_listener(start_service: StartService) -> None:
    service = await start_service(TextualBackend())
    results = await asyncio.gather(
        *(collect(service, speech_request(FAILS_LATE)) for _ in range(5)), return_exceptions=True
    )
    assert {type(result) for result in results} == {SynthesisFailed}


def ask_once(server: Server, text: str) -> httpx.Response:
    return server.client.post("/v1/audio/speech", json={"input": text, "response_format": "pcm"})
