"""Whether two candidates differ, or only these sentences do: a paired bootstrap over sentences."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike

DRAWS = 10_000
INTERVAL = (2.5, 97.5)
"""Percentiles: 95 %."""


@dataclass(frozen=True)
class Difference:
    """An estimate, and the interval that holds it in 95 % of the draws."""

    estimate: float
    low: float
    high: float


def ratio_difference(ours: ArrayLike, theirs: ArrayLike, draws: int = DRAWS, seed: int = 0) -> Difference:
    """Of two ratios of sums, such as edits over words: each argument is sentences x (numerator, denominator).

    Both are of the same sentences in the same order, which are drawn together: what makes a sentence hard for both
    takes no part. A mean's denominators are 1. Raises ValueError: no sentences, or not as many of both.
    """
    pairs = np.stack([np.asarray(ours, np.float64), np.asarray(theirs, np.float64)])
    count = pairs.shape[1]
    if not count:
        raise ValueError("there are no sentences to compare")
    drawn = np.random.default_rng(seed).multinomial(count, np.full(count, 1 / count), size=draws)
    low, high = np.percentile(_difference(drawn @ pairs), INTERVAL)
    return Difference(float(_difference(pairs.sum(1))), float(low), float(high))


def _difference(sums: np.ndarray) -> np.ndarray:
    """Of the two candidates' (numerator, denominator) in the last axis, candidates first."""
    ours, theirs = sums[..., 0] / sums[..., 1]
    return np.asarray(ours - theirs)
