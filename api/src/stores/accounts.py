"""Accounts, their keys, and the audit of every admin act, in the ledger's database.

Owns what is asked and changed, each change in one transaction with its line of the audit. Money is the ledger's; what
a request may do is decided by those who read this (speech/access.py). Accounts and keys are never deleted.
"""

from __future__ import annotations

import json
import re
import secrets
import time
from collections.abc import Callable, Collection, Mapping
from typing import Any, NamedTuple, TypeVar, get_args

from sqlalchemy import Connection, exists, insert, select, update
from sqlalchemy.exc import IntegrityError

from ..domain import ACCOUNT_NAME, AuditEntry, LogLevel, StoredAccount, StoredKey
from ..errors import Conflict, InvalidRequest, NotFound
from .accounts_database import AccountsDatabase
from .accounts_tables import ACCOUNTS, AUDIT, KEYS, SHOWN_OF_KEYS, account_of, entry_of, key_of
from .api_keys import digest_of, hint_of, new_key

BOUNDS = ("requests_per_minute", "concurrent", "characters_per_day", "alert_characters_per_day")
LOG_LEVELS = ("", *get_args(LogLevel))
MAX_BOUND = 2**53 - 1
MAX_SECONDS = 10 * 366 * 86400
"""The longest term of a key, and the longest grace of one that is replaced."""

RESERVED = "admin"
"""What the audit and the usage call the holder of the admin key."""

_T = TypeVar("_T")
_DEFAULTS: Mapping[str, object] = {"trusted": False, "log_level": "", "disabled": False}


class NewKey(NamedTuple):
    """A key as it is shown this once, and what is stored of it."""

    secret: str
    key: StoredKey


