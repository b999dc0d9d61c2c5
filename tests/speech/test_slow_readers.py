"""Clients that read slowly or not at all: they hold back nobody but themselves, and not for ever."""

from __future__ import annotations

import time
from collections.abc import Callable

import httpx
import pytest

from api.src.speech.generation import RELAY_SIZE, Generation
from api.src.speech.recording import Relay
from tests.conftest import Server
from tests.speech.asking import open_files, stalled, wait_until
from tests.speech.caller import Caller
from tests.speech.textual import TextualBackend, pcm_of, sentences

SECONDS = 10
SEGMENT_BYTES = SECONDS * 48_000
SEGMENTS = 24
"""Together 11 MB: more than the kernel's buffers take for a client that does not read."""
LONG = sentences(SEGMENTS)
LONG_PCM = pcm_of(LONG, SECONDS * 24_000)
SMALL_BUFFER = 4096


@pytest.fixture
def backend() -> TextualBackend:
    return TextualBackend(seconds_per_segment=SECONDS)


def slow_reader(server: Server, **fields: object) -> Caller:
    """A client that has read the headers of the long text, and nothing more."""
    caller = Caller(server.url, receive_buffer=SMALL_BUFFER)
    caller.ask(input=LONG, response_format="pcm", **fields)
    caller.read_head()
    return caller


def only_generation(server: Server) -> Generation:
    (generation,) = server.service._running
    return generation


def seconds_for(server: Server, text: str) -> float:
    started = time.monotonic()
    answer = server.client.post("/v1/audio/speech", json={"input": text, "response_format": "pcm"})
    assert answer.content == pcm_of(text, SECONDS * 24_000)
    return time.monotonic() - started


def test_what_is_stored_is_finished_whoever_dawdles(server: Server, backend: TextualBackend) -> None:
    with slow_reader(server) as slow:
        wait_until(lambda: not server.service._running)
        assert len(backend.segments) == SEGMENTS
        assert len(server.service._listeners) == 1, "the slow one is still there"
        assert server.service.admission.running == 0
        answer = server.client.post("/v1/audio/speech", json={"input": LONG, "response_format": "pcm"})
        assert answer.headers["x-cache"] == "hit"
        assert answer.content == LONG_PCM
        slow.hurry()
        assert slow.read_answer() == LONG_PCM
    server.wait_idle()


def test_others_run_at_full_speed(start_server: Callable[..., Server]) -> None:
    server = start_server(TextualBackend(delay_s=0.02, seconds_per_segment=SECONDS), max_concurrent=4)
    alone = min(seconds_for(server, sentences(6, about)) for about in ("sea", "shore"))
    callers = [slow_reader(server, no_store=number > 0) for number in range(3)]
    wait_until(lambda: server.service.admission.running == 2)
    time.sleep(0.5)
    # The best of some: a moment in which the machine stood still says nothing.
    assert any(seconds_for(server, sentences(6, f"hill {number}")) < 2 * alone + 0.3 for number in range(8))
    for caller in callers:
        caller.hang_up()
    server.wait_idle()


def test_a_joiner_is_not_held_back_by_the_slow_one_it_joined(start_server: Callable[..., Server]) -> None:
    backend = TextualBackend(delay_s=0.02, seconds_per_segment=SECONDS)
    server = start_server(backend)
    with slow_reader(server) as slow:
        answer = server.client.post("/v1/audio/speech", json={"input": LONG, "response_format": "pcm"})
        assert answer.headers["x-cache"] == "join"
        assert answer.content == LONG_PCM
        slow.hurry()
        assert slow.read_answer() == LONG_PCM
    assert backend.spoken == 1


