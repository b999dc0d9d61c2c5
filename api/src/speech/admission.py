"""Who may generate now, who waits, and who is told to come back later.

Owns the permits of one process. Joins and cache hits need none.
"""

from __future__ import annotations

import asyncio
import math
import time
from collections import deque
from types import TracebackType

from ..errors import Overloaded

MAX_RETRY_AFTER = 60
_SMOOTHING = 0.2
"""Weight of the newest generation in the moving average of their lengths."""


class Permit:
    """A place among the running or the waiting; leaving the context gives it back."""

    def __init__(self, admission: Admission) -> None:
        self._admission = admission
        self._turn: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._entered_at = time.monotonic()
        self._started_at: float | None = None

    async def granted(self) -> None:
        """Wait, in order of arrival, until this permit may run."""
        await asyncio.shield(self._turn)

    def grant(self) -> None:
        self._started_at = time.monotonic()
        self._turn.set_result(None)

    @property
    def running_seconds(self) -> float | None:
        """How long this permit has run; None while it waits."""
        return None if self._started_at is None else time.monotonic() - self._started_at

    @property
    def waited_seconds(self) -> float | None:
        """How long this permit waited to run; None while it waits."""
        return None if self._started_at is None else self._started_at - self._entered_at

    def __enter__(self) -> Permit:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.release()

    def release(self) -> None:
        """Give the place back; a second call does nothing."""
        self._admission.leave(self)


class Admission:
    """At most `max_concurrent` permits run; at most `queue_size` more wait in order of arrival."""

    def __init__(self, max_concurrent: int, queue_size: int) -> None:
        self._max_concurrent = max_concurrent
        self._queue_size = queue_size
        self._running: set[Permit] = set()
        self._waiting: deque[Permit] = deque()
        self._average_seconds = 1.0

    @property
    def running(self) -> int:
        return len(self._running)

    @property
    def waiting(self) -> int:
        return len(self._waiting)

    def enter(self) -> Permit:
        """Take a place at once, or raise Overloaded."""
        if len(self._running) >= self._max_concurrent and len(self._waiting) >= self._queue_size:
            raise Overloaded("The server is at capacity. Try again later.", retry_after=self.retry_after())
        permit = Permit(self)
        self._waiting.append(permit)
        self._admit()
        return permit

    def leave(self, permit: Permit) -> None:
        """Give a place back; a second call does nothing."""
        if permit in self._running:
            self._running.remove(permit)
            self._average_seconds += _SMOOTHING * ((permit.running_seconds or 0.0) - self._average_seconds)
            self._admit()
        elif permit in self._waiting:
            self._waiting.remove(permit)

    def retry_after(self) -> int:
        """Whole seconds until a place is likely free: the queue's length in average generations."""
        rounds = (len(self._waiting) + 1) / self._max_concurrent
        return min(MAX_RETRY_AFTER, max(1, math.ceil(rounds * self._average_seconds)))

    def _admit(self) -> None:
        while self._waiting and len(self._running) < self._max_concurrent:
            permit = self._waiting.popleft()
            self._running.add(permit)
            permit.grant()
