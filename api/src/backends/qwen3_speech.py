"""How a request's segments become the engine's requests, and its deliveries chunks of sound.

Owns the crossing between the engine's thread and asyncio, prompts, seeds and frame budgets.
"""

from __future__ import annotations

import asyncio
import hashlib
import logging
import math
import unicodedata
from collections.abc import AsyncGenerator, AsyncIterator

import numpy as np

from ..domain import AudioChunk, Segment, SpeechRequest, Voice
from ..engine.engine import Engine, Ticket
from ..engine.errors import DeviceLost, PromptTooLong
from ..engine.loading import Asking
from ..engine.messages import Delivery, EngineStopped, FinishReason, Request
from ..engine.prompt import Prompt, Reference
from ..errors import InvalidRequest, NeedsNewProcess, NotReady, ShuttingDown, SynthesisFailed
from ..observe import detail

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


async def speak(
    model: Asking, request: SpeechRequest, voice: Voice, segments: AsyncIterator[Segment]
) -> AsyncGenerator[AudioChunk, None]:
    """Yield each segment's sound as it is made. The next segment is spoken while the last is consumed.

    Raises SynthesisFailed, NotReady, ShuttingDown, InvalidRequest.
    """
    utterances = Utterances(model, request, voice, segments)
    following = asyncio.create_task(utterances.begin())
    try:
        while (utterance := await following) is not None:
            following = asyncio.create_task(utterances.begin())
            while (chunk := await utterance.chunk()) is not None:
                yield chunk
            detail(logger, "a segment ended", start=utterance.segment.start, finish_reason=utterance.reason)
            if utterance.reason == "length":
                logger.warning("a segment of %d characters has used up its frames", len(utterance.segment.text))
    finally:
        following.cancel()
        await asyncio.gather(following, return_exceptions=True)
        utterances.cancel()


async def warm_up(model: Asking, voice: Voice) -> None:
    """Speak a word to nobody."""
    request = model.request(_prompt(WARM_UP, voice), model.sampling(0), WARM_UP_FRAMES)
    utterance = Utterance(model, request, WARM_UP)
    while await utterance.chunk() is not None:
        pass


class Utterance:
    """One segment at the engine. Made and used on an event loop."""

    def __init__(self, model: Asking, request: Request, segment: Segment) -> None:
        """Raises NotReady, ShuttingDown."""
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
        """The next sound; None at the end. Raises SynthesisFailed, NotReady, ShuttingDown."""
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

    async def continuation(self, model: Asking) -> Reference | None:
        """The voice of this segment once it has been spoken; None if it had no sound."""
        await self.ended.wait()
        return model.continuing(np.concatenate(self._codes), self.segment.text) if self._codes else None

    def cancel(self) -> None:
        self._ticket.cancel()


class Utterances:
    """The segments of one request, each begun when `begin` asks for it.

    A designed voice would be another one in each segment: all but the first go on from the first.
    """

    def __init__(self, model: Asking, request: SpeechRequest, voice: Voice, segments: AsyncIterator[Segment]) -> None:
        self._model, self._request, self._voice, self._segments = model, request, voice, segments
        self._begun: list[Utterance] = []

    async def begin(self) -> Utterance | None:
        """The next segment, on its way; None after the last."""
        # Not anext(): a StopAsyncIteration cannot leave a task.
        async for segment in self._segments:
            utterance = Utterance(self._model, await self._asked(segment), segment)
            detail(logger, "a segment goes to the engine", start=segment.start, end=segment.end)
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
    if isinstance(delivery.error, PromptTooLong):  # segments are short: what is left are the instructions
        raise InvalidRequest("The instructions are too long for this model.", param="instructions")
    if isinstance(delivery.error, EngineStopped | DeviceLost):
        raise told_of(delivery.error)
    if reason not in (None, "stop", "length"):
        raise SynthesisFailed(f"The speech could not be generated ({reason}).") from delivery.error


def _submit(engine: Engine, request: Request, utterance: Utterance) -> Ticket:
    try:
        return engine.submit(request, utterance.deliver)
    except EngineStopped:
        raise told_of(engine.death) if engine.death else ShuttingDown("The server is shutting down.") from None


def told_of(death: EngineStopped | DeviceLost) -> NotReady:
    """What an engine's death means for who asks it."""
    if isinstance(death, DeviceLost):
        return NeedsNewProcess("The device takes no more work from this server, which ends to be started anew.")
    return NotReady("The engine has ended, and is started again.")


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
