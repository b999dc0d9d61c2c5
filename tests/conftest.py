"""A real server for the tests: uvicorn on a port of its own, in a thread, around any backend."""

from __future__ import annotations

import asyncio
import sqlite3
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import httpx
import pytest
import uvicorn
from hypothesis import HealthCheck
from hypothesis import settings as hypothesis_settings

from api.src.cli import IDLE_S
from api.src.main import create_app
from api.src.settings import Settings
from api.src.speech.service import Qwen3TTSService
from tests.fakes import FakeBackend

hypothesis_settings.register_profile("any machine", deadline=None, suppress_health_check=[HealthCheck.too_slow])
hypothesis_settings.load_profile("any machine")


@dataclass
class Server:
    """A running server; `client` talks to it, `call` runs a coroutine function on its event loop."""

    url: str
    service: Qwen3TTSService
    backend: Any
    client: httpx.Client
    loop: asyncio.AbstractEventLoop
    folder: Path

    def call(self, work: Callable[[], Any]) -> Any:
        return asyncio.run_coroutine_threadsafe(work(), self.loop).result(30)

    def open_holds(self) -> int:
        """Holds in the ledger that have not ended."""
        with closing(sqlite3.connect(self.folder / "ledger.db")) as db:
            return int(db.execute("SELECT count(*) FROM holds WHERE state = 'open'").fetchone()[0])

    def give_up_after(self, seconds: float) -> None:
        """The time-out of requests from now on; those that run keep theirs, so that no test need be quick to begin."""
        self.service._limits = replace(self.service._limits, request_timeout_s=seconds)

    def wait_idle(self, seconds: float = 30.0) -> None:
        """Wait until no generation, listener, permit, hold, task or temp file is left."""
        deadline = time.monotonic() + seconds
        while rest := self.leftovers():
            assert time.monotonic() < deadline, f"left behind: {rest}"
            time.sleep(0.01)

    def leftovers(self) -> dict[str, Any]:
        service = self.service
        rest = {
            "generations": len(service._running),
            "joinable": len(service._generations),
            "listeners": len(service._listeners),
            "tasks": len(service._tasks),
            "running": service.admission.running,
            "waiting": service.admission.waiting,
            "open speak() calls": getattr(self.backend, "open", 0),
            "holds": self.open_holds(),
            "temp files": len([path for path in self.folder.rglob("*") if "tmp" in path.name]),
        }
        return {name: count for name, count in rest.items() if count}


def run_server(folder: Path, backend: Any, **settings: Any) -> Iterator[Server]:
    """Start a server, yield it, stop it and see that it ends."""
    configured = Settings(
        _env_file=None,
        cache_dir=folder / "cache",
        **{"log_level": "warning", "ledger_url": f"sqlite:///{folder / 'ledger.db'}", **settings},
    )
    app = create_app(configured, backend=backend)
    config = uvicorn.Config(
        app, port=0, log_config=None, access_log=False, timeout_graceful_shutdown=2, timeout_keep_alive=IDLE_S
    )
    server = uvicorn.Server(config)
    loops: list[asyncio.AbstractEventLoop] = []

    async def serve() -> None:
        loops.append(asyncio.get_running_loop())
        await server.serve()

    thread = threading.Thread(target=lambda: asyncio.run(serve()), name="uvicorn")
    thread.start()
    while not server.started:
        assert thread.is_alive(), "the server did not start"
        time.sleep(0.005)
    port = server.servers[0].sockets[0].getsockname()[1]
    url = f"http://127.0.0.1:{port}"
    with httpx.Client(base_url=url, timeout=60) as client:
        try:
            while client.get("/ready").status_code != 200 and getattr(backend, "ready", True):
                time.sleep(0.02)
            yield Server(url, app.state.tts_service, backend, client, loops[0], folder)
        finally:
            server.should_exit = True
            thread.join(30)
    assert not thread.is_alive(), "the server did not stop"


@pytest.fixture
def backend() -> FakeBackend:
    return FakeBackend()


@pytest.fixture
def server(tmp_path: Path, backend: FakeBackend) -> Iterator[Server]:
    """A server around the `backend` fixture, with a fresh cache and ledger."""
    yield from run_server(tmp_path, backend)


@pytest.fixture
def start_server(tmp_path: Path) -> Iterator[Callable[..., Server]]:
    """Start servers with settings of the test's own: `start_server(backend, max_concurrent=1)`."""
    running: list[Iterator[Server]] = []

    def start(backend: Any, folder: Path = tmp_path, **settings: Any) -> Server:
        running.append(run_server(folder, backend, **settings))
        return next(running[-1])

    yield start
    for server in running:
        next(server, None)
