"""Sound leaves while the rest is being made, in every format, and its parts are one stream."""

from __future__ import annotations

import base64
import io
import json
import math
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import get_args

import av
import httpx
import numpy as np
import pytest

from api.src.audio.encoders import open_encoder
from api.src.domain import FRAME_SECONDS, SAMPLE_RATE, AudioFormat
from api.src.speech import generation
from tests.conftest import Server
from tests.speech.textual import TextualBackend, pcm_of, sentences

FORMATS: tuple[AudioFormat, ...] = get_args(AudioFormat)
SENTENCES = 20
SECONDS = 0.4
DELAY_S = 0.12
TEXT = sentences(SENTENCES)
ALLOWED_SHARE = 0.15
PADDING = 3000
"""Samples that lossy encoders may add in front and behind."""


@dataclass
class Arrival:
    """An answer and when its bytes came, in seconds after the request."""

    headers: httpx.Headers
    times: list[float] = field(default_factory=list)
    parts: list[bytes] = field(default_factory=list)

    @property
    def audio(self) -> bytes:
        return b"".join(self.parts)

    def until(self, moment: float) -> bytes:
        return b"".join(part for when, part in zip(self.times, self.parts, strict=True) if when <= moment)


def stream(server: Server, format: AudioFormat, parts: Callable[[httpx.Response], Iterator[bytes]]) -> Arrival:
    body = {"input": TEXT, "response_format": format}
    if parts is event_parts:
        body["stream_format"] = "sse"
    started = time.monotonic()
    with httpx.stream("POST", f"{server.url}/v1/audio/speech", json=body, timeout=60) as response:
        assert response.status_code == 200
        arrival = Arrival(response.headers)
        for part in parts(response):
            arrival.times.append(time.monotonic() - started)
            arrival.parts.append(part)
    return arrival


def raw_parts(response: httpx.Response) -> Iterator[bytes]:
    yield from response.iter_raw()


def event_parts(response: httpx.Response) -> Iterator[bytes]:
    """The sound of each delta, and the done event as it is."""
    for line in response.iter_lines():
        if line.startswith("data: "):
            event = json.loads(line.removeprefix("data: "))
            done = event["type"] == "speech.audio.done"
            yield json.dumps(event).encode() if done else base64.b64decode(event["audio"])


def samples_in(format: AudioFormat, audio: bytes) -> int:
    """Samples at 24 kHz of the one stream in `audio`, of which the end may be missing."""
    if format == "pcm":
        return len(audio) // 2
    count = 0.0
    with av.open(io.BytesIO(audio)) as container:
        assert len(container.streams) == 1
        for frame in container.decode(audio=0):
            assert frame.sample_rate is not None
            count += frame.samples * SAMPLE_RATE / frame.sample_rate
    return round(count)


@pytest.fixture
def server(start_server: Callable[..., Server]) -> Server:
    return start_server(TextualBackend(delay_s=DELAY_S, seconds_per_segment=SECONDS), max_concurrent=len(FORMATS))


def test_sound_comes_early_in_every_format(server: Server) -> None:
    with ThreadPoolExecutor(len(FORMATS)) as pool:  # the fake only sleeps: side by side they do not slow each other
        arrivals = dict(zip(FORMATS, pool.map(lambda format: stream(server, format, raw_parts), FORMATS), strict=True))
    for format, arrival in arrivals.items():
        total = arrival.times[-1]
        assert total > DELAY_S * SENTENCES
        early = arrival.until(ALLOWED_SHARE * total)
        with open_encoder(format) as encoder:
            assert len(early) > len(encoder.header), f"{format}: no sound within {ALLOWED_SHARE:.0%}"
        assert samples_in(format, early) > 0, f"{format}: what came early does not sound"
        halfway = samples_in(format, arrival.until(0.6 * total)) / SAMPLE_RATE
        assert 0.3 * SENTENCES * SECONDS < halfway < 0.75 * SENTENCES * SECONDS, f"{format} does not flow evenly"
    for format, arrival in arrivals.items():
        assert arrival.headers["x-cache"] == "miss"
        expected = round(SENTENCES * SECONDS * SAMPLE_RATE)
        assert 0 <= samples_in(format, arrival.audio) - expected < PADDING, format
    server.wait_idle()


def test_pcm_and_its_containers_are_the_sum_of_the_segments(server: Server) -> None:
    expected = pcm_of(TEXT, int(SECONDS * SAMPLE_RATE))
    lossless: tuple[AudioFormat, ...] = ("pcm", "wav", "flac")
    with ThreadPoolExecutor(3) as pool:
        answers = dict(zip(lossless, pool.map(lambda f: stream(server, f, raw_parts).audio, lossless), strict=True))
    assert answers["pcm"] == expected
    assert answers["wav"][44:] == expected
    with av.open(io.BytesIO(answers["flac"])) as container:
        decoded = np.concatenate([frame.to_ndarray()[0] for frame in container.decode(audio=0)])
    assert decoded.astype("<i2").tobytes() == expected


@pytest.mark.parametrize("format", ["mp3", "pcm"])
def test_events_carry_the_same_bytes_as_early(server: Server, format: AudioFormat) -> None:
    arrival = stream(server, format, event_parts)
    done = json.loads(arrival.parts.pop())
    total = arrival.times.pop()
    assert samples_in(format, arrival.until(ALLOWED_SHARE * total)) > 0
    assert len(arrival.parts) >= SENTENCES
    plain = stream(server, format, raw_parts)
    assert plain.headers["x-cache"] == "hit"
    assert arrival.audio == plain.audio
    frames = math.ceil(SENTENCES * SECONDS / FRAME_SECONDS)
    assert done["usage"] == {"input_tokens": len(TEXT), "output_tokens": frames, "total_tokens": len(TEXT) + frames}


def test_a_text_without_words_is_a_short_silence_in_every_format(server: Server) -> None:
    for format in FORMATS:
        body = {"input": "🙂 … *** !", "response_format": format}
        answer = server.client.post("/v1/audio/speech", json=body)
        assert answer.status_code == 200
        assert samples_in(format, answer.content) >= generation.SILENCE_SECONDS * SAMPLE_RATE
    assert server.backend.spoken == 0
