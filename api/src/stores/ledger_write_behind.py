"""A ledger whose free requests do not wait for its database: their usage events go there later, through Redis.

Owns which hold goes which way. A request that costs something, or has an idempotency key, has its hold in the wrapped
ledger and is told there, in the transaction that moves the money. A request that costs nothing needs no hold: what it
used goes into usage_outbox.py, through the stream (usage_stream.py), and by usage_flusher.py into the wrapped ledger.
So Redis never has money in it, and what the ledger shows lags behind by the flusher's interval for free requests alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractAsyncContextManager, AsyncExitStack
from dataclasses import dataclass, replace
from types import TracebackType

from ..domain import UsageBacklog, UsageEvent
from ..errors import Unavailable
from .ledger import Hold, IdempotencyKey, Ledger
from .usage_flusher import Flusher
from .usage_outbox import Outbox
from .usage_stream import UsageStream

_CLOSE_S = 5.0
"""For each of the two ends of the way, when the ledger is closed."""


@dataclass(frozen=True, slots=True)
class WriteBehind:
    """How events go through Redis; times in seconds.

    Every `flush_interval_s` they are passed on, `flush_events` at a time. After `failures` of Redis in a row they go
    past it for a while. `memory_events` may wait in this process while nothing takes them. Events that another process
    has taken, and not passed on for `lease_s`, are taken over.
    """

    flush_events: int = 500
    flush_interval_s: float = 1.0
    failures: int = 5
    memory_events: int = 10_000
    lease_s: float = 60.0
    redis_timeout_s: float = 1.0


class WriteBehindLedger:
    """See ledger.Ledger. Wraps a ledger that is not started yet; `url` is Redis's. It starts also where Redis is away.

    Raises ValueError for an URL that is not understood.
    """

    def __init__(self, ledger: Ledger, url: str, options: WriteBehind) -> None:
        self._ledger = ledger
        self._stream = UsageStream(url, timeout_s=options.redis_timeout_s)
        self._outbox = Outbox(
            self._stream,
            ledger,
            failures=options.failures,
            capacity=options.memory_events,
            batch=options.flush_events,
        )
        self._flusher = Flusher(
            self._stream,
            ledger,
            batch=options.flush_events,
            interval_s=options.flush_interval_s,
            lease_s=options.lease_s,
        )
        self._open = False

    def backlog(self) -> UsageBacklog:
        """What is on its way, without asking anybody."""
        there = self._flusher.backlog
        return UsageBacklog(
            stream=there.events,
            oldest_s=there.oldest_s,
            memory=self._outbox.waiting,
            dead_letters=there.dead_letters,
            dropped=self._outbox.dropped,
        )

    def breakers(self) -> dict[str, str]:
        """The states of the circuit breakers on the way of usage events, by what they guard."""
        return {"usage_redis": self._outbox.redis.state, "usage_ledger": self._outbox.database.state}

    async def start(self) -> None:
        await self._ledger.start()
        self._open = True
        self._outbox.start()
        self._flusher.start()

    async def close(self) -> None:
        try:
            if self._open:
                self._open = False
                await self._outbox.close(_CLOSE_S)
                await self._flusher.close(_CLOSE_S)
                await self._stream.close()
        finally:
            await self._ledger.close()

    def hold(
        self, account: str, request_id: str, micros: int, *, key: IdempotencyKey | None = None
    ) -> AbstractAsyncContextManager[Hold]:
        if micros or key is not None:
            return self._ledger.hold(account, request_id, micros, key=key)
        return FreeHold(self._ledger, self._outbox, account, request_id)

    async def charge(self, event: UsageEvent, *, key: IdempotencyKey | None = None) -> None:
        if event.price_micros or key is not None:
            await self._ledger.charge(event, key=key)
        else:
            await self._outbox.put(event)

    async def credit(self, account: str, micros: int, reference: str) -> int:
        return await self._ledger.credit(account, micros, reference)

    async def balance(self, account: str) -> int | None:
        return await self._ledger.balance(account)

    async def record(self, events: Sequence[UsageEvent]) -> None:
        await self._ledger.record(events)

    async def usage(self, account: str | None, limit: int, *, user: str | None = None) -> list[UsageEvent]:
        """Free requests appear with the next flush."""
        return await self._ledger.usage(account, limit, user=user)

    async def accounts(self) -> dict[str, int | None]:
        return await self._ledger.accounts()

    async def check(self) -> list[str]:
        return await self._ledger.check()


class FreeHold(AbstractAsyncContextManager["FreeHold"]):
    """A hold of nothing, which no database knows; see ledger.Hold. Extended, it becomes one of the wrapped ledger."""

    __slots__ = ("_closed", "_ledger", "_outbox", "_stack", "_stored", "account", "request_id")

    def __init__(self, ledger: Ledger, outbox: Outbox, account: str, request_id: str) -> None:
        self._ledger = ledger
        self._outbox = outbox
        self._stack: AsyncExitStack | None = None
        self._stored: Hold | None = None
        self._closed = False
        self.account = account
        self.request_id = request_id

    @property
    def id(self) -> int:
        """0 until it is extended."""
        return self._stored.id if self._stored else 0

    @property
    def micros(self) -> int:
        return self._stored.micros if self._stored else 0

    async def __aenter__(self) -> FreeHold:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._closed = True
        if self._stack is not None:
            await self._stack.__aexit__(kind, error, traceback)

    async def settle(self, event: UsageEvent) -> None:
        if self._stored is not None:
            await self._stored.settle(event)
            return
        self._require_open()
        if event.account != self.account or event.request_id != self.request_id:
            raise ValueError("The usage event belongs to another request.")
        if event.price_micros:
            raise ValueError(f"{event.price_micros} micro-units do not fit into a hold of 0.")
        await self._tell(event)

    async def release(self, event: UsageEvent | None = None) -> None:
        if self._stored is not None:
            await self._stored.release(event)
            return
        self._require_open()
        if event is None:
            self._closed = True
        else:
            await self._tell(replace(event, price_micros=0))

    async def extend(self, micros: int) -> None:
        if self._stored is not None:
            await self._stored.extend(micros)
            return
        self._require_open()
        if micros:
            stack = AsyncExitStack()
            self._stored = await stack.enter_async_context(self._ledger.hold(self.account, self.request_id, micros))
            self._stack = stack

    async def _tell(self, event: UsageEvent) -> None:
        self._closed = True  # it will be on its way, whatever happens to the caller
        try:
            await self._outbox.put(event)
        except Unavailable:
            self._closed = False
            raise

    def _require_open(self) -> None:
        if self._closed:
            raise RuntimeError("The hold is closed already.")
