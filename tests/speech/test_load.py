"""More work than there is room for: who runs, who waits, who is sent away, and what is given up."""

from __future__ import annotations

import asyncio
import math
import time
from collections import Counter
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from dataclasses import dataclass
from typing import Any

import httpx
import pytest

from api.src.domain import AudioChunk, Segment, SpeechRequest, Voice
from tests.conftest import Server
from tests.speech.asking import eventually, wait_until
from tests.speech.caller import Caller
from tests.speech.textual import TextualBackend, pcm_of, sentences

TEXT = sentences(3)


@dataclass
class Crowded(TextualBackend):
    """Remembers how many spoke at once."""

    most: int = 0

    async def speak(
        self, request: SpeechRequest, voice: Voice, segments: AsyncIterator[Segment]
    ) -> AsyncGenerator[AudioChunk, None]:
        async for chunk in super().speak(request, voice, segments):
            self.most = max(self.most, self.open)
            yield chunk


@dataclass
class Stuck(TextualBackend):
    """Speaks one segment, then hangs; `patience_s` is how long its run is then waited for."""

    patience_s: float = 0.5
    server: Server | None = None

    async def speak(
        self, request: SpeechRequest, voice: Voice, segments: AsyncIterator[Segment]
    ) -> AsyncGenerator[AudioChunk, None]:
        assert self.server is not None
        (generation,) = self.server.service._running
        self.spoken += 1
        self.open += 1
        try:
            segment = await anext(segments)
            generation._progress_timeout_s = self.patience_s  # from the second segment on
            yield AudioChunk(self.sound(segment, voice, request.seed), 24_000, segment)
            await asyncio.Event().wait()
        finally:
            self.open -= 1


def ask_all(
    server: Server, texts: list[str], *, held_until: Callable[[int], bool] | None = None
) -> list[httpx.Response]:
    """Ask for all of them at once. `held_until`: when the backend may speak on, by the number of answers there are."""

    async def run() -> list[httpx.Response]:
        async with httpx.AsyncClient(base_url=server.url, timeout=60, limits=httpx.Limits()) as client:
            bodies = [{"input": text, "response_format": "pcm"} for text in texts]
            asked = [asyncio.create_task(client.post("/v1/audio/speech", json=body)) for body in bodies]
            if held_until is not None:
                await eventually(lambda: held_until(sum(answer.done() for answer in asked)))
                server.backend.allowed = math.inf
            return await asyncio.gather(*asked)

    return asyncio.run(run())


def ask(server: Server, text: str) -> httpx.Response:
    return server.client.post("/v1/audio/speech", json={"input": text, "response_format": "pcm"})


def numbered(count: int) -> list[str]:
    return [f"Number {number}. {TEXT}" for number in range(count)]


def test_no_more_run_than_may_and_no_more_wait_than_may(start_server: Callable[..., Server]) -> None:
    backend = Crowded(allowed=0)
    server = start_server(backend, max_concurrent=2, queue_size=3)
    texts = numbered(12)
    answers = ask_all(server, texts, held_until=lambda answered: answered == 7)  # a refusal waits for no place
    assert Counter(answer.status_code for answer in answers) == {200: 5, 503: 7}
    assert backend.most == 2
    for text, answer in zip(texts, answers, strict=True):
        if answer.status_code == 200:
            assert answer.content == pcm_of(text)
        else:
            assert answer.json()["error"]["code"] == "overloaded"
            assert 1 <= int(answer.headers["retry-after"]) <= 60
    server.wait_idle()
    assert server.open_holds() == 0
    assert ask(server, texts[-1]).status_code == 200, "there is room again"


def test_the_queue_is_served_in_order(start_server: Callable[..., Server]) -> None:
    backend = TextualBackend(allowed=0)
    server = start_server(backend, max_concurrent=1, queue_size=10)
    callers = []
    for number, text in enumerate(numbered(6)):
        callers.append(Caller(server.url))
        callers[-1].ask(input=text, response_format="pcm")
        wait_until(lambda number=number: len(server.service._running) == number + 1)  # type: ignore[misc]
    backend.allowed = math.inf
    for text, caller in zip(numbered(6), callers, strict=True):
        assert caller.read_answer() == pcm_of(text)
        caller.hang_up()
    firsts = [segment.text for segment in backend.segments if "Number" in segment.text]
    assert [text.split(".")[0] for text in firsts] == [f"Number {number}" for number in range(6)]


