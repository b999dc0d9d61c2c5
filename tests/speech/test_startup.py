"""What keeps a server from speaking: said to everybody, tried again, and never in the way of its end."""

from __future__ import annotations

import asyncio
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from api.src import patience
from api.src.building import build_service
from api.src.cli import main
from api.src.domain import Readiness
from api.src.errors import NeedsNewProcess, NotReady
from api.src.observe import Metrics
from api.src.patience import keep_working, until_it_works
from api.src.settings import Settings
from api.src.speech.service import Qwen3TTSService
from api.src.stores.cache import SpeechCache
from tests.api.wire import assert_error, speak
from tests.conftest import Server, run_server
from tests.fakes import FakeBackend
from tests.postgres import PostgresServer, running_server
from tests.speech.asking import collect, eventually, speech_request, wait_until

OUT_OF_MEMORY = "There is not enough memory for the model."


class Reluctant(FakeBackend):
    """Raises `error` at each start until `works` is set."""

    def __init__(self, error: Exception) -> None:
        super().__init__(ready=False)
        self.error, self.works, self.tries = error, threading.Event(), 0

    def readiness(self) -> Readiness:
        """It says nothing of what went wrong itself."""
        return Readiness(self.ready, "ready" if self.ready else "loading")

    async def start(self) -> None:
        self.tries += 1
        if not self.works.is_set():
            raise self.error
        await super().start()


class Mortal(Reluctant):
    """Ends by itself, with `error`, whenever it is told to."""

    def __init__(self) -> None:
        super().__init__(NotReady(OUT_OF_MEMORY))
        self.works.set()
        self.deaths: asyncio.Queue[NotReady] = asyncio.Queue()

    async def died(self) -> NotReady:
        death = await self.deaths.get()
        self.ready = False
        return death


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(patience, "FIRST_PAUSE_S", 0.02)
    monkeypatch.setattr(patience, "LONGEST_PAUSE_S", 0.05)


@pytest.fixture(scope="module")
def postgres() -> Iterator[PostgresServer]:
    with running_server() as server:
        yield server


def assert_speaks_not(server: Server, phase: str, reason: str) -> None:
    """Everything that can be asked says the same, and nothing else is said."""
    ready = server.client.get("/ready")
    assert (ready.status_code, ready.json()["ready"], ready.json()["phase"]) == (503, False, phase)
    assert ready.json()["reason"] == reason
    assert int(ready.headers["retry-after"]) >= 1
    refused = speak(server.client)
    assert assert_error(refused, 503, code="not_ready") == f"The server is not ready: {reason}"
    assert int(refused.headers["retry-after"]) >= 1
    assert server.client.get("/healthz").status_code == 200
    assert server.client.get("/version").status_code == 200
    assert server.client.get("/metrics").status_code == 200


@pytest.mark.usefixtures("impatient")
@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (NotReady(OUT_OF_MEMORY), OUT_OF_MEMORY),
        (RuntimeError("CUDA error at /secret/path"), "The backend cannot be started. The log says why."),
    ],
)
def test_a_backend_that_does_not_start_is_tried_again(tmp_path: Path, error: Exception, reason: str) -> None:
    backend = Reluctant(error)
    with starting(tmp_path, backend) as server:
        wait_until(lambda: backend.tries > 3)
        assert_speaks_not(server, "loading", reason)
        backend.works.set()
        wait_until(lambda: server.client.get("/ready").status_code == 200)
        tries = backend.tries
        assert speak(server.client).status_code == 200
        time.sleep(0.2)
        assert backend.tries == tries, "once it works it is left alone"


@contextmanager
def starting(folder: Path, backend: FakeBackend, **settings: object) -> Iterator[Server]:
    """A server that need not be ready."""
    backend.ready = False
    yield from run_server(folder, backend, **settings)


@pytest.mark.usefixtures("impatient")
def test_a_ledger_that_is_away_at_the_start_is_waited_for(tmp_path: Path, postgres: PostgresServer) -> None:
    database = postgres.new_database()
    postgres.stop()
    try:
        keys = [("alice", "key")]  # without any, nobody knows yet whether the database has some
        with starting(tmp_path, FakeBackend(), ledger_url=postgres.url(database), api_keys=keys) as server:
            server.client.headers["Authorization"] = "Bearer key"
            assert_speaks_not(server, "ledger", "The ledger is being opened.")
            failing = "The ledger cannot be opened. The log says why."
            wait_until(lambda: server.client.get("/ready").json()["reason"] == failing, 60)
            assert_speaks_not(server, "ledger", failing)
            assert_error(server.client.get("/v1/usage"), 503)
            assert not server.backend.ready, "the backend comes after it"
            postgres.start()
            wait_until(lambda: server.client.get("/ready").status_code == 200, 60)
            assert speak(server.client).status_code == 200
            assert len(server.client.get("/v1/usage").json()["data"]) == 1
    finally:
        postgres.start()


@pytest.mark.usefixtures("impatient")
def test_so_is_a_folder_that_cannot_be_used(tmp_path: Path) -> None:
    place = tmp_path / "state"
    place.write_text("not a folder")
    with starting(tmp_path, FakeBackend(), ledger_url=f"sqlite:///{place / 'ledger.db'}") as server:
        failing = "The ledger cannot be opened. The log says why."
        wait_until(lambda: server.client.get("/ready").json()["reason"] == failing)
        place.unlink()
        wait_until(lambda: server.client.get("/ready").status_code == 200)
        assert speak(server.client).status_code == 200


