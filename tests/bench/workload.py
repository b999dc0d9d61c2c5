"""What is asked for and when: texts, lengths and arrivals that follow from a seed, the same for every server.

A text's length in letters gives its frames, at a usual pace of speech: so a request says how long its sound is to be
wherever the text goes, whole or cut into segments. No network here.
"""

from __future__ import annotations

import math
import random
from dataclasses import dataclass

FRAME_S = 0.08
FRAMES_PER_LETTER = 0.8
"""15 letters a second."""

MEAN_FRAMES = 52
"""About the mean of the Seed-TTS English set, 4.2 s."""

_SIGMA = 0.45
_FEWEST, _MOST = 15, 150
_VOCABULARY = (
    "the a of to and in that was it for on with as at by from or but not this which their they were been had has will "
    "can one two over after before water light morning harbour people river table number story paper answer market "
    "winter summer garden window letter doctor music kitchen station captain mountain village children together "
    "sometimes nothing everyone quietly perhaps beautiful remember important different"
)
_WORDS = _VOCABULARY.split()


@dataclass(frozen=True)
class Ask:
    """One request: its text, and the frames (80 ms each) of its sound where the checkpoint has no end of its own."""

    id: int
    text: str
    frames: int


def ask(seed: int, id: int, mean_frames: float = MEAN_FRAMES) -> Ask:
    """The request of that number: lengths are log-normal, 15 to 150 frames, about `mean_frames` on average."""
    rng = random.Random(f"{seed}:{id}")
    drawn = rng.lognormvariate(math.log(mean_frames) - _SIGMA**2 / 2, _SIGMA)
    text = _sentence(rng, round(min(max(drawn, _FEWEST), _MOST) / FRAMES_PER_LETTER))
    return Ask(id, text, frames_of(text))


def frames_of(text: str) -> int:
    """The frames that a text is to take."""
    return max(1, round(FRAMES_PER_LETTER * len(text.strip())))


def arrivals(seed: int, per_second: float, count: int) -> list[float]:
    """When each request of a Poisson process arrives, in seconds from the start."""
    rng = random.Random(f"{seed}:arrivals:{per_second}")
    at, times = 0.0, []
    for _ in range(count):
        at += rng.expovariate(per_second)
        times.append(at)
    return times


def _sentence(rng: random.Random, letters: int) -> str:
    """Words up to about so many letters: no commas, digits or names, which servers read or cut in ways of their own."""
    text = rng.choice(_WORDS).capitalize()
    while len(text) + 2 < letters:
        text += f" {rng.choice(_WORDS)}"
    return f"{text}."
