"""The transactions that keep the laws of ledger.py in a SQLite file, and what the books say.

Owns every statement that moves money. Each function runs inside a transaction that has the write lock and raises before
it is half done or is undone as a whole: begin, commit and rollback belong to sqlite_writer.py, leases to
ledger_sqlite.py.
"""

from __future__ import annotations

import time
from sqlite3 import Cursor

from ..domain import UsageEvent
from ..errors import HoldLost, InsufficientBalance, InvalidRequest
from .ledger import IdempotencyKey

HoldRow = tuple[str, str, "int | None", int, int, int, str]
"""What _FIND_HOLD selects; plain, because this is the hot path."""

_FIND_HOLD = "SELECT account, request_id, key, price, held, wallet, state FROM holds WHERE id = ?"
_ADD_HOLD = """
    INSERT INTO holds (account, request_id, owner, key, price, held, wallet, at) VALUES (?, ?, ?, ?, ?, 0, ?, ?)
"""
_ADD_ENTRY = "INSERT INTO entries (kind, account, hold, micros, at) VALUES (?, ?, ?, ?, ?)"
_ADD_CREDIT = """
    INSERT INTO entries (kind, account, micros, reference, at) VALUES ('credit', ?, ?, ?, ?) ON CONFLICT DO NOTHING
"""
_ADD_TO_WALLET = """
    INSERT INTO balances (account, micros) VALUES (?, ?)
    ON CONFLICT (account) DO UPDATE SET micros = micros + excluded.micros
"""
_ADD_USAGE = """
    INSERT INTO usage_events
        (hold, request_id, account, model, voice, characters, audio_ms, outcome, price_micros, at)
    VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?)
"""
_USAGE = """
    SELECT request_id, account, model, voice, characters, audio_ms, outcome, price_micros, at
    FROM usage_events
"""


def open_hold(
    db: Cursor,
    owner: str,
    key_ttl_s: float,
    account: str,
    request_id: str,
    micros: int,
    key: IdempotencyKey | None,
) -> int:
    """Reserve what the key, if any, does not cover yet; return the hold's id."""
    now = time.time()
    balance = get_balance(db, account)
    wallet = balance is not None
    key_id, covered = None, 0
    if key is not None:
        key_id = _use_key(db, account, key, now, key_ttl_s)
        covered = _charged(db, key_id) + _reserved(db, key_id, wallet)
    db.execute(_ADD_HOLD, (account, request_id, owner, key_id, micros, wallet, now))
    hold_id = db.lastrowid
    assert hold_id is not None
    if micros > covered:
        _reserve(db, hold_id, account, micros - covered, balance, now)
    return hold_id


def extend(db: Cursor, hold_id: int, micros: int) -> None:
    """Raise an open hold's price and reserve what that leaves uncovered."""
    account, _, key, price, held, wallet, state = find_hold(db, hold_id)
    _must_be_open(state)
    price += micros
    covered = held if key is None else _charged(db, key) + _reserved(db, key, wallet)
    db.execute("UPDATE holds SET price = ? WHERE id = ?", (price, hold_id))
    if price > covered:
        balance = get_balance(db, account) if wallet else None
        _reserve(db, hold_id, account, price - covered, balance, time.time())


def settle(db: Cursor, hold_id: int, event: UsageEvent) -> None:
    """Close an open hold with a charge."""
    hold = find_hold(db, hold_id)
    account, request_id, _, price, _, _, state = hold
    _must_be_open(state)
    if event.account != account or event.request_id != request_id:
        raise ValueError("The usage event belongs to another request.")
    if not 0 <= event.price_micros <= price:
        raise ValueError(f"{event.price_micros} micro-units do not fit into a hold of {price}.")
    _end(db, hold_id, hold, "settled", event.price_micros, event)


def release(db: Cursor, hold_id: int, event: UsageEvent | None) -> None:
    """Close an open hold without a charge; a lost one is released already and only gets its event."""
    hold = find_hold(db, hold_id)
    if hold[-1] != "lost":
        _must_be_open(hold[-1])
        _end(db, hold_id, hold, "released", 0, event)
    elif event is not None:
        _add_usage(db, hold_id, event, 0)


def release_if_open(db: Cursor, hold_id: int, state: str) -> None:
    """Give a hold back, whatever became of it before; `state` is what it is from now on."""
    hold = find_hold(db, hold_id)
    if hold[-1] == "open":
        _end(db, hold_id, hold, state, 0, None)


def find_hold(db: Cursor, hold_id: int) -> HoldRow:
    found: HoldRow = db.execute(_FIND_HOLD, (hold_id,)).fetchone()
    return found


def add_credit(db: Cursor, account: str, micros: int, reference: str) -> int:
    """Fill the wallet, once per reference; return the balance."""
    if db.execute(_ADD_CREDIT, (account, micros, reference, time.time())).rowcount:
        db.execute(_ADD_TO_WALLET, (account, micros))
    balance = get_balance(db, account)
    assert balance is not None
    return balance


def get_balance(db: Cursor, account: str) -> int | None:
    """None without a wallet."""
    found = db.execute("SELECT micros FROM balances WHERE account = ?", (account,)).fetchone()
    return None if found is None else int(found[0])


def get_usage(db: Cursor, account: str | None, limit: int) -> list[UsageEvent]:
    """Newest first."""
    if account is None:
        rows = db.execute(f"{_USAGE} ORDER BY id DESC LIMIT ?", (limit,))
    else:
        rows = db.execute(f"{_USAGE} WHERE account = ? ORDER BY id DESC LIMIT ?", (account, limit))
    return [UsageEvent(*row) for row in rows.fetchall()]


