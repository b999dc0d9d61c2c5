"""A circuit breaker: whether something outside may be asked now, by how it has fared lately.

Owns counts and times alone; what counts as a failure is its user's to say. Used on one event loop.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Literal

State = Literal["closed", "open", "half_open"]


class BreakerOpen(Exception):
    """Nothing is let through now; `retry_after` seconds from now a probe may be."""

    def __init__(self, retry_after: float) -> None:
        super().__init__(f"open for another {retry_after:.1f} s")
        self.retry_after = retry_after


class Attempt:
    """One call that was let through. Left without a verdict, it says nothing of the other side."""

    def __init__(self, breaker: Breaker, number: int) -> None:
        self._breaker = breaker
        self._number = number

    def succeed(self) -> None:
        self._breaker._succeeded(self._number)

    def fail(self) -> None:
        self._breaker._failed(self._number)


class Breaker:
    """Closed until `failures` come in a row; then open for `open_s`; then half open: one probe at a time.

    A probe that succeeds closes it. One that fails opens it again, for twice as long as before and `longest_s` at most.
    A verdict that comes late, of a call from before the last change of state, changes nothing. `clock` is in seconds.
    """

    def __init__(
        self,
        *,
        failures: int = 5,
        open_s: float = 5.0,
        longest_s: float = 60.0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._allowed_failures = failures
        self._first_open_s, self._longest_s = open_s, longest_s
        self._clock = clock
        self._failures = 0
        self._open_s = open_s
        self._open_until: float | None = None
        self._probing = False
        self._epoch = 0

    @property
    def state(self) -> State:
        if self._open_until is None:
            return "closed"
        return "open" if self._clock() < self._open_until else "half_open"

    @property
    def allows(self) -> bool:
        """Whether a call would be let through now."""
        return self.state == "closed" or (self.state == "half_open" and not self._probing)

    @property
    def retry_after(self) -> float:
        """Seconds until a call may be let through; 0 if that is now, or hangs on the probe under way."""
        return max(0.0, (self._open_until or 0.0) - self._clock())

    @contextmanager
    def attempt(self) -> Iterator[Attempt]:
        """Let one call through; raises BreakerOpen instead where none may be."""
        if not self.allows:
            raise BreakerOpen(self.retry_after)
        probe, epoch = self.state == "half_open", self._epoch
        self._probing = self._probing or probe
        try:
            yield Attempt(self, epoch)
        finally:
            if probe and epoch == self._epoch:
                self._probing = False

    def _succeeded(self, epoch: int) -> None:
        if epoch != self._epoch:
            return
        self._failures = 0
        if self._open_until is not None:
            self._open_until, self._open_s = None, self._first_open_s
            self._change()

    def _failed(self, epoch: int) -> None:
        if epoch != self._epoch:
            return
        self._failures += 1
        if self._open_until is not None:
            self._open_s = min(2 * self._open_s, self._longest_s)
        elif self._failures < self._allowed_failures:
            return
        self._open_until = self._clock() + self._open_s
        self._change()

    def _change(self) -> None:
        self._epoch += 1
        self._failures = 0
        self._probing = False
