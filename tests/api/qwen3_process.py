"""`qwen3-tts serve` with TTS_BACKEND=qwen3 as a process of its own, asked over HTTP, and watched through /metrics."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import numpy as np
from prometheus_client.parser import text_string_to_metric_families

from api.src.domain import AudioFormat, Samples
from tests.api.wire import speak
from tests.decoding import decoded
from tests.speech.asking import wait_until
from tests.speech.launching import ROOT, Process

FRAME = 1920
"""Samples of a codec frame."""

NO_STORE = {"Cache-Control": "no-store"}

MOST_APART = 4 / 32768
"""What float32 in another batch, and the rounding to 16 bits, may change of a sample."""


@dataclass(frozen=True)
class EngineFigures:
    """The engine's metrics. `ended` counts its requests (segments, and the warm-up) by their finish reason."""

    frames: int = 0
    active: int = 0
    waiting: int = 0
    ended: dict[str, int] = field(default_factory=dict)

    @property
    def idle(self) -> bool:
        return not (self.active or self.waiting)

    def since(self, earlier: EngineFigures) -> EngineFigures:
        """These figures, with the counts from `earlier` on; reasons without a request are left out."""
        ended = {reason: count - earlier.ended[reason] for reason, count in self.ended.items()}
        counted = {reason: count for reason, count in ended.items() if count}
        return EngineFigures(self.frames - earlier.frames, self.active, self.waiting, counted)


@dataclass(frozen=True)
class Qwen3Server:
    """A running server; `client` talks to it."""

    process: Process
    client: httpx.Client

    def figures(self) -> EngineFigures:
        answer = self.client.get("/metrics")
        assert answer.status_code == 200
        found: dict[tuple[str, ...], int] = {}
        ended: dict[str, int] = {}
        for family in text_string_to_metric_families(answer.text):
            for sample in family.samples:
                if sample.name == "tts_engine_requests_total":
                    ended[sample.labels["finish_reason"]] = int(sample.value)
                elif sample.name.startswith("tts_engine_"):
                    found[(sample.name, sample.labels.get("state", ""))] = int(sample.value)
        slots = found["tts_engine_slots", "active"] + found["tts_engine_slots", "paused"]
        return EngineFigures(found["tts_engine_frames_total", ""], slots, found["tts_engine_waiting", ""], ended)

    def pcm(self, text: str, **fields: Any) -> Samples:
        """The sound, made anew."""
        answer = speak(self.client, text, NO_STORE, response_format="pcm", **fields)
        assert answer.status_code == 200, answer.text
        assert answer.headers["x-cache"] == "bypass"
        return samples("pcm", answer.content)

    def together(self, requests: Sequence[dict[str, Any]]) -> list[Samples]:
        """Each of the requests' sounds, asked for at the same moment."""
        barrier = threading.Barrier(len(requests))

        def ask(fields: dict[str, Any]) -> Samples:
            barrier.wait(30)
            return self.pcm(**fields)

        with ThreadPoolExecutor(len(requests)) as pool:
            return list(pool.map(ask, requests))


@contextmanager
def serving(folder: Path, checkpoint: Path, **settings: object) -> Iterator[Qwen3Server]:
    """Serve a checkpoint; at the end the process must leave in peace, with everything given back."""
    environment = os.environ | {
        "TTS_PORT": "0",
        "TTS_BACKEND": "qwen3",
        "TTS_MODEL": str(checkpoint),
        "TTS_DEVICE": "cpu",
        "TTS_CPU_WEIGHTS": "fp32",  # so that sounds can be compared
        "TTS_CACHE_DIR": str(folder / "cache"),
        "TTS_LEDGER_URL": f"sqlite:///{folder / 'ledger.db'}",
        **{f"TTS_{name.upper()}": str(value) for name, value in settings.items()},
    }
    command = [sys.executable, "-m", "api.src.cli", "serve"]
    with subprocess.Popen(command, cwd=ROOT, env=environment, stderr=subprocess.PIPE, text=True) as popen:
        process = Process(popen, folder)
        threading.Thread(target=lambda: process.log.extend(popen.stderr or ()), daemon=True).start()
        try:
            with httpx.Client(base_url=process.url, timeout=120) as client:
                wait_until(lambda: client.get("/ready").status_code == 200, 60, lambda: client.get("/ready").text)
                yield Qwen3Server(process, client)
            popen.terminate()
            assert process.ended(30) == 0
            process.assert_clean()
        finally:
            popen.kill()


def samples(format: AudioFormat, data: bytes) -> Samples:
    """Decoded sound that is more than silence."""
    sound = decoded(format, data)
    assert np.abs(sound).max(initial=0) > 0.01
    return sound


def apart(one: Samples, other: Samples) -> float:
    """By how much samples differ at most; infinite if one sound is longer."""
    return float(np.abs(one - other).max()) if one.shape == other.shape else float("inf")
