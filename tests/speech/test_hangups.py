"""Clients that hang up over a real socket, at any moment: everything borrowed is free again."""

from __future__ import annotations

import asyncio
import math
import random
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.conftest import Server
from tests.speech.asking import open_files, wait_until
from tests.speech.caller import Caller
from tests.speech.textual import SAMPLES, TextualBackend, pcm_of, sentences

VISITS = 180
AT_ONCE = 12
TEXT = sentences(6)
MOMENTS = ("half a request", "before the headers", "between the chunks", "after the last byte")
PRICE = "[default]\nper_1000_characters = 1000000\n"
"""1000 micro-units a character."""


def tasks(server: Server) -> int:
    async def count() -> int:
        return len(asyncio.all_tasks())

    return int(server.call(count))


def visit(server: Server, number: int) -> tuple[str, str]:
    """One client's life; returns the moment at which it hung up, and in which form it had asked."""
    rng = random.Random(number)
    moment = rng.choice(MOMENTS)
    form = rng.choice(("audio", "sse", "base64"))
    path = "/v1/audio/speech/base64" if form == "base64" else "/v1/audio/speech"
    text = rng.choice([f"Shared number {number % 3}. {TEXT}", f"Number {number}. {TEXT}", f"Number {number}. {TEXT}"])
    fields = {"input": text, "response_format": rng.choice(["pcm", "mp3", "opus"])}
    if form == "sse":
        fields["stream_format"] = "sse"
    caller = Caller(server.url)
    try:
        caller.ask(path, no_store=rng.random() < 0.2, cut=rng.randint(1, 60) if moment == MOMENTS[0] else 0, **fields)
        if moment in MOMENTS[:2] or (form == "base64" and moment == "between the chunks"):
            time.sleep(rng.uniform(0, 0.08))
        elif moment == "between the chunks":
            for _ in range(rng.randint(1, 6)):
                if not caller.has_all:
                    caller.read()
        else:
            caller.read_answer()
    finally:
        caller.hang_up(reset=rng.random() < 0.5)
    return moment, form


def visits(server: Server, numbers: range) -> Counter[str]:
    with ThreadPoolExecutor(AT_ONCE) as pool:
        outcomes = list(pool.map(lambda number: visit(server, number), numbers))
    return Counter(word for outcome in outcomes for word in outcome)


@contextmanager
def longest_queue(server: Server) -> Iterator[list[int]]:
    """Watch how many wait for a permit; the list holds the most that were seen."""
    seen, over = [0], threading.Event()

    def watch() -> None:
        while not over.wait(0.001):
            seen[0] = max(seen[0], server.service.admission.waiting)

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        yield seen
    finally:
        over.set()
        thread.join()


def test_hang_ups_at_random_moments_leave_nothing(start_server: Callable[..., Server], tmp_path: Path) -> None:
    prices = tmp_path / "prices.toml"
    prices.write_text(PRICE)
    backend = TextualBackend(delay_s=0.006)
    server = start_server(backend, max_concurrent=3, queue_size=100, prices_file=prices)
    server.call(lambda: server.service.ledger.credit("anonymous", 2**40, "start"))
    visits(server, range(-24, 0))  # so that pools and buffers have their size
    server.wait_idle()
    files, running = open_files(), tasks(server)
    with longest_queue(server) as queue:
        outcomes = visits(server, range(VISITS))
    assert min(outcomes[word] for word in (*MOMENTS, "audio", "sse", "base64")) >= 20, outcomes
    assert queue[0] >= 2, "nobody was queued"
    server.wait_idle()
    wait_until(lambda: open_files() <= files, why=lambda: f"{files} files became {open_files()}")
    wait_until(lambda: tasks(server) <= running, why=lambda: f"{running} tasks became {tasks(server)}")
    assert server.call(server.service.ledger.check) == []
    spoken = {event.outcome for event in server.call(lambda: server.service.ledger.usage(None, 1000))}
    assert {"completed", "cancelled"} <= spoken
    text = "And after all that, somebody is served."
    answer = server.client.post("/v1/audio/speech", json={"input": text, "response_format": "pcm"})
    assert answer.content == pcm_of(text)


FORMS: dict[str, tuple[str, dict[str, Any]]] = {
    "audio": ("/v1/audio/speech", {}),
    "sse": ("/v1/audio/speech", {"stream_format": "sse"}),
    "base64": ("/v1/audio/speech/base64", {}),
    "no-store": ("/v1/audio/speech", {"no_store": True}),
}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("reset", [False, True])
def test_the_backend_stops_within_one_segment(start_server: Callable[..., Server], form: str, reset: bool) -> None:
    backend = TextualBackend(allowed=2)
    server = start_server(backend)
    path, fields = FORMS[form]
    caller = Caller(server.url)
    caller.ask(path, input=sentences(30), response_format="pcm", **fields)
    wait_until(lambda: len(backend.segments) == 2)
    caller.hang_up(reset=reset)
    server.wait_idle()  # in the middle of the third segment, which would never end
    assert len(backend.segments) == 2


