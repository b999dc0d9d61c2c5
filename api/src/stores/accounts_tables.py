"""The rows of accounts, keys and the audit, as SQLAlchemy and as the rest of the server see them.

Owns the mapping alone: the numbered migrations make the tables, accounts.py asks and changes them.
"""

from __future__ import annotations

import json
from typing import Any

from sqlalchemy import BigInteger, Boolean, Column, Float, LargeBinary, MetaData, Row, String, Table

from ..domain import AuditEntry, Bounds, StoredAccount, StoredKey

_METADATA = MetaData()

ACCOUNTS = Table(
    "accounts",
    _METADATA,
    Column("name", String, primary_key=True),
    Column("requests_per_minute", BigInteger),
    Column("concurrent", BigInteger),
    Column("characters_per_day", BigInteger),
    Column("alert_characters_per_day", BigInteger),
    Column("trusted", Boolean),
    Column("log_level", String),
    Column("disabled", Boolean),
    Column("created_at", Float),
)
KEYS = Table(
    "api_keys",
    _METADATA,
    Column("id", String, primary_key=True),
    Column("account", String),
    Column("digest", LargeBinary),
    Column("hint", String),
    Column("created_at", Float),
    Column("expires_at", Float),
    Column("revoked_at", Float),
)
AUDIT = Table(
    "audit",
    _METADATA,
    Column("id", BigInteger, primary_key=True),
    Column("at", Float),
    Column("actor", String),
    Column("act", String),
    Column("account", String),
    Column("detail", String),
)

SHOWN_OF_KEYS = [KEYS.c[name] for name in ("id", "account", "hint", "created_at", "expires_at", "revoked_at")]
"""All but the digest."""


def account_of(row: Row[Any]) -> StoredAccount:
    bounds = Bounds(row.requests_per_minute, row.concurrent, row.characters_per_day, row.alert_characters_per_day)
    return StoredAccount(row.name, bounds, row.trusted, row.log_level, row.disabled, row.created_at)


def key_of(row: Row[Any]) -> StoredKey:
    """`row` has SHOWN_OF_KEYS at least."""
    return StoredKey(row.id, row.account, row.hint, row.created_at, row.expires_at, row.revoked_at)


def entry_of(row: Row[Any]) -> AuditEntry:
    return AuditEntry(row.id, row.at, row.actor, row.act, row.account, json.loads(row.detail))
