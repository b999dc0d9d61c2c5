"""Which ledger a URL means."""

from __future__ import annotations

from pathlib import Path

from ..errors import NotReady
from .ledger import Ledger
from .ledger_sqlite import SqliteLedger

SQLITE = "sqlite:///"
POSTGRES = ("postgresql://", "postgresql+psycopg://")
SCHEMES = (SQLITE, *POSTGRES)


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
