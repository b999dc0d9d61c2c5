"""Pages of the books in PostgreSQL: locks and loads what Acts must see, stores what they changed.

Owns these statements, a fixed number for any number of acts. Everything that a law reads or writes belongs to one
account, so that one lock per account guards every page. The locks are taken in one order, before anything is read;
hence no two transactions ever wait for each other, and each of their statements sees all that was committed before
the locks were given.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from hashlib import blake2b
from typing import Any

from .ledger_page import Act, Page
from .postgres_session import Query

_LOCK = "SELECT pg_advisory_xact_lock(account) FROM unnest(%s::bigint[]) AS account"
_BALANCES = "SELECT account, micros FROM balances WHERE account = ANY(%s::text[])"
_CREDITS = """
    SELECT entries.account, entries.reference
    FROM unnest(%s::text[], %s::text[]) AS wanted (account, reference)
    JOIN entries ON kind = 'credit' AND entries.account = wanted.account AND entries.reference = wanted.reference
"""
_WANTED_KEYS = """
    SELECT key FROM holds WHERE id = ANY(%s::bigint[]) AND key IS NOT NULL
    UNION
    SELECT keys.id FROM unnest(%s::text[], %s::text[]) AS wanted (account, value)
    JOIN idempotency_keys AS keys ON keys.account = wanted.account AND keys.value = wanted.value
"""
_KEYS = f"SELECT id, account, value, digest, charged, at FROM idempotency_keys WHERE id IN ({_WANTED_KEYS})"
_HOLDS = f"""
    SELECT id, account, request_id, owner, key, price, held, wallet, state, at FROM holds
    WHERE id = ANY(%s::bigint[])
    UNION
    SELECT id, account, request_id, owner, key, price, held, wallet, state, at FROM holds
    WHERE state = 'open' AND key IN ({_WANTED_KEYS})
"""


def _insert(table: str, **columns: str) -> str:
    casts = ", ".join(f"%s::{kind}[]" for kind in columns.values())
    return f"INSERT INTO {table} ({', '.join(columns)}) SELECT * FROM unnest({casts})"


_ADD_KEYS = _insert(
    "idempotency_keys", id="bigint", account="text", value="text", digest="text", charged="bigint", at="float8"
)
_CHANGE_KEYS = """
    UPDATE idempotency_keys SET charged = new.charged
    FROM unnest(%s::bigint[], %s::bigint[]) AS new (id, charged) WHERE idempotency_keys.id = new.id
"""
_ADD_HOLDS = _insert(
    "holds",
    id="bigint",
    account="text",
    request_id="text",
    owner="text",
    key="bigint",
    price="bigint",
    held="bigint",
    wallet="integer",
    state="text",
    at="float8",
)
_CHANGE_HOLDS = """
    UPDATE holds SET price = new.price, held = new.held, state = new.state
    FROM unnest(%s::bigint[], %s::bigint[], %s::bigint[], %s::text[]) AS new (id, price, held, state)
    WHERE holds.id = new.id
"""
_ADD_WALLETS = "INSERT INTO balances (account, micros) SELECT account, 0 FROM unnest(%s::text[]) AS account"
_MOVE = """
    UPDATE balances SET micros = balances.micros + moved.micros
    FROM unnest(%s::text[], %s::bigint[]) AS moved (account, micros) WHERE balances.account = moved.account
"""
_ADD_ENTRIES = _insert(
    "entries", kind="text", account="text", hold="bigint", micros="bigint", reference="text", at="float8"
)
_ADD_EVENTS = _insert(
    "usage_events",
    hold="bigint",
    request_id="text",
    account="text",
    model="text",
    voice="text",
    characters="bigint",
    audio_ms="bigint",
    outcome="text",
    price_micros="bigint",
    at="float8",
    end_user="text",
)
_ADD_EVENTS_ONCE = f"{_ADD_EVENTS} ON CONFLICT (request_id) WHERE hold IS NULL DO NOTHING"


def lock(accounts: Iterable[str | None]) -> Query:
    """The locks of all these accounts, in the one order."""
    return _LOCK, (sorted({_lock_number(account) for account in accounts if account is not None}),)


def load(acts: Sequence[Act[Any]]) -> dict[str, Query]:
    """What a page for these acts takes, by the names of Page.load."""
    queries: dict[str, Query] = {"balances": (_BALANCES, (list({act.account for act in acts} - {None}),))}
    holds = [act.hold for act in acts if act.hold is not None]
    keys = _columns([(act.account, act.key) for act in acts if act.key is not None], 2)
    if holds or keys[0]:
        queries["keys"] = _KEYS, (holds, *keys)
        queries["holds"] = _HOLDS, (holds, holds, *keys)
    credits = [(act.account, act.reference) for act in acts if act.reference is not None]
    if credits:
        queries["credits"] = _CREDITS, _columns(credits, 2)
    return queries


def store(page: Page) -> list[Query]:
    """What makes the page's changes last."""
    keys, holds = page.changed_keys.values(), page.changed_holds.values()
    changes: list[tuple[str, list[tuple[Any, ...]]]] = [
        (_ADD_KEYS, [(k.id, k.account, k.value, k.digest, k.charged, k.at) for k in page.new_keys.values()]),
        (_CHANGE_KEYS, [(key.id, key.charged) for key in keys]),
        (
            _ADD_HOLDS,
            [
                (h.id, h.account, h.request_id, h.owner, h.key, h.price, h.held, h.wallet, h.state, h.at)
                for h in page.new_holds.values()
            ],
        ),
        (_CHANGE_HOLDS, [(hold.id, hold.price, hold.held, hold.state) for hold in holds]),
        (_ADD_WALLETS, [(account,) for account in page.new_wallets]),
        (_MOVE, list(page.moved.items())),
        (_ADD_ENTRIES, list(page.entries)),
        (_ADD_EVENTS, list(page.events)),
        (_ADD_EVENTS_ONCE, list(page.records)),
    ]
    return [(sql, _columns(rows, len(rows[0]))) for sql, rows in changes if rows]


def _columns(rows: Sequence[tuple[Any, ...]], width: int) -> tuple[list[Any], ...]:
    return tuple([row[index] for row in rows] for index in range(width))


def _lock_number(account: str) -> int:
    """Advisory locks are numbers, for all users of a database: 64 bits of a hash of our own."""
    digest = blake2b(account.encode("utf-8", "surrogatepass"), digest_size=8, person=b"tts-ledger").digest()
    return int.from_bytes(digest, "big", signed=True)