class Accounts:
    """`url` is the ledger's, which has run the migrations before this is used. From one event loop.

    An account's name may be `NAME:USER` for an end user of NAME, or `NAME:*` for all that have no row; these have no
    keys. `actor` is who does it, for the audit. Every method may raise Unavailable; for changes it means that they may
    have happened. `on_change` is called with the account's name after each change.
    """

    def __init__(self, url: str, *, timeout_s: float = 5.0) -> None:
        self._database = AccountsDatabase(url, timeout_s)
        self.on_change: Callable[[str], None] = lambda account: None

    async def close(self) -> None:
        """Let go of the database. May be called twice."""
        await self._database.close()

    # --- accounts ---

    async def create(self, name: str, changes: Mapping[str, object], actor: str) -> StoredAccount:
        """Make an account; `changes` are bounds, `trusted`, `log_level`, `disabled` where not the default.

        Raises InvalidRequest, Conflict if there is one, NotFound if an end user's account is not there.
        """
        _check_name(name)
        _check_changes(name, changes)

        def create(db: Connection) -> StoredAccount:
            if ":" in name:
                _account(db, name.partition(":")[0])
            try:
                db.execute(insert(ACCOUNTS).values(**{**_DEFAULTS, **changes}, name=name, created_at=time.time()))
            except IntegrityError:
                raise Conflict("There is such an account already.", param="name", code="account_exists") from None
            _audit(db, actor, "account.create", name, changes)
            return _account(db, name)

        return await self._change(name, create)

    async def change(self, name: str, changes: Mapping[str, object], actor: str) -> StoredAccount:
        """Change what `changes` names, as in `create`; a bound of None is the deployment's again. NotFound."""
        _check_changes(name, changes)

        def change(db: Connection) -> StoredAccount:
            before = db.execute(select(ACCOUNTS).where(ACCOUNTS.c.name == name).with_for_update()).one_or_none()
            old = {} if before is None else before._asdict()
            changed = {field: value for field, value in changes.items() if old.get(field) != value}
            if old and changed:
                db.execute(update(ACCOUNTS).where(ACCOUNTS.c.name == name).values(**changed))
                detail = {field: {"from": old[field], "to": value} for field, value in changed.items()}
                _audit(db, actor, "account.change", name, detail)
            return _account(db, name)

        return await self._change(name, change)

    async def get(self, name: str) -> StoredAccount:
        """Raises NotFound."""
        return await self._database.read(lambda db: _account(db, name))

    async def page(self, after: str, limit: int) -> list[StoredAccount]:
        """The first `limit` accounts whose names come after `after`, by name."""
        query = select(ACCOUNTS).where(ACCOUNTS.c.name > after).order_by(ACCOUNTS.c.name).limit(limit)
        return await self._database.read(lambda db: [account_of(row) for row in db.execute(query)])

    # --- keys ---

    async def keys(self, account: str) -> list[StoredKey]:
        """All that the account ever had, the oldest first. Raises NotFound."""
        query = select(*SHOWN_OF_KEYS).where(KEYS.c.account == account).order_by(KEYS.c.created_at, KEYS.c.id)

        def find(db: Connection) -> list[StoredKey]:
            _account(db, account)
            return [key_of(row) for row in db.execute(query)]

        return await self._database.read(find)

    async def create_key(self, account: str, actor: str, expires_in_s: float | None = None) -> NewKey:
        """A further key for the account. Raises NotFound, InvalidRequest for end users."""
        _check_seconds("expires_in_s", expires_in_s, least=1)
        if ":" in account:
            raise InvalidRequest("End users have no keys: their account asks for them.", param="account")

        def create(db: Connection) -> NewKey:
            _account(db, account)
            made = _add_key(db, account, expires_in_s)
            _audit(db, actor, "key.create", account, {"key": made.key.id, "expires_at": made.key.expires_at})
            return made

        return await self._change(account, create)

    async def rotate_key(
        self, account: str, id: str, actor: str, *, grace_s: float = 0.0, expires_in_s: float | None = None
    ) -> NewKey:
        """A new key in place of a living one, which goes on for `grace_s` seconds more.

        Without `expires_in_s` the new one lives as long as the old one was made for. Raises NotFound, Conflict if the
        old one is dead.
        """
        _check_seconds("grace_s", grace_s)
        _check_seconds("expires_in_s", expires_in_s, least=1)

        def rotate(db: Connection) -> NewKey:
            old, now = _key(db, account, id), time.time()
            if not old.opens(now):
                raise Conflict("This key is revoked or has expired; create a new one.", code="key_is_dead")
            term = old.expires_at - old.created_at if old.expires_at is not None else None
            made = _add_key(db, account, term if expires_in_s is None else expires_in_s)
            until = now + grace_s if old.expires_at is None else min(now + grace_s, old.expires_at)
            _set(db, id, **({"expires_at": until} if grace_s else {"revoked_at": now}))
            _audit(db, actor, "key.rotate", account, {"key": id, "new_key": made.key.id, "grace_s": grace_s})
            return made

        return await self._change(account, rotate)

    async def revoke_key(self, account: str, id: str, actor: str) -> StoredKey:
        """End a key for good; one that is revoked stays as it is. Raises NotFound."""

        def revoke(db: Connection) -> StoredKey:
            if _key(db, account, id).revoked_at is None:
                _set(db, id, revoked_at=time.time())
                _audit(db, actor, "key.revoke", account, {"key": id})
            return _key(db, account, id)

        return await self._change(account, revoke)

    # --- the audit ---

    async def note(self, actor: str, act: str, account: str, detail: Mapping[str, object]) -> None:
        """A line about an act that happens elsewhere. `detail` must hold no secret."""
        await self._database.write(lambda db: _audit(db, actor, act, account, detail), lambda: None)

    async def audit(self, limit: int, account: str | None = None, before: int | None = None) -> list[AuditEntry]:
        """The latest `limit` lines, newest first: of one account, and older than line `before`, if given."""
        query = select(AUDIT).order_by(AUDIT.c.id.desc()).limit(limit)
        if account is not None:
            query = query.where(AUDIT.c.account == account)
        if before is not None:
            query = query.where(AUDIT.c.id < before)
        return await self._database.read(lambda db: [entry_of(row) for row in db.execute(query)])

    # --- for each request; many share one query ---

    async def with_digests(self, digests: Collection[bytes]) -> dict[bytes, StoredKey]:
        """The keys with these digests, dead or alive."""
        query = select(KEYS).where(KEYS.c.digest.in_(digests))
        return await self._database.read(lambda db: {row.digest: key_of(row) for row in db.execute(query)})

    async def with_names(self, names: Collection[str]) -> dict[str, StoredAccount]:
        """Those of these accounts that there are."""
        query = select(ACCOUNTS).where(ACCOUNTS.c.name.in_(names))
        return await self._database.read(lambda db: {row.name: account_of(row) for row in db.execute(query)})

    async def had_any_key(self) -> bool:
        """Whether a key was ever stored."""
        return await self._database.read(lambda db: bool(db.scalar(select(exists().select_from(KEYS)))))

    async def _change(self, account: str, work: Callable[[Connection], _T]) -> _T:
        return await self._database.write(work, lambda: self.on_change(account))


