"""Proves the laws of ledger.py over stored books. Owns the queries, in SQL that every database understands."""

from __future__ import annotations

import sqlite3
from collections.abc import Callable, Iterable, Mapping
from contextlib import closing
from pathlib import Path
from typing import Any

_WALLET_SUM = """
    SELECT entries.account, sum(CASE kind WHEN 'hold' THEN -entries.micros ELSE entries.micros END) AS micros
    FROM entries LEFT JOIN holds ON holds.id = entries.hold
    WHERE kind = 'credit' OR (kind IN ('hold', 'release') AND holds.wallet = 1)
    GROUP BY entries.account
"""
_HOLD_SUM = """
    SELECT hold, sum(CASE kind WHEN 'hold' THEN micros ELSE -micros END) AS micros,
        sum(CASE kind WHEN 'charge' THEN micros ELSE 0 END) AS charged
    FROM entries WHERE hold IS NOT NULL GROUP BY hold
"""

LAWS = {
    "account {}: the balance is {}, its entries make {}": f"""
        SELECT account, balances.micros, coalesce(sums.micros, 0)
        FROM balances LEFT JOIN ({_WALLET_SUM}) AS sums USING (account)
        WHERE balances.micros <> coalesce(sums.micros, 0)
        UNION ALL
        SELECT account, NULL, micros FROM ({_WALLET_SUM}) AS sums WHERE account NOT IN (SELECT account FROM balances)
    """,
    "account {}: the balance of {} is below zero": "SELECT account, micros FROM balances WHERE micros < 0",
    "entry {}: {} micro-units are below zero": "SELECT id, micros FROM entries WHERE micros < 0",
    "entry {}: its hold {} is not of its account {}": """
        SELECT entries.id, entries.hold, entries.account
        FROM entries LEFT JOIN holds ON holds.id = entries.hold
        WHERE kind <> 'credit' AND (entries.account = holds.account) IS NOT TRUE
    """,
    "hold {}: {}, with {} held, though its entries leave {}": f"""
        SELECT id, state, held, coalesce(micros, 0) FROM holds LEFT JOIN ({_HOLD_SUM}) AS sums ON hold = id
        WHERE held <> coalesce(micros, 0) OR held < 0 OR (state <> 'open' AND held <> 0)
    """,
    "hold {}: {}, charged {} at a price of {}": f"""
        SELECT id, state, charged, price FROM holds JOIN ({_HOLD_SUM}) AS sums ON hold = id
        WHERE charged > CASE state WHEN 'settled' THEN price ELSE 0 END
    """,
    "hold {}: {}, charged {}, with {} usage events of {} in all": f"""
        SELECT id, state, coalesce(charged, 0), coalesce(events, 0), coalesce(told, 0)
        FROM holds LEFT JOIN ({_HOLD_SUM}) AS sums ON sums.hold = id
        LEFT JOIN (
            SELECT hold, count(*) AS events, sum(price_micros) AS told FROM usage_events
            WHERE hold IS NOT NULL GROUP BY hold
        ) AS used ON used.hold = id
        WHERE coalesce(charged, 0) <> coalesce(told, 0) OR coalesce(events, 0) > 1
            OR (state = 'settled' AND events IS NULL) OR (state = 'open' AND events IS NOT NULL)
    """,
    "usage event {}: its hold {} is not of its account {}": """
        SELECT usage_events.id, usage_events.hold, usage_events.account
        FROM usage_events LEFT JOIN holds ON holds.id = usage_events.hold
        WHERE usage_events.hold IS NOT NULL AND (usage_events.account = holds.account) IS NOT TRUE
    """,
    "usage event {}: it has no hold and costs {}": """
        SELECT id, price_micros FROM usage_events WHERE hold IS NULL AND price_micros <> 0
    """,
    "request {}: {} usage events without a hold": """
        SELECT request_id, count(*) FROM usage_events WHERE hold IS NULL GROUP BY request_id HAVING count(*) > 1
    """,
    "key {}: charged {}, its holds were charged {}, the dearest costs {}": f"""
        SELECT keys.id, keys.charged, coalesce(sum(sums.charged), 0), max(price)
        FROM idempotency_keys AS keys JOIN holds ON holds.key = keys.id
        LEFT JOIN ({_HOLD_SUM}) AS sums ON sums.hold = holds.id
        GROUP BY keys.id
        HAVING keys.charged <> coalesce(sum(sums.charged), 0) OR keys.charged > max(price)
    """,
    "key {}: charged {} and reserved {} do not cover an open hold's price of {}": """
        SELECT keys.id, keys.charged, sum(held), max(price)
        FROM idempotency_keys AS keys JOIN holds ON holds.key = keys.id AND state = 'open'
        GROUP BY keys.id, wallet HAVING keys.charged + sum(held) < max(price)
    """,
}


_INTACT = {"the file: {}": "SELECT * FROM pragma_quick_check WHERE quick_check <> 'ok'"}


def find_broken(execute: Callable[[str], Iterable[tuple[Any, ...]]], laws: Mapping[str, str] = LAWS) -> list[str]:
    """One line for every row that a law's query finds; empty when the books are sound."""
    return [law.format(*row) for law, query in laws.items() for row in execute(query)]


def broken_laws(path: Path) -> list[str]:
    """One line for every broken law in a SQLite ledger file.

    Reads one snapshot, so that ongoing writes neither wait for it nor confuse it.
    """
    with closing(sqlite3.connect(path, isolation_level=None)) as connection:
        connection.execute("PRAGMA query_only=ON")
        connection.execute("BEGIN")
        return find_broken(connection.execute, LAWS | _INTACT)
