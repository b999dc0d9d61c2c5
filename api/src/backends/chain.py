"""Several backends as one: who is asked first, and who speaks where that one cannot.

Owns the order alone. Who speaks a request is settled when its names are resolved, before anything is looked up in the
cache: the model that was found says whose it is. From then on nobody else takes over, so that no cached sound and no
response is ever of two backends.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncGenerator, AsyncIterator, Mapping, Sequence
from contextlib import aclosing
from dataclasses import replace

from ..domain import AudioChunk, Model, ModelStats, Readiness, Segment, SpeechRequest, Voice
from ..errors import NotReady
from ..patience import FIRST_PAUSE_S, until_it_works
from .base import Backend

logger = logging.getLogger(__name__)


class Chain:
    """Implements `Backend` with others, each of a name of its own, in the order in which they are asked."""

    def __init__(self, members: Sequence[Backend]) -> None:
        self._members = {member.name: member for member in members}
        if len(self._members) < len(members):
            raise ValueError("the members of a chain need names of their own")
        self.name = ",".join(self._members)
        self._started: set[str] = set()
        self._retrying: list[asyncio.Task[None]] = []

    @property
    def models(self) -> Sequence[Model]:
        """Those of the members that are ready, in the members' order; each says whose it is."""
        return [replace(model, backend=member.name) for member in self._ready() for model in member.models]

    def readiness(self) -> Readiness:
        """Ready as soon as one member is; the reason tells of those that are not, or fail."""
        each = {name: member.readiness() for name, member in self._members.items()}
        troubles = {name: state for name, state in each.items() if not state.ready or state.reason}
        reason = " ".join(f"{name}: {state.reason or state.phase}" for name, state in troubles.items())
        if any(state.ready for state in each.values()):
            return Readiness(True, "degraded" if troubles else "ready", reason)
        return Readiness(False, next(iter(each.values())).phase, reason)

    async def start(self) -> None:
        """Start all at once. Those that fail are tried again in the background; raises NotReady if none can speak."""
        waiting = [member for name, member in self._members.items() if name not in self._started]
        await asyncio.gather(*map(self._start, waiting))
        if not self._started:
            raise NotReady(self.readiness().reason)
        self._retrying = [
            asyncio.create_task(self._keep_starting(member), name=f"start {name}")
            for name, member in self._members.items()
            if name not in self._started
        ]

    async def stop(self) -> None:
        for task in self._retrying:
            task.cancel()
        await asyncio.gather(*self._retrying, return_exceptions=True)
        await asyncio.gather(*(member.stop() for member in self._members.values()))

    async def speak(
        self, request: SpeechRequest, voice: Voice, segments: AsyncIterator[Segment]
    ) -> AsyncGenerator[AudioChunk, None]:
        """As the member does that `request.backend` names."""
        async with aclosing(self._members[request.backend].speak(request, voice, segments)) as chunks:
            async for chunk in chunks:
                yield chunk

    def text_tokens(self, request: SpeechRequest) -> int | None:
        return self._members[request.backend].text_tokens(request)

    def stats(self) -> Mapping[str, ModelStats]:
        return {id: stats for member in self._members.values() for id, stats in member.stats().items()}

    def breakers(self) -> Mapping[str, str]:
        return {name: state for member in self._members.values() for name, state in member.breakers().items()}

    def _ready(self) -> list[Backend]:
        return [member for member in self._members.values() if member.readiness().ready]

    async def _start(self, member: Backend) -> None:
        try:
            await member.start()
        except Exception as error:  # the others speak all the same
            _log_failure(member, error)
        else:
            self._started.add(member.name)

    async def _keep_starting(self, member: Backend) -> None:
        # The first failure was just now.
        await asyncio.sleep(FIRST_PAUSE_S)
        await until_it_works(member.start, failed=lambda error, _: _log_failure(member, error))
        self._started.add(member.name)
        logger.info("the %s backend has started after all", member.name)


def _log_failure(member: Backend, error: Exception) -> None:
    if isinstance(error, NotReady):
        logger.warning("the %s backend does not start: %s", member.name, error.message)
    else:
        logger.error("the %s backend does not start", member.name, exc_info=error)
