"""The event loop does not stall: no callback uses more than 50 ms of CPU time while eight syntheses run."""

from __future__ import annotations

import asyncio
import gc
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import httpx
import pytest

from api.src.backends.embedded import EmbeddedBackend
from tests.conftest import Server
from tests.fakes import FakeBackend
from tests.speech.textual import sentences

LIMIT_S = 0.05
ACCIDENTS = 2
"""Callbacks that may seem slow: a virtual machine's thread is charged for what its host takes from it. What is slow by
itself is so for each synthesis."""

SYNTHESES = 8
FORMATS = ["mp3", "mp3", "mp3", "opus", "aac", "flac", "wav", "ogg"]
LONGEST = 4096


@dataclass
class Watch:
    """What the callbacks of one event loop took, in seconds of CPU time of its thread."""

    callbacks: int = 0
    slow: list[str] = field(default_factory=list)

    def note(self, seconds: float, handle: object) -> None:
        self.callbacks += 1
        if seconds > LIMIT_S:
            self.slow.append(f"{seconds * 1000:.0f} ms: {handle!r}")


@contextmanager
def watched(server: Server) -> Iterator[Watch]:
    """Measure every callback that the server's loop runs meanwhile."""

    async def thread() -> int:
        return threading.get_ident()

    looping, watch, run = server.call(thread), Watch(), asyncio.Handle._run  # type: ignore[attr-defined]

    def timed(handle: asyncio.Handle) -> None:
        if threading.get_ident() != looping:
            run(handle)
            return
        started = time.thread_time()
        run(handle)
        watch.note(time.thread_time() - started, handle)

    gc.collect()
    gc.freeze()  # the test process holds far more objects than a server, and a collection counts for who meets it
    asyncio.Handle._run = timed  # type: ignore[attr-defined]
    try:
        yield watch
    finally:
        asyncio.Handle._run = run  # type: ignore[attr-defined]
        gc.unfreeze()


@contextmanager
def health(server: Server) -> Iterator[list[float]]:
    """Ask /healthz all the time; the list holds how long each answer took, in seconds."""
    over, times = threading.Event(), list[float]()

    def ask() -> None:
        with httpx.Client(base_url=server.url, timeout=30) as client:
            while not over.wait(0.01):
                started = time.monotonic()
                assert client.get("/healthz").json() == {"status": "ok"}
                times.append(time.monotonic() - started)

    with ThreadPoolExecutor(1) as pool:
        asking = pool.submit(ask)
        try:
            yield times
        finally:
            over.set()
            asking.result()


def synthesise(server: Server, texts: list[str], **fields: Any) -> list[httpx.Response]:
    """Eight requests at once, one of each in FORMATS."""

    def ask(number: int) -> httpx.Response:
        body = {"input": texts[number], "response_format": FORMATS[number], **fields}
        return httpx.post(f"{server.url}/v1/audio/speech", json=body, timeout=100)

    with ThreadPoolExecutor(SYNTHESES) as pool:
        return list(pool.map(ask, range(SYNTHESES)))


def assert_smooth(watch: Watch, times: list[float]) -> None:
    assert len(watch.slow) <= ACCIDENTS, watch.slow
    assert watch.callbacks > 500, "the callbacks were not measured"
    assert len(times) > 10, "/healthz did not answer for a while"


@pytest.mark.parametrize("form", ["audio", "sse"])
def test_eight_long_syntheses_with_real_encoders(start_server: Callable[..., Server], form: str) -> None:
    backend = FakeBackend(delay_s=0.01, seconds_per_segment=20)  # each takes an encoder some 100 ms
    server = start_server(backend, max_concurrent=SYNTHESES)
    texts = [sentences(5, f"subject {number}") for number in range(SYNTHESES)]
    with watched(server) as watch, health(server) as times:
        answers = synthesise(server, texts, stream_format=form)
    assert {answer.status_code for answer in answers} == {200}
    assert backend.spoken == SYNTHESES
    assert_smooth(watch, times)


def test_sixty_listeners_and_hits_of_the_longest_text(start_server: Callable[..., Server]) -> None:
    backend = FakeBackend(delay_s=0.005, seconds_per_segment=0.5)
    server = start_server(backend, max_concurrent=SYNTHESES)
    text = sentences(80)[:LONGEST]

    async def crowd() -> list[int]:
        async with httpx.AsyncClient(base_url=server.url, timeout=60, limits=httpx.Limits()) as client:
            visits = (client.post("/v1/audio/speech", json={"input": text}) for _ in range(60))
            return [answer.status_code for answer in await asyncio.gather(*visits)]

    with watched(server) as watch, health(server) as times:
        for _ in range(2):  # joins, then hits
            assert asyncio.run(crowd()) == [200] * 60
    assert backend.spoken == 1
    assert_smooth(watch, times)


def test_eight_syntheses_with_the_embedded_voice(start_server: Callable[..., Server]) -> None:
    pytest.importorskip("piper")
    server = start_server(EmbeddedBackend(workers=2), max_concurrent=SYNTHESES)
    while server.client.get("/ready").status_code != 200:
        time.sleep(0.1)
    texts = [sentences(1, f"subject {number}") for number in range(SYNTHESES)]
    with watched(server) as watch, health(server) as times:
        answers = synthesise(server, texts)
    assert {answer.status_code for answer in answers} == {200}
    assert_smooth(watch, times)
