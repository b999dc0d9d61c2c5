"""Qwen3-TTS: the engine's thread on one side, asyncio on the other.

Owns the crossing between the two, and how a request's segments become the engine's requests. The model is
`engine`'s; what a checkpoint can serve is `qwen3_checkpoint`'s.
"""

from __future__ import annotations

import asyncio
import hashlib
import logging
import math
import unicodedata
from collections.abc import AsyncGenerator, AsyncIterator
from pathlib import Path

import numpy as np
import torch

from ..domain import AudioChunk, Capabilities, Readiness, Segment, SpeechRequest, Voice
from ..engine.config import ModelConfig
from ..engine.engine import Engine, Ticket
from ..engine.errors import EngineError
from ..engine.loading import SpeechModel, load_model
from ..engine.messages import Delivery, EngineStopped, FinishReason, Limits, Request
from ..engine.prompt import Prompt, Reference
from ..errors import NotReady, ShuttingDown, SynthesisFailed
from . import qwen3_checkpoint

logger = logging.getLogger(__name__)

POSITIONS = 1024
"""Of a slot: prompt rows and frames together. The longest segment's budget is 675 frames, a minute of them 750."""

FRAMES_PER_LETTER = 2.5
"""A letter takes 0.8 frames at a usual pace of speech (15 letters a second): three times that."""

FEWEST_FRAMES = 50
"""Four seconds, so that a single word may be said slowly."""

LONG_CHARACTER = 3
"""How many letters an ideograph, a kana, a Hangul syllable or a digit takes as long to say as, at most."""

DESCRIPTION = "A clear, warm and natural voice."
"""For a designed voice that nobody described: without any, each request would have a voice of chance."""

WARM_UP = Segment("Ready.", 0, 6, final=True)
WARM_UP_FRAMES = 8
STOP_S = 30.0


class Qwen3TTSBackend:
    """Implements `Backend` with a Qwen3-TTS 12 Hz checkpoint: CustomVoice, or VoiceDesign.

    `model`: its folder. `slots`: segments that are spoken at once. `dtype`: of the language model, "float32" or
    "bfloat16"; None for float32 on a CPU and bfloat16 elsewhere.
    """

    name = "qwen3"

    def __init__(self, *, model: str, slots: int, device: str = "cpu", dtype: str | None = None) -> None:
        self._folder, self._slots, self._device = Path(model), slots, device
        self._dtype = dtype or ("float32" if device == "cpu" else "bfloat16")
        self._phase = Readiness(False, "starting")
        self._capabilities = Capabilities((), (), {}, (), "")
        self._model: SpeechModel | None = None

    @property
    def capabilities(self) -> Capabilities:
        return self._capabilities

    def readiness(self) -> Readiness:
        if self._phase.ready and not (self._model and self._model.engine.running):
            return Readiness(False, "failed", "The engine has ended. See the log.")
        return self._phase

    async def start(self) -> None:
        """Load the checkpoint and speak once; raises NotReady when it cannot be used."""
        self._phase = Readiness(False, "loading")
        try:
            model, self._capabilities = await asyncio.to_thread(self._load)
            self._model = model
            self._phase = Readiness(False, "warming up")
            await self._warm_up(model)
        except (EngineError, SynthesisFailed) as error:
            raise self._failed(str(error)) from error
        except (MemoryError, torch.OutOfMemoryError) as error:
            raise self._failed(f"There is not enough memory for {self._folder.name}.") from error
        except Exception as error:  # a driver's, a disk's
            raise self._failed(f"{self._folder.name} cannot be used on {self._device}: {error}") from error
        self._phase = Readiness(True, "ready")

    async def stop(self) -> None:
        """End the engine's thread; running `speak` calls raise ShuttingDown."""
        self._phase = Readiness(False, "stopped")
        if self._model is not None and not await asyncio.to_thread(self._model.engine.stop, STOP_S):
            logger.error("the engine's thread did not end within %s s", STOP_S)
        self._model = None

    def text_tokens(self, text: str) -> int | None:
        return len(self._model.tokenizer.ids(text)) if self._model else None

    async def speak(
        self, request: SpeechRequest, voice: Voice, segments: AsyncIterator[Segment]
    ) -> AsyncGenerator[AudioChunk, None]:
        """Yield each segment's sound as it is made. The next segment is spoken while the last is consumed.

        Raises SynthesisFailed, NotReady, ShuttingDown.
        """
        if self._model is None:
            raise NotReady("The server is not ready.")
        utterances = Utterances(self._model, request, voice, segments)
        following = asyncio.create_task(utterances.begin())
        try:
            while (utterance := await following) is not None:
                following = asyncio.create_task(utterances.begin())
                while (chunk := await utterance.chunk()) is not None:
                    yield chunk
                if utterance.reason == "length":
                    logger.warning("a segment of %d characters has used up its frames", len(utterance.segment.text))
        finally:
            following.cancel()
            await asyncio.gather(following, return_exceptions=True)
            utterances.cancel()

    def _load(self) -> tuple[SpeechModel, Capabilities]:
        config = ModelConfig.read(self._folder)
        served = qwen3_checkpoint.capabilities(config, qwen3_checkpoint.identity(self._folder, self._dtype))
        if not served.voices:
            raise EngineError(f"{served.models[0]} only clones voices, and has none of its own to speak with.")
        limits = Limits(
            slots=self._slots,
            codec_frames=max(64, self._slots),
            outbox_frames=POSITIONS,  # a slow reader costs 8 MB at most, but never holds a slot
        )
        model = load_model(
            self._folder,
            slots=self._slots,
            device=self._device,
            dtype=getattr(torch, self._dtype),
            positions=POSITIONS,
            limits=limits,
        )
        return model, served

    async def _warm_up(self, model: SpeechModel) -> None:
        model.engine.start()
        prompt = _prompt(WARM_UP, self._capabilities.voices[0])
        utterance = Utterance(model, model.request(prompt, model.sampling(0), WARM_UP_FRAMES), WARM_UP)
        while await utterance.chunk() is not None:
            pass

    def _failed(self, reason: str) -> NotReady:
        self._phase = Readiness(False, "failed", reason)
        return NotReady(reason)


