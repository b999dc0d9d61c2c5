"""Who is judged, and what they say: each candidate's sentences as a client of the server gets them, one at a time.

A candidate is a named way to synthesise: a server of this project with settings of its own, started for it, or any
OpenAI-compatible server that runs already. Judges nothing.
"""

from __future__ import annotations

import asyncio
import json
import secrets
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from tests.bench.listening import Target, listen
from tests.bench.processes import running
from tests.bench.sentences import Sentence
from tests.bench.server import SERVERS
from tests.bench.tts_server import Measured, says
from tests.bench.workload import Ask
from tests.ports import free_port

_START_S = 1800.0
"""A model may be downloaded and quantised first."""
_POLL_S = 0.1


@dataclass(frozen=True)
class Candidate:
    """`settings`: the started server's; none is started if there is a `base_url`. `fields` go into each request."""

    name: str
    settings: dict[str, str] = field(default_factory=dict)
    base_url: str = ""
    headers: dict[str, str] = field(default_factory=dict)
    fields: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Take:
    """One sentence spoken once: a whole wav file, or what went wrong, and the seconds it took."""

    sentence: Sentence
    wav: bytes
    total_s: float
    error: str | None = None


@dataclass(frozen=True)
class Speech:
    """All that a candidate said, in the order of the sentences, `takes` of each together; and its GET /version."""

    takes: list[Take]
    says: Any = None


def speak(
    candidate: Candidate, sentences: Sequence[Sentence], folder: Path, *, takes: int = 1, timeout_s: float = 600.0
) -> Speech:
    """Each sentence `takes` times, with the seeds 0, 1 and so on. A request that fails is a Take with its error.

    `folder` is for the started server's data and log. Raises RuntimeError, which says why: the server does not start.
    """
    with _serving(candidate, folder, timeout_s) as server:
        target = Target(
            server.base_url, "wav", candidate.fields, server.headers | candidate.headers, timeout_s=timeout_s
        )
        _take(target, Sentence("Are you ready?"), 0)  # the first request of a process may take longer
        found = [_take(target, sentence, seed) for sentence in sentences for seed in range(takes)]
        return Speech(found, says(server, "/version"))


def _take(target: Target, sentence: Sentence, seed: int) -> Take:
    asked = replace(target, fields=target.fields | {"seed": seed})
    heard = asyncio.run(listen(asked, Ask(0, sentence.text, 0)))
    error = heard.error and f"{heard.error} {heard.said}".strip()
    return Take(sentence, b"".join(heard.body), heard.total_s, error)


@contextmanager
def _serving(candidate: Candidate, folder: Path, timeout_s: float) -> Iterator[Measured]:
    if candidate.base_url:
        yield Measured(candidate.base_url, {})
        return
    port, key = free_port(), secrets.token_hex(8)
    environment = {
        "TTS_HOST": "127.0.0.1",
        "TTS_PORT": str(port),
        "TTS_CACHE_DIR": str(folder / "cache"),
        "TTS_CACHE_MAX_BYTES": "0",
        "TTS_LEDGER_URL": f"sqlite:///{folder / 'ledger.db'}",
        "TTS_API_KEYS": f"judge={key}",
        "TTS_REQUEST_TIMEOUT_S": str(timeout_s),
        **candidate.settings,
    }
    log = folder / "server.log"
    with running(SERVERS["embedded"], port, log, environment=environment, ready="/healthz") as process:
        server = Measured(f"http://127.0.0.1:{port}", {"Authorization": f"Bearer {key}"}, process)
        _wait_until_ready(server, log)
        yield server


def _wait_until_ready(server: Measured, log: Path) -> None:
    """A server whose model cannot be loaded lives on, and says why it is not ready."""
    deadline = time.monotonic() + _START_S
    while not (state := _ready(server.base_url))["ready"]:
        ended = server.process is not None and server.process.process.poll() is not None
        if state["phase"] == "failed" or ended or time.monotonic() > deadline:
            raise RuntimeError(state["reason"] or f"The server did not become ready:\n{log.read_text()[-3000:]}")
        time.sleep(_POLL_S)


def _ready(base_url: str) -> dict[str, Any]:
    """GET /ready, whatever its status."""
    try:
        with urllib.request.urlopen(f"{base_url}/ready", timeout=10) as answer:
            return dict(json.load(answer))
    except urllib.error.HTTPError as error:
        return dict(json.load(error))
    except OSError:  # it is just ending
        return {"ready": False, "phase": "ended", "reason": ""}
