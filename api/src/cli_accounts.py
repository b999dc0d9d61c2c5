"""The commands `account`, `key` and `audit`: accounts and keys without a server, in the ledger's database.

Owns their arguments and how they print. A running server knows of a change within TTS_ACCOUNTS_REFRESH_S.
"""

from __future__ import annotations

import argparse
import asyncio
import dataclasses
import json
import sys
from collections.abc import Awaitable, Callable, Sequence
from datetime import UTC, datetime
from typing import Any, TypeVar

from .building import build_accounts, build_ledger
from .domain import AuditEntry, StoredAccount, StoredKey
from .settings import Settings
from .stores.accounts import BOUNDS, LOG_LEVELS, Accounts, NewKey
from .stores.ledger import Ledger

T = TypeVar("T")

ACTOR = "cli"
"""What the audit calls whoever may run these commands."""

PAGE = 1000


async def with_stores(settings: Settings, work: Callable[[Ledger, Accounts], Awaitable[T]]) -> T:
    """Run `work` with the ledger, which brings the tables up to date, and the accounts."""
    ledger, accounts = build_ledger(settings), build_accounts(settings)
    try:
        await ledger.start()
        return await work(ledger, accounts)
    finally:
        await ledger.close()
        await accounts.close()


def add_accounts(commands: Any) -> None:
    """Register the commands with argparse's sub-parsers."""
    account = _group(commands, "account", "accounts, and the end users of trusted ones")
    create = _command(account, "create", "make an account", _create)
    change = _command(account, "set", "change an account; a bound: a number, 0 for none, or 'default'", _set)
    for parser in (create, change):
        parser.add_argument("name", help="NAME, NAME:USER for an end user of it, NAME:* for all others of its")
        _add_terms(parser)
    _command(account, "list", "all accounts", _list)
    _command(account, "show", "one account, its balance and its keys", _show).add_argument("name")

    key = _group(commands, "key", "API keys of an account")
    parsers = {
        "create": _command(key, "create", "make a key; it is printed once", _create_key),
        "list": _command(key, "list", "all keys that it ever had, without the keys themselves", _list_keys),
        "rotate": _command(key, "rotate", "make a key in place of another; it is printed once", _rotate_key),
        "revoke": _command(key, "revoke", "end a key for good", _revoke_key),
    }
    for parser in parsers.values():
        parser.add_argument("account")
    for name in ("rotate", "revoke"):
        parsers[name].add_argument("id", help="as in key list: key_...")
    for name in ("create", "rotate"):
        parsers[name].add_argument("--expires-in-s", type=int, metavar="S", help="seconds; without it, never")
    parsers["rotate"].add_argument("--grace-s", type=int, default=0, metavar="S", help="how long the old one goes on")

    audit = _command(commands, "audit", "what was done to accounts, newest first", _audit)
    audit.add_argument("--account")
    audit.add_argument("--limit", type=int, default=100)


def _group(commands: Any, name: str, help: str) -> Any:
    return commands.add_parser(name, help=help).add_subparsers(required=True)


def _command(commands: Any, name: str, help: str, run: Callable[..., Awaitable[None]]) -> argparse.ArgumentParser:
    parser: argparse.ArgumentParser = commands.add_parser(name, help=help)
    parser.add_argument("--json", action="store_true", help="for programs")

    def work(settings: Settings, options: argparse.Namespace) -> int:
        asyncio.run(with_stores(settings, lambda ledger, accounts: run(options, ledger, accounts)))
        return 0

    parser.set_defaults(run=work)
    return parser


def _add_terms(parser: argparse.ArgumentParser) -> None:
    for bound in BOUNDS:
        parser.add_argument(_flag(bound), type=_bound, default=argparse.SUPPRESS, metavar="N")
    parser.add_argument("--log-level", choices=LOG_LEVELS, default=argparse.SUPPRESS)
    for field, yes, no in [("trusted", "--trusted", "--no-trusted"), ("disabled", "--disable", "--enable")]:
        either = parser.add_mutually_exclusive_group()
        either.add_argument(yes, dest=field, action="store_true", default=argparse.SUPPRESS)
        either.add_argument(no, dest=field, action="store_false", default=argparse.SUPPRESS)


def _flag(field: str) -> str:
    return f"--{field.replace('_', '-')}"


def _bound(text: str) -> int | None:
    return None if text == "default" else int(text)


