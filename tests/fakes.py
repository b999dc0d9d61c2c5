"""A backend in some fifty lines: sine waves instead of speech, with faults, delays and halts on demand."""

from __future__ import annotations

import asyncio
import math
from collections.abc import AsyncGenerator, AsyncIterator, Mapping
from dataclasses import dataclass, field

import numpy as np

from api.src.backends.base import never
from api.src.domain import SAMPLE_RATE, AudioChunk, Model, ModelStats, Readiness, Segment, SpeechRequest, Voice
from api.src.errors import NotReady

OPENAI_VOICES = (
    "alloy ash ballad coral echo fable onyx nova sage shimmer verse marin cedar".split()  # noqa: SIM905
)


@dataclass
class FakeBackend:
    """Speaks `seconds_per_segment` of a tone for each segment, `delay_s` after it was asked for it.

    Of each run it speaks `allowed` segments, and then waits until a test sets it to more: so a test sees what there is
    in the middle of a run for as long as it likes, however slow the machine. A segment whose text holds "FAIL" raises.
    `spoken` counts runs, `open` those that have not ended. `engines` is what `stats` answers.
    """

    delay_s: float = 0.0
    allowed: float = math.inf
    seconds_per_segment: float = 0.4
    ready: bool = True
    name: str = "fake"
    spoken: int = 0
    open: int = 0
    segments: list[Segment] = field(default_factory=list)
    engines: dict[str, ModelStats] = field(default_factory=dict)

    @property
    def models(self) -> list[Model]:
        voices = [Voice("tone", "Tone", "english", "tone-1"), Voice("hum", "Hum", "german", "hum-1")]
        aliases = {name: ("hum" if name == "nova" else "tone") for name in OPENAI_VOICES}
        return [Model("fake-1", voices, aliases, ["english", "german"], "1")]

    def readiness(self) -> Readiness:
        return Readiness(self.ready, "ready" if self.ready else "loading", "" if self.ready else "still loading")

    async def start(self) -> None:
        self.ready = True

    async def died(self) -> NotReady:
        return await never()

    async def stop(self) -> None:
        self.ready = False

    def text_tokens(self, request: SpeechRequest) -> int | None:
        return None

    def stats(self) -> Mapping[str, ModelStats]:
        return self.engines

    def breakers(self) -> Mapping[str, str]:
        return {}

    async def speak(
        self, request: SpeechRequest, voice: Voice, segments: AsyncIterator[Segment]
    ) -> AsyncGenerator[AudioChunk, None]:
        self.spoken += 1
        self.open += 1
        number = 0
        try:
            async for segment in segments:
                number += 1
                await self.turn(number)
                if "FAIL" in segment.text:
                    raise RuntimeError("planted failure")
                self.segments.append(segment)
                yield AudioChunk(self.sound(segment, voice, request.seed), SAMPLE_RATE, segment)
        finally:
            self.open -= 1

    async def turn(self, number: int) -> None:
        """Wait until a run may speak its segment of this number, counted from 1."""
        await asyncio.sleep(self.delay_s)
        while number > self.allowed:  # noqa: ASYNC110 (a test in another thread sets it)
            await asyncio.sleep(0.002)

    def sound(self, segment: Segment, voice: Voice, seed: int) -> np.ndarray:
        """The samples of one segment."""
        return self.tone(voice, seed)

    def tone(self, voice: Voice, seed: int) -> np.ndarray:
        hertz = (220.0 if voice.id == "tone" else 330.0) + seed % 100
        times = np.arange(int(self.seconds_per_segment * SAMPLE_RATE)) / SAMPLE_RATE
        return (0.3 * np.sin(2 * np.pi * hertz * times)).astype(np.float32)