@pytest.mark.usefixtures("impatient")
def test_a_backend_that_dies_later_is_started_again(tmp_path: Path) -> None:
    backend = Mortal()
    with starting(tmp_path, backend) as server:
        wait_until(lambda: server.client.get("/ready").status_code == 200)
        assert speak(server.client).status_code == 200
        for _ in range(2):
            backend.works.clear()
            tries = backend.tries
            server.loop.call_soon_threadsafe(backend.deaths.put_nowait, NotReady("The engine has ended."))
            wait_until(lambda tries=tries: backend.tries > tries + 2)
            assert_speaks_not(server, "loading", OUT_OF_MEMORY)
            backend.works.set()
            wait_until(lambda: server.client.get("/ready").status_code == 200)
            assert speak(server.client, "Something else.").status_code == 200


async def test_a_backend_that_no_start_helps_ends_the_process(tmp_path: Path) -> None:
    backend, ended = Mortal(), asyncio.Event()
    service = make_service(tmp_path, backend, end_process=ended.set)
    await service.start()
    await service.wait_ready()
    backend.deaths.put_nowait(NeedsNewProcess("The device is lost."))
    await asyncio.wait_for(ended.wait(), 5)
    assert (service.readiness().ready, service.readiness().reason) == (False, "The device is lost.")
    assert backend.tries == 1
    await service.close()


def make_service(folder: Path, backend: FakeBackend, ledger_url: str = "", **options: Any) -> Qwen3TTSService:
    url = ledger_url or f"sqlite:///{folder / 'ledger.db'}"
    settings = Settings(_env_file=None, cache_dir=folder / "cache", ledger_url=url)
    return build_service(settings, backend, Metrics(), **options)


async def test_who_waits_for_it_is_told_what_is_wrong(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(patience, "FIRST_PAUSE_S", 600.0)
    monkeypatch.setattr(patience, "LONGEST_PAUSE_S", 600.0)
    backend = Reluctant(NotReady(OUT_OF_MEMORY))
    service = make_service(tmp_path, backend)
    await service.start()
    with pytest.raises(NotReady, match=OUT_OF_MEMORY):
        await service.wait_ready()
    began = time.monotonic()
    await service.close()
    assert time.monotonic() - began < 60, "the pause is not waited out"
    assert backend.tries == 1


async def test_the_end_does_not_wait_for_a_database_that_is_away(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        port = silent.getsockname()[1]
        service = make_service(tmp_path, FakeBackend(), f"postgresql://me:pw@127.0.0.1:{port}/db?connect_timeout=2")
        await service.start()
        await asyncio.sleep(0.2)
        began = time.monotonic()
        await service.close()
        assert time.monotonic() - began < 5.5, "it waited for another try"
    assert "postgres-writer" not in [thread.name for thread in threading.enumerate()]


def test_say_ends_with_what_is_wrong(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    place = tmp_path / "state"
    place.write_text("not a folder")
    monkeypatch.setenv("TTS_LEDGER_URL", f"sqlite:///{place / 'ledger.db'}")
    monkeypatch.setenv("TTS_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setenv("TTS_BACKEND", "embedded")
    monkeypatch.chdir(tmp_path)
    assert main(["say", "Hello.", "-o", str(tmp_path / "a.wav")]) == 1
    assert "the ledger cannot be started" in capsys.readouterr().err


async def test_a_long_sweep_is_in_nobodys_way(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    begun, stopped = threading.Event(), threading.Event()

    def endless(cache: SpeechCache) -> None:
        begun.set()
        assert cache._no_sweep.wait(20)
        stopped.set()

    monkeypatch.setattr(SpeechCache, "sweep", endless)
    service = make_service(tmp_path, FakeBackend())
    await service.start()
    await service.wait_ready()
    assert await collect(service, speech_request("Hello there."))
    await eventually(begun.is_set)
    assert not stopped.is_set()
    await service.close()
    assert stopped.is_set()


# --- pauses ---


async def test_pauses_grow_to_a_bound_and_differ(monkeypatch: pytest.MonkeyPatch) -> None:
    waits: list[float] = []
    slept: list[float] = []

    async def sleep(seconds: float) -> None:
        slept.append(seconds)

    async def work() -> None:
        if len(waits) < 12:
            raise OSError

    monkeypatch.setattr(patience.asyncio, "sleep", sleep)
    await until_it_works(work, failed=lambda error, wait: waits.append(wait))
    assert waits == slept
    longest = [min(2.0**number, 60.0) for number in range(12)]
    assert all(most / 2 <= wait <= most for wait, most in zip(waits, longest, strict=True))
    assert len(set(waits)) == 12


async def test_a_cancelled_try_is_not_repeated() -> None:
    tries = 0

    async def work() -> None:
        nonlocal tries
        tries += 1
        await asyncio.sleep(30)

    task = asyncio.create_task(until_it_works(work, failed=lambda *_: None))
    await asyncio.sleep(0.01)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert tries == 1


@pytest.mark.parametrize(("life_s", "growing"), [(59.0, True), (61.0, False)])
async def test_pauses_grow_over_short_lives(monkeypatch: pytest.MonkeyPatch, life_s: float, growing: bool) -> None:
    now, waits = 0.0, []

    async def sleep(seconds: float) -> None:
        nonlocal now
        now += seconds

    async def start() -> None:
        if len(waits) == 6:
            raise NeedsNewProcess("It is enough.")

    async def died() -> NotReady:
        nonlocal now
        now += life_s
        return NotReady("It has ended.")

    monkeypatch.setattr(patience.asyncio, "sleep", sleep)
    monkeypatch.setattr(patience.time, "monotonic", lambda: now)
    with pytest.raises(NeedsNewProcess):
        await keep_working(start, died, works=lambda: None, failed=lambda error, wait: waits.append(wait))
    longest = [2.0**number if growing else 1.0 for number in range(6)]
    assert all(most / 2 <= wait <= most for wait, most in zip(waits, longest, strict=True))
