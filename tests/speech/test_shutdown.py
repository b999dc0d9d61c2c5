"""The end of a server, as an operator sees it: a real process, real signals."""

from __future__ import annotations

import os
import re
import signal
import sqlite3
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path

import httpx
import pytest

from api.src.cli import GRACE_S
from api.src.stores.ledger_check import broken_laws
from tests.speech.asking import wait_until
from tests.speech.textual import pcm_of, sentences

ROOT = Path(__file__).parents[2]
SIGNALS = [signal.SIGTERM, signal.SIGINT]
PRICE = "[default]\nper_1000_characters = 1000000\n"


@dataclass
class Process:
    """A server in a process of its own."""

    popen: subprocess.Popen[str]
    folder: Path
    log: list[str] = field(default_factory=list)

    @property
    def url(self) -> str:
        """Where it listens; waits until it says so."""
        pattern = re.compile(r"Uvicorn running on (http://[\d.:]+)")
        while True:
            wait_until(lambda: any(map(pattern.search, self.log)) or self.popen.poll() is not None, 30)
            found = [match[1] for line in self.log if (match := pattern.search(line))]
            assert found, "".join(self.log)
            return found[0]

    def ended(self, seconds: float) -> int:
        """Wait for its end; returns its exit status."""
        return self.popen.wait(seconds)

    def rows(self, query: str) -> list[tuple[object, ...]]:
        with closing(sqlite3.connect(self.folder / "ledger.db")) as db:
            return db.execute(query).fetchall()

    def assert_clean(self) -> None:
        """No hold, no lease, no temp file is left, the books are sound, and nothing went wrong unnoticed."""
        assert self.rows("SELECT * FROM holds WHERE state = 'open'") == []
        assert self.rows("SELECT * FROM owners") == [], "the ledger was not closed"
        assert broken_laws(self.folder / "ledger.db") == []
        assert list(self.folder.rglob("*.tmp")) == []
        assert "Traceback" not in "".join(self.log)


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


@pytest.fixture
def launch(tmp_path: Path) -> Iterator[Callable[..., Process]]:
    """Start a server whose backend takes so long for each segment; TTS_ settings as keyword arguments."""
    running: list[Process] = []

    def start(delay_s: float, **settings: object) -> Process:
        prices = tmp_path / "prices.toml"
        prices.write_text(PRICE)
        environment = os.environ | {
            "TTS_PORT": "0",
            "TTS_LOG_LEVEL": "info",
            "TTS_CACHE_DIR": str(tmp_path / "cache"),
            "TTS_LEDGER_URL": f"sqlite:///{tmp_path / 'ledger.db'}",
            "TTS_PRICES_FILE": str(prices),
            **{f"TTS_{name.upper()}": str(value) for name, value in settings.items()},
        }
        command = [sys.executable, "-m", "tests.speech.serve_textual", str(delay_s)]
        popen = subprocess.Popen(command, cwd=ROOT, env=environment, stderr=subprocess.PIPE, text=True)
        process = Process(popen, tmp_path)
        threading.Thread(target=lambda: process.log.extend(popen.stderr or ()), daemon=True).start()
        running.append(process)
        wait_until(lambda: httpx.get(f"{process.url}/ready").status_code == 200, 30)
        return process

    yield start
    for process in running:
        process.popen.kill()
        process.popen.wait()
        if process.popen.stderr:
            process.popen.stderr.close()


@pytest.mark.parametrize("number", SIGNALS)
def test_what_runs_is_finished_and_what_is_new_is_refused(launch: Callable[..., Process], number: int) -> None:
    process = launch(0.25)
    text, kept = sentences(10), sentences(1)
    assert download(process.url, kept).begun.is_set()
    running = download(process.url, text)
    process.popen.send_signal(number)
    wait_until(lambda: httpx.get(f"{process.url}/ready").status_code == 503, 2)
    assert httpx.get(f"{process.url}/ready").json()["phase"] == "draining"
    for asked in (kept, text, sentences(2, "sea")):  # a hit, a join and a miss
        refusal = httpx.post(f"{process.url}/v1/audio/speech", json={"input": asked, "response_format": "pcm"})
        assert (refusal.status_code, refusal.json()["error"]["code"]) == (503, "shutting_down")
        assert int(refusal.headers["retry-after"]) >= 1
    assert httpx.get(f"{process.url}/healthz").status_code == 200
    assert running.thread.is_alive(), "all of this happens while it runs"
    running.thread.join(20)
    assert (running.status, running.cut) == (200, False)
    assert running.content == pcm_of(text)
    assert process.ended(GRACE_S + 3) == 0
    process.assert_clean()
    assert process.rows("SELECT outcome, characters FROM usage_events ORDER BY id DESC LIMIT 1") == [
        ("completed", len(text))
    ]


def test_what_takes_too_long_is_cut_and_paid_as_far_as_it_was_heard(launch: Callable[..., Process]) -> None:
    process = launch(0.2, drain_timeout_s=0.6)
    text = sentences(40)
    running = download(process.url, text)
    process.popen.send_signal(signal.SIGTERM)
    signalled = time.monotonic()
    assert process.ended(GRACE_S + 5) == 0
    assert 0.6 < time.monotonic() - signalled < GRACE_S + 3
    running.thread.join(5)
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
    process = launch(0.2, drain_timeout_s=60)
    running = download(process.url, sentences(40))
    process.popen.send_signal(number)
    wait_until(lambda: httpx.get(f"{process.url}/ready").status_code == 503, 2)
    process.popen.send_signal(number)
    assert process.ended(GRACE_S + 3) == 0
    running.thread.join(5)
    assert running.cut
    process.assert_clean()


def test_the_drain_may_end_after_the_second_signal(launch: Callable[..., Process]) -> None:
    """Its end must not count as a third signal, at which uvicorn would leave without closing anything."""
    process = launch(0.2, drain_timeout_s=0.7)
    running = download(process.url, sentences(40))
    for _ in range(2):
        process.popen.send_signal(signal.SIGINT)
        time.sleep(0.2)
    assert process.ended(GRACE_S + 3) == 0
    running.thread.join(5)
    process.assert_clean()


@pytest.mark.parametrize("number", SIGNALS)
def test_an_idle_server_ends_at_once(launch: Callable[..., Process], number: int) -> None:
    process = launch(0)
    with httpx.Client(base_url=process.url) as client:  # a kept connection does not hold it up
        assert client.get("/healthz").status_code == 200
        process.popen.send_signal(number)
        signalled = time.monotonic()
        assert process.ended(5) == 0
        assert time.monotonic() - signalled < 2
    process.assert_clean()
