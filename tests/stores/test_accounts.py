"""Accounts, keys and the audit, in SQLite and PostgreSQL alike."""

from __future__ import annotations

import asyncio
import os
import signal
import sqlite3
import time
import traceback
from collections.abc import AsyncIterator, Iterator
from contextlib import closing, suppress
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy.exc import SQLAlchemyError

from api.src.domain import Bounds, StoredAccount
from api.src.errors import Conflict, InvalidRequest, NotFound, Unavailable
from api.src.stores import api_keys
from api.src.stores.accounts import BOUNDS, MAX_BOUND, Accounts
from api.src.stores.api_keys import digest_of, has_form, new_key
from tests.postgres import PostgresServer
from tests.stores.conftest import DATABASES, opened
from tests.stores.ledgers import LedgerStore, PostgresStore, SqliteStore

YEAR = 365.0 * 86400


@pytest.fixture(params=DATABASES)
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[LedgerStore]:
    """Accounts are in the ledger's database, whether or not usage events go there through Redis."""
    yield from opened(request, tmp_path)


@pytest.fixture
async def accounts(store: LedgerStore, ledger: Any) -> AsyncIterator[Accounts]:
    accounts = Accounts(store.url)
    yield accounts
    await accounts.close()


async def acts(accounts: Accounts) -> list[str]:
    return [entry.act for entry in await accounts.audit(100)]


# --- keys by themselves ---


def test_keys_are_long_random_and_recognised() -> None:
    keys = {new_key() for _ in range(1000)}
    assert len(keys) == 1000
    assert all(has_form(key) and len(key) == 50 for key in keys)
    characters = set("".join(key.removeprefix("sk-tts-") for key in keys))
    assert len(characters) == 62
    for wrong in ["", "sk-tts-", new_key()[:-1], new_key() + "a", new_key() + "\n", "sk-" + new_key()[3:-1] + "-"]:
        assert not has_form(wrong)


def test_a_key_holds_256_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(api_keys.secrets, "randbits", lambda bits: 2**bits - 1)
    highest = api_keys.new_key()
    monkeypatch.setattr(api_keys.secrets, "randbits", lambda bits: 2**255 - 1)
    assert api_keys.new_key() != highest


# --- accounts ---


async def test_an_account_is_what_it_was_made(accounts: Accounts) -> None:
    began = time.time()
    plain = await accounts.create("acme", {}, "admin")
    assert plain == StoredAccount("acme", Bounds(), False, "", False, plain.created_at)
    assert began - 1 < plain.created_at < time.time() + 1
    terms = {"requests_per_minute": 0, "concurrent": 2, "characters_per_day": MAX_BOUND, "trusted": True}
    busy = await accounts.create("busy", {**terms, "log_level": "debug", "disabled": True}, "admin")
    assert busy == StoredAccount("busy", Bounds(0, 2, MAX_BOUND, None), True, "debug", True, busy.created_at)
    assert await accounts.get("busy") == busy
    assert await accounts.with_names(["busy", "acme", "none"]) == {"acme": plain, "busy": busy}
    assert await accounts.with_names([]) == {}


async def test_a_change_changes_what_it_names(accounts: Accounts) -> None:
    made = await accounts.create("acme", {"concurrent": 2, "requests_per_minute": 5}, "admin")
    changed = await accounts.change("acme", {"concurrent": None, "trusted": True}, "cli")
    assert changed == StoredAccount("acme", Bounds(5), True, "", False, made.created_at)
    assert await accounts.get("acme") == changed
    assert await accounts.change("acme", {"trusted": True}, "cli") == changed
    assert await accounts.change("acme", {}, "cli") == changed
    entry, _ = await accounts.audit(10)  # nothing was done the second and the third time
    assert (entry.actor, entry.act, entry.account) == ("cli", "account.change", "acme")
    assert entry.detail == {"concurrent": {"from": 2, "to": None}, "trusted": {"from": False, "to": True}}


