"""Pages of the books in a SQLite file: loads what Acts must see, stores what they changed.

Owns these statements. They run in a transaction that has the file's write lock, which locks every page.
"""

from __future__ import annotations

from collections.abc import Sequence
from sqlite3 import Cursor
from typing import Any

from .ledger_page import Act, Attempt, Page, attempt_all

_KEY = "SELECT id, account, value, digest, charged, at FROM idempotency_keys"
_HOLD = "SELECT id, account, request_id, owner, key, price, held, wallet, state, at FROM holds"
_LAST_ID = {
    "holds": "SELECT coalesce(max(id), 0) FROM holds",
    # Never used again (AUTOINCREMENT): closed holds may outlive the row of their key.
    "idempotency_keys": "SELECT coalesce(max(seq), 0) FROM sqlite_sequence WHERE name = 'idempotency_keys'",
}
_ADD_HOLD = """
    INSERT INTO holds (id, account, request_id, owner, key, price, held, wallet, state, at)
    VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?)
"""
_ADD_KEY = "INSERT INTO idempotency_keys (id, account, value, digest, charged, at) VALUES (?, ?, ?, ?, ?, ?)"
_CHANGE_KEY = "UPDATE idempotency_keys SET charged = ? WHERE id = ?"
_CHANGE_HOLD = "UPDATE holds SET price = ?, held = ?, state = ? WHERE id = ?"
_MOVE = "UPDATE balances SET micros = micros + ? WHERE account = ?"
_ADD_ENTRY = "INSERT INTO entries (kind, account, hold, micros, reference, at) VALUES (?, ?, ?, ?, ?, ?)"
_ADD_EVENT = """
    INSERT INTO usage_events
        (hold, request_id, account, model, voice, characters, audio_ms, outcome, price_micros, at, end_user)
    VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)
"""
_ADD_EVENT_ONCE = f"{_ADD_EVENT} ON CONFLICT (request_id) WHERE hold IS NULL DO NOTHING"


def perform(db: Cursor, acts: Sequence[Act[Any]], now: float) -> list[Attempt]:
    """Let acts happen in the open transaction, on one page; `now` is Unix time in seconds."""
    page = Page(now, _Ids(db))
    for account in {act.account for act in acts} - {None}:
        page.load(balances=db.execute("SELECT account, micros FROM balances WHERE account = ?", (account,)))
    for act in acts:
        _load(db, page, act)
    attempts = attempt_all(acts, page)
    _store(db, page)
    return attempts


class _Ids:
    """Ids for new rows of one transaction: what the database has not used yet, and then on from there."""

    def __init__(self, db: Cursor) -> None:
        self._db = db
        self._last: dict[str, int] = {}

    def __call__(self, table: str) -> int:
        if table not in self._last:
            self._last[table] = int(self._db.execute(_LAST_ID[table]).fetchone()[0])
        self._last[table] += 1
        return self._last[table]


def _load(db: Cursor, page: Page, act: Act[Any]) -> None:
    """Add to a page what an act must see beside its balance, and is not there yet."""
    if act.hold is not None and act.hold not in page.holds:
        page.load(holds=db.execute(f"{_HOLD} WHERE id = ?", (act.hold,)))
    for key in _keys(db, page, act):
        if key[0] not in page.keys:
            page.load(keys=[key])
            sharing = db.execute(f"{_HOLD} WHERE key = ? AND state = 'open'", (key[0],))
            page.load(holds=[hold for hold in sharing.fetchall() if hold[0] not in page.holds])
    if act.reference is not None:
        found = "SELECT account, reference FROM entries WHERE kind = 'credit' AND account = ? AND reference = ?"
        page.load(credits=db.execute(found, (act.account, act.reference)))


def _keys(db: Cursor, page: Page, act: Act[Any]) -> list[tuple[Any, ...]]:
    """The rows of the keys that an act names, by its hold or by their value."""
    hold = None if act.hold is None else page.holds.get(act.hold)
    found: list[tuple[Any, ...]] = []
    if hold is not None and hold.key is not None:
        found += db.execute(f"{_KEY} WHERE id = ?", (hold.key,))
    if act.key is not None:
        found += db.execute(f"{_KEY} WHERE account = ? AND value = ?", (act.account, act.key))
    return found


def _store(db: Cursor, page: Page) -> None:
    db.executemany(_ADD_KEY, [(k.id, k.account, k.value, k.digest, k.charged, k.at) for k in page.new_keys.values()])
    db.executemany(_CHANGE_KEY, [(key.charged, key.id) for key in page.changed_keys.values()])
    db.executemany(
        _ADD_HOLD,
        [
            (h.id, h.account, h.request_id, h.owner, h.key, h.price, h.held, h.wallet, h.state, h.at)
            for h in page.new_holds.values()
        ],
    )
    db.executemany(_CHANGE_HOLD, [(h.price, h.held, h.state, h.id) for h in page.changed_holds.values()])
    db.executemany("INSERT INTO balances (account, micros) VALUES (?, 0)", [(account,) for account in page.new_wallets])
    db.executemany(_MOVE, [(micros, account) for account, micros in page.moved.items()])
    db.executemany(_ADD_ENTRY, page.entries)
    db.executemany(_ADD_EVENT, page.events)
    db.executemany(_ADD_EVENT_ONCE, page.records)
