"""A thousand short requests through the Qwen3-TTS backend, most of which leave at some random moment."""

from __future__ import annotations

import asyncio
import ctypes
import gc
import logging
import os
import random
import sys
import threading
from collections import Counter
from collections.abc import AsyncIterator, Sequence
from contextlib import aclosing
from dataclasses import dataclass

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from api.src.backends import qwen3_speech  # noqa: E402
from api.src.backends.qwen3_tts import Qwen3TTSBackend  # noqa: E402
from api.src.domain import ModelStats, Samples, Segment, SpeechRequest, Voice  # noqa: E402
from api.src.engine import loading, messages  # noqa: E402
from api.src.engine.loading import SpeechModel  # noqa: E402
from api.src.engine.scheduler import Job, Slot  # noqa: E402
from tests.engine.checkpoints import tiny  # noqa: E402

SLOTS = 16
AT_ONCE = 24
"""Half as many again as there are slots, so that some leave while they wait for one."""

WINDOWS, WINDOW = 10, 100
WARM_UP = 4
"""Windows in which allocators and caches may grow to what this load needs."""

MOST_KEPT = 20_000
"""Bytes that a request may leave behind, by the median of the windows after the warm-up. Measured are 0 to 8 kB; a
copy of its sound, left behind on purpose, showed as 35 to 41 kB. The median, because torch keeps what it has prepared
for each shape of a batch, and now and then a new shape comes up: a step of some megabytes, in few of the windows."""

MOST_PREPARED = 25_000_000
"""Bytes of all such steps after the warm-up; measured are up to 13 MB."""

PATIENCE_S = 120
"""For a request that stays, and for cancellations to be seen: a whole window takes 3 s, or 15 on a busy machine."""

MOST_APART = 1e-3
"""Samples that float32 may differ by when batches and chunks are cut otherwise: 3e-5 by the median, 1.03e-4 at most in
a thousand comparisons. Sound of another request, or of another state, is 0.1 and more apart. How exact the engine is,
its own tests say."""

SAMPLE = 40
"""Requests that are also spoken alone."""

WORDS = (
    "a",
    "river",
    "runs",
    "past",
    "the",
    "old",
    "mill",
    "and",
    "two",
    "boats",
    "lie",
    "at",
    "its",
    "bank",
    "in",
    "evening",
)
LANGUAGES = ("auto", "english", "german", "chinese")
LIVING = (Job, Slot, qwen3_speech.Utterance, qwen3_speech.Utterances, messages.Request, messages.Delivery)
"""What must not outlive its request. None of it is large enough to show in the memory of a whole process."""


@dataclass(frozen=True)
class Asked:
    """One request, and when it leaves: after so many chunks, or so many seconds; None to stay to the end."""

    texts: tuple[str, ...]
    voice: str
    language: str
    seed: int
    chunks: int | None = None
    seconds: float | None = None

    @property
    def stays(self) -> bool:
        return self.chunks is None and self.seconds is None


def asked(chance: random.Random, voices: Sequence[str]) -> Asked:
    texts = tuple(" ".join(chance.choices(WORDS, k=chance.randint(1, 4))) for _ in range(chance.choice((1, 1, 2))))
    known = (texts, chance.choice(voices), chance.choice(LANGUAGES), chance.randrange(2**32))
    leaves = chance.random()
    if leaves < 0.35:
        return Asked(*known)
    if leaves < 0.6:
        return Asked(*known, chunks=chance.randint(1, 3))
    return Asked(*known, seconds=chance.choice((0.0, 0.01, 0.1, 0.5)) * chance.random())


class House:
    """The backend on the tiny checkpoint, and what its engine holds."""

    def __init__(self) -> None:
        self.backend = Qwen3TTSBackend(models=[str(tiny("custom_voice"))], slots=SLOTS)

    @property
    def voices(self) -> dict[str, Voice]:
        return {voice.id: voice for voice in self.backend.models[0].voices}

    @property
    def stats(self) -> ModelStats:
        (stats,) = self.backend.stats().values()
        return stats

    @property
    def model(self) -> SpeechModel:
        (model,) = self.backend._models.values()
        loaded = model._loaded()
        assert loaded is not None
        return loaded

    async def speak(self, asked: Asked) -> Samples | None:
        """The whole sound; None if it left before the end."""
        task = asyncio.create_task(self._listen(asked))
        try:
            async with asyncio.timeout(PATIENCE_S if asked.seconds is None else asked.seconds):
                return await task
        except TimeoutError:
            if asked.seconds is None:
                raise
            return None

    async def _listen(self, asked: Asked) -> Samples | None:
        request = SpeechRequest(
            "req", "soak", self.backend.models[0].id, "", asked.voice, language=asked.language, seed=asked.seed
        )
        sound: list[Samples] = []
        async with aclosing(self.backend.speak(request, self.voices[asked.voice], _segments(asked.texts))) as chunks:
            async for chunk in chunks:
                sound.append(chunk.samples)
                if len(sound) == asked.chunks:
                    return None
        return np.concatenate(sound)

    async def idle(self) -> None:
        """Wait until the engine's thread has seen the last cancellation."""
        async with asyncio.timeout(PATIENCE_S):
            while self.stats.active or self.stats.waiting:  # noqa: ASYNC110 (a thread's doing)
                await asyncio.sleep(0.005)

    def assert_empty(self) -> None:
        """Every slot is free, and there is one of each."""
        assert (self.stats.active, self.stats.paused, self.stats.waiting) == (0, 0, 0)
        stepper = self.model.engine._stepper
        assert sorted(stepper.scheduler._free) == list(range(SLOTS))
        assert not stepper.jobs
        assert not stepper._runner._slots.streams
        assert not stepper._runner._pads


