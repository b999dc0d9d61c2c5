"""Who asks: keys of the settings and of the database, openness, end users, and a database that is away."""

from __future__ import annotations

import asyncio
import hmac
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from api.src.domain import Account, Bounds
from api.src.errors import Forbidden, InvalidRequest, Unauthorized, Unavailable
from api.src.speech import access as access_module
from api.src.speech.access import Access, SettingsKeys
from api.src.stores.accounts import Accounts
from api.src.stores.api_keys import digest_of, new_key
from tests.postgres import PostgresServer
from tests.stores.conftest import DATABASES, opened
from tests.stores.ledgers import LedgerStore, PostgresStore

API_KEYS = [("alice", "alices-key"), ("bob", "bobs-key"), ("alice", "alices-other-key")]
ADMIN = Account("admin", admin=True)
ANONYMOUS = Account("anonymous")

NewAccess = Callable[..., Access]


@pytest.fixture(params=DATABASES)
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[LedgerStore]:
    """Accounts are in the ledger's database, whether or not usage events go there through Redis."""
    yield from opened(request, tmp_path)


@pytest.fixture
async def new_access(store: LedgerStore, ledger: Any) -> AsyncIterator[NewAccess]:
    """Makes as many as are wanted, each like a process of its own."""
    made: list[Access] = []

    def new(api_keys: Any = (), admin_key: str | None = None, **options: Any) -> Access:
        made.append(Access(api_keys, admin_key, Accounts(store.url), **options))
        return made[-1]

    yield new
    for access in made:
        await access.close()


async def refused(access: Access, key: str | None) -> bool:
    try:
        await access.account(key)
    except Unauthorized:
        return True
    return False


# --- keys of the settings ---


def test_each_key_of_the_settings_opens_its_account() -> None:
    keys = SettingsKeys(API_KEYS, "the-admin-key")
    for key, account in [
        ("alices-key", Account("alice")),
        ("alices-other-key", Account("alice")),
        ("bobs-key", Account("bob")),
        ("the-admin-key", ADMIN),
    ]:
        assert keys.find(digest_of(key)) == account


WRONG = [None, "", "alice", "alices-ke", "alices-key ", "ALICES-KEY", "alices-key\x00", "\ud800", new_key()]


async def test_anything_else_opens_nothing(new_access: NewAccess) -> None:
    access = new_access(API_KEYS, "the-admin-key")
    for key in WRONG:
        assert await refused(access, key), key


async def test_an_empty_key_opens_nothing_even_where_an_empty_one_was_configured_for_the_admin(
    new_access: NewAccess,
) -> None:
    assert await refused(new_access(API_KEYS, ""), "")


@pytest.mark.parametrize("key", ["alices-key", "bobs-key", "the-admin-key", "wrong", "", "x" * 10_000])
def test_every_key_is_compared_and_only_digests_of_one_length(monkeypatch: pytest.MonkeyPatch, key: str) -> None:
    compared: list[tuple[bytes, bytes]] = []

    def compare(known: bytes, given: bytes) -> bool:
        compared.append((known, given))
        return hmac_compare(known, given)

    hmac_compare = hmac.compare_digest
    keys = SettingsKeys(API_KEYS, "the-admin-key")
    monkeypatch.setattr(access_module.hmac, "compare_digest", compare)
    keys.find(digest_of(key))
    assert len(compared) == 4
    assert {len(digest) for pair in compared for digest in pair} == {32}


# --- open or not ---


async def test_without_any_key_everyone_is_anonymous(new_access: NewAccess) -> None:
    access = new_access()
    for key in [None, "", "anything", new_key(), "\ud800"]:
        assert await access.account(key) == ANONYMOUS


async def test_an_admin_key_or_an_account_does_not_close_a_server(new_access: NewAccess) -> None:
    access = new_access((), "the-admin-key")
    await access.accounts.create("acme", {}, "admin")
    assert await access.account(None) == await access.account("wrong") == ANONYMOUS
    assert await access.account("the-admin-key") == ADMIN


async def test_the_first_stored_key_closes_every_server_for_good(new_access: NewAccess) -> None:
    here, there = new_access(), new_access(refresh_s=0.2)
    assert await here.account(None) == await there.account(None) == ANONYMOUS
    await here.accounts.create("acme", {}, "admin")
    secret, key = await here.accounts.create_key("acme", "admin")
    assert await refused(here, None)  # at once
    await asyncio.sleep(0.21)
    assert await refused(there, None)
    assert await here.account(secret) == await there.account(secret) == Account("acme")
    await here.accounts.revoke_key("acme", key.id, "admin")
    assert await refused(here, None)
    assert await refused(new_access(), None)
    assert await refused(new_access(), "anything")


