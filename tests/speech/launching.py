"""`qwen3-tts serve` as an operator runs it: a process of its own, around a backend that needs no voice."""

from __future__ import annotations

import os
import re
import sqlite3
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path

import httpx

from api.src.stores.ledger_check import broken_laws
from tests.speech.asking import wait_until

ROOT = Path(__file__).parents[2]
GATE = "allowed-segments"
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
            wait_until(lambda: any(map(pattern.search, self.log)) or self.popen.poll() is not None, 60)
            found = [match[1] for line in self.log if (match := pattern.search(line))]
            assert found, "".join(self.log)
            return found[0]

    def allow(self, segments: int | None) -> None:
        """How many segments of each run its backend may speak before it waits; None: all."""
        gate = self.folder / GATE
        if segments is None:
            gate.unlink(missing_ok=True)
        else:
            gate.write_text(str(segments))

    def ended(self, seconds: float = 30) -> int:
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


def launching(tmp_path: Path) -> Iterator[Callable[..., Process]]:
    """Start servers whose backend speaks each segment after so long for so long; end them when the test has.

    `allowed`: see Process.allow.
    """
    running: list[Process] = []

    def start(delay_s: float, segment_seconds: float = 0.1, allowed: int | None = None, **settings: object) -> Process:
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
        gate = str(tmp_path / GATE)
        command = [sys.executable, "-m", "tests.speech.serve_textual", str(delay_s), str(segment_seconds), gate]
        popen = subprocess.Popen(command, cwd=ROOT, env=environment, stderr=subprocess.PIPE, text=True)
        process = Process(popen, tmp_path)
        process.allow(allowed)
        threading.Thread(target=lambda: process.log.extend(popen.stderr or ()), daemon=True).start()
        running.append(process)
        wait_until(lambda: httpx.get(f"{process.url}/ready").status_code == 200, 60)
        return process

    yield start
    for process in running:
        process.popen.kill()
        process.popen.wait()
        if process.popen.stderr:
            process.popen.stderr.close()