async def test_a_name_is_given_once_also_when_many_ask_at_once(accounts: Accounts, store: LedgerStore) -> None:
    other = Accounts(store.url)
    tries = [each.create("acme", {}, "admin") for each in (accounts, other) for _ in range(5)]
    outcomes = await asyncio.gather(*tries, return_exceptions=True)
    refused = [outcome for outcome in outcomes if isinstance(outcome, Conflict)]
    assert (len(refused), {error.code for error in refused}) == (9, {"account_exists"})
    assert await acts(accounts) == ["account.create"]
    await other.close()


async def test_a_name_that_cannot_be_one(accounts: Accounts) -> None:
    names = ["", "a b", "é", "a\n", "a" * 129, "a/b", ":u", "a:", "a:u:v", "a:**", "*", "a:u\n", "admin", "admin:*"]
    for name in names:
        with pytest.raises(InvalidRequest) as raised:
            await accounts.create(name, {}, "admin")
        assert raised.value.param == "name"


IMPOSSIBLE: list[tuple[str, object]] = [
    *((bound, value) for bound in BOUNDS for value in (-1, 1.5, "5", True, MAX_BOUND + 1)),
    ("trusted", None),
    ("trusted", 1),
    ("log_level", "loud"),
    ("log_level", None),
    ("name", "x"),
    ("created_at", 1),
]


async def test_terms_that_cannot_be(accounts: Accounts) -> None:
    await accounts.create("acme", {}, "admin")
    for field, value in IMPOSSIBLE:
        terms = {field: value}
        for change in (accounts.create("other", terms, "admin"), accounts.change("acme", terms, "admin")):
            with pytest.raises(InvalidRequest) as raised:
                await change
            assert raised.value.param == field
    assert await acts(accounts) == ["account.create"]


async def test_end_users_belong_to_an_account(accounts: Accounts) -> None:
    for name in ("acme:ann", "acme:*"):
        with pytest.raises(NotFound):
            await accounts.create(name, {}, "admin")
    await accounts.create("acme", {}, "admin")
    for name in ("acme:ann", "acme:*"):
        assert (await accounts.create(name, {"concurrent": 1}, "admin")).name == name
        with pytest.raises(InvalidRequest):
            await accounts.change(name, {"trusted": True}, "admin")
        with pytest.raises(InvalidRequest):
            await accounts.create_key(name, "admin")


async def test_pages_are_by_name(accounts: Accounts) -> None:
    names = ["Zoe", "_", "a", "a-b", "a.b", "ab", "b"]
    for name in reversed(names):
        await accounts.create(name, {}, "admin")
    expected = sorted(names)  # by code point, whatever the database's language
    assert [account.name for account in await accounts.page("", 100)] == expected
    assert [account.name for account in await accounts.page(expected[2], 2)] == expected[3:5]
    assert await accounts.page("zzz", 5) == []


async def test_what_is_not_there_is_not_found(accounts: Accounts) -> None:
    await accounts.create("acme", {}, "admin")
    await accounts.create("other", {}, "admin")
    key = (await accounts.create_key("other", "admin")).key
    for work in [
        accounts.get("none"),
        accounts.change("none", {"trusted": True}, "admin"),
        accounts.keys("none"),
        accounts.create_key("none", "admin"),
        accounts.revoke_key("acme", "key_0", "admin"),
        accounts.revoke_key("acme", key.id, "admin"),
        accounts.rotate_key("acme", key.id, "admin"),
    ]:
        with pytest.raises(NotFound):
            await work
    assert (await accounts.keys("other")) == [key]


# --- keys ---


async def test_a_key_is_found_by_its_digest_and_is_nowhere_in_the_database(
    accounts: Accounts, store: LedgerStore
) -> None:
    await accounts.create("acme", {}, "admin")
    assert not await accounts.had_any_key()
    secret, key = await accounts.create_key("acme", "admin", expires_in_s=60)
    assert await accounts.had_any_key()
    assert key.expires_at == pytest.approx(key.created_at + 60)
    assert (key.account, key.hint, key.revoked_at) == ("acme", secret[:11], None)
    found = await accounts.with_digests([digest_of(secret), digest_of("other")])
    assert found == {digest_of(secret): key}
    assert await accounts.keys("acme") == [key]
    stored = str([store.query(f"SELECT * FROM {table}") for table in ("accounts", "api_keys", "audit")])
    assert key.id in stored
    assert secret[11:] not in stored
    assert secret not in repr(key)


