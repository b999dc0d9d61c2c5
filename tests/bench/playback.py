"""A listener's player: when it runs dry.

Owns the accounting of underruns. Knows neither clocks nor engines: who receives sound says when, and how much it was.
"""

from __future__ import annotations

_ROUNDING_S = 1e-6


class Playback:
    """Starts with the first sound that comes, plays at the pace of sound, and waits where there is none.

    slack_s: a gap up to this long is not counted, as a real player's own buffer bridges it.
    underruns: gaps so far; dry_s: their seconds together; sound_s: seconds of sound received.
    """

    def __init__(self, slack_s: float = 0.0) -> None:
        self.underruns = 0
        self.dry_s = 0.0
        self.sound_s = 0.0
        self.first_at: float | None = None
        self._slack_s = slack_s + _ROUNDING_S
        self._plays_until = 0.0

    def arrive(self, at: float, seconds: float) -> None:
        """`seconds` of sound came at the time `at`, which never goes back. A header has none, and starts nothing."""
        if seconds <= 0:
            return
        if self.first_at is None:
            self.first_at = self._plays_until = at
        gap = at - self._plays_until
        if gap > self._slack_s:
            self.underruns += 1
            self.dry_s += gap
        self._plays_until = max(self._plays_until, at) + seconds
        self.sound_s += seconds

    def lead(self, at: float) -> float:
        """Seconds of sound that are still to be played at the time `at`; below 0, how long it has been dry."""
        return self._plays_until - at