async def _segments(texts: Sequence[str]) -> AsyncIterator[Segment]:
    for number, text in enumerate(texts):
        yield Segment(text, number, number + 1, final=number == len(texts) - 1)


def resident() -> int:
    """Bytes of memory that this process holds, without what its allocator could give back at once."""
    gc.collect()
    if trim := getattr(ctypes.CDLL(None), "malloc_trim", None):  # glibc's
        trim(0)
    with open("/proc/self/statm") as statm:
        return int(statm.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def own_threads() -> set[threading.Thread]:
    """Those of this process but for tqdm's, which starts with the first bar that is shown and never ends."""
    return {thread for thread in threading.enumerate() if thread.name != "tqdm_monitor"}


def living() -> Counter[str]:
    gc.collect()
    return Counter(type(thing).__name__ for thing in gc.get_objects() if type(thing) in LIVING)


def apart(one: Samples, other: Samples) -> float:
    """By how much samples differ at most; infinite if one sound is longer."""
    return float(np.abs(one - other).max()) if one.shape == other.shape else float("inf")


async def soak(house: House, requests: Sequence[Asked], alone: dict[int, Samples]) -> tuple[list[int], Counter[str]]:
    """Ask for everything, in windows; returns the memory after each, and how the requests ended."""
    turns = asyncio.Semaphore(AT_ONCE)
    memory, ended = [], Counter[str]()

    async def one(number: int) -> None:
        async with turns:
            sound = await house.speak(requests[number])
        ended["left" if sound is None else "heard"] += 1
        assert sound is not None or not requests[number].stays
        if number in alone:
            assert sound is not None
            assert apart(sound, alone[number]) < MOST_APART, f"request {number} has a sound of its own only alone"

    for start in range(0, len(requests), WINDOW):
        await asyncio.gather(*(one(number) for number in range(start, start + WINDOW)))
        await house.idle()
        house.assert_empty()
        memory.append(resident())
    return memory, ended


async def full_batch(house: House, request: Asked) -> None:
    """As many at once as there are slots: all are spoken at once, and alike."""
    speaking = asyncio.gather(*(house.speak(request) for _ in range(SLOTS)))
    most = 0
    while not speaking.done():
        most = max(most, house.stats.active)
        await asyncio.sleep(0.001)
    first, *others = await speaking
    assert most == SLOTS
    assert max(apart(first, other) for other in others) < MOST_APART


async def live(house: House) -> tuple[list[int], Counter[str]]:
    chance = random.Random(4)
    await house.backend.start()
    try:
        requests = [asked(chance, sorted(house.voices)) for _ in range(WINDOWS * WINDOW)]
        staying = [number for number, request in enumerate(requests) if request.stays]
        sample = chance.sample(staying, SAMPLE)
        alone = {number: await house.speak(requests[number]) for number in sample}
        memory, ended = await soak(house, requests, alone)
        kept = living()
        assert max(kept.values(), default=0) <= 1, kept  # the engine's thread may still name the last one
        await full_batch(house, requests[sample[0]])
        finished = house.stats.finished
        assert min(finished[reason] for reason in ("stop", "length", "cancelled")) >= 20, finished
        assert not finished["error"] + finished["deadline"] + finished["stuck"], finished
    finally:
        await house.backend.stop()
    return memory, ended


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_a_soak_of_a_thousand_requests_leaves_nothing(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.ERROR)  # what pytest keeps of a log takes memory
    monkeypatch.setattr(loading, "usable_cores", lambda: 1)  # the tiny model's steps are too small to share
    monkeypatch.setattr(qwen3_speech, "FEWEST_FRAMES", 4)  # for the random model seldom ends by itself
    monkeypatch.setattr(qwen3_speech, "FRAMES_PER_LETTER", 0.5)
    threads = own_threads()
    memory, ended = asyncio.run(live(House()))
    assert own_threads() == threads
    print(f"\n{dict(ended)}, resident: {[f'{size / 1e6:.1f} MB' for size in memory]}")
    assert min(ended["heard"], ended["left"]) > 300
    flat = memory[WARM_UP:]
    assert np.median(np.diff(flat)) < MOST_KEPT * WINDOW
    assert flat[-1] - flat[0] < MOST_PREPARED