def _terms(options: argparse.Namespace) -> dict[str, Any]:
    """What was given of an account's fields."""
    return {name: value for name, value in vars(options).items() if name in (*BOUNDS, "log_level", *_SWITCHES)}


_SWITCHES = ("trusted", "disabled")


# --- the commands ---


async def _create(options: argparse.Namespace, ledger: Ledger, accounts: Accounts) -> None:
    _print(options, [await accounts.create(options.name, _terms(options), ACTOR)], one=True)


async def _set(options: argparse.Namespace, ledger: Ledger, accounts: Accounts) -> None:
    _print(options, [await accounts.change(options.name, _terms(options), ACTOR)], one=True)


async def _list(options: argparse.Namespace, ledger: Ledger, accounts: Accounts) -> None:
    found: list[StoredAccount] = []
    while page := await accounts.page(found[-1].name if found else "", PAGE):
        found += page
    _print(options, found)


async def _show(options: argparse.Namespace, ledger: Ledger, accounts: Accounts) -> None:
    account, balance = await accounts.get(options.name), await ledger.balance(options.name)
    keys = await accounts.keys(options.name)
    if options.json:
        print(json.dumps({**_fields(account), "balance_micros": balance, "keys": [_fields(key) for key in keys]}))
        return
    print(_in_words(account))
    print("balance: " + ("no wallet" if balance is None else f"{balance} micro-units"))
    for key in keys:
        print(_in_words(key))


async def _create_key(options: argparse.Namespace, ledger: Ledger, accounts: Accounts) -> None:
    _print_new(options, await accounts.create_key(options.account, ACTOR, options.expires_in_s))


async def _list_keys(options: argparse.Namespace, ledger: Ledger, accounts: Accounts) -> None:
    _print(options, await accounts.keys(options.account))


async def _rotate_key(options: argparse.Namespace, ledger: Ledger, accounts: Accounts) -> None:
    made = await accounts.rotate_key(
        options.account, options.id, ACTOR, grace_s=options.grace_s, expires_in_s=options.expires_in_s
    )
    _print_new(options, made)


async def _revoke_key(options: argparse.Namespace, ledger: Ledger, accounts: Accounts) -> None:
    _print(options, [await accounts.revoke_key(options.account, options.id, ACTOR)], one=True)


async def _audit(options: argparse.Namespace, ledger: Ledger, accounts: Accounts) -> None:
    _print(options, await accounts.audit(max(options.limit, 0), options.account))


# --- printing ---


def _print(
    options: argparse.Namespace, records: Sequence[StoredAccount | StoredKey | AuditEntry], *, one: bool = False
) -> None:
    if options.json:
        fields = [_fields(record) for record in records]
        print(json.dumps(fields[0] if one else fields))
        return
    for record in records:
        print(_in_words(record))


def _print_new(options: argparse.Namespace, made: NewKey) -> None:
    """The key alone on standard output, for KEY=$(qwen3-tts key create NAME); the rest beside it."""
    if options.json:
        print(json.dumps({"key": made.secret, **_fields(made.key)}))
        return
    print(made.secret)
    print(f"{_in_words(made.key)}\nKeep the key: it is not shown again.", file=sys.stderr)


def _fields(record: StoredAccount | StoredKey | AuditEntry) -> dict[str, Any]:
    fields: dict[str, Any] = dataclasses.asdict(record)
    bounds: dict[str, Any] = fields.pop("bounds", {})
    return fields | bounds


def _in_words(record: StoredAccount | StoredKey | AuditEntry) -> str:
    if isinstance(record, AuditEntry):
        return f"{_time(record.at)}  {record.actor}  {record.act}  {record.account}  {json.dumps(dict(record.detail))}"
    if isinstance(record, StoredKey):
        dates = {"created": record.created_at, "expires": record.expires_at, "revoked": record.revoked_at}
        told = "  ".join(f"{word} {_time(at)}" for word, at in dates.items() if at is not None)
        return f"{record.id}  {record.account}  {record.hint}...  {told}"
    bounds = {name: value for name, value in dataclasses.asdict(record.bounds).items() if value is not None}
    words = [f"{name}={value}" for name, value in bounds.items()]
    words += [switch for switch in _SWITCHES if getattr(record, switch)]
    words += [f"log_level={record.log_level}"] if record.log_level else []
    return "  ".join([record.name, *words])


def _time(at: float) -> str:
    return datetime.fromtimestamp(at, UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
