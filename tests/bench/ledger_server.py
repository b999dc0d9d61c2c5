"""`qwen3-tts serve` around the tests' fake backend, with its ledger (`on`) or with one that does nothing (`off`)."""

from __future__ import annotations

import sys
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass

from api.src.domain import UsageEvent
from api.src.stores.ledger import IdempotencyKey
from tests.bench.fake_server import serve


@dataclass
class NullHold:
    """Forgets what it is told."""

    account: str
    request_id: str
    micros: int
    id: int = 0

    async def settle(self, event: UsageEvent) -> None: ...

    async def release(self, event: UsageEvent | None = None) -> None: ...

    async def extend(self, micros: int) -> None: ...


class NullLedger:
    """A ledger switched off: what a request costs without one."""

    async def start(self) -> None: ...

    async def close(self) -> None: ...

    @asynccontextmanager
    async def hold(
        self, account: str, request_id: str, micros: int, *, key: IdempotencyKey | None = None
    ) -> AsyncIterator[NullHold]:
        yield NullHold(account, request_id, micros)

    async def charge(self, event: UsageEvent, *, key: IdempotencyKey | None = None) -> None: ...

    async def credit(self, account: str, micros: int, reference: str) -> int:
        return micros

    async def balance(self, account: str) -> int | None:
        return None

    async def record(self, events: Sequence[UsageEvent]) -> None: ...

    async def usage(self, account: str | None, limit: int, *, user: str | None = None) -> list[UsageEvent]:
        return []

    async def accounts(self) -> dict[str, int | None]:
        return {}

    async def check(self) -> list[str]:
        return []


if __name__ == "__main__":
    serve(NullLedger() if sys.argv[1] == "off" else None)
