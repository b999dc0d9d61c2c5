"""Pages of the books in a SQLite file: loads what an Act must see, stores what it changed.

Owns these statements. They run in a transaction that has the file's write lock, which locks every page.
"""

from __future__ import annotations

from collections.abc import Iterable
from sqlite3 import Cursor
from typing import Any, TypeVar

from .ledger_page import Act, EventRow, Page

_T = TypeVar("_T")

_KEY = "SELECT id, account, value, digest, charged, at FROM idempotency_keys"
_HOLD = "SELECT id, account, request_id, owner, key, price, held, wallet, state, at FROM holds"
_NEXT_ID = {
    "holds": "SELECT coalesce(max(id), 0) + 1 FROM holds",
    # Never used again (AUTOINCREMENT): closed holds may outlive the row of their key.
    "idempotency_keys": "SELECT coalesce(max(seq), 0) + 1 FROM sqlite_sequence WHERE name = 'idempotency_keys'",
}
_ADD_HOLD = """
    INSERT INTO holds (id, account, request_id, owner, key, price, held, wallet, state, at)
    VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?)
"""
_ADD_KEY = "INSERT INTO idempotency_keys (id, account, value, digest, charged, at) VALUES (?, ?, ?, ?, ?, ?)"
_ADD_ENTRY = "INSERT INTO entries (kind, account, hold, micros, reference, at) VALUES (?, ?, ?, ?, ?, ?)"
_ADD_EVENT = """
    INSERT INTO usage_events
        (hold, request_id, account, model, voice, characters, audio_ms, outcome, price_micros, at, end_user)
    VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)
"""
_ADD_EVENT_ONCE = f"{_ADD_EVENT} ON CONFLICT (request_id) WHERE hold IS NULL DO NOTHING"


def perform(db: Cursor, act: Act[_T], now: float) -> _T:
    """Let one act happen in the open transaction; `now` is Unix time in seconds."""

    def new_id(table: str) -> int:
        return int(db.execute(_NEXT_ID[table]).fetchone()[0])

    page = Page(now, new_id)
    _load(db, page, act)
    result = act.apply(page)
    _store(db, page)
    return result


def record(db: Cursor, events: Iterable[EventRow]) -> None:
    """Add events that have no hold, those that are there already excepted."""
    db.executemany(_ADD_EVENT_ONCE, events)


def _load(db: Cursor, page: Page, act: Act[Any]) -> None:
    page.load(balances=db.execute("SELECT account, micros FROM balances WHERE account = ?", (act.account,)))
    if act.hold is not None:
        page.load(holds=db.execute(f"{_HOLD} WHERE id = ?", (act.hold,)))
        for hold in list(page.holds.values()):
            page.load(keys=db.execute(f"{_KEY} WHERE id = ?", (hold.key,)))
    if act.key is not None:
        page.load(keys=db.execute(f"{_KEY} WHERE account = ? AND value = ?", (act.account, act.key)))
    for key in page.keys:
        others = db.execute(f"{_HOLD} WHERE key = ? AND state = 'open' AND id IS NOT ?", (key, act.hold))
        page.load(holds=others)
    if act.reference is not None:
        found = "SELECT account, reference FROM entries WHERE kind = 'credit' AND account = ? AND reference = ?"
        page.load(credits=db.execute(found, (act.account, act.reference)))


def _store(db: Cursor, page: Page) -> None:
    for key in page.new_keys.values():
        db.execute(_ADD_KEY, (key.id, key.account, key.value, key.digest, key.charged, key.at))
    for key in page.changed_keys.values():
        db.execute("UPDATE idempotency_keys SET charged = ? WHERE id = ?", (key.charged, key.id))
    for row in page.new_holds.values():
        who = (row.id, row.account, row.request_id, row.owner, row.key)
        db.execute(_ADD_HOLD, (*who, row.price, row.held, row.wallet, row.state, row.at))
    for row in page.changed_holds.values():
        db.execute(
            "UPDATE holds SET price = ?, held = ?, state = ? WHERE id = ?", (row.price, row.held, row.state, row.id)
        )
    for account in page.new_wallets:
        db.execute("INSERT INTO balances (account, micros) VALUES (?, 0)", (account,))
    for account, micros in page.moved.items():
        db.execute("UPDATE balances SET micros = micros + ? WHERE account = ?", (micros, account))
    for entry in page.entries:
        db.execute(_ADD_ENTRY, entry)
    for event in page.events:
        db.execute(_ADD_EVENT, event)
