"""A backend whose sound says which text it was made from, so that any answer can be checked against its request."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

import numpy as np

from api.src.domain import SAMPLE_RATE, Segment, Voice
from api.src.text.segment import segment
from tests.fakes import FakeBackend

SAMPLES = 2400
"""Of one segment by default: 0.1 s."""


def noise(text: str, samples: int = SAMPLES) -> np.ndarray:
    """Noise that follows from the text alone, on the grid of 16-bit samples."""
    rng = np.random.default_rng(int.from_bytes(hashlib.sha256(text.encode()).digest()))
    return (rng.integers(-20_000, 20_000, samples) / 32768).astype(np.float32)


def pcm_of(text: str, samples: int = SAMPLES) -> bytes:
    """What a request for `text` answers in pcm: the sum of its segments, bit for bit."""
    sound = np.concatenate([noise(part.text, samples) for part in segment(text)])
    return (sound * 32768).astype("<i2").tobytes()


@dataclass
class TextualBackend(FakeBackend):
    """Speaks noise that follows from the text of each segment."""

    seconds_per_segment: float = SAMPLES / SAMPLE_RATE

    def sound(self, segment: Segment, voice: Voice, seed: int) -> np.ndarray:
        return noise(segment.text, int(self.seconds_per_segment * SAMPLE_RATE))


def sentences(count: int, about: str = "garden") -> str:
    """A text of so many sentences, which the segmenter keeps apart."""
    return " ".join(f"Sentence number {i} about the {about} is long enough to be spoken alone." for i in range(count))
