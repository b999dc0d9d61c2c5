"""The one narrow seam between the service and whatever makes sound."""

from __future__ import annotations

from collections.abc import AsyncGenerator, AsyncIterator, Mapping, Sequence
from typing import Protocol

from ..domain import AudioChunk, Model, ModelStats, Readiness, Segment, SpeechRequest, Voice


class Backend(Protocol):
    """Something that can speak.

    `start` returns once the backend has spoken a first real sound; until then `readiness` says the phase. It may be
    called again after it has failed.
    `models` is meaningful after `start`. A request comes with every name resolved to what `models` said.
    """

    name: str

    @property
    def models(self) -> Sequence[Model]:
        """What can be asked for now, best first. A model without voices of its own only clones."""
        ...

    def readiness(self) -> Readiness: ...

    async def start(self) -> None: ...

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
