"""The end of a server, as an operator sees it: a real process, real signals."""

from __future__ import annotations

import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass

import httpx
import pytest

from api.src.cli import GRACE_S
from api.src.shutdown import SPENT
from tests.speech.asking import wait_until
from tests.speech.launching import ROOT, Process
from tests.speech.textual import pcm_of, sentences

SIGNALS = [signal.SIGTERM, signal.SIGINT]


@dataclass
class Download:
    """A response that is read in a thread of its own."""

    thread: threading.Thread
    begun: threading.Event
    status: int = 0
    content: bytes = b""
    cut: bool = False


def download(url: str, text: str) -> Download:
    """Begin to read an answer in pcm; returns once its first sound is there."""

    def read() -> None:
        body = {"input": text, "response_format": "pcm"}
        try:
            with httpx.stream("POST", f"{url}/v1/audio/speech", json=body, timeout=60) as response:
                result.status = response.status_code
                for part in response.iter_raw():
                    result.content += part
                    result.begun.set()
        except httpx.TransportError:
            result.cut = True

    result = Download(threading.Thread(target=read), threading.Event())
    result.thread.start()
    assert result.begun.wait(20)
    return result


@pytest.mark.parametrize("number", SIGNALS)
def test_what_runs_is_finished_and_what_is_new_is_refused(launch: Callable[..., Process], number: int) -> None:
    process = launch(0, allowed=1)
    text, kept = sentences(10), sentences(1)
    download(process.url, kept).thread.join(30)
    running = download(process.url, text)
    process.popen.send_signal(number)
    wait_until(lambda: httpx.get(f"{process.url}/ready").status_code == 503)
    assert httpx.get(f"{process.url}/ready").json()["phase"] == "draining"
    for asked in (kept, text, sentences(2, "sea")):  # a hit, a join and a miss
        refusal = httpx.post(f"{process.url}/v1/audio/speech", json={"input": asked, "response_format": "pcm"})
        assert (refusal.status_code, refusal.json()["error"]["code"]) == (503, "shutting_down")
        assert int(refusal.headers["retry-after"]) >= 1
    assert httpx.get(f"{process.url}/healthz").status_code == 200
    assert running.thread.is_alive(), "all of this happens while it runs"
    process.allow(None)
    running.thread.join(30)
    assert (running.status, running.cut) == (200, False)
    assert running.content == pcm_of(text)
    assert process.ended() == 0
    process.assert_clean()
    assert process.rows("SELECT outcome, characters FROM usage_events ORDER BY id DESC LIMIT 1") == [
        ("completed", len(text))
    ]


def test_what_takes_too_long_is_cut_and_paid_as_far_as_it_was_heard(launch: Callable[..., Process]) -> None:
    process = launch(0, allowed=2, drain_timeout_s=0.6)
    text = sentences(40)
    running = download(process.url, text)
    process.popen.send_signal(signal.SIGTERM)
    signalled = time.monotonic()
    assert process.ended() == 0
    assert time.monotonic() - signalled > 0.6
    running.thread.join(30)
    assert running.cut
    assert 0 < len(running.content) < len(pcm_of(text))
    process.assert_clean()
    ((outcome, characters, price),) = process.rows("SELECT outcome, characters, price_micros FROM usage_events")
    assert outcome == "cancelled"
    assert isinstance(characters, int)
    assert 0 < characters < len(text)
    assert price == 1000 * characters


@pytest.mark.parametrize("number", SIGNALS)
def test_a_second_signal_ends_the_drain(launch: Callable[..., Process], number: int) -> None:
    process = launch(0, allowed=2, drain_timeout_s=600)
    running = download(process.url, sentences(40))
    process.popen.send_signal(number)
    wait_until(lambda: httpx.get(f"{process.url}/ready").status_code == 503)
    process.popen.send_signal(number)
    assert process.ended() == 0
    running.thread.join(30)
    assert running.cut
    process.assert_clean()


def test_the_drain_may_end_after_the_second_signal(launch: Callable[..., Process]) -> None:
    """Its end must not count as a third signal, at which uvicorn would leave without closing anything."""
    process = launch(0, allowed=2, drain_timeout_s=3)
    running = download(process.url, sentences(40))
    process.popen.send_signal(signal.SIGINT)
    wait_until(lambda: httpx.get(f"{process.url}/ready").status_code == 503)
    process.popen.send_signal(signal.SIGINT)
    assert process.ended() == 0
    running.thread.join(30)
    process.assert_clean()


@pytest.mark.parametrize("number", SIGNALS)
def test_an_idle_server_ends_at_once(launch: Callable[..., Process], number: int) -> None:
    process = launch(0)
    with httpx.Client(base_url=process.url) as client:  # a kept connection does not hold it up
        assert client.get("/healthz").status_code == 200
        process.popen.send_signal(number)
        signalled = time.monotonic()
        assert process.ended() == 0
        assert time.monotonic() - signalled < GRACE_S, "it waited for the connection"
    process.assert_clean()


def test_a_server_that_has_lost_its_device_finishes_and_ends_to_be_started_anew(launch: Callable[..., Process]) -> None:
    process = launch(0.25)
    text = sentences(6)
    running = download(process.url, text)
    process.popen.send_signal(signal.SIGUSR1)
    wait_until(lambda: httpx.get(f"{process.url}/ready").status_code == 503, 2)
    assert process.ended(20) == SPENT != 0
    running.thread.join(20)
    assert running.content == pcm_of(text)
    assert "the process ends with status 75, to be started anew" in "".join(process.log)
    process.assert_clean()


def test_an_end_that_does_not_come_is_forced() -> None:
    program = (
        "import signal, time\n"
        "from api.src import shutdown\n"
        "shutdown.GRACE_S = 0.1\n"
        "signal.signal(signal.SIGTERM, lambda *_: time.sleep(60))\n"
        "shutdown.EndOfProcess(0.1).begin()\n"
    )
    began = time.monotonic()
    assert subprocess.run([sys.executable, "-c", program], timeout=30, cwd=ROOT).returncode == SPENT
    assert time.monotonic() - began < 20
