"""A remote server that speaks for this one: OpenAI's, or any that answers as OpenAI's speech API does.

Owns what of it is known and when it is asked anew, and the order of a request's sound. A connection is
`remote_client`'s, the lists are `remote_lists`', what is believed of an answer `remote_sound`'s.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import random
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from ..breaker import Breaker
from ..domain import AudioChunk, Model, ModelStats, Readiness, Segment, SpeechRequest, Voice
from ..errors import NotReady, ShuttingDown, UpstreamFailed, UpstreamUnavailable
from . import remote_lists
from .base import never
from .remote_client import Client, Remote
from .remote_faults import Fault

logger = logging.getLogger(__name__)

REFRESH_S = 300.0
"""Between two looks at the lists, while they succeed."""

FIRST_RETRY_S, LONGEST_RETRY_S = 1.0, 60.0
"""Between two looks that fail: doubled from the first to the longest, with jitter."""


class RemoteBackend:
    """Implements `Backend` with a server elsewhere.

    `models`: those to ask for, best first; without any, those that the server lists. `revision`: a word of the
    operator's that goes into every cache key, to be changed when the server's sound has changed under the same names.
    Once its lists are known they are kept while it is down, and what was spoken stays in reach of the cache.
    Each segment is a request of its own, the next one sent when the last begins to be heard. `speed` is left to this
    server. A segment's sound is taken as it comes, whoever listens: a slow listener is none of the remote server's.
    """

    name = "remote"

    def __init__(
        self, remote: Remote, *, models: Sequence[str] = (), revision: str = "", breaker: Breaker | None = None
    ) -> None:
        self._remote = remote
        self._asked_models, self._revision = models, revision
        self._breaker = breaker or Breaker()
        self._client = Client(remote, self._breaker)
        self._models: tuple[Model, ...] = ()
        self._fault: Fault | None = None
        self._look_now = asyncio.Event()
        self._looking: asyncio.Task[None] | None = None
        self._stopped = False
        self._utterances: set[Utterance] = set()

    @property
    def models(self) -> Sequence[Model]:
        down = self._down
        return [replace(model, down=down) for model in self._models]

    @property
    def breaker(self) -> Breaker:
        """How the remote server has fared lately."""
        return self._breaker

    def readiness(self) -> Readiness:
        """Ready once the lists are known, even while the server is down: what is cached can still be had."""
        if self._stopped:
            return Readiness(False, "stopped")
        reason = self._fault.error.message if self._fault else ""
        if not self._models:
            return Readiness(False, "connecting", reason)
        if self._down:
            return Readiness(True, "failing", reason or "The remote server keeps failing.")
        return Readiness(True, "ready")

    async def start(self) -> None:
        """Ask for the lists; raises NotReady if they cannot be had, and goes on trying in the background."""
        if self._looking is None:
            self._client.open()
            await self._look()
            self._looking = asyncio.create_task(self._keep_looking(), name="remote lists")
        elif self._fault is not None:
            await self._look()
        if self._fault is not None:
            raise NotReady(self._fault.error.message)

    async def died(self) -> NotReady:
        """Never: the remote server is asked again for ever."""
        return await never()

    async def stop(self) -> None:
        """End every request to the remote server; running `speak` calls raise ShuttingDown."""
        self._stopped = True
        running = [utterance.cancel() for utterance in self._utterances]
        if self._looking is not None:
            self._looking.cancel()
            running.append(self._looking)
        await asyncio.gather(*running, return_exceptions=True)
        await self._client.close()

    def text_tokens(self, request: SpeechRequest) -> int | None:
        return None

    def stats(self) -> Mapping[str, ModelStats]:
        return {}

    def breakers(self) -> Mapping[str, str]:
        return {self.name: self._breaker.state}

    async def speak(
        self, request: SpeechRequest, voice: Voice, segments: AsyncIterator[Segment]
    ) -> AsyncGenerator[AudioChunk, None]:
        """As Backend.speak.

        Raises UpstreamFailed, UpstreamUnavailable, UpstreamRefused, RateLimited, ShuttingDown: a segment that did not
        come whole, whatever was heard of it.
        """
        begun: list[Utterance] = []

        async def begin() -> Utterance | None:
            # Not anext(): a StopAsyncIteration cannot leave a task.
            async for segment in segments:
                begun.append(self._utterance(_body(request, voice, segment), segment))
                return begun[-1]
            return None

        following = asyncio.create_task(begin())
        try:
            while (utterance := await following) is not None:
                chunk = await utterance.chunk()
                following = asyncio.create_task(begin())
                while chunk is not None:
                    yield chunk
                    chunk = await utterance.chunk()
        finally:
            following.cancel()
            await asyncio.gather(following, *(utterance.cancel() for utterance in begun), return_exceptions=True)
            self._utterances.difference_update(begun)

    def _utterance(self, body: Mapping[str, Any], segment: Segment) -> Utterance:
        if self._stopped:
            raise ShuttingDown("The server is shutting down.")
        utterance = Utterance(self._client, body, segment, on_end=self._look_after)
        self._utterances.add(utterance)
        return utterance

    @property
    def _down(self) -> bool:
        return self._fault is not None or not self._breaker.allows

    def _look_after(self, error: BaseException | None) -> None:
        """See at once whether the server is down, so that the next request can go elsewhere."""
        if self._down or isinstance(error, UpstreamFailed | UpstreamUnavailable):
            self._look_now.set()

    async def _keep_looking(self) -> None:
        pause = FIRST_RETRY_S
        while True:
            if self._fault is None:
                pause = FIRST_RETRY_S
                await self._time_to_look()
            else:
                await asyncio.sleep(pause * random.uniform(0.5, 1.0))
                pause = min(2 * pause, LONGEST_RETRY_S)
            try:
                await self._look()
            except Exception:  # whatever is odd in an answer must not end the looking
                logger.exception("the remote server's lists could not be read")
                await asyncio.sleep(LONGEST_RETRY_S)

    async def _time_to_look(self) -> None:
        """Wait until the lists are old, or requests have begun to fail."""
        self._look_now.clear()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(REFRESH_S * random.uniform(0.5, 1.0)):
                await self._look_now.wait()

    async def _look(self) -> None:
        try:
            models = await remote_lists.fetch(self._client, self._remote, self._asked_models, self._revision)
        except Fault as fault:
            if self._fault is None:
                logger.warning("the remote server's lists cannot be had: %s", fault.error.message)
            self._fault = fault
            return
        if self._fault is not None or not self._models:
            logger.info("the remote server lists %d models and %d voices", len(models), len(models[0].voices))
        self._models, self._fault = models, None


class Utterance:
    """One segment at the remote server, asked for at once, and read as it comes."""

    def __init__(
        self,
        client: Client,
        body: Mapping[str, Any],
        segment: Segment,
        *,
        on_end: Callable[[BaseException | None], None],
    ) -> None:
        self._on_end = on_end
        self._queue: asyncio.Queue[AudioChunk | BaseException | None] = asyncio.Queue()
        self._task = asyncio.create_task(self._read(client, body, segment), name="remote segment")
        self._task.add_done_callback(self._ended)

    async def chunk(self) -> AudioChunk | None:
        """The next sound; None at the end. Raises what `Client.speech` does, or ShuttingDown."""
        item = await self._queue.get()
        if isinstance(item, BaseException):
            raise item
        return item

    def cancel(self) -> asyncio.Task[None]:
        """End the request; the task ends once the connection is given back."""
        self._task.cancel()
        return self._task

    async def _read(self, client: Client, body: Mapping[str, Any], segment: Segment) -> None:
        async with contextlib.aclosing(client.speech(body, segment)) as chunks:
            async for chunk in chunks:
                self._queue.put_nowait(chunk)

    def _ended(self, task: asyncio.Task[None]) -> None:
        error = ShuttingDown("The server is shutting down.") if task.cancelled() else task.exception()
        self._queue.put_nowait(error)
        self._on_end(error)


def _body(request: SpeechRequest, voice: Voice, segment: Segment) -> dict[str, Any]:
    """OpenAI's fields; those that only other servers know are there only where a client has asked for them."""
    body: dict[str, Any] = {
        "model": request.model,
        "input": segment.text,
        "voice": voice.id,
        "response_format": "pcm",
        "stream_format": "audio",
    }
    if request.instructions:
        body["instructions"] = request.instructions
    if request.language != "auto" and voice.language != remote_lists.ANY_LANGUAGE:
        body["language"] = request.language.capitalize()
    if request.seed:
        body["seed"] = request.seed
    return body
