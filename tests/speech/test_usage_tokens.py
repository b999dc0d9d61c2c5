"""Output tokens are the frames that the backend made, however they were spoken on and whoever hears them."""

from __future__ import annotations

import asyncio
import json
import math
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from contextlib import aclosing, closing
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest

from api.src.domain import AudioChunk, Segment, SpeechRequest, Voice
from tests.conftest import Server
from tests.fakes import FakeBackend
from tests.speech.asking import StartService, collect, eventually, speech_request
from tests.speech.textual import sentences

FRAMES = (1, 7, 16, 3)
"""Of the chunks of each segment."""


@dataclass
class FrameBackend(FakeBackend):
    """Speaks FRAMES for each segment in chunks of whole frames, as the engine delivers them; `allowed` counts these.

    `odd` samples more in each chunk: as a voice that knows no frames.
    """

    sample_rate: int = 24_000
    odd: int = 0

    async def speak(
        self, request: SpeechRequest, voice: Voice, segments: AsyncIterator[Segment]
    ) -> AsyncGenerator[AudioChunk, None]:
        self.spoken += 1
        number = 0
        async for segment in segments:
            for frames in FRAMES:
                number += 1
                await self.turn(number)
                samples = frames * self.sample_rate * 2 // 25 + self.odd
                self.segments.append(segment)
                yield AudioChunk(np.full(samples, 0.1, np.float32), self.sample_rate, segment)


def done(server: Server, text: str, **fields: Any) -> tuple[str, dict[str, int]]:
    """The answer's cache status, and the usage that its last event reports."""
    answer = server.client.post("/v1/audio/speech", json={"input": text, "stream_format": "sse", **fields})
    assert answer.status_code == 200, answer.text
    last = json.loads(answer.text.rstrip().rpartition("data: ")[2])
    assert last["type"] == "speech.audio.done"
    return answer.headers["x-cache"], last["usage"]


@pytest.mark.parametrize("speed", [0.25, 0.7, 1.0, 4.0])
@pytest.mark.parametrize("format", ["mp3", "pcm"])
def test_the_speed_changes_nothing_for_a_miss_or_a_hit(
    start_server: Callable[..., Server], speed: float, format: str
) -> None:
    server = start_server(FrameBackend())
    text, frames = sentences(3), 3 * sum(FRAMES)
    expected = {"input_tokens": len(text), "output_tokens": frames, "total_tokens": len(text) + frames}
    assert done(server, text, speed=speed, response_format=format) == ("miss", expected)
    assert done(server, text, speed=speed, response_format=format) == ("hit", expected)


def test_a_hit_in_another_process_knows_the_frames(start_server: Callable[..., Server]) -> None:
    """From the record on the disk."""
    assert done(start_server(FrameBackend()), sentences(2), speed=2.0)[0] == "miss"
    status, usage = done(start_server(FrameBackend()), sentences(2), speed=2.0)
    assert (status, usage["output_tokens"]) == ("hit", 2 * sum(FRAMES))


@pytest.mark.parametrize(("sample_rate", "odd"), [(22_050, 0), (22_050, 1), (16_000, 700), (24_000, 1919)])
def test_sound_without_frames_is_counted_in_their_length_rounded_up_once(
    start_server: Callable[..., Server], sample_rate: int, odd: int
) -> None:
    server = start_server(FrameBackend(sample_rate=sample_rate, odd=odd))
    samples = sum(2 * (frames * sample_rate * 2 // 25 + odd) for frames in FRAMES)
    assert done(server, sentences(2), speed=1.5)[1]["output_tokens"] == -(-samples * 25 // (sample_rate * 2))


def test_what_nobody_speaks_has_no_frames(start_server: Callable[..., Server]) -> None:
    """A silence of the service's own is heard of it."""
    server = start_server(FrameBackend())
    for status in ("miss", "hit"):
        assert done(server, "* * *") == (status, {"input_tokens": 5, "output_tokens": 0, "total_tokens": 5})
    assert server.backend.spoken == 0


async def test_who_joins_is_told_the_same(start_service: StartService) -> None:
    backend = FrameBackend(allowed=1)
    service = await start_service(backend)
    with closing(service.open(speech_request(sentences(3)))) as first:
        await first.start()
        with closing(service.open(speech_request(sentences(3)))) as second:
            await second.start()
            backend.allowed = math.inf
            await asyncio.gather(first.whole(), second.whole())
            assert (first.cache_status, second.cache_status) == ("miss", "join")
            assert first.usage == second.usage
            assert second.usage.output_tokens == 3 * sum(FRAMES)
    assert backend.spoken == 1


@pytest.mark.parametrize("store", [True, False])
async def test_a_cancelled_answer_has_what_was_made(start_service: StartService, store: bool) -> None:
    backend = FrameBackend(allowed=6)
    service = await start_service(backend)
    with closing(service.open(speech_request(sentences(3), speed=2.0, store=store))) as listener:
        await listener.start()
        async with aclosing(listener.chunks()) as chunks:
            await anext(chunks)
            await eventually(lambda: len(backend.segments) == 6)
    await eventually(lambda: not service._running)
    assert len(backend.segments) == 6
    assert listener.usage.output_tokens == sum((FRAMES * 3)[:6])


async def test_before_there_is_a_source_there_are_no_frames(start_service: StartService) -> None:
    service = await start_service(FrameBackend())
    with closing(service.open(speech_request("Hello."))) as listener:
        assert listener.usage.output_tokens == 0
    assert await collect(service, speech_request("Hello."))