def forget_keys(db: Cursor, until: float) -> None:
    """Drop the keys first used before `until`, those of open holds excepted."""
    db.execute(
        "DELETE FROM idempotency_keys WHERE at <= ?"
        " AND NOT EXISTS (SELECT 1 FROM holds WHERE holds.key = idempotency_keys.id AND state = 'open')",
        (until,),
    )


def _must_be_open(state: str) -> None:
    if state == "lost":
        raise HoldLost("The server lost track of this request for too long to bill it. It was not charged.")
    if state != "open":
        raise RuntimeError(f"The hold is {state} already.")


def _reserve(db: Cursor, hold_id: int, account: str, micros: int, balance: int | None, now: float) -> None:
    """Move `micros` from the balance (None: no wallet to move) into the hold."""
    if balance is not None:
        if micros > balance:
            raise InsufficientBalance(balance, micros)
        db.execute("UPDATE balances SET micros = micros - ? WHERE account = ?", (micros, account))
    _put(db, hold_id, account, micros, now)


def _put(db: Cursor, hold_id: int, account: str, micros: int, now: float) -> None:
    db.execute("UPDATE holds SET held = held + ? WHERE id = ?", (micros, hold_id))
    db.execute(_ADD_ENTRY, ("hold", account, hold_id, micros, now))


def _end(db: Cursor, hold_id: int, hold: HoldRow, state: str, price: int, event: UsageEvent | None) -> None:
    """Close an open hold: charge `price` less what its key has paid, hand the rest on or back."""
    account, _, key, _, held, wallet, _ = hold
    now = time.time()
    charge = price
    if key is not None:
        charge = max(0, price - _charged(db, key))
        held += _pull(db, hold_id, key, wallet, charge - held, now)
    db.execute("UPDATE holds SET state = ?, held = 0 WHERE id = ?", (state, hold_id))
    if charge:
        db.execute(_ADD_ENTRY, ("charge", account, hold_id, charge, now))
        if key is not None:
            db.execute("UPDATE idempotency_keys SET charged = charged + ? WHERE id = ?", (charge, key))
    left = held - charge
    if left:
        db.execute(_ADD_ENTRY, ("release", account, hold_id, left, now))
        if key is not None:
            left -= _hand_on(db, key, wallet, left, now)
        if wallet:
            db.execute("UPDATE balances SET micros = micros + ? WHERE account = ?", (left, account))
    if event is not None:
        _add_usage(db, hold_id, event, charge)


def _add_usage(db: Cursor, hold_id: int, event: UsageEvent, charged: int) -> None:
    row = (hold_id, event.request_id, event.account, event.model, event.voice, event.characters)
    db.execute(_ADD_USAGE, (*row, event.audio_ms, event.outcome, charged, event.at))


# Idempotency keys


def _use_key(db: Cursor, account: str, key: IdempotencyKey, now: float, ttl_s: float) -> int:
    """The id of the key; a new one where none of that value is young enough."""
    found = db.execute(
        "SELECT id, digest FROM idempotency_keys WHERE account = ? AND value = ? AND at > ?",
        (account, key.value, now - ttl_s),
    ).fetchone()
    if found is None:
        db.execute(
            "INSERT INTO idempotency_keys (account, value, digest, at) VALUES (?, ?, ?, ?)",
            (account, key.value, key.digest, now),
        )
        assert db.lastrowid is not None
        return db.lastrowid
    if found[1] != key.digest:
        raise InvalidRequest(
            "This Idempotency-Key was used with a different request body.",
            param="Idempotency-Key",
            code="idempotency_key_reused",
        )
    return int(found[0])


def _charged(db: Cursor, key: int) -> int:
    return int(db.execute("SELECT charged FROM idempotency_keys WHERE id = ?", (key,)).fetchone()[0])


def _reserved(db: Cursor, key: int, wallet: int) -> int:
    """What the key's open holds reserve, of those that do or do not move the wallet."""
    query = "SELECT coalesce(sum(held), 0) FROM holds WHERE key = ? AND state = 'open' AND wallet = ?"
    return int(db.execute(query, (key, wallet)).fetchone()[0])


def _pull(db: Cursor, hold_id: int, key: int, wallet: int, missing: int, now: float) -> int:
    """Take `missing` from the reserves of the key's other open holds; return what was taken."""
    taken = 0
    if missing <= 0:
        return taken
    others = db.execute(
        "SELECT id, account, held FROM holds"
        " WHERE key = ? AND state = 'open' AND wallet = ? AND id <> ? AND held > 0 ORDER BY id",
        (key, wallet, hold_id),
    ).fetchall()
    for other, account, held in others:
        part = min(held, missing - taken)
        if part:
            db.execute("UPDATE holds SET held = held - ? WHERE id = ?", (part, other))
            db.execute(_ADD_ENTRY, ("release", account, other, part, now))
            _put(db, hold_id, account, part, now)
            taken += part
    return taken


def _hand_on(db: Cursor, key: int, wallet: int, left: int, now: float) -> int:
    """Give the dearest open hold of the key what it lacks (then all others are covered); return how much."""
    dearest = db.execute(
        "SELECT id, account, price FROM holds"
        " WHERE key = ? AND state = 'open' AND wallet = ? ORDER BY price DESC, id LIMIT 1",
        (key, wallet),
    ).fetchone()
    if dearest is None:
        return 0
    heir, account, price = dearest
    part = min(left, max(0, price - _charged(db, key) - _reserved(db, key, wallet)))
    if part:
        _put(db, heir, account, part, now)
    return int(part)
