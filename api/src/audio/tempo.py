"""Change of speed at constant pitch, as a stream. Knows nothing of codecs and of other sample rates."""

from __future__ import annotations

import math

from ..domain import SAMPLE_RATE, Samples
from ..errors import InvalidRequest
from .filters import SILENCE, FilterChain

MIN_SPEED = 0.25
MAX_SPEED = 4.0
"""The bounds of OpenAI's speech API."""

STAGE_RATIO = 2.0
"""Up to this ratio ffmpeg's atempo overlaps and adds; beyond it drops samples. Hence a chain of stages."""


class Tempo:
    """SAMPLE_RATE float32 mono in, the same out, `speed` times as fast; 1 passes samples through untouched.

    From a few seconds on, the output's length is within 0.8 % of length / speed; up to 20 ms of the
    input's end are lost. The output does not depend on how the input was cut.
    """

    def __init__(self, speed: float = 1.0) -> None:
        """Raises InvalidRequest unless MIN_SPEED <= speed <= MAX_SPEED."""
        if not MIN_SPEED <= speed <= MAX_SPEED:
            raise InvalidRequest(f"speed must lie between {MIN_SPEED} and {MAX_SPEED}.", param="speed")
        self._chain = FilterChain(SAMPLE_RATE, _stages(speed)) if speed != 1.0 else None

    def push(self, samples: Samples) -> Samples:
        """Take contiguous samples and return those that are ready, possibly none."""
        return self._chain.push(samples) if self._chain else samples

    def flush(self) -> Samples:
        """Return the rest. Nothing may be pushed afterwards."""
        return self._chain.flush() if self._chain else SILENCE

    def close(self) -> None:
        """Free the filter. Idempotent."""
        self._chain = None


def _stages(speed: float) -> list[tuple[str, str]]:
    count = max(1, math.ceil(abs(math.log(speed, STAGE_RATIO))))
    return [("atempo", repr(speed ** (1 / count)))] * count
