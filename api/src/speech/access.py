"""Who asks: from an API key, and a name of an end user, to an Account.

Owns what a deployment without keys, with keys in its settings and with stored ones means, and for how long an answer of
the database holds. Accounts and keys are stored by stores/accounts.py; what an account's bounds do is not decided here.
"""

from __future__ import annotations

import hmac
import re
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress

from ..domain import ACCOUNT_NAME, Account, StoredAccount
from ..errors import Forbidden, InvalidRequest, Unauthorized, Unavailable
from ..stores.accounts import RESERVED, Accounts
from ..stores.api_keys import digest_of, has_form
from .lookup import Lookup

ANONYMOUS = "anonymous"
"""The account of everybody where no keys are wanted."""

_ANY = ""
_USER = re.compile(ACCOUNT_NAME)


class SettingsKeys:
    """The keys that stand in the settings."""

    def __init__(self, api_keys: Sequence[tuple[str, str]], admin_key: str | None) -> None:
        self._accounts = [(digest_of(key), Account(name)) for name, key in api_keys]
        if admin_key:
            self._accounts.append((digest_of(admin_key), Account(RESERVED, admin=True)))
        self.close_the_server = bool(api_keys)

    def find(self, digest: bytes) -> Account | None:
        """The account behind a key, by the key's digest.

        Every key is compared, and digests rather than keys, so that time tells nothing of either.
        """
        found = None
        for known, account in self._accounts:
            if hmac.compare_digest(known, digest):
                found = account
        return found


class Access:
    """The keys of a deployment, those of its settings and those in its database.

    Without any key in the settings, and as long as none was ever stored, the server is open: everyone is `anonymous`.
    What another process changes is known here within `refresh_s` seconds, what this one changes at once. While the
    database is away, what was known is believed for ten minutes; what is not known is Unavailable, never open. Keys of
    the settings then go on in any case, if need be without what is stored of their accounts.

    `user_header` is the header in which trusted accounts say for whom they ask.
    """

    def __init__(
        self,
        api_keys: Sequence[tuple[str, str]],
        admin_key: str | None,
        accounts: Accounts,
        *,
        refresh_s: float = 5.0,
        user_header: str = "X-OpenWebUI-User-Id",
    ) -> None:
        self.accounts = accounts
        self.user_header = user_header
        self._settings_keys = SettingsKeys(api_keys, admin_key)
        self._closed = self._settings_keys.close_the_server
        self._keys = Lookup(accounts.with_digests, refresh_s=refresh_s)
        self._rows = Lookup(accounts.with_names, refresh_s=refresh_s, believe_absence=True)
        self._any_key = Lookup(self._find_any_key, refresh_s=refresh_s, believe_absence=True)
        accounts.on_change = self._forget

    async def account(self, key: str | None, user: str | None = None) -> Account:
        """The account behind `key`, asking for `user` if it is trusted to say so.

        Raises Unauthorized for a key that opens nothing, Forbidden for an account that is switched off,
        InvalidRequest for a name that no end user has, Unavailable where the database would have to be asked.
        """
        digest = digest_of(key or "")
        found = self._settings_keys.find(digest)
        if found is None:
            name = await self._stored_name(key, digest)
            return await self._with_row(Account(name), await self._rows.find(name), user)
        if found.admin:
            return found
        row = None
        with suppress(Unavailable):
            row = await self._rows.find(found.name)
        return await self._with_row(found, row, user)

    async def close(self) -> None:
        """Let go of the database. May be called twice."""
        for lookup in (self._keys, self._rows, self._any_key):
            await lookup.close()
        await self.accounts.close()

    async def _stored_name(self, key: str | None, digest: bytes) -> str:
        """The name of the account behind a stored key; `anonymous` where none is wanted. Raises Unauthorized."""
        stored = await self._keys.find(digest) if key is not None and has_form(key) else None
        if stored is not None and stored.opens(time.time()):
            return stored.account
        if stored is not None or self._closed or await self._any_key.find(_ANY):
            self._closed = True  # keys are never deleted
            raise Unauthorized("A valid API key is required: 'Authorization: Bearer <key>'.")
        return ANONYMOUS

    async def _with_row(self, account: Account, row: StoredAccount | None, user: str | None) -> Account:
        if row is None:
            return account
        if row.disabled:
            raise Forbidden("This account is switched off.")
        if user is None or not row.trusted:
            return Account(account.name, bounds=row.bounds, log_level=row.log_level)
        theirs = await self._user_row(account.name, user)
        if theirs is None:
            return Account(account.name, user=user, bounds=row.bounds, log_level=row.log_level)
        if theirs.disabled:
            raise Forbidden("This user is switched off.")
        return Account(
            account.name,
            user=user,
            bounds=row.bounds,
            user_bounds=theirs.bounds,
            log_level=theirs.log_level or row.log_level,
        )

    async def _user_row(self, account: str, user: str) -> StoredAccount | None:
        if not _USER.fullmatch(user):
            raise InvalidRequest(
                "Must be 1 to 128 ASCII letters, digits or any of '._@-'.", param=self.user_header, code="invalid_value"
            )
        return await self._rows.find(f"{account}:{user}") or await self._rows.find(f"{account}:*")

    async def _find_any_key(self, keys: list[str]) -> Mapping[str, bool]:
        return {_ANY: True} if await self.accounts.had_any_key() else {}

    def _forget(self, account: str) -> None:
        self._rows.forget(lambda name, row: name == account)
        self._keys.forget(lambda digest, key: key.account == account)
        self._any_key.forget(lambda key, value: False)