def test_joins_and_hits_need_no_permit(start_server: Callable[..., Server]) -> None:
    backend = TextualBackend()
    server = start_server(backend, max_concurrent=1, queue_size=0)
    assert ask(server, TEXT).headers["x-cache"] == "miss"
    backend.allowed = 0
    with Caller(server.url) as running:
        running.ask(input=sentences(3, "sea"), response_format="pcm")
        wait_until(lambda: backend.open == 1)
        assert ask(server, sentences(3, "hill")).status_code == 503
        all_are_there = lambda hits: hits == 10 and len(server.service._listeners) == 11  # noqa: E731
        answers = ask_all(server, [TEXT] * 10 + [sentences(3, "sea")] * 10, held_until=all_are_there)
        statuses = Counter((answer.status_code, answer.headers["x-cache"]) for answer in answers)
        assert statuses == {(200, "hit"): 10, (200, "join"): 10}
    assert backend.spoken == 2


def test_a_refusal_costs_nothing_and_leaves_no_entry(start_server: Callable[..., Server]) -> None:
    server = start_server(TextualBackend(allowed=0), max_concurrent=1, queue_size=0)
    answers = ask_all(server, numbered(8), held_until=lambda answered: answered == 7)
    assert Counter(answer.status_code for answer in answers) == {200: 1, 503: 7}
    server.wait_idle()
    assert len(server.call(lambda: server.service.ledger.usage(None, 100))) == 1
    assert len(list((server.folder / "cache").rglob("*.json"))) == 1


def test_without_sound_in_time_it_is_a_503_and_is_stopped(start_server: Callable[..., Server]) -> None:
    server = start_server(TextualBackend(allowed=0), request_timeout_s=0.3)
    started = time.monotonic()
    answer = ask(server, TEXT)
    assert time.monotonic() - started > 0.25
    assert (answer.status_code, answer.json()["error"]["code"]) == (503, "timed_out")
    assert int(answer.headers["retry-after"]) >= 1
    server.wait_idle()
    assert server.call(lambda: server.service.ledger.usage(None, 10)) == []


def test_the_time_in_the_queue_counts(start_server: Callable[..., Server]) -> None:
    backend = TextualBackend(allowed=1)
    server = start_server(backend, max_concurrent=1)
    with Caller(server.url) as first:
        first.ask(input=sentences(6), response_format="pcm")
        first.read_head()  # it holds the only place until it may go on
        server.give_up_after(0.3)
        started = time.monotonic()
        answer = ask(server, TEXT)
        assert (answer.status_code, answer.json()["error"]["code"]) == (503, "timed_out")
        assert time.monotonic() - started > 0.25
        wait_until(lambda: server.service.admission.waiting == 0)
        backend.allowed = math.inf
        assert first.read_answer() == pcm_of(sentences(6))
    assert backend.spoken == 1, "what waited in vain must not be spoken"


def test_many_that_wait_in_vain_leave_together(start_server: Callable[..., Server]) -> None:
    backend = TextualBackend(allowed=0)
    server = start_server(backend, max_concurrent=2, queue_size=20, request_timeout_s=0.4)
    answers = ask_all(server, numbered(15))
    assert {answer.json()["error"]["code"] for answer in answers} == {"timed_out"}
    server.wait_idle()
    server.give_up_after(60)
    backend.allowed = math.inf
    assert ask(server, TEXT).status_code == 200


@pytest.mark.parametrize("form", ["audio", "sse", "base64"])
def test_a_backend_that_hangs_in_the_middle_is_stopped(start_server: Callable[..., Server], form: str) -> None:
    backend = Stuck()
    backend.server = server = start_server(backend)
    path = "/v1/audio/speech/base64" if form == "base64" else "/v1/audio/speech"
    fields: dict[str, Any] = {"stream_format": "sse"} if form == "sse" else {}
    started = time.monotonic()
    with Caller(server.url) as caller:
        caller.ask(path, input=TEXT, response_format="pcm", **fields)
        if form == "audio":
            with pytest.raises(ConnectionError):
                caller.read_answer()
            assert len(caller.received) > len(pcm_of(TEXT)) // 3, "what there was must come"
        elif form == "sse":
            assert b'event: error\ndata: {"type": "error", "error": {' in caller.read_answer()
            assert b'"code": "timed_out"' in caller.received
        else:
            assert b'"code":"timed_out"' in caller.read_answer()
    assert time.monotonic() - started > 0.4
    server.wait_idle()
    assert list((server.folder / "cache").rglob("*.json")) == []


def test_slow_but_steady_is_not_stopped(start_server: Callable[..., Server]) -> None:
    server = start_server(TextualBackend(delay_s=0.4), request_timeout_s=2.2)
    text = sentences(6)  # 2.4 s in steps that leave a busy machine more than a second and a half
    assert ask(server, text).content == pcm_of(text)


def test_a_failure_is_not_remembered(start_server: Callable[..., Server]) -> None:
    backend = TextualBackend(allowed=0)
    server = start_server(backend, request_timeout_s=0.2)
    assert ask(server, TEXT).status_code == 503
    server.give_up_after(60)
    backend.allowed = math.inf
    answer = ask(server, TEXT)
    assert (answer.status_code, answer.headers["x-cache"]) == (200, "miss")
    assert answer.content == pcm_of(TEXT)