class Utterance:
    """One segment at the engine. Made and used on an event loop."""

    def __init__(self, model: SpeechModel, request: Request, segment: Segment) -> None:
        """Raises ShuttingDown."""
        self.segment, self.ended = segment, asyncio.Event()
        self._sample_rate = model.sample_rate
        self._codes: list[np.ndarray] = []
        self._queue: asyncio.Queue[Delivery] = asyncio.Queue()
        self._loop = asyncio.get_running_loop()
        self.reason: FinishReason | None = None
        self._taken = 0
        self._ticket = _submit(model.engine, request, self)

    def deliver(self, delivery: Delivery) -> None:
        """Called by the engine's thread."""
        self._loop.call_soon_threadsafe(self._arrived, delivery)

    def _arrived(self, delivery: Delivery) -> None:
        self._queue.put_nowait(delivery)
        if delivery.sound is not None and delivery.sound.codes is not None:
            self._codes.append(delivery.sound.codes)
        if delivery.finish_reason is not None:
            self.ended.set()

    async def chunk(self) -> AudioChunk | None:
        """The next sound; None at the end. Raises SynthesisFailed, ShuttingDown."""
        if self._taken:  # the engine hears of it when more is wanted
            self._ticket.taken(self._taken)
            self._taken = 0
        while self.reason is None:
            delivery = await self._queue.get()
            self.reason = delivery.finish_reason
            _check(delivery)
            if delivery.sound is not None:
                self._taken = delivery.frames
                return AudioChunk(delivery.sound.samples, self._sample_rate, self.segment)
        return None

    async def continuation(self, model: SpeechModel) -> Reference | None:
        """The voice of this segment once it has been spoken; None if it had no sound."""
        await self.ended.wait()
        return model.continuing(np.concatenate(self._codes), self.segment.text) if self._codes else None

    def cancel(self) -> None:
        self._ticket.cancel()


class Utterances:
    """The segments of one request, each begun when `begin` asks for it.

    A designed voice would be another one in each segment: all but the first go on from the first.
    """

    def __init__(
        self, model: SpeechModel, request: SpeechRequest, voice: Voice, segments: AsyncIterator[Segment]
    ) -> None:
        self._model, self._request, self._voice, self._segments = model, request, voice, segments
        self._begun: list[Utterance] = []

    async def begin(self) -> Utterance | None:
        """The next segment, on its way; None after the last."""
        # Not anext(): a StopAsyncIteration cannot leave a task.
        async for segment in self._segments:
            utterance = Utterance(self._model, await self._asked(segment), segment)
            self._begun.append(utterance)
            return utterance
        return None

    async def _asked(self, segment: Segment) -> Request:
        number = len(self._begun)
        reference = None
        if number and self._voice.kind == "designed":
            reference = await self._begun[0].continuation(self._model)
        prompt = _prompt(segment, self._voice, self._request, reference)
        sampling = self._model.sampling(mixed_seed(self._request.seed, number))
        return self._model.request(prompt, sampling, frame_budget(segment.text), priority=min(number, 1))

    def cancel(self) -> None:
        """End what has not ended."""
        for utterance in self._begun:
            utterance.cancel()


def _check(delivery: Delivery) -> None:
    reason = delivery.finish_reason
    if reason == "cancelled":  # never by this side, which listens no more then
        raise ShuttingDown("The server is shutting down.")
    if reason not in (None, "stop", "length"):
        raise SynthesisFailed(f"The speech could not be generated ({reason}).") from delivery.error


def _submit(engine: Engine, request: Request, utterance: Utterance) -> Ticket:
    try:
        return engine.submit(request, utterance.deliver)
    except EngineStopped:
        raise ShuttingDown("The server is shutting down.") from None


def _prompt(
    segment: Segment, voice: Voice, request: SpeechRequest | None = None, reference: Reference | None = None
) -> Prompt:
    instruct = request.instructions if request else ""
    designed = voice.kind == "designed"
    return Prompt(
        segment.text,
        language=request.language if request else "auto",
        speaker=None if designed else voice.id,
        instruct=instruct or (DESCRIPTION if designed else None),
        reference=reference,
    )


def frame_budget(text: str) -> int:
    """How many frames the text may take: generous, as only runs that find no end of their own should meet it."""
    letters = sum(LONG_CHARACTER if _is_long(character) else 1 for character in text)
    return FEWEST_FRAMES + math.ceil(FRAMES_PER_LETTER * letters)


def _is_long(character: str) -> bool:
    return character.isdigit() or unicodedata.east_asian_width(character) in "WF"


def mixed_seed(seed: int, number: int) -> int:
    """The seed of a request's segment: segments that begin alike shall not draw the same numbers."""
    return int.from_bytes(hashlib.sha256(f"{seed}:{number}".encode()).digest()[:8], "little")
