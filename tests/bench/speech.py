"""How long speech takes and what it costs: time to the first byte of sound, total, CPU, for each format.

Every request says `Cache-Control: no-store`: it is generated, whatever was said before.
"""

from __future__ import annotations

import http.client
import json
import statistics
import time
from dataclasses import asdict, dataclass

from api.src.domain import SAMPLE_RATE
from tests.bench.processes import ServerProcess
from tests.bench.sound import sound_offset

FORMATS = ("mp3", "opus", "aac", "flac", "wav", "pcm")

SHORT = "The train to the coast leaves at nine."
LONG = (
    "The old harbour wakes before the town does. Boats come in while the streets are still dark. "
    "Men in heavy coats carry boxes up the steps. A bell rings twice, and then the market opens. "
    "The first customers know exactly what they want. They point at a fish, pay, and hurry home. "
    "Later the visitors arrive with their cameras. They ask for names, prices and good stories. "
    "An old woman sells bread from a blue cart. She bakes it at night in a kitchen near the wall. "
    "Her daughter keeps the accounts in a small green book. On Fridays they give the last loaf away. "
    "When it rains, everyone moves under the long roof. The talk grows louder there, and warmer. "
    "Somebody always tells the tale of the great storm. It broke nine windows and sank two boats. "
    "Nobody was hurt, and the wall was built again by spring. By noon the tables are empty and clean. "
    "The gulls take what the people have left behind. Then the harbour is quiet until the next morning."
)
"""Twenty sentences."""

_SAMPLE_BYTES = 2
_READ_BYTES = 64 * 1024


@dataclass(frozen=True)
class Speaking:
    """Medians for one text in one format. `real_time_factor`: seconds of work per second of sound."""

    first_sound_ms: float
    total_ms: float
    audio_s: float
    real_time_factor: float
    cpu_per_audio_s: float


@dataclass(frozen=True)
class _Answer:
    first_sound_s: float
    total_s: float
    body: bytes


def measure(
    server: ServerProcess, texts: dict[str, tuple[str, int]], headers: dict[str, str]
) -> dict[str, dict[str, dict[str, float]]]:
    """For each format and text (its name: text, repetitions) the figures of Speaking.

    The same text has the same samples in every format, so pcm tells their number.
    """
    audio_s = {
        name: len(speak(server.port, text, "pcm", headers).body) / _SAMPLE_BYTES / SAMPLE_RATE
        for name, (text, _) in texts.items()
    }
    return {
        audio_format: {
            name: asdict(_measure_one(server, text, audio_format, times, audio_s[name], headers))
            for name, (text, times) in texts.items()
        }
        for audio_format in FORMATS
    }


def _measure_one(
    server: ServerProcess, text: str, audio_format: str, times: int, audio_s: float, headers: dict[str, str]
) -> Speaking:
    cpu = server.cpu_seconds()
    answers = [speak(server.port, text, audio_format, headers) for _ in range(times)]
    total_s = statistics.median(answer.total_s for answer in answers)
    return Speaking(
        first_sound_ms=round(1000 * statistics.median(answer.first_sound_s for answer in answers), 1),
        total_ms=round(1000 * total_s, 1),
        audio_s=round(audio_s, 2),
        real_time_factor=round(total_s / audio_s, 4),
        cpu_per_audio_s=round((server.cpu_seconds() - cpu) / (times * audio_s), 4),
    )


def speak(port: int, text: str, audio_format: str, headers: dict[str, str], *, store: bool = False) -> _Answer:
    """One request over a connection of its own; the clock starts when the request is sent."""
    body = json.dumps({"model": "tts-1", "input": text, "voice": "alloy", "response_format": audio_format})
    if not store:
        headers = {**headers, "Cache-Control": "no-store"}
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=120)
    try:
        connection.connect()
        started = time.perf_counter()
        connection.request("POST", "/v1/audio/speech", body, {**headers, "Content-Type": "application/json"})
        return _read(connection.getresponse(), audio_format, started)
    finally:
        connection.close()


def _read(response: http.client.HTTPResponse, audio_format: str, started: float) -> _Answer:
    if response.status != 200:
        raise RuntimeError(f"{response.status}: {response.read()!r}")
    body, arrivals = bytearray(), []
    while data := response.read1(_READ_BYTES):
        body += data
        arrivals.append((len(body), time.perf_counter() - started))
    offset = sound_offset(audio_format, bytes(body))
    first_sound_s = next(seconds for length, seconds in arrivals if length > offset)
    return _Answer(first_sound_s, time.perf_counter() - started, bytes(body))