@pytest.mark.parametrize("form", ["audio", "sse"])
def test_what_is_not_stored_pauses_in_bounded_memory_and_goes_on(
    server: Server, backend: TextualBackend, form: str
) -> None:
    with slow_reader(server, no_store=True, stream_format=form) as slow:
        generation = only_generation(server)
        wait_until(stalled(generation))
        spoken = len(backend.segments)
        assert spoken < SEGMENTS - 4
        relay = generation._sink
        assert isinstance(relay, Relay)
        assert relay.buffered <= RELAY_SIZE + SEGMENT_BYTES
        time.sleep(0.5)
        assert len(backend.segments) == spoken, "it does not pause"
        slow.hurry()
        answer = slow.read_answer()
    assert len(backend.segments) == SEGMENTS
    if form == "audio":
        assert answer == LONG_PCM
    else:
        assert answer.count(b"speech.audio.delta\n") > SEGMENTS
        assert answer.count(b"event: speech.audio.done\n") == 1
    server.wait_idle()


def test_a_reader_that_sips_is_not_cut(start_server: Callable[..., Server]) -> None:
    """It reads so little that the server waits for it most of the time, but it does read."""
    server = start_server(TextualBackend(seconds_per_segment=SECONDS), stall_timeout_s=3)
    with slow_reader(server, no_store=True) as slow:
        started = time.monotonic()
        while time.monotonic() - started < 4:
            assert slow.read()
            time.sleep(0.002)  # the kernel tells the server of room only once there is much of it, about 1 MB
        assert len(slow.received) < len(LONG_PCM)
        slow.hurry()
        assert slow.read_answer() == LONG_PCM
    server.wait_idle()


@pytest.mark.parametrize(
    "fields",
    [{}, {"no_store": True}, {"stream_format": "sse"}, {"stream_format": "sse", "no_store": True}],
    ids=["stored", "unstored", "sse", "unstored sse"],
)
def test_one_that_reads_nothing_is_let_go(start_server: Callable[..., Server], fields: dict[str, object]) -> None:
    backend = TextualBackend(seconds_per_segment=SECONDS)
    server = start_server(backend, stall_timeout_s=0.4)
    server.wait_idle()
    files = open_files()
    with slow_reader(server, **fields) as slow:
        started = time.monotonic()
        server.wait_idle()
        assert time.monotonic() - started > 0.2
        slow.hurry()
        with pytest.raises((ConnectionError, AssertionError)):
            slow.read_answer()  # what the kernel kept, and then the end of the connection
        assert 0 < len(slow.received) < len(LONG_PCM)
    (event,) = server.call(lambda: server.service.ledger.usage(None, 10))
    assert event.outcome == "cancelled"
    assert 0 < event.characters < len(LONG)
    assert server.call(server.service.ledger.check) == []
    wait_until(lambda: open_files() <= files)


def test_one_that_asks_again_and_again_but_never_reads_is_let_go(start_server: Callable[..., Server]) -> None:
    """Its connection is clogged by earlier answers, so that not even the next one's headers get through."""
    server = start_server(TextualBackend(seconds_per_segment=5), stall_timeout_s=0.4)
    short = {"input": sentences(1), "response_format": "pcm"}
    assert server.client.post("/v1/audio/speech", json=short).headers["x-cache"] == "miss"
    with Caller(server.url, receive_buffer=SMALL_BUFFER) as caller:
        for _ in range(60):  # 240 kB each
            caller.ask(**short)
        hits = server.service._metrics.speech.labels("hit")
        wait_until(lambda: hits._value.get() >= 2)
        server.wait_idle()
        time.sleep(0.2)
        server.wait_idle()


def test_a_hit_that_nobody_reads_is_let_go(start_server: Callable[..., Server]) -> None:
    patient = start_server(TextualBackend(seconds_per_segment=SECONDS))
    body = {"input": LONG, "response_format": "pcm"}
    assert httpx.post(f"{patient.url}/v1/audio/speech", json=body, timeout=60).content == LONG_PCM
    patient.wait_idle()
    server = start_server(TextualBackend(seconds_per_segment=SECONDS), stall_timeout_s=0.4)
    with slow_reader(server) as slow:
        assert "x-cache: hit" in slow.read_head()
        server.wait_idle()
