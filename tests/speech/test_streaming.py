"""Sound leaves while the rest is being made, in every format, and its parts are one stream."""

from __future__ import annotations

import base64
import io
import json
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
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
TEXT = sentences(SENTENCES)
EARLY, HALFWAY = 3, 12
"""Segments after which there must be sound, and after which about so much of it."""
PADDING = 3000
"""Samples that lossy encoders may add in front and behind."""


@dataclass
class Answer:
    """An answer that is read as far as one likes."""

    format: AudioFormat
    headers: httpx.Headers
    rest: Iterator[bytes]
    parts: list[bytes] = field(default_factory=list)

    @property
    def audio(self) -> bytes:
        return b"".join(self.parts)

    def read_until(self, seconds: float) -> float:
        """Read until more than so much sounds; returns how much does, at least. It hangs where that does not come."""
        while (heard := samples_in(self.format, self.audio) / SAMPLE_RATE if self.parts else 0.0) <= seconds:
            self.parts.append(next(self.rest))
        return heard

    def read_all(self) -> bytes:
        self.parts += self.rest
        return self.audio


@contextmanager
def stream(server: Server, format: AudioFormat, parts: Callable[[httpx.Response], Iterator[bytes]]) -> Iterator[Answer]:
    body = {"input": TEXT, "response_format": format}
    if parts is event_parts:
        body["stream_format"] = "sse"
    with httpx.stream("POST", f"{server.url}/v1/audio/speech", json=body, timeout=60) as response:
        assert response.status_code == 200
        yield Answer(format, response.headers, parts(response))


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
    """Samples at 24 kHz of the one stream in `audio`, of which the end may be missing, in the middle of a frame too."""
    if format == "pcm":
        return len(audio) // 2
    with open_encoder(format) as encoder:
        if len(audio) <= len(encoder.header):
            return 0
    count = 0.0
    with av.open(io.BytesIO(audio)) as container, suppress(av.error.InvalidDataError):
        assert len(container.streams) == 1
        for frame in container.decode(audio=0):
            assert frame.sample_rate is not None
            count += frame.samples * SAMPLE_RATE / frame.sample_rate
    return round(count)


@pytest.fixture
def server(start_server: Callable[..., Server]) -> Server:
    return start_server(TextualBackend(seconds_per_segment=SECONDS))


@pytest.mark.timeout(60)
@pytest.mark.parametrize("format", FORMATS)
def test_sound_comes_early_and_evenly(server: Server, format: AudioFormat) -> None:
    """The voice goes on only when what it has spoken was heard: whoever kept it back would be waited for in vain."""
    server.backend.allowed = EARLY
    with stream(server, format, raw_parts) as answer:
        assert answer.headers["x-cache"] == "miss"
        assert answer.read_until(0.0) <= EARLY * SECONDS + PADDING / SAMPLE_RATE
        server.backend.allowed = HALFWAY
        assert answer.read_until(0.5 * HALFWAY * SECONDS) <= HALFWAY * SECONDS + PADDING / SAMPLE_RATE
        server.backend.allowed = math.inf
        answer.read_all()
    assert 0 <= samples_in(format, answer.audio) - round(SENTENCES * SECONDS * SAMPLE_RATE) < PADDING
    server.wait_idle()


def test_pcm_and_its_containers_are_the_sum_of_the_segments(server: Server) -> None:
    expected = pcm_of(TEXT, int(SECONDS * SAMPLE_RATE))
    lossless: tuple[AudioFormat, ...] = ("pcm", "wav", "flac")
    answers = {}
    for format in lossless:
        with stream(server, format, raw_parts) as answer:
            answers[format] = answer.read_all()
    assert answers["pcm"] == expected
    assert answers["wav"][44:] == expected
    with av.open(io.BytesIO(answers["flac"])) as container:
        decoded = np.concatenate([frame.to_ndarray()[0] for frame in container.decode(audio=0)])
    assert decoded.astype("<i2").tobytes() == expected


@pytest.mark.parametrize("format", ["mp3", "pcm"])
def test_events_carry_the_same_bytes_as_early(server: Server, format: AudioFormat) -> None:
    server.backend.allowed = EARLY
    with stream(server, format, event_parts) as answer:
        answer.read_until(0.0)
        server.backend.allowed = math.inf
        answer.read_all()
    done = json.loads(answer.parts.pop())
    assert len(answer.parts) > 1
    with stream(server, format, raw_parts) as plain:
        assert plain.headers["x-cache"] == "hit"
        assert answer.audio == plain.read_all()
    frames = math.ceil(SENTENCES * SECONDS / FRAME_SECONDS)
    assert done["usage"] == {"input_tokens": len(TEXT), "output_tokens": frames, "total_tokens": len(TEXT) + frames}


def test_a_text_without_words_is_a_short_silence_in_every_format(server: Server) -> None:
    for format in FORMATS:
        body = {"input": "🙂 … *** !", "response_format": format}
        answer = server.client.post("/v1/audio/speech", json=body)
        assert answer.status_code == 200
        assert samples_in(format, answer.content) >= generation.SILENCE_SECONDS * SAMPLE_RATE
    assert server.backend.spoken == 0