# --- stored keys ---


async def test_a_stored_key_opens_its_account_with_what_is_stored_of_it(new_access: NewAccess) -> None:
    access = new_access(API_KEYS)
    await access.accounts.create("acme", {"concurrent": 2, "log_level": "debug"}, "admin")
    secret, _ = await access.accounts.create_key("acme", "admin")
    assert await access.account(secret) == Account("acme", bounds=Bounds(concurrent=2), log_level="debug")
    await access.accounts.change("acme", {"concurrent": 3}, "admin")
    assert (await access.account(secret)).bounds == Bounds(concurrent=3)
    for wrong in (secret[:-1], secret + "x", secret.upper(), secret[7:]):
        assert await refused(access, wrong)


async def test_revocation_is_known_at_once_here_and_soon_elsewhere(new_access: NewAccess) -> None:
    here, there = new_access(), new_access(refresh_s=0.3)
    await here.accounts.create("acme", {}, "admin")
    secret, key = await here.accounts.create_key("acme", "admin")
    assert await here.account(secret) == await there.account(secret)
    await here.accounts.revoke_key("acme", key.id, "admin")
    revoked = time.monotonic()
    assert await refused(here, secret)
    await asyncio.sleep(0.3 - (time.monotonic() - revoked))
    assert await refused(there, secret)


async def test_a_key_expires_to_the_moment_without_being_asked_for(
    new_access: NewAccess, monkeypatch: pytest.MonkeyPatch
) -> None:
    access = new_access(refresh_s=3600)
    await access.accounts.create("acme", {}, "admin")
    secret, key = await access.accounts.create_key("acme", "admin", expires_in_s=60)
    old, _ = await access.accounts.create_key("acme", "admin")
    assert key.expires_at is not None
    await access.accounts.rotate_key("acme", (await access.accounts.keys("acme"))[1].id, "admin", grace_s=30)
    assert (await access.account(secret)).name == (await access.account(old)).name == "acme"
    monkeypatch.setattr(access_module.time, "time", lambda: key.expires_at - 20)
    assert await refused(access, old)
    assert not await refused(access, secret)
    monkeypatch.setattr(access_module.time, "time", lambda: key.expires_at)
    assert await refused(access, secret)


async def test_what_cannot_be_a_stored_key_is_not_looked_up(
    new_access: NewAccess, monkeypatch: pytest.MonkeyPatch
) -> None:
    access = new_access(API_KEYS)
    asked: list[Any] = []
    monkeypatch.setattr(access.accounts._database, "read", asked.append)
    for key in WRONG[:-1]:
        assert await refused(access, key)
    assert asked == []


# --- what is stored of an account ---


async def test_a_key_of_the_settings_gets_what_is_stored_under_its_name(new_access: NewAccess) -> None:
    access = new_access(API_KEYS, "the-admin-key")
    await access.accounts.create("alice", {"requests_per_minute": 9, "trusted": True}, "admin")
    assert await access.account("alices-key", "ann") == Account("alice", user="ann", bounds=Bounds(9))
    assert await access.account("bobs-key", "ann") == Account("bob")
    await access.accounts.change("alice", {"disabled": True}, "admin")
    with pytest.raises(Forbidden) as raised:
        await access.account("alices-key")
    assert (raised.value.status, raised.value.code) == (403, "account_disabled")
    assert await access.account("the-admin-key") == ADMIN
    await access.accounts.change("alice", {"disabled": False}, "admin")
    assert (await access.account("alices-key")).name == "alice"


async def test_everybody_is_bounded_like_anonymous(new_access: NewAccess) -> None:
    access = new_access()
    await access.accounts.create("anonymous", {"concurrent": 1}, "admin")
    assert await access.account(None) == Account("anonymous", bounds=Bounds(concurrent=1))


async def test_an_end_user_has_its_own_bounds_or_those_for_all(new_access: NewAccess) -> None:
    access = new_access()
    for name, terms in {
        "webui": {"trusted": True, "concurrent": 9, "log_level": "info"},
        "webui:*": {"concurrent": 1},
        "webui:ann": {"concurrent": 2, "log_level": "debug"},
        "webui:bad": {"disabled": True},
        "other": {"trusted": True},
    }.items():
        await access.accounts.create(name, terms, "admin")
    webui, _ = await access.accounts.create_key("webui", "admin")
    other, _ = await access.accounts.create_key("other", "admin")
    everyones, whole = Bounds(concurrent=1), Bounds(concurrent=9)
    ann = Account("webui", user="ann", bounds=whole, user_bounds=Bounds(concurrent=2), log_level="debug")
    assert await access.account(webui, "ann") == ann
    ben = Account("webui", user="ben", bounds=whole, user_bounds=everyones, log_level="info")
    assert await access.account(webui, "ben") == ben
    assert await access.account(webui) == Account("webui", bounds=whole, log_level="info")
    assert await access.account(other, "ann") == Account("other", user="ann")
    with pytest.raises(Forbidden):
        await access.account(webui, "bad")
    await access.accounts.change("webui:*", {"disabled": True}, "admin")
    with pytest.raises(Forbidden):
        await access.account(webui, "ben")
    assert await access.account(webui, "ann") == ann


