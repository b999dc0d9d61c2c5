"""`qwen3-tts serve` around the tests' fake backend, with its ledger (`on`) or with one that does nothing (`off`)."""

from __future__ import annotations

import sys
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass

import uvicorn

from api.src.cli import GRACE_S
from api.src.domain import UsageEvent
from api.src.main import create_app
from api.src.settings import Settings
from api.src.stores.ledger import IdempotencyKey
from tests.fakes import FakeBackend


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


def main() -> None:
    settings = Settings()
    app = create_app(settings, backend=FakeBackend(seconds_per_segment=3.0))
    if sys.argv[1] == "off":
        app.state.tts_service.ledger = NullLedger()
    uvicorn.run(
        app,
        host=settings.host,
        port=settings.port,
        log_config=None,
        access_log=False,
        timeout_graceful_shutdown=GRACE_S,
    )


if __name__ == "__main__":
    main()