def _account(db: Connection, name: str) -> StoredAccount:
    row = db.execute(select(ACCOUNTS).where(ACCOUNTS.c.name == name)).one_or_none()
    if row is None:
        raise NotFound("There is no such account.", param="account", code="account_not_found")
    return account_of(row)


def _key(db: Connection, account: str, id: str) -> StoredKey:
    """The key, locked until the transaction ends. Raises NotFound."""
    found = select(*SHOWN_OF_KEYS).where(KEYS.c.id == id, KEYS.c.account == account).with_for_update()
    row = db.execute(found).one_or_none()
    if row is None:
        raise NotFound("The account has no such key.", param="key_id", code="key_not_found")
    return key_of(row)


def _add_key(db: Connection, account: str, expires_in_s: float | None) -> NewKey:
    secret, now = new_key(), time.time()
    expires_at = None if expires_in_s is None else now + expires_in_s
    key = StoredKey(f"key_{secrets.token_hex(8)}", account, hint_of(secret), now, expires_at)
    db.execute(
        insert(KEYS).values(
            id=key.id, account=account, digest=digest_of(secret), hint=key.hint, created_at=now, expires_at=expires_at
        )
    )
    return NewKey(secret, key)


def _set(db: Connection, id: str, **values: float) -> None:
    db.execute(update(KEYS).where(KEYS.c.id == id).values(**values))


def _audit(db: Connection, actor: str, act: str, account: str, detail: Mapping[str, Any]) -> None:
    line = {"at": time.time(), "actor": actor, "act": act, "account": account, "detail": json.dumps(dict(detail))}
    db.execute(insert(AUDIT).values(**line))


# --- what may not be ---


def _check_name(name: str) -> None:
    account, colon, user = name.partition(":")
    parts = [account, user] if colon and user != "*" else [account]
    if not all(re.fullmatch(ACCOUNT_NAME, part) for part in parts):
        raise InvalidRequest("Not a name for an account.", param="name", code="invalid_value")
    if account == RESERVED:
        raise InvalidRequest("This name is the admin key's own.", param="name", code="invalid_value")


def _check_changes(name: str, changes: Mapping[str, object]) -> None:
    for field, value in changes.items():
        if not _may_be(field, value):
            raise InvalidRequest(f"Invalid '{field}'.", param=field, code="invalid_value")
    if ":" in name and changes.get("trusted"):
        raise InvalidRequest("End users cannot be trusted to name others.", param="trusted", code="invalid_value")


def _may_be(field: str, value: object) -> bool:
    if field in BOUNDS:
        return value is None or (type(value) is int and 0 <= value <= MAX_BOUND)
    if field == "log_level":
        return value in LOG_LEVELS
    return field in _DEFAULTS and type(value) is bool


def _check_seconds(field: str, seconds: float | None, least: int = 0) -> None:
    if seconds is not None and not least <= seconds <= MAX_SECONDS:
        raise InvalidRequest(
            f"'{field}' must be from {least} to {MAX_SECONDS} seconds.", param=field, code="invalid_value"
        )