async def test_a_trusted_account_names_users_properly(new_access: NewAccess) -> None:
    access = new_access(API_KEYS)
    await access.accounts.create("alice", {"trusted": True}, "admin")
    for user in ["", " ", "a b", "a:b", "*", "ä", "a\n", "a" * 129]:
        with pytest.raises(InvalidRequest) as raised:
            await access.account("alices-key", user)
        assert raised.value.param == "X-OpenWebUI-User-Id"
        assert await access.account("bobs-key", user) == Account("bob")


# --- a database that is away ---


async def test_at_a_start_without_a_database_nothing_is_open() -> None:
    accounts = Accounts("postgresql://nobody@127.0.0.1:1/nowhere")
    access = Access([], "the-admin-key", accounts)
    for key in [None, "", "anything", new_key()]:
        with pytest.raises(Unavailable):
            await access.account(key)
    assert await access.account("the-admin-key") == ADMIN
    await access.close()
    access = Access(API_KEYS, None, Accounts("postgresql://nobody@127.0.0.1:1/nowhere"))
    assert await access.account("alices-key") == Account("alice")
    assert await refused(access, "wrong")
    with pytest.raises(Unavailable):
        await access.account(new_key())
    await access.close()


async def test_a_killed_database(mortal: PostgresServer) -> None:
    store = PostgresStore(mortal)
    ledger = store.ledger()
    await ledger.start()
    access = Access(API_KEYS, None, Accounts(store.url, timeout_s=30), refresh_s=0.2)
    await access.accounts.create("acme", {"concurrent": 2}, "admin")
    secret, key = await access.accounts.create_key("acme", "admin")
    unused, _ = await access.accounts.create_key("acme", "admin")
    acme = Account("acme", bounds=Bounds(concurrent=2))
    assert await access.account(secret) == acme
    assert await access.account("alices-key") == Account("alice")
    mortal.kill()
    await asyncio.sleep(0.3)
    for _ in range(3):
        assert await access.account(secret) == acme
        assert await access.account("alices-key") == Account("alice")
        with pytest.raises(Unavailable):  # it may be a good one
            await access.account(unused)
        assert await refused(access, "wrong")
    await asyncio.to_thread(mortal.start)
    await _eventually(lambda: access.account(unused), acme)
    await access.accounts.revoke_key("acme", key.id, "admin")
    assert await refused(access, secret)
    await access.close()
    await ledger.close()
    store.drop()


OTHER = """
import asyncio, sys
from api.src.stores.accounts import Accounts

async def main(url):
    accounts = Accounts(url)
    await accounts.create("acme", {"concurrent": 4}, "cli")
    secret, key = await accounts.create_key("acme", "cli")
    print(secret, flush=True)
    sys.stdin.readline()
    await accounts.revoke_key("acme", key.id, "cli")
    print("revoked", flush=True)
    await accounts.close()

asyncio.run(main(sys.argv[1]))
"""


def start_other(url: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", OTHER, url]
    return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)


async def test_another_process_changes_what_this_one_believes(new_access: NewAccess, store: LedgerStore) -> None:
    access = new_access(refresh_s=0.2)
    assert await access.account(None) == ANONYMOUS
    other = start_other(store.url)
    assert other.stdout is not None
    assert other.stdin is not None
    secret = (await asyncio.to_thread(other.stdout.readline)).strip()
    await asyncio.sleep(0.2)
    assert await access.account(secret) == Account("acme", bounds=Bounds(concurrent=4))
    assert await refused(access, None)
    other.stdin.write("\n")
    other.stdin.flush()
    assert await asyncio.to_thread(other.stdout.readline) == "revoked\n"
    await asyncio.sleep(0.2)
    assert await refused(access, secret)
    await asyncio.to_thread(other.communicate)
    assert other.returncode == 0


async def _eventually(work: Callable[[], Any], expected: object, seconds: float = 30.0) -> None:
    deadline = time.monotonic() + seconds
    while True:
        try:
            if await work() == expected:
                return
        except Unavailable:
            pass
        assert time.monotonic() < deadline
        await asyncio.sleep(0.05)
