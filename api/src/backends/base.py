"""The one narrow seam between the service and whatever makes sound."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Mapping, Sequence
from typing import NoReturn, Protocol

from ..domain import AudioChunk, Model, ModelStats, Readiness, Segment, SpeechRequest, Voice
from ..errors import NotReady


class Backend(Protocol):
    """Something that can speak.

    `start` returns once the backend has spoken a first real sound; until then `readiness` says the phase. It may be
    called again after it has failed, and is to be after the backend has `died`.
    `models` is meaningful after `start`. A request comes with every name resolved to what `models` said.
    """

    name: str

    @property
    def models(self) -> Sequence[Model]:
        """What can be asked for now, best first. A model without voices of its own only clones."""
        ...

    def readiness(self) -> Readiness: ...

    async def start(self) -> None: ...

    async def died(self) -> NotReady:
        """Wait until the backend can speak no more and does not mend itself; NeedsNewProcess where no start helps."""
        ...

    async def stop(self) -> None:
        """End every process and thread of the backend; running `speak` calls fail."""
        ...

    def speak(
        self, request: SpeechRequest, voice: Voice, segments: AsyncIterator[Segment]
    ) -> AsyncGenerator[AudioChunk, None]:
        """Yield the segments' sound in order, in one or more chunks per segment.

        Closing the generator frees what it holds within one segment. Raises SynthesisFailed.
        """
        ...

    def text_tokens(self, request: SpeechRequest) -> int | None:
        """The length of a request's text in the backend's own tokens; None where it has none."""
        ...

    def stats(self) -> Mapping[str, ModelStats]:
        """How each model's engine fares, by native model id; empty where the backend has no engine.

        Cheap, and right at any time: a model that was unloaded stays here with the counts of all its engines.
        """
        ...

    def breakers(self) -> Mapping[str, str]:
        """The states of its circuit breakers (closed, half_open, open), by what they guard; empty where it has none."""
        ...


async def never() -> NoReturn:
    """Wait for ever: for backends that mend themselves."""
    while True:
        await asyncio.Event().wait()
