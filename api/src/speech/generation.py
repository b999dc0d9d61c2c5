"""A run of the backend, which listeners listen to while it goes on.

A Generation owns the permit, the encoder, the cache writer and the backend's generator, and runs in a task
of the service, not of a request. It stops when its last listener has left; its failure reaches every
listener and caches nothing.
"""

from __future__ import annotations

import asyncio
import hashlib
import logging
import math
import time
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Sequence
from contextlib import ExitStack, aclosing
from fractions import Fraction
from functools import partial

import numpy as np

from ..audio.encoders import open_encoder
from ..backends.base import Backend
from ..domain import FRAME_SECONDS, SAMPLE_RATE, AudioChunk, Segment
from ..errors import SpeechError, SynthesisFailed, TimedOut
from ..observe import NO_SPAN, Metrics, Span, detail, span
from ..stores.cache import CacheWriter, EntryMeta, EntryReader, SpeechCache
from .admission import Permit
from .recording import Mark, Recording, Relay
from .source import READ_SIZE, Script
from .threads import Threads

RELAY_SIZE = 256 * 1024
"""Bytes that an unstored generation may be ahead of its listener before it pauses."""

SILENCE_SECONDS = 0.25
"""Length of the answer to a text in which nothing can be spoken."""

_STOPPED = "The speech was stopped."
_log = logging.getLogger(__name__)


