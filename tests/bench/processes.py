"""The servers under test as subprocesses, and what the kernel says of them (Linux: /proc).

Owns starting, waiting until ready, stopping, and reading CPU time and memory of a whole process tree.
"""

from __future__ import annotations

import http.client
import os
import signal
import subprocess
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

_TICKS = os.sysconf("SC_CLK_TCK")
_POLL_S = 0.01
_START_S = 120.0


@dataclass
class ServerProcess:
    """A running server, its port, and the seconds from its start to its first 200."""

    process: subprocess.Popen[bytes]
    port: int
    ready_s: float = 0.0

    def tree(self) -> list[int]:
        """The process ids of the server and everything it has started."""
        parents = dict(_parents())
        found = [self.process.pid]
        for pid in found:
            found += [child for child, parent in parents.items() if parent == pid]
        return found

    def cpu_seconds(self) -> float:
        """CPU time of the whole tree, children that have ended included."""
        return sum(_cpu_seconds(pid) for pid in self.tree())

    def memory_mb(self, field: str) -> list[float]:
        """A memory field of /proc/<pid>/status (VmRSS, VmHWM) for each process, the server's first."""
        return [_status_mb(pid, field) for pid in self.tree()]


@contextmanager
def running(
    command: Sequence[str],
    port: int,
    log: Path,
    *,
    environment: Mapping[str, str] | None = None,
    ready: str = "/",
    start_s: float = _START_S,
) -> Iterator[ServerProcess]:
    """Run `command` until the context is left; entered once GET `ready` is answered by 200, within `start_s`.

    Its output goes to the file `log`: what a server writes is part of what it costs.
    """
    started = time.perf_counter()
    with log.open("wb") as output:
        process = subprocess.Popen(
            command,
            env={**os.environ, **(environment or {})},
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
        )
        try:
            server = ServerProcess(process, port)
            _wait_until_ready(server, ready, log, start_s)
            server.ready_s = time.perf_counter() - started
            yield server
        finally:
            _stop(process)


def _wait_until_ready(server: ServerProcess, path: str, log: Path, start_s: float) -> None:
    deadline = time.monotonic() + start_s
    while _status(server.port, path) != 200:
        if server.process.poll() is not None or time.monotonic() > deadline:
            raise RuntimeError(f"the server did not become ready:\n{log.read_text()[-3000:]}")
        time.sleep(_POLL_S)


def _status(port: int, path: str) -> int:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=10)
    try:
        connection.request("GET", path)
        return connection.getresponse().status
    except OSError:
        return 0
    finally:
        connection.close()


def _stop(process: subprocess.Popen[bytes]) -> None:
    process.send_signal(signal.SIGTERM)
    try:
        process.wait(20)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


def _parents() -> Iterator[tuple[int, int]]:
    for entry in Path("/proc").iterdir():
        if entry.name.isdecimal():
            with suppress(OSError):  # it has ended meanwhile
                yield int(entry.name), int(_stat(int(entry.name))[1])


def _stat(pid: int) -> list[str]:
    """The fields of /proc/<pid>/stat from the third, the state, on: the name before them may hold spaces."""
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()


def _cpu_seconds(pid: int) -> float:
    try:
        return sum(int(ticks) for ticks in _stat(pid)[11:15]) / _TICKS  # utime stime cutime cstime
    except OSError:
        return 0.0


def _status_mb(pid: int, field: str) -> float:
    with suppress(OSError):
        for line in Path(f"/proc/{pid}/status").read_text().splitlines():
            if line.startswith(f"{field}:"):
                return int(line.split()[1]) / 1024
    return 0.0
