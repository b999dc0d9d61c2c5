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
from .base import Backend

logger = logging.getLogger(__name__)


class Chain:
    """Implements `Backend` with others, each of a name of its own, in the order in which they are asked."""

    def __init__(self, members: Sequence[Backend]) -> None:
        self._members = {member.name: member for member in members}
        if len(self._members) < len(members):
            raise ValueError("the members of a chain need names of their own")
        self.name = ",".join(self._members)

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
        """Start all at once; raises NotReady if none can speak then."""
        results = await asyncio.gather(*map(_start, self._members.values()))
        if not any(results):
            raise NotReady(self.readiness().reason)

    async def stop(self) -> None:
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

    def _ready(self) -> list[Backend]:
        return [member for member in self._members.values() if member.readiness().ready]


async def _start(member: Backend) -> bool:
    try:
        await member.start()
    except NotReady as error:
        logger.warning("the %s backend does not start: %s", member.name, error.message)
    except Exception:  # the others speak all the same
        logger.exception("the %s backend does not start", member.name)
    else:
        return True
    return False
