"""What every ledger with a writer thread does alike: its holds, and what cancellation and failures leave behind.

Owns the life of a hold on the event loop: no answer that comes too late, no cancelled task and no database that was
away leaves one open. The laws are ledger_laws.py's; the databases are ledger_sqlite.py's and ledger_postgres.py's.
"""

from __future__ import annotations

import asyncio
import secrets
from abc import ABC, abstractmethod
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager, suppress
from functools import partial
from typing import Any, TypeVar

from ..domain import UsageEvent
from ..errors import HoldLost, Unavailable
from . import ledger_laws as laws
from .ledger import MAX_MICROS, IdempotencyKey
from .ledger_page import Act, EventRow

_T = TypeVar("_T")

_EVENT = "request_id, account, model, voice, characters, audio_ms, outcome, price_micros, at, end_user"
_RETRY_RELEASE_S = 1.0


class StoredHold:
    """A hold of a StoredLedger; see ledger.Hold."""

    __slots__ = ("_ledger", "_settling", "account", "closed", "id", "micros", "request_id")

    def __init__(self, ledger: StoredLedger, id: int, account: str, request_id: str, micros: int) -> None:
        self._ledger = ledger
        self._settling: tuple[UsageEvent, asyncio.Future[None]] | None = None
        self.id = id
        self.account = account
        self.request_id = request_id
        self.micros = micros
        self.closed = False

    async def settle(self, event: UsageEvent) -> None:
        try:
            await self._ledger.answer(self._settle(event))
        except HoldLost:
            self.closed = True
            raise
        self.closed = True
        self._settling = None

    async def release(self, event: UsageEvent | None = None) -> None:
        await self._ledger.answer(self._ledger.submit(self._act(laws.release, event)))
        self.closed = True

    async def extend(self, micros: int) -> None:
        # Durable: a database server that forgot it would find the settlement too dear.
        await self._ledger.answer(self._ledger.submit(self._act(laws.extend, _amount(micros))))
        self.micros += micros

    def _settle(self, event: UsageEvent) -> asyncio.Future[None]:
        """Settle, or go on waiting for an earlier attempt that has not been answered: it may come to pass yet."""
        if self._settling is not None:
            attempted, settling = self._settling
            if attempted == event and not (settling.done() and settling.exception() is not None):
                return settling
        settling = self._ledger.submit(self._act(laws.settle, event))
        self._settling = event, settling
        return settling

    def _act(self, law: Any, *details: Any) -> Act[None]:
        return Act(self.account, lambda page: law(page, self.id, *details), hold=self.id)


