"""Which ledger the URLs mean."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from ..errors import NotReady
from .ledger import Ledger
from .ledger_sqlite import SqliteLedger

if TYPE_CHECKING:
    from .ledger_write_behind import WriteBehindLedger
    from .usage_stream import UsageStream

SQLITE = "sqlite:///"
POSTGRES = ("postgresql://", "postgresql+psycopg://")
SCHEMES = (SQLITE, *POSTGRES)

_PATIENCE_S = 10.0
"""Of a person at a terminal."""
_NEEDS_REDIS = "TTS_REDIS_URL needs redis: pip install 'qwen3-tts-server[redis]'."


def ledger_at(url: str, *, lease_s: float = 60.0) -> Ledger:
    """The ledger at `sqlite:///PATH` or `postgresql://USER:PASSWORD@HOST/DATABASE`, not started yet.

    Raises ValueError for another scheme, NotReady where PostgreSQL's driver is not installed.
    """
    if url.startswith(SQLITE):
        return SqliteLedger(Path(url.removeprefix(SQLITE)), lease_s=lease_s)
    if not url.startswith(POSTGRES):
        raise ValueError(f"A ledger's URL begins with {SQLITE} or {POSTGRES[0]}.")
    try:
        from .ledger_postgres import PostgresLedger  # needs psycopg, an extra
    except ImportError as error:
        raise NotReady("A ledger in PostgreSQL needs psycopg: pip install 'qwen3-tts-server[postgres]'.") from error
    return PostgresLedger(url, lease_s=lease_s)


def behind_redis(
    ledger: Ledger,
    url: str,
    *,
    flush_events: int,
    flush_interval_s: float,
    failures: int,
    memory_events: int,
    lease_s: float,
) -> WriteBehindLedger:
    """That ledger, with the usage events of free requests going through the Redis at `url`; see WriteBehind.

    Raises ValueError for a URL that is not understood, NotReady where Redis's client is not installed.
    """
    try:
        from .ledger_write_behind import WriteBehind, WriteBehindLedger  # needs redis, an extra
    except ImportError as error:
        raise NotReady(_NEEDS_REDIS) from error
    options = WriteBehind(flush_events, flush_interval_s, failures, memory_events, lease_s)
    return WriteBehindLedger(ledger, url, options)


def usage_stream_at(url: str) -> UsageStream:
    """The stream of usage events in the Redis at `url`, to look after it. Raises as `behind_redis`."""
    try:
        from .usage_stream import UsageStream  # needs redis, an extra
    except ImportError as error:
        raise NotReady(_NEEDS_REDIS) from error
    return UsageStream(url, timeout_s=_PATIENCE_S)
