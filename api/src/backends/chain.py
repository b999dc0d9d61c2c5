"""Several backends as one: who is asked first, and who speaks where that one cannot.

Owns the order alone. Who speaks a request is settled when its names are resolved, before anything is looked up in the
cache: the model that was found says whose it is. Nobody takes over from there, so that no cached sound and no response
is ever of two backends; where a member turns out to be away before its first sound, the names are resolved once more.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncGenerator, AsyncIterator, Mapping, Sequence
from contextlib import aclosing
from dataclasses import replace

from ..domain import AudioChunk, Model, ModelStats, Readiness, Segment, SpeechRequest, Voice
from ..errors import NeedsNewProcess, NotReady
from ..patience import FIRST_PAUSE_S, keep_working
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
        self._keeping: list[asyncio.Task[None]] = []
        self._spent: NeedsNewProcess | None = None
        self._over = asyncio.Event()

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
        """Start all at once. Those that fail, or die later, are started again in the background.

        Raises NotReady if none can speak.
        """
        failures = await asyncio.gather(*map(self._start, self._members.values()))
        if not self._started:
            spent = next((error for error in failures if isinstance(error, NeedsNewProcess)), None)
            raise spent or NotReady(self.readiness().reason)
        self._keeping = [
            asyncio.create_task(self._keep(member), name=f"keep {name}") for name, member in self._members.items()
        ]

    async def died(self) -> NotReady:
        """Wait until a member that has spoken, or without which nobody speaks, needs a new process."""
        await self._over.wait()
        assert self._spent is not None
        return self._spent

    async def stop(self) -> None:
        for task in self._keeping:
            task.cancel()
        await asyncio.gather(*self._keeping, return_exceptions=True)
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

    async def _start(self, member: Backend) -> Exception | None:
        try:
            await member.start()
        except Exception as error:  # the others speak all the same
            _log_failure(member, error)
            return error.with_traceback(None)
        self._started.add(member.name)
        return None

    async def _keep(self, member: Backend) -> None:
        running = member.name in self._started
        if not running:  # the first failure was just now
            await asyncio.sleep(FIRST_PAUSE_S)

        def works() -> None:
            if member.name not in self._started:
                logger.info("the %s backend has started after all", member.name)
            self._started.add(member.name)

        try:
            await keep_working(
                member.start,
                member.died,
                works=works,
                failed=lambda error, _: _log_failure(member, error),
                running=running,
            )
        except NeedsNewProcess as error:
            _log_failure(member, error)
            if member.name in self._started or not self._ready():  # else the others' speech is not worth a new try
                self._spent = NeedsNewProcess(error.message)
                self._over.set()


def _log_failure(member: Backend, error: Exception) -> None:
    if isinstance(error, NotReady):
        logger.warning("the %s backend does not speak: %s", member.name, error.message)
    else:
        logger.error("the %s backend does not speak", member.name, exc_info=error)
