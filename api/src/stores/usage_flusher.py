"""Passes usage events on from the stream in Redis to the ledger, in batches.

Owns the task that does so, and the order that makes it safe: first into the ledger, which takes an event once, then out
of the stream. What fails in between is done again.
"""

from __future__ import annotations

import asyncio
import logging
import time
from contextlib import suppress

from ..domain import UsageEvent
from ..errors import Unavailable
from .ledger import Ledger
from .usage_entry import Unreadable, unpack
from .usage_outbox import record_all
from .usage_stream import Backlog, Entry, StreamAway, UsageStream

_SHORTEST_PAUSE_S = 0.25
_LONGEST_PAUSE_S = 10.0
_FORGET_LEASES = 10
"""So many leases without a sign of life make a consumer without anything pending a dead one."""

_log = logging.getLogger(__name__)


class Flusher:
    """Flushes every `interval_s` seconds at most `batch` events at a time; without a pause where there are more.

    What another consumer has not been done with for `lease_s` seconds is taken over.
    """

    def __init__(self, stream: UsageStream, ledger: Ledger, *, batch: int, interval_s: float, lease_s: float) -> None:
        self._stream, self._ledger = stream, ledger
        self._batch, self._interval_s, self._lease_s = batch, interval_s, lease_s
        self._claim_at = 0.0
        self._sampled = Backlog(0, 0.0, 0), time.monotonic()
        self._stopping = asyncio.Event()
        self._task: asyncio.Task[None] | None = None

    @property
    def backlog(self) -> Backlog:
        """As it was after the last attempt; what waited then has since become older."""
        backlog, sampled = self._sampled
        return backlog._replace(oldest_s=backlog.oldest_s + time.monotonic() - sampled) if backlog.events else backlog

    def start(self) -> None:
        self._task = asyncio.create_task(self._run(), name="usage flusher")

    async def close(self, within_s: float) -> None:
        """Flush once more all that there is, as far as that is done in `within_s` seconds."""
        self._stopping.set()
        if self._task is not None:
            await asyncio.wait([self._task], timeout=within_s)
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)

    async def _run(self) -> None:
        pause, warned = _SHORTEST_PAUSE_S, False
        while True:
            last = self._stopping.is_set()
            try:
                if not warned:
                    for warning in await self._stream.warnings():
                        _log.warning("%s", warning)
                    warned = True
                more = await self._flush()
            except Exception as error:
                self._note(error, first=pause == _SHORTEST_PAUSE_S)
                if last:
                    return
                await self._rest(pause)
                pause = min(2 * pause, _LONGEST_PAUSE_S)
            else:
                pause = _SHORTEST_PAUSE_S
                if last and not more:
                    return
                if not more:
                    await self._rest(self._interval_s)

    async def _rest(self, seconds: float) -> None:
        """Wait, but not while stopping."""
        with suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                await self._stopping.wait()

    def _note(self, error: Exception, *, first: bool) -> None:
        """Log it, but an absence only once."""
        if not isinstance(error, StreamAway | Unavailable):
            _log.exception("the flusher of usage events failed", exc_info=error)
        elif first:
            _log.warning("usage events cannot be passed on: %s", str(error.__cause__ or error).partition("\n")[0])

    async def _flush(self) -> bool:
        """Pass on one batch; return whether there may be more."""
        claimed = await self._claim() if time.monotonic() >= self._claim_at else []
        entries = claimed or await self._stream.read(self._batch)
        try:
            await self._pass_on(entries)
        except Unavailable:
            await self._sample()
            raise
        await self._sample()
        return bool(claimed) or len(entries) == self._batch

    async def _sample(self) -> None:
        self._sampled = await self._stream.backlog(), time.monotonic()

    async def _claim(self) -> list[Entry]:
        """What a dead consumer has left behind; once there is nothing more, also forget such consumers."""
        entries = await self._stream.claim(self._batch, self._lease_s)
        if not entries:
            await self._stream.forget_dead(_FORGET_LEASES * self._lease_s)
            self._claim_at = time.monotonic() + self._lease_s / 3
        return entries

    async def _pass_on(self, entries: list[Entry]) -> None:
        events: dict[bytes, UsageEvent] = {}
        faults: dict[bytes, str] = {}
        for entry in entries:
            try:
                if entry.fields is not None:
                    events[entry.id] = unpack(entry.fields)
            except Unreadable as error:
                faults[entry.id] = str(error)
        refused = await record_all(self._ledger, list(events.values())) if events else {}
        faults |= {id: refused[event] for id, event in events.items() if event in refused}
        await self._stream.done([entry for entry in entries if entry.id not in faults])
        for entry in entries:
            if entry.id in faults:
                _log.error("entry %s of the usage stream is a dead letter: %s", entry.id.decode(), faults[entry.id])
                await self._stream.bury([entry], faults[entry.id])