async def test_a_key_opens_until_it_expires_or_is_revoked(accounts: Accounts) -> None:
    await accounts.create("acme", {}, "admin")
    key = (await accounts.create_key("acme", "admin", expires_in_s=60)).key
    assert key.expires_at is not None
    assert key.opens(key.expires_at - 1)
    assert not key.opens(key.expires_at)
    revoked = await accounts.revoke_key("acme", key.id, "admin")
    assert not revoked.opens(key.created_at)
    assert await accounts.revoke_key("acme", key.id, "admin") == revoked
    assert await acts(accounts) == ["key.revoke", "key.create", "account.create"]


async def test_rotation_replaces_a_key(accounts: Accounts) -> None:
    await accounts.create("acme", {}, "admin")
    first = await accounts.create_key("acme", "admin")
    second = await accounts.rotate_key("acme", first.key.id, "admin")
    assert second.secret != first.secret
    assert second.key.expires_at is None
    found = await accounts.with_digests([digest_of(first.secret), digest_of(second.secret)])
    assert not found[digest_of(first.secret)].opens(time.time())
    assert found[digest_of(second.secret)] == second.key
    with pytest.raises(Conflict):
        await accounts.rotate_key("acme", first.key.id, "admin")
    entry = (await accounts.audit(1))[0]
    assert entry.detail == {"key": first.key.id, "new_key": second.key.id, "grace_s": 0.0}


async def test_the_old_key_goes_on_for_its_grace_but_no_longer_than_its_term(accounts: Accounts) -> None:
    await accounts.create("acme", {}, "admin")
    for term, grace, left in [(None, 60, 60), (1000, 60, 60), (30, 60, 30)]:
        old = (await accounts.create_key("acme", "admin", expires_in_s=term)).key
        new = (await accounts.rotate_key("acme", old.id, "admin", grace_s=grace)).key
        now = time.time()
        (stored,) = [key for key in await accounts.keys("acme") if key.id == old.id]
        assert stored.expires_at == pytest.approx(now + left, abs=10)
        assert stored.opens(now)
        lifetime = None if new.expires_at is None else new.expires_at - new.created_at
        assert lifetime == (None if term is None else pytest.approx(term))


async def test_a_rotation_may_set_a_new_term(accounts: Accounts) -> None:
    await accounts.create("acme", {}, "admin")
    old = (await accounts.create_key("acme", "admin", expires_in_s=60)).key
    new = (await accounts.rotate_key("acme", old.id, "admin", expires_in_s=YEAR)).key
    assert new.expires_at == pytest.approx(new.created_at + YEAR)


async def test_a_key_is_replaced_once_however_many_ask(accounts: Accounts, store: LedgerStore) -> None:
    await accounts.create("acme", {}, "admin")
    key = (await accounts.create_key("acme", "admin")).key
    other = Accounts(store.url)
    tries = [each.rotate_key("acme", key.id, "admin") for each in (accounts, other) for _ in range(4)]
    outcomes = await asyncio.gather(*tries, return_exceptions=True)
    assert len([outcome for outcome in outcomes if isinstance(outcome, Conflict)]) == 7
    assert len([key for key in await accounts.keys("acme") if key.opens(time.time())]) == 1
    await other.close()


async def test_terms_of_a_key_that_cannot_be(accounts: Accounts) -> None:
    await accounts.create("acme", {}, "admin")
    for seconds in (-1, 0, 20 * YEAR, float("nan"), float("inf")):
        with pytest.raises(InvalidRequest):
            await accounts.create_key("acme", "admin", expires_in_s=seconds)
    assert await accounts.keys("acme") == []


# --- the audit ---


