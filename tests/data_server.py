"""What the data servers of the tests have in common: a process of their own in a temporary folder.

Owns starting it, waiting until it answers, killing and ending it, and what becomes of a test where there is no such
server. Which program that is, and how it is asked, is redis_server.py's and postgres.py's.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import tempfile
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, TypeVar

import pytest

_START_S = 60.0
_END_S = 30.0


class DataServer(ABC):
    """A server whose data lie in `folder` and outlive its death."""

    end_signal = signal.SIGTERM

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._process: subprocess.Popen[bytes] | None = None

    @abstractmethod
    def _launch(self, log: IO[bytes]) -> subprocess.Popen[bytes]:
        """Start the program."""

    @abstractmethod
    def _answers(self) -> bool:
        """Whether it can be used now."""

    @property
    def pid(self) -> int:
        assert self._process is not None
        return self._process.pid

    def start(self) -> None:
        """Start it and wait until it answers; again where it ends, as long as a dead one's children are not gone."""
        deadline = time.monotonic() + _START_S
        while not self._answers():
            if self._process is None or self._process.poll() is not None:
                with (self.folder / "log").open("ab") as log:
                    self._process = self._launch(log)
            assert time.monotonic() < deadline, (self.folder / "log").read_text()
            time.sleep(0.01)

    def kill(self) -> None:
        """Kill -9, without a chance to write anything down."""
        self._end(signal.SIGKILL)

    def stop(self) -> None:
        self._end(self.end_signal)

    def _end(self, number: int) -> None:
        if self._process is not None:
            self._process.send_signal(number)
            self._process.wait(_END_S)
            self._process = None


_Server = TypeVar("_Server", bound=DataServer)


@contextmanager
def running(name: str, make: Callable[[Path], _Server]) -> Iterator[_Server]:
    """A server made in a folder of its own and started; stopped and removed at the end."""
    folder = Path(tempfile.mkdtemp(prefix=f"tts-{name}-"))  # short: a socket's path has 107 bytes
    try:
        server = make(folder)
        try:
            server.start()
            yield server
        finally:
            server.stop()
    finally:
        shutil.rmtree(folder)


def require(program: Path | None, missing: str) -> Path:
    """The program, or folder of programs. Where there is none the test is skipped, or fails if TTS_TEST_ALL is set."""
    if program is None:
        (pytest.fail if os.environ.get("TTS_TEST_ALL") else pytest.skip)(missing)
    return program