class StoredLedger(ABC):
    """Holds and credits over a writer that makes Acts happen; see ledger.Ledger for the rest."""

    def __init__(self, lease_s: float, key_ttl_s: float) -> None:
        self._lease_s = lease_s
        self._key_ttl_s = key_ttl_s
        self._owner = secrets.token_hex(8)

    @abstractmethod
    def submit(self, act: Act[_T], *, durable: bool = True) -> asyncio.Future[_T]:
        """Queue an act. The future has its result once it is stored, or its exception once it is certain that it
        will not be; what was submitted first happens first. Cancelled, it does not happen, unless its transaction is
        under way. Raises Unavailable if the ledger is not open.

        Not `durable`: a power failure may undo it, unless a durable one was stored after it.
        """

    async def answer(self, future: asyncio.Future[_T]) -> _T:
        """The result of what was submitted. Raises Unavailable where nobody can say for too long."""
        return await asyncio.shield(future)

    @asynccontextmanager
    async def hold(
        self, account: str, request_id: str, micros: int, *, key: IdempotencyKey | None = None
    ) -> AsyncIterator[StoredHold]:
        # Not durable: a hold that a power failure undoes is a hold released, and a later settle makes both durable.
        opening = self.submit(self._opening(account, request_id, _amount(micros), key), durable=False)
        try:
            hold_id = await self.answer(opening)
        except (asyncio.CancelledError, Unavailable):
            opening.add_done_callback(partial(self._undo, account))  # it may still commit, or have committed
            raise
        hold = StoredHold(self, hold_id, account, request_id, micros)
        try:
            yield hold
        finally:
            if not hold.closed:
                await self._give_back(hold)

    async def charge(self, event: UsageEvent, *, key: IdempotencyKey | None = None) -> None:
        _amount(event.price_micros)
        charging = self.submit(self._charging(event, key) if event.price_micros or key else recording([event]))
        try:
            await self.answer(charging)
        except (asyncio.CancelledError, Unavailable):
            charging.cancel()  # nobody will hear of it
            raise

    async def record(self, events: Sequence[UsageEvent]) -> None:
        await self.answer(self.submit(recording(events)))

    async def credit(self, account: str, micros: int, reference: str) -> int:
        return await self.answer(self.submit(self._crediting(account, _amount(micros), reference)))

    def _crediting(self, account: str, micros: int, reference: str) -> Act[int]:
        return Act(account, lambda page: laws.add_credit(page, account, micros, reference), reference=reference)

    def _opening(self, account: str, request_id: str, micros: int, key: IdempotencyKey | None) -> Act[int]:
        details = (self._owner, self._key_ttl_s, account, request_id, micros, key)
        return Act(account, lambda page: laws.open_hold(page, *details), key=None if key is None else key.value)

    def _charging(self, event: UsageEvent, key: IdempotencyKey | None) -> Act[None]:
        details = (self._owner, self._key_ttl_s, event, key)
        return Act(event.account, lambda page: laws.charge(page, *details), key=None if key is None else key.value)

    async def _give_back(self, hold: StoredHold) -> None:
        """Release what was left open. A settle that is still queued comes first; then this changes nothing."""
        hold.closed = True
        releasing = self._release_later(hold.account, hold.id)
        if releasing is not None:
            with suppress(Unavailable):  # tried again in the background: the caller has nothing to add
                await self.answer(releasing)

    def _undo(self, account: str, opening: asyncio.Future[int]) -> None:
        if not opening.cancelled() and opening.exception() is None:
            self._release_later(account, opening.result())

    def _release_later(self, account: str, hold_id: int) -> asyncio.Future[None] | None:
        """Queue a release, repeated until it commits; None once the ledger is closed: that releases all."""
        try:
            releasing = self.submit(laws.releasing(account, hold_id, "released"), durable=False)
        except Unavailable:
            return None
        releasing.add_done_callback(partial(self._retry_release, account, hold_id))
        return releasing

    def _retry_release(self, account: str, hold_id: int, releasing: asyncio.Future[None]) -> None:
        if not releasing.cancelled() and releasing.exception() is not None:
            releasing.get_loop().call_later(_RETRY_RELEASE_S, self._release_later, account, hold_id)


def recording(events: Sequence[UsageEvent]) -> Act[None]:
    """Stores events without a hold. Raises ValueError if one of them costs something."""
    if any(event.price_micros for event in events):
        raise ValueError("What costs something needs a hold.")
    rows = [EventRow.of(event, None, 0) for event in events]
    return Act(None, lambda page: page.records.extend(rows))


def usage_query(account: str | None, user: str | None, limit: int, mark: str) -> tuple[str, tuple[object, ...]]:
    """The query of Ledger.usage and its values; `mark` stands for a value. Its columns are a UsageEvent's fields."""
    conditions = {f"account = {mark}": account, f"end_user = {mark}": user}
    wanted = {condition: value for condition, value in conditions.items() if value is not None}
    where = " AND ".join([*wanted, *(["end_user <> ''"] if user else [])])  # the last one names the index
    query = f"SELECT {_EVENT} FROM usage_events {where and 'WHERE'} {where} ORDER BY id DESC LIMIT {mark}"
    return query, (*wanted.values(), max(limit, 0))


def _amount(micros: int) -> int:
    if not 0 <= micros <= MAX_MICROS:
        raise ValueError(f"An amount is from 0 to {MAX_MICROS} micro-units, not {micros}.")
    return micros
