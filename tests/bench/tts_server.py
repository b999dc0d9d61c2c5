"""The server that `tests.bench.tts_load` measures: this project's own, or any command's, as a process of its own.

    python -m tests.bench.tts_server    `qwen3-tts serve`, each segment as long as its text says (workload.frames_of)

A checkpoint with random weights finds no end of speech: without that each text would be spoken up to the server's own
bound, three times as long as speech. Also what the graphics driver says of memory.
"""

from __future__ import annotations

import json
import secrets
import shlex
import shutil
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from tests.bench.processes import ServerProcess, running
from tests.bench.server import SERVERS
from tests.bench.workload import frames_of
from tests.ports import free_port

ENDLESS = "random.json"
"""What random_checkpoint leaves in a folder whose speech has no end of its own."""

_MOST_AT_ONCE = 256
_START_S = 1800.0
_SAID = 2000


@dataclass(frozen=True)
class Measured:
    """A server to be measured. `process` is None where it runs already."""

    base_url: str
    headers: dict[str, str]
    process: ServerProcess | None = None


@contextmanager
def own_server(
    folder: Path, model: str, slots: int, timeout_s: float, *, fixed_lengths: bool, fake: bool = False
) -> Iterator[Measured]:
    """`qwen3-tts serve` on a free port, its data in `folder`; refuses nobody, waits `timeout_s` for a first sound."""
    port, key = free_port(), secrets.token_hex(8)
    environment = {
        "TTS_HOST": "127.0.0.1",
        "TTS_PORT": str(port),
        "TTS_BACKEND": "qwen3",
        "TTS_MODEL": model,
        "TTS_SLOTS": str(slots),
        "TTS_CACHE_DIR": str(folder / "cache"),
        "TTS_LEDGER_URL": f"sqlite:///{folder / 'ledger.db'}",
        "TTS_API_KEYS": f"bench={key}",
        "TTS_MAX_CONCURRENT": str(max(slots, _MOST_AT_ONCE)),
        "TTS_QUEUE_SIZE": "100000",
        "TTS_REQUEST_TIMEOUT_S": str(timeout_s),
    }
    command = [sys.executable, "-m", "tests.bench.tts_server"] if fixed_lengths else SERVERS["embedded"]
    command = SERVERS["fake"] if fake else command
    log = folder / "server.log"
    with running(command, port, log, environment=environment, ready="/ready", start_s=_START_S) as process:
        yield Measured(f"http://127.0.0.1:{port}", {"Authorization": f"Bearer {key}"}, process)


def says(server: Measured, path: str) -> Any:
    """The JSON that a server answers to GET `path`, such as its versions; None if it has none."""
    request = urllib.request.Request(server.base_url.removesuffix("/v1") + path, headers=server.headers)
    try:
        with urllib.request.urlopen(request, timeout=10) as answer:
            return json.loads(answer.read(_SAID))
    except (OSError, ValueError):
        return None


@contextmanager
def started(command: str, base_url: str, ready: str, log: Path) -> Iterator[Measured]:
    """Run a peer's command line, which serves at `base_url`, and end it afterwards."""
    port = urlsplit(base_url).port or 80
    with running(shlex.split(command), port, log, ready=ready, start_s=_START_S) as process:
        yield Measured(base_url, {}, process)


def graphics() -> list[dict[str, object]]:
    """Name, driver and used memory of each GPU (of all its processes); empty without nvidia-smi."""
    if shutil.which("nvidia-smi") is None:
        return []
    query = "--query-gpu=name,driver_version,memory.total,memory.used"
    asked = subprocess.run(["nvidia-smi", query, "--format=csv,noheader,nounits"], capture_output=True, text=True)
    rows = [[cell.strip() for cell in line.split(",")] for line in asked.stdout.splitlines()]
    return [
        {"name": name, "driver": driver, "memory_mb": int(total), "used_mb": int(used)}
        for name, driver, total, used in (row for row in rows if len(row) == 4)
    ]


def main() -> int:
    from api.src import cli
    from api.src.backends import qwen3_speech

    qwen3_speech.frame_budget = frames_of
    return cli.main(["serve"])


if __name__ == "__main__":
    sys.exit(main())