def test_before_the_headers_it_costs_nothing_and_frees_the_queue(start_server: Callable[..., Server]) -> None:
    backend = TextualBackend(allowed=0)
    server = start_server(backend, max_concurrent=1, queue_size=3)
    admission = server.service.admission
    callers = [Caller(server.url) for _ in range(4)]
    for number, caller in enumerate(callers):
        caller.ask(input=f"Number {number}. {TEXT}")
        places = (1, number)
        wait_until(lambda places=places: (admission.running, admission.waiting) == places)  # type: ignore[misc]
    refused = server.client.post("/v1/audio/speech", json={"input": "One too many."})
    assert (refused.status_code, refused.json()["error"]["code"]) == (503, "overloaded")
    callers[2].hang_up()
    wait_until(lambda: admission.waiting == 2)
    assert (admission.running, backend.spoken) == (1, 1)
    callers[0].hang_up(reset=True)
    wait_until(lambda: backend.spoken == 2)
    assert (admission.running, admission.waiting) == (1, 1)
    callers[1].hang_up()
    callers[3].hang_up()
    server.wait_idle()
    assert server.call(lambda: server.service.ledger.usage(None, 10)) == []


def priced(start_server: Callable[..., Server], tmp_path: Path, backend: TextualBackend) -> Server:
    prices = tmp_path / "prices.toml"
    prices.write_text(PRICE)
    return start_server(backend, prices_file=prices)


def test_a_stream_is_paid_as_far_as_it_was_sent(start_server: Callable[..., Server], tmp_path: Path) -> None:
    backend = TextualBackend(allowed=3)
    server = priced(start_server, tmp_path, backend)
    text = sentences(10)
    caller = Caller(server.url)
    caller.ask(input=text, response_format="pcm")
    caller.read_head()
    while len(caller.received) < 3 * 2 * SAMPLES:
        assert caller.read()
    caller.hang_up()
    server.wait_idle()
    (event,) = server.call(lambda: server.service.ledger.usage(None, 10))
    assert event.outcome == "cancelled"
    assert event.characters in [part.end for part in backend.segments[1:3]]
    assert event.price_micros == 1000 * event.characters


@pytest.mark.parametrize("text", [sentences(10), f"{sentences(3)} And then it must FAIL, of all things."])
def test_a_whole_answer_that_never_comes_costs_nothing(
    start_server: Callable[..., Server], tmp_path: Path, text: str
) -> None:
    """Hung up on, or failed in the middle: base64 was to be answered whole, so nothing was sent."""
    backend = TextualBackend(allowed=4)
    server = priced(start_server, tmp_path, backend)
    if "FAIL" in text:
        assert server.client.post("/v1/audio/speech/base64", json={"input": text}).status_code == 500
    else:
        caller = Caller(server.url)
        caller.ask("/v1/audio/speech/base64", input=text)
        wait_until(lambda: len(backend.segments) == 4)
        caller.hang_up()
    server.wait_idle()
    assert server.call(lambda: server.service.ledger.usage(None, 10)) == []


def test_a_failure_after_sound_is_not_charged(start_server: Callable[..., Server], tmp_path: Path) -> None:
    """The client has heard some of it, but the fault is the server's: it leaves a trace and costs nothing."""
    server = priced(start_server, tmp_path, TextualBackend(delay_s=0.05))
    with pytest.raises(httpx.RemoteProtocolError):
        server.client.post("/v1/audio/speech", json={"input": f"{sentences(3)} And then it must FAIL, of all things."})
    server.wait_idle()
    (event,) = server.call(lambda: server.service.ledger.usage(None, 10))
    assert (event.outcome, event.price_micros) == ("failed", 0)
    assert server.call(server.service.ledger.check) == []


def test_a_hang_up_in_the_middle_harms_no_other_listener(server: Server, backend: Any) -> None:
    backend.allowed = 1
    bodies = []

    def listen() -> None:
        with httpx.stream("POST", f"{server.url}/v1/audio/speech", json={"input": TEXT}, timeout=60) as response:
            bodies.append(response.read())

    thread = threading.Thread(target=listen)
    thread.start()
    wait_until(lambda: backend.open == 1)
    callers = [Caller(server.url) for _ in range(5)]
    for caller in callers:
        caller.ask(input=TEXT)
    for caller in callers:
        caller.read_head()
        caller.hang_up(reset=True)
    backend.allowed = math.inf
    thread.join()
    assert backend.spoken == 1
    assert bodies == [server.client.post("/v1/audio/speech", json={"input": TEXT}).content]
    server.wait_idle()