class Generation:
    """One run of the backend for one script.

    `on_leave` is called when the last listener has left, so that nobody new joins; `on_end` once the run is
    over. `progress_timeout_s` bounds the wait for the backend's next chunk.
    """

    def __init__(
        self,
        script: Script,
        *,
        backend: Backend,
        cache: SpeechCache,
        permit: Permit,
        threads: Threads,
        metrics: Metrics,
        progress_timeout_s: float,
        on_leave: Callable[[Generation], None],
        on_end: Callable[[Generation], None],
    ) -> None:
        self.script = script
        self._backend = backend
        self._cache = cache
        self._permit = permit
        self._threads = threads
        self._metrics = metrics
        self._progress_timeout_s = progress_timeout_s
        self._on_leave = on_leave
        self._on_end = on_end
        self._listeners = 0
        self._task: asyncio.Task[None] | None = None
        self._recording: Recording | None = None
        self._sink: CacheWriter | Relay | None = None
        self._reader: EntryReader | Relay | None = None
        self._length = 0
        self._done = False
        self._error: SpeechError | None = None
        self._changed = asyncio.Event()
        self._begun = time.perf_counter()
        self._made = Fraction()  # seconds of sound, by the backend's own rate
        self._paused = 0.0
        self._span: Span = NO_SPAN
        self.audio_ms = 0
        self.length = None
        self.in_memory = False
        self.spoken_for = script.request.id

    # --- what listeners use ---

    @property
    def marks(self) -> Sequence[Mark]:
        return self._recording.marks if self._recording else ()

    @property
    def frames(self) -> int:
        return math.ceil(self._made / FRAME_SECONDS)

    def attach(self) -> None:
        self._listeners += 1

    def detach(self) -> None:
        """A listener leaves; the last one stops the run."""
        self._listeners -= 1
        if self._listeners == 0:
            self.stop()
            self._forget()

    async def sounding(self) -> None:
        if self._task is None:
            self._task = asyncio.create_task(self._run(), name=f"generation {self.script.request.id}")
            self._task.add_done_callback(self._on_done)
        await self._moved(lambda: self._length > 0)

    async def read(self, offset: int) -> tuple[bytes, bool]:
        await self._moved(lambda: self._length > offset)
        size = min(READ_SIZE, self._length - offset)
        data = await self._read_some(offset, size) if size > 0 else b""
        return data, self._done and offset + len(data) == self._length

    # --- what the service uses ---

    def stop(self) -> None:
        """End the run at once, if it still runs; nobody may join any more."""
        self._on_leave(self)
        if self._task is None:
            self._end(SynthesisFailed(_STOPPED))
        else:
            self._task.cancel()

    async def ended(self) -> None:
        """Wait until everything borrowed has been given back."""
        if self._task is not None:
            await asyncio.wait([self._task])

    # --- the run ---

    async def _run(self) -> None:
        with self._permit:
            with span("admission"):
                await self._permit.granted()
            self._begun = time.perf_counter()
            waited = self._permit.waited_seconds or 0.0
            self._metrics.queue_wait.observe(waited)
            detail(_log, "permit granted", waited_ms=_ms(waited))
            script = self.script
            with span(
                "generation",
                backend=script.request.backend,
                model=script.request.model,
                segments=len(script.segments),
                characters=len(script.request.text),
            ) as self._span:
                await self._record()
                self._span.set(audio_ms=self.audio_ms, frames=self.frames)

    def _on_done(self, task: asyncio.Task[None]) -> None:
        # A callback rather than a `finally`: a task cancelled before its first step runs none of its body.
        # Cancelled once it was done, it was only tidying up.
        failure = task.exception() if not task.cancelled() else None if self._done else SynthesisFailed(_STOPPED)
        if failure is not None and not isinstance(failure, SpeechError):
            _log.error("generation failed", exc_info=failure)
            failure = SynthesisFailed("The speech could not be generated.")
        outcome = "completed" if failure is None else "stopped" if task.cancelled() else "failed"
        self._metrics.generations.labels(outcome).inc()
        self._leave_record(outcome, failure)
        self._end(failure)

    def _leave_record(self, outcome: str, failure: SpeechError | None) -> None:
        """One log line; `ms` is counted from the permit on."""
        fields: dict[str, object] = {
            "outcome": outcome,
            "model": self.script.request.model,
            "segments": len(self.script.segments),
            "audio_ms": self.audio_ms,
            "frames": self.frames,
            "ms": self._ms,
        }
        if outcome == "failed" and failure is not None:
            # Of what the model did wrong, our own words; of all else the code: a message may quote the client.
            fields["reason"] = failure.message if isinstance(failure, SynthesisFailed) else failure.code
        _log.info("generation", extra={"fields": fields})

    async def _record(self) -> None:
        """Speak into a recording; whatever happens, encoder and temp file are given back."""
        stack = await self._threads.run(self._open_recording, undo=ExitStack.close)
        detail(_log, "recording opened", stored=self.script.key is not None)
        try:
            if self.script.segments:
                await self._speak()
            if not self._require_recording().samples:
                await self._take(_silence(len(self.script.request.text)))
            await self._finish()
        finally:
            await self._threads.run(stack.close)

    async def _speak(self) -> None:
        script = self.script
        speech = self._backend.speak(script.request, script.voice, _stream(script.segments))
        async with aclosing(speech) as chunks:
            segment = None
            while (chunk := await self._next(chunks)) is not None:
                if chunk.segment is not segment:
                    segment = chunk.segment
                    detail(
                        _log, "a segment sounds", start=segment.start, end=segment.end, ms=self._ms, frames=self.frames
                    )
                self._made += Fraction(len(chunk.samples), chunk.sample_rate)
                await self._take(chunk)
                await self._room()

    def _open_recording(self) -> ExitStack:
        request, key = self.script.request, self.script.key
        with ExitStack() as stack:
            sink = Relay() if key is None else stack.enter_context(self._cache.writer(key, request.format))
            encoder = stack.enter_context(open_encoder(request.format, request.speed))
            self._reader = sink if isinstance(sink, Relay) else sink.open()
            self._sink, self._recording = sink, Recording(encoder, sink)
            return stack.pop_all()

    async def _next(self, chunks: AsyncGenerator[AudioChunk, None]) -> AudioChunk | None:
        try:
            async with asyncio.timeout(self._progress_timeout_s):
                return await anext(chunks, None)
        except TimeoutError:
            raise TimedOut("The speech made no progress.") from None

    async def _take(self, chunk: AudioChunk) -> None:
        recording = self._require_recording()
        await self._threads.run(partial(recording.take, chunk))
        self._publish()

    async def _room(self) -> None:
        """Pause while the listener of an unstored generation is far behind."""
        began = time.perf_counter()
        while isinstance(self._sink, Relay) and self._sink.buffered > RELAY_SIZE:
            await self._changed.wait()
        self._paused += time.perf_counter() - began

    async def _finish(self) -> None:
        recording = self._require_recording()
        await self._threads.run(partial(recording.finish, len(self.script.request.text)))
        if isinstance(self._sink, CacheWriter):
            await self._threads.run(partial(self._commit, self._sink))
        detail(
            _log, "recording finished", ms=self._ms, bytes=recording.length, stored=isinstance(self._sink, CacheWriter)
        )
        self._metrics.audio_seconds.inc(recording.audio_ms / 1000)
        if self._made:
            took = time.perf_counter() - self._begun - self._paused
            self._metrics.real_time_factor.observe(took / float(self._made))
        self._done = True
        self._publish()

    def _commit(self, sink: CacheWriter) -> None:
        """Keep the entry if the disk lets us: the listeners have their sound either way."""
        request = self.script.request
        meta = EntryMeta(
            model=request.model,
            voice=self.script.voice.id,
            audio_samples=self._require_recording().samples,
            frames=self.frames,
            text_digest=hashlib.sha256(request.text.encode()).hexdigest(),
            marks=tuple(self.marks),
        )
        try:
            sink.commit(meta)
        except (OSError, ValueError):
            _log.exception("cache commit failed")

    @property
    def _ms(self) -> float:
        """Since the permit was granted."""
        return _ms(time.perf_counter() - self._begun)

    # --- telling the listeners ---

    def _require_recording(self) -> Recording:
        assert self._recording is not None
        return self._recording

    def _publish(self) -> None:
        recording = self._require_recording()
        if recording.length and not self._length:
            self._span.event("first sound")
        self._length, self.audio_ms = recording.length, recording.audio_ms
        self._wake()

    def _end(self, error: SpeechError | None) -> None:
        self._error = error
        self._permit.release()
        self._on_end(self)
        self._wake()
        self._forget()

    def _forget(self) -> None:
        """Close the reader once the run is over and nobody listens any more."""
        over = self._task is None or self._task.done()
        if over and self._listeners == 0 and self._reader is not None:
            self._reader.close()
            self._reader = None

    def _wake(self) -> None:
        self._changed.set()
        self._changed = asyncio.Event()

    async def _moved(self, enough: Callable[[], bool]) -> None:
        """Wait until `enough` or done; raise the error that ended the run."""
        while not enough() and not self._done:
            if self._error is not None:
                raise self._error
            await self._changed.wait()

    async def _read_some(self, offset: int, size: int) -> bytes:
        if self._reader is None:
            raise SynthesisFailed(_STOPPED)
        if isinstance(self._reader, Relay):
            data = self._reader.read(offset, size)
            self._wake()
            return data
        return await self._threads.run(partial(self._reader.read, offset, size))


def _ms(seconds: float) -> float:
    return round(seconds * 1000, 1)


async def _stream(segments: Sequence[Segment]) -> AsyncIterator[Segment]:
    for segment in segments:
        yield segment


def _silence(characters: int) -> AudioChunk:
    """What is heard of a text in which nothing can be spoken: never an empty file."""
    samples = np.zeros(int(SILENCE_SECONDS * SAMPLE_RATE), dtype=np.float32)
    return AudioChunk(samples, SAMPLE_RATE, Segment("", 0, characters, final=True))