async def test_every_act_leaves_a_line(accounts: Accounts) -> None:
    await accounts.create("acme", {"concurrent": 3}, "cli")
    await accounts.change("acme", {"disabled": True}, "admin")
    key = (await accounts.create_key("acme", "admin")).key
    new = (await accounts.rotate_key("acme", key.id, "admin", grace_s=5)).key
    await accounts.revoke_key("acme", new.id, "cli")
    await accounts.note("cli", "credit", "bob", {"micros": 5})
    entries = await accounts.audit(100)
    assert [(entry.actor, entry.act, entry.account) for entry in reversed(entries)] == [
        ("cli", "account.create", "acme"),
        ("admin", "account.change", "acme"),
        ("admin", "key.create", "acme"),
        ("admin", "key.rotate", "acme"),
        ("cli", "key.revoke", "acme"),
        ("cli", "credit", "bob"),
    ]
    assert [entry.detail for entry in reversed(entries)][:2] == [
        {"concurrent": 3},
        {"disabled": {"from": False, "to": True}},
    ]
    assert await accounts.audit(2) == entries[:2]
    assert await accounts.audit(2, before=entries[1].id) == entries[2:4]
    assert await accounts.audit(10, account="bob") == entries[:1]


async def test_nothing_is_done_without_its_line(accounts: Accounts, store: LedgerStore) -> None:
    await accounts.create("acme", {}, "admin")
    key = (await accounts.create_key("acme", "admin")).key
    store.query("ALTER TABLE audit RENAME TO hidden")
    for work in [
        accounts.create("other", {}, "admin"),
        accounts.change("acme", {"trusted": True}, "admin"),
        accounts.create_key("acme", "admin"),
        accounts.rotate_key("acme", key.id, "admin"),
        accounts.revoke_key("acme", key.id, "admin"),
        accounts.note("admin", "credit", "acme", {}),
    ]:
        with pytest.raises(Unavailable):
            await work
    assert [account.name for account in await accounts.page("", 10)] == ["acme"]
    assert not (await accounts.get("acme")).trusted
    assert await accounts.keys("acme") == [key]


@pytest.mark.parametrize("damage", ["UPDATE audit SET actor = 'nobody'", "DELETE FROM audit", "DELETE FROM api_keys"])
async def test_the_database_itself_keeps_audit_and_keys(accounts: Accounts, store: LedgerStore, damage: str) -> None:
    await accounts.create("acme", {}, "admin")
    await accounts.create_key("acme", "admin")
    with pytest.raises(Exception, match=r"append-only|never deleted|keeps what was written"):
        store.query(damage)


# --- the database ---


async def test_a_change_is_told_also_when_nobody_waits_for_it(accounts: Accounts) -> None:
    told = asyncio.Event()
    accounts.on_change = lambda account: told.set() if account == "acme" else None
    creating = asyncio.create_task(accounts.create("acme", {}, "admin"))
    await asyncio.sleep(0)
    creating.cancel()
    await asyncio.wait([creating])
    async with asyncio.timeout(30):
        await told.wait()
    assert (await accounts.get("acme")).name == "acme"


async def test_without_tables_it_is_unavailable(store: LedgerStore) -> None:
    accounts = Accounts(store.url)
    if isinstance(store, SqliteStore):
        store.path.parent.mkdir()
    for _ in range(2):
        with pytest.raises(Unavailable):
            await accounts.had_any_key()
    with pytest.raises(Unavailable):
        await accounts.create("acme", {}, "admin")
    if isinstance(store, SqliteStore):
        assert not store.path.exists()  # that is for the ledger to make, and to guard
    ledger = store.ledger()
    await ledger.start()
    assert not await accounts.had_any_key()
    await accounts.close()
    with pytest.raises(Unavailable):
        await accounts.had_any_key()
    await accounts.close()
    await ledger.close()


async def test_errors_tell_no_digest(accounts: Accounts, store: LedgerStore) -> None:
    digest = b"planted-digest-of-32-bytes-12345"
    store.query("ALTER TABLE api_keys RENAME TO hidden")
    with pytest.raises(Unavailable) as raised:
        await accounts.with_digests([digest])
    assert isinstance(raised.value.__cause__, SQLAlchemyError)
    assert "planted" not in "".join(traceback.format_exception(raised.value))


async def test_waiting_for_the_database_does_not_block_the_event_loop(tmp_path: Path) -> None:
    store = SqliteStore(tmp_path / "ledger.db")
    ledger = store.ledger()
    await ledger.start()
    accounts, impatient = Accounts(store.url, timeout_s=60), Accounts(store.url, timeout_s=0.1)
    with closing(sqlite3.connect(store.path, isolation_level=None)) as writer:
        writer.execute("BEGIN IMMEDIATE")
        creating = asyncio.create_task(accounts.create("acme", {}, "admin"))
        for _ in range(10):
            await asyncio.sleep(0.005)
            assert await accounts.with_names(["acme"]) == {}  # readers wait for no writer
        with pytest.raises(Unavailable):
            await impatient.create("other", {}, "admin")
        assert not creating.done()
        writer.execute("ROLLBACK")
    assert (await creating).name == "acme"
    await impatient.close()
    await accounts.close()
    await ledger.close()


