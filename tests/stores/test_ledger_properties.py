"""Every law at once: a machine that does everything in any order, on two ledgers that share a store."""

from __future__ import annotations

import asyncio
import shutil
import tempfile
from abc import abstractmethod
from collections.abc import Iterator
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, initialize, invariant, multiple, rule

from api.src.domain import UsageEvent
from api.src.errors import HoldLost, InsufficientBalance, InvalidRequest, Unavailable
from api.src.stores.ledger import Hold, IdempotencyKey
from api.src.stores.ledger_front import StoredLedger
from tests.postgres import PostgresServer
from tests.stores.ledgers import LedgerStore, PostgresStore, SqliteStore

ACCOUNTS = st.sampled_from(["ann", "bob"])
AMOUNTS = st.integers(0, 30)
KEYS = st.none() | st.builds(IdempotencyKey, st.sampled_from("xy"), st.just("digest"))


@dataclass
class Lease:
    """A hold as the machine knows it. `owner` is the number of the ledger object that gave it."""

    manager: AbstractAsyncContextManager[Hold]
    hold: Hold
    owner: int
    key: tuple[str, str] | None
    wallet: bool


class LedgerMachine(RuleBasedStateMachine):
    """`spent`, `credited` and `dearest` are the model: what was charged to wallets, paid in, and a key's maximum."""

    leases = Bundle("leases")

    @abstractmethod
    def new_store(self) -> LedgerStore:
        """An empty database."""

    @abstractmethod
    def drop_store(self) -> None: ...

    @initialize()
    def open_two(self) -> None:
        self.store = self.new_store()
        self.runner = asyncio.Runner()
        self.open: list[Lease] = []
        self.credited: dict[str, int] = {}
        self.dearest: dict[tuple[str, str], int] = {}
        self.paid: dict[tuple[str, str], int] = {}
        self.spent: dict[str, int] = {}
        self.number = 0
        self.ledgers: list[StoredLedger] = []
        self.owners = [self.start(), self.start()]

    def start(self) -> int:
        ledger = self.store.ledger()
        self.runner.run(ledger.start())
        self.ledgers.append(ledger)
        return len(self.ledgers) - 1

    @rule(account=ACCOUNTS, micros=AMOUNTS, reference=st.integers(0, 5), side=st.integers(0, 1))
    def credit(self, account: str, micros: int, reference: int, side: int) -> None:
        ledger = self.ledgers[self.owners[side]]
        before = self.runner.run(ledger.balance(account))
        known = self.rows(
            f"SELECT 1 FROM entries WHERE kind = 'credit' AND account = '{account}' AND reference = '{reference}'"
        )
        after = self.runner.run(ledger.credit(account, micros, str(reference)))
        assert after == (before if known else (before or 0) + micros)
        self.credited[account] = self.credited.get(account, 0) + (0 if known else micros)

    @rule(target=leases, account=ACCOUNTS, micros=AMOUNTS, key=KEYS, side=st.integers(0, 1))
    def hold(self, account: str, micros: int, key: IdempotencyKey | None, side: int) -> object:
        owner = self.owners[side]
        self.number += 1
        balance = self.runner.run(self.ledgers[owner].balance(account))
        manager = self.ledgers[owner].hold(account, f"r{self.number}", micros, key=key)
        named = None if key is None else (account, key.value)
        try:
            hold = self.runner.run(manager.__aenter__())
        except InsufficientBalance:
            assert balance is not None
            assert micros - self.covered(named, wallet=True) > balance
            return multiple()
        assert balance is None or micros - self.covered(named, wallet=True) <= balance
        lease = Lease(manager, hold, owner, named, balance is not None)
        self.open.append(lease)
        return lease

    @rule(account=ACCOUNTS, price=AMOUNTS, key=KEYS, side=st.integers(0, 1))
    def charge(self, account: str, price: int, key: IdempotencyKey | None, side: int) -> None:
        ledger = self.ledgers[self.owners[side]]
        self.number += 1
        event = UsageEvent(f"r{self.number}", account, "m", "v", 1, 1, "cached", price, 0.0)
        balance = self.runner.run(ledger.balance(account))
        named = None if key is None else (account, key.value)
        missing = price - self.covered(named, wallet=balance is not None)
        try:
            self.runner.run(ledger.charge(event, key=key))
        except InsufficientBalance:
            assert balance is not None
            assert missing > balance
            return
        assert balance is None or missing <= balance
        self.note_charge(account, named, price, wallet=balance is not None)

    @rule(account=ACCOUNTS, value=st.sampled_from("xy"), side=st.integers(0, 1))
    def reuse_a_key(self, account: str, value: str, side: int) -> None:
        if not self.rows(f"SELECT 1 FROM idempotency_keys WHERE account = '{account}' AND value = '{value}'"):
            return
        manager = self.ledgers[self.owners[side]].hold(account, "r", 1, key=IdempotencyKey(value, "other"))
        with pytest.raises(InvalidRequest):
            self.runner.run(manager.__aenter__())

    @rule(lease=leases, micros=AMOUNTS)
    def extend(self, lease: Lease, micros: int) -> None:
        if lease not in self.open:
            return
        before = lease.hold.micros
        balance = self.runner.run(self.ledgers[self.owners[0]].balance(lease.hold.account))
        try:
            self.runner.run(lease.hold.extend(micros))
        except InsufficientBalance:
            assert lease.wallet
            assert balance is not None
            assert micros > balance
            assert lease.hold.micros == before
        else:
            assert lease.hold.micros == before + micros

    @rule(lease=consumes(leases), part=st.integers(0, 100))
    def settle(self, lease: Lease, part: int) -> None:
        price = lease.hold.micros * part // 100
        event = UsageEvent(lease.hold.request_id, lease.hold.account, "m", "v", 1, 1, "completed", price, 0.0)
        if lease not in self.open:
            with pytest.raises((HoldLost, Unavailable)):
                self.runner.run(lease.hold.settle(event))
            return
        self.runner.run(lease.hold.settle(event))
        self.note_charge(lease.hold.account, lease.key, price, wallet=lease.wallet)
        self.leave(lease)

    @rule(lease=consumes(leases), tell=st.booleans())
    def release(self, lease: Lease, tell: bool) -> None:
        event = UsageEvent(lease.hold.request_id, lease.hold.account, "m", "v", 1, 1, "failed", 0, 0.0)
        if lease in self.open:
            self.runner.run(lease.hold.release(event if tell else None))
            self.leave(lease)

    @rule(lease=consumes(leases))
    def hang_up(self, lease: Lease) -> None:
        if lease in self.open:
            self.leave(lease)

    @rule(side=st.integers(0, 1), dead=st.booleans())
    def end_an_owner(self, side: int, dead: bool) -> None:
        """It closes, or its lease runs out and the other notices; a new one takes its place."""
        owner, other = self.owners[side], self.ledgers[self.owners[1 - side]]
        if dead:
            self.store.query(f"UPDATE owners SET lease_until = 0 WHERE id = '{self.ledgers[owner]._owner}'")
            self.runner.run(self.tick(other))
        else:
            self.runner.run(self.ledgers[owner].close())
        self.open = [lease for lease in self.open if lease.owner != owner]
        self.owners[side] = self.start()

    async def tick(self, ledger: StoredLedger) -> None:
        await ledger._writer._enqueue(ledger._writer._tick)

    @invariant()
    def the_laws_hold(self) -> None:
        ledger = self.ledgers[self.owners[0]]
        assert self.runner.run(ledger.check()) == []
        held = {
            account: sum(self.held(lease) for lease in self.open if lease.wallet and lease.hold.account == account)
            for account in self.credited
        }
        for account, credited in self.credited.items():
            balance = self.runner.run(ledger.balance(account))
            assert balance == credited - self.spent.get(account, 0) - held[account]
            assert balance >= 0
        assert self.paid == self.dearest
        for lease in self.open:
            assert self.covered(lease.key, lease.wallet) >= lease.hold.micros or lease.key is None
        assert {row[0] for row in self.rows("SELECT id FROM holds WHERE state = 'open'")} == {
            lease.hold.id for lease in self.open
        }

    def note_charge(self, account: str, key: tuple[str, str] | None, price: int, *, wallet: bool) -> None:
        """Something was settled just now: see what was charged for it."""
        charged = self.rows("SELECT price_micros FROM usage_events ORDER BY id DESC LIMIT 1")[0][0]
        paid = 0 if key is None else self.paid.get(key, 0)
        assert charged == max(0, price - paid)
        if key is not None:
            self.paid[key] = paid + charged
            self.dearest[key] = max(self.dearest.get(key, 0), price)
        if wallet:
            self.spent[account] = self.spent.get(account, 0) + charged

    def teardown(self) -> None:
        for lease in list(self.open):
            self.leave(lease)
        self.the_laws_hold()
        for ledger in self.ledgers:
            self.runner.run(ledger.close())
        self.runner.close()
        self.drop_store()

    def leave(self, lease: Lease) -> None:
        self.open.remove(lease)
        self.runner.run(lease.manager.__aexit__(None, None, None))  # type: ignore[arg-type]

    def held(self, lease: Lease) -> int:
        return int(self.rows(f"SELECT held FROM holds WHERE id = {lease.hold.id}")[0][0])

    def covered(self, key: tuple[str, str] | None, wallet: bool) -> int:
        """What a key's requests have paid or still reserve."""
        if key is None:
            return 0
        siblings = [lease for lease in self.open if lease.key == key and lease.wallet == wallet]
        return self.paid.get(key, 0) + sum(self.held(lease) for lease in siblings)

    def rows(self, sql: str) -> list[tuple[int]]:
        return self.store.query(sql)


class SqliteMachine(LedgerMachine):
    def new_store(self) -> LedgerStore:
        self.folder = Path(tempfile.mkdtemp())
        return SqliteStore(self.folder / "ledger.db")

    def drop_store(self) -> None:
        shutil.rmtree(self.folder)


class PostgresMachine(LedgerMachine):
    server: PostgresServer

    def new_store(self) -> LedgerStore:
        return PostgresStore(self.server)

    def drop_store(self) -> None:
        self.store.drop()


@pytest.fixture
def machines_server(postgres: PostgresServer) -> Iterator[None]:
    PostgresMachine.server = postgres
    yield
    del PostgresMachine.server


def machine_settings(examples: int) -> settings:
    return settings(
        max_examples=examples,
        stateful_step_count=30,
        deadline=None,
        suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
    )


SqliteMachine.TestCase.settings = machine_settings(30)
PostgresMachine.TestCase.settings = machine_settings(12)  # each is seven times as slow
TestLedgerLaws = SqliteMachine.TestCase
TestLedgerLawsInPostgres = pytest.mark.usefixtures("machines_server")(PostgresMachine.TestCase)
