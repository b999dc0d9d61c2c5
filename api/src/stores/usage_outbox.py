"""Usage events that have not left this process yet, and the choice of where they go.

Owns a bounded queue in memory, the task that empties it, and the breakers. Events that are told at the same time go
together: into the stream in Redis; past it into the ledger's database while Redis's breaker is not closed; and where
both are away they stay, and nobody waits for them. Any event may be sent twice, after an unclear answer or as a probe:
the ledger stores it once.
"""

from __future__ import annotations

import asyncio
import logging
from collections import deque
from collections.abc import Iterable
from typing import NamedTuple

from ..breaker import Breaker, BreakerOpen
from ..domain import UsageEvent
from ..errors import Unavailable
from .ledger import Ledger
from .usage_stream import StreamAway, UsageStream

_OPEN_S = 1.0
_LONGEST_OPEN_S = 10.0
_DATABASE_OPEN_S = 0.25
_LONGEST_DATABASE_OPEN_S = 5.0
_PATIENCE_S = 1.0
_LONG_PATIENCE_S = 5.0
"""With a ledger that has failed before: nobody waits for it then."""

_SHORTEST_PAUSE_S = 0.05
_DROPS_PER_LINE = 1000

_log = logging.getLogger(__name__)


class _Item(NamedTuple):
    """`told` is done once the event is stored or known to have to wait; None where nobody waits."""

    event: UsageEvent
    told: asyncio.Future[None] | None


class Outbox:
    """At most `capacity` events in memory; beyond it the oldest that are not being sent are dropped.

    `batch` go at once. Redis's breaker opens after `failures` in a row.
    """

    def __init__(self, stream: UsageStream, ledger: Ledger, *, failures: int, capacity: int, batch: int) -> None:
        self.redis = Breaker(failures=failures, open_s=_OPEN_S, longest_s=_LONGEST_OPEN_S)
        self.database = Breaker(failures=1, open_s=_DATABASE_OPEN_S, longest_s=_LONGEST_DATABASE_OPEN_S)
        self._stream, self._ledger = stream, ledger
        self._capacity, self._batch = capacity, batch
        self._queue: deque[_Item] = deque()
        self._leaving: list[_Item] = []
        self._wake = asyncio.Event()
        self._task: asyncio.Task[None] | None = None
        self._probe: asyncio.Task[bool] | None = None
        self._closing = False
        self.dropped = 0

    @property
    def waiting(self) -> int:
        """How many events are in memory."""
        return len(self._queue) + len(self._leaving)

    def start(self) -> None:
        self._task = asyncio.create_task(self._run(), name="usage outbox")

    async def close(self, within_s: float) -> None:
        """Refuse what is new, and send what waits; what is left after `within_s` seconds is lost, and logged."""
        self._closing = True
        self._wake.set()
        tasks = [task for task in (self._task, self._probe) if task is not None]
        if self._task is not None:
            await asyncio.wait([self._task], timeout=within_s)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        self._put_back(self._leaving)
        self._drop(self.waiting)

    async def put(self, event: UsageEvent) -> None:
        """Send an event; returns once it is stored, or at once where it has to wait in memory.

        From the call on it is on its way, also if the caller is cancelled. Raises Unavailable after `close`.
        """
        if self._task is None or self._closing:
            raise Unavailable("The ledger is not open.")
        told = asyncio.get_running_loop().create_future() if self._somewhere else None
        self._queue.append(_Item(event, told))
        self._drop(self.waiting - self._capacity)
        self._wake.set()
        if told is not None:
            await told

    @property
    def _somewhere(self) -> bool:
        """Whether there is a place that events can be expected to go to."""
        return self.redis.state == "closed" or self.database.state == "closed"

    # The task

    async def _run(self) -> None:
        while True:
            await self._something_to_do()
            if self._closing and not self._queue:
                return
            self._leaving = [self._queue.popleft() for _ in range(min(len(self._queue), self._batch))]
            try:
                stored = await self._send([item.event for item in self._leaving])
            except Exception:
                _log.exception("the outbox of usage events failed")
                await asyncio.sleep(_LONGEST_DATABASE_OPEN_S)
                stored = False
            leaving, self._leaving = self._leaving, []
            if not stored:
                self._put_back(leaving)
            _tell(leaving)
            if not self._somewhere:
                _tell(self._queue)

    def _put_back(self, items: list[_Item]) -> None:
        self._leaving = []
        self._queue.extendleft(reversed(items))
        self._drop(self.waiting - self._capacity)

    async def _something_to_do(self) -> None:
        """Wait for an event, and for a place that may take it."""
        while not (self._queue or self._closing):
            self._wake.clear()
            await self._wake.wait()
        while self._queue and not (self.redis.allows or self.database.allows):
            pause = min(self.redis.retry_after, self.database.retry_after)
            await asyncio.sleep(max(_SHORTEST_PAUSE_S, pause))

    async def _send(self, events: list[UsageEvent]) -> bool:
        if self.redis.state == "closed":
            if await self._to_stream(events):
                return True
        elif self.redis.allows and (self._probe is None or self._probe.done()):
            # Beside the other way, so that nobody waits for it.
            self._probe = asyncio.create_task(self._to_stream(events[:1]), name="usage probe")
        return await self._to_database(events)

    async def _to_stream(self, events: list[UsageEvent]) -> bool:
        before = self.redis.state
        try:
            with self.redis.attempt() as attempt:
                try:
                    await self._stream.add(events)
                except StreamAway as error:
                    attempt.fail()
                    _log.debug("usage events did not reach Redis: %s", error)
                    if before == "closed" and self.redis.state == "open":
                        _log.warning("usage events go straight to the ledger's database: %s", error)
                    return False
                attempt.succeed()
        except BreakerOpen:
            return False
        if before != "closed":
            _log.warning("usage events go through Redis again")
        return True

    async def _to_database(self, events: list[UsageEvent]) -> bool:
        before = self.database.state
        try:
            with self.database.attempt() as attempt:
                try:
                    async with asyncio.timeout(_PATIENCE_S if before == "closed" else _LONG_PATIENCE_S):
                        refused = await record_all(self._ledger, events)
                except (TimeoutError, Unavailable):
                    attempt.fail()
                    if before == "closed":
                        _log.error("usage events wait in memory: neither Redis nor the ledger's database takes them")
                    return False
                attempt.succeed()
        except BreakerOpen:
            return False
        if before != "closed":
            _log.warning("usage events that waited in memory go to the ledger's database")
        for event, reason in refused.items():
            _log.error("the usage event of request %s is lost: %s", event.request_id, reason)
        self.dropped += len(refused)
        return True

    def _drop(self, count: int) -> None:
        """Lose the oldest events, none for a number below 1."""
        for _ in range(min(count, len(self._queue))):
            if self.dropped % _DROPS_PER_LINE == 0:
                _log.error("usage events are lost: they could be stored nowhere, and there is no more room for them")
            _tell([self._queue.popleft()])
            self.dropped += 1


async def record_all(ledger: Ledger, events: list[UsageEvent]) -> dict[UsageEvent, str]:
    """Record events. Those that the ledger refuses, returned with its reason, do not keep out the others."""
    try:
        await ledger.record(events)
    except ValueError as error:
        if len(events) == 1:
            return {events[0]: str(error)}
        half = len(events) // 2
        return await record_all(ledger, events[:half]) | await record_all(ledger, events[half:])
    return {}


def _tell(items: Iterable[_Item]) -> None:
    for item in items:
        if item.told is not None and not item.told.done():
            item.told.set_result(None)