# --- PostgreSQL alone ---


@pytest.fixture
async def with_mortal(mortal: PostgresServer) -> AsyncIterator[tuple[PostgresStore, Accounts]]:
    """A server to be killed, whose absence is no question of time: it refuses connections."""
    store = PostgresStore(mortal)
    ledger = store.ledger()
    await ledger.start()
    accounts = Accounts(store.url, timeout_s=30)
    yield store, accounts
    await accounts.close()
    await ledger.close()
    store.drop()


async def test_a_killed_database_forgets_nothing_and_is_found_again(
    with_mortal: tuple[PostgresStore, Accounts],
) -> None:
    store, accounts = with_mortal
    server = store.server
    await accounts.create("acme", {}, "admin")
    secret, key = await accounts.create_key("acme", "admin")
    server.kill()
    while await _answers(accounts):  # its orphaned process may outlive it for a moment
        continue
    for _ in range(2):
        assert not await _answers(accounts)
    await asyncio.to_thread(server.start)
    assert await accounts.with_digests([digest_of(secret)]) == {digest_of(secret): key}
    assert await acts(accounts) == ["key.create", "account.create"]


async def test_a_database_that_answers_nothing_is_unavailable_in_bounded_time(
    with_mortal: tuple[PostgresStore, Accounts],
) -> None:
    store, accounts = with_mortal
    server, impatient = store.server, Accounts(store.url, timeout_s=0.5)
    await accounts.create("acme", {}, "admin")
    await eventually_answers(impatient)
    backends = [pid for (pid,) in server.execute("postgres", "SELECT pid FROM pg_stat_activity WHERE pid IS NOT NULL")]
    frozen = [server.pid, *backends]
    for pid in frozen:
        _signal(pid, signal.SIGSTOP)
    try:
        with pytest.raises(Unavailable):
            await asyncio.wait_for(impatient.get("acme"), 20)
        await asyncio.wait_for(impatient.close(), 20)  # its threads do not wait for ever either
    finally:
        for pid in frozen:
            _signal(pid, signal.SIGCONT)


@pytest.mark.parametrize(
    "url",
    ["postgresql://ledger:x/sk-planted@127.0.0.1/nowhere", "postgresql+psycopg://u:sk@sk-planted@127.0.0.1/nowhere"],
)
def test_a_url_that_is_not_understood_is_not_quoted(url: str) -> None:
    with pytest.raises(ValueError, match="not understood") as raised:
        Accounts(url)
    assert "sk-planted" not in "".join(traceback.format_exception(raised.value))


async def test_a_url_may_name_the_driver_and_trouble_does_not_tell_its_password(
    postgres: PostgresServer, caplog: pytest.LogCaptureFixture
) -> None:
    store = PostgresStore(postgres)
    ledger = store.ledger()
    await ledger.start()
    accounts = Accounts(store.url.replace("://", "+psycopg://"))
    assert (await accounts.create("acme", {}, "admin")).name == "acme"
    await accounts.close()
    await ledger.close()
    store.drop()
    away = Accounts("postgresql+psycopg://ledger:sk-planted@127.0.0.1:1/nowhere")
    with pytest.raises(Unavailable) as raised:
        await away.had_any_key()
    await away.close()
    assert "cannot be used" in caplog.text
    assert "sk-planted" not in caplog.text + "".join(traceback.format_exception(raised.value))


async def eventually_answers(accounts: Accounts) -> None:
    async with asyncio.timeout(30):
        while not await _answers(accounts):
            continue


async def _answers(accounts: Accounts) -> bool:
    try:
        await accounts.had_any_key()
    except Unavailable:
        return False
    return True


def _signal(pid: int, number: int) -> None:
    with suppress(ProcessLookupError):
        os.kill(pid, number)
