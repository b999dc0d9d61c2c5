"""The laws of every ledger one by one, under cancellation, concurrency and death, in each database in turn."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import time
from collections.abc import Awaitable, Generator
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

import pytest

from api.src.domain import UsageEvent
from api.src.errors import HoldLost, InsufficientBalance, InvalidRequest, Unavailable
from api.src.stores.ledger import MAX_MICROS, IdempotencyKey, Ledger
from api.src.stores.ledger_migrations import scripts_after
from tests.stores.conftest import OpenLedger
from tests.stores.ledgers import LedgerStore, event, eventually

KEY = IdempotencyKey("k", "digest")
_FREE = "NULL, 'r', 'ann', '', '', 1, 1, '', 0, 0, ''"


# A hold's life


async def test_settle_charges_and_gives_the_rest_back(ledger: Ledger):
    assert await ledger.credit("ann", 100, "c1") == 100
    async with ledger.hold("ann", "r1", 30) as hold:
        assert (hold.account, hold.request_id, hold.micros) == ("ann", "r1", 30)
        assert await ledger.balance("ann") == 70
        await hold.settle(event(hold, 20))
        assert await ledger.balance("ann") == 80
    assert await ledger.balance("ann") == 80
    assert await ledger.usage("ann", 10) == [event(hold, 20)]


async def test_leaving_without_settling_means_that_nothing_happened(ledger: Ledger):
    await ledger.credit("ann", 100, "c1")
    async with ledger.hold("ann", "r1", 30):
        pass
    with pytest.raises(ZeroDivisionError):
        async with ledger.hold("ann", "r2", 30):
            raise ZeroDivisionError
    assert await ledger.balance("ann") == 100
    assert await ledger.usage("ann", 10) == []


async def test_release_can_tell_what_failed(ledger: Ledger):
    await ledger.credit("ann", 100, "c1")
    async with ledger.hold("ann", "r1", 30) as hold:
        await hold.release(event(hold, 7, "failed"))
        assert await ledger.balance("ann") == 100
    assert await ledger.usage("ann", 10) == [event(hold, 0, "failed")]


async def test_a_hold_ends_once(ledger: Ledger):
    async with ledger.hold("ann", "r1", 30) as hold:
        await hold.settle(event(hold, 30))
        for again in (hold.settle(event(hold, 30)), hold.release(), hold.extend(1)):
            with pytest.raises(RuntimeError):
                await again
    async with ledger.hold("ann", "r2", 30) as left:
        pass
    with pytest.raises(RuntimeError):
        await left.settle(event(left, 30))
    assert len(await ledger.usage("ann", 10)) == 1


@pytest.mark.parametrize("wallet", [True, False])
async def test_no_more_is_charged_than_is_held(ledger: Ledger, wallet: bool):
    if wallet:
        await ledger.credit("ann", 100, "c1")
    async with ledger.hold("ann", "r1", 30) as hold:
        with pytest.raises(ValueError, match="31"):
            await hold.settle(event(hold, 31))
        with pytest.raises(ValueError, match="-1"):
            await hold.settle(event(hold, -1))
        with pytest.raises(ValueError, match="another request"):
            await hold.settle(UsageEvent("r9", "ann", "m", "v", 1, 1, "completed", 1, 0.0))
        await hold.settle(event(hold, 30))
    assert [used.price_micros for used in await ledger.usage("ann", 10)] == [30]


async def test_extend_reserves_more_or_nothing(ledger: Ledger):
    await ledger.credit("ann", 100, "c1")
    async with ledger.hold("ann", "r1", 30) as hold:
        await hold.extend(50)
        assert (hold.micros, await ledger.balance("ann")) == (80, 20)
        with pytest.raises(InsufficientBalance):
            await hold.extend(21)
        assert (hold.micros, await ledger.balance("ann")) == (80, 20)
        await hold.settle(event(hold, 75))
    assert await ledger.balance("ann") == 25


@pytest.mark.parametrize("micros", [-1, MAX_MICROS + 1])
async def test_amounts_out_of_range_are_refused(ledger: Ledger, micros: int):
    with pytest.raises(ValueError, match=str(micros)):
        await ledger.credit("ann", micros, "c1")
    with pytest.raises(ValueError, match=str(micros)):
        async with ledger.hold("ann", "r1", micros):
            pass
    assert await ledger.accounts() == {}


# Wallets


async def test_a_reference_is_credited_once_per_account(ledger: Ledger):
    assert await ledger.credit("ann", 100, "order 1") == 100
    assert await ledger.credit("ann", 100, "order 1") == 100
    assert await ledger.credit("bob", 7, "order 1") == 7
    assert await ledger.credit("ann", 1, "order 2") == 101


async def test_a_wallet_can_be_empty_and_then_refuses(ledger: Ledger):
    assert await ledger.balance("ann") is None
    assert await ledger.credit("ann", 0, "opened") == 0
    with pytest.raises(InsufficientBalance) as caught:
        async with ledger.hold("ann", "r1", 1):
            pass
    assert caught.value.balance_micros == 0
    async with ledger.hold("ann", "r2", 0) as hold:
        await hold.settle(event(hold, 0))


async def test_a_hold_from_before_the_wallet_never_moves_it(ledger: Ledger):
    async with ledger.hold("ann", "r1", 500) as settled, ledger.hold("ann", "r2", 500):
        await ledger.credit("ann", 100, "c1")
        await settled.extend(500)
        await settled.settle(event(settled, 1))
    assert await ledger.balance("ann") == 100


async def test_usage_is_newest_first_and_limited(ledger: Ledger):
    for number, account in enumerate(["ann", "bob", "ann"]):
        async with ledger.hold(account, f"r{number}", 1) as hold:
            await hold.settle(event(hold, 1))
    await ledger.credit("carl", 5, "c1")
    assert [used.request_id for used in await ledger.usage(None, 10)] == ["r2", "r1", "r0"]
    assert [used.request_id for used in await ledger.usage("ann", 10)] == ["r2", "r0"]
    assert [used.request_id for used in await ledger.usage(None, 1)] == ["r2"]
    assert await ledger.usage(None, -1) == []
    assert await ledger.accounts() == {"ann": None, "bob": None, "carl": 5}


async def test_a_hundred_at_once_get_what_is_there_for_ten(open_ledger: OpenLedger):
    ledgers = [await open_ledger(), await open_ledger()]
    await ledgers[0].credit("ann", 105, "c1")
    refused: list[InsufficientBalance] = []
    everyone_asked = asyncio.Barrier(100)

    async def one(number: int) -> None:
        try:
            async with ledgers[number % 2].hold("ann", f"r{number}", 10) as hold:
                await everyone_asked.wait()
                await hold.settle(event(hold, 10))
        except InsufficientBalance as error:
            refused.append(error)
            await everyone_asked.wait()

    await asyncio.gather(*(one(number) for number in range(100)))
    assert len(refused) == 90
    assert {error.balance_micros for error in refused} == {5}
    assert await ledgers[1].balance("ann") == 5


# Idempotency keys


async def test_a_key_with_another_body_is_refused(ledger: Ledger):
    async with ledger.hold("ann", "r1", 1, key=KEY):
        pass
    with pytest.raises(InvalidRequest) as caught:
        async with ledger.hold("ann", "r2", 1, key=IdempotencyKey("k", "other")):
            pass
    assert (caught.value.code, caught.value.param) == ("idempotency_key_reused", "Idempotency-Key")
    async with ledger.hold("bob", "r3", 1, key=IdempotencyKey("k", "other")):
        pass


async def test_a_refused_hold_does_not_use_its_key_up(ledger: Ledger):
    await ledger.credit("ann", 1, "c1")
    with pytest.raises(InsufficientBalance):
        async with ledger.hold("ann", "r1", 2, key=KEY):
            pass
    async with ledger.hold("ann", "r2", 1, key=IdempotencyKey("k", "other")):
        pass


async def test_a_repeat_is_free_after_the_first(ledger: Ledger):
    await ledger.credit("ann", 100, "c1")
    for request in ("r1", "r2"):
        async with ledger.hold("ann", request, 100, key=KEY) as hold:
            await hold.settle(event(hold, 100))
    assert await ledger.balance("ann") == 0
    assert [used.price_micros for used in await ledger.usage("ann", 10)] == [0, 100]


async def test_a_dearer_repeat_pays_the_difference(ledger: Ledger):
    await ledger.credit("ann", 100, "c1")
    for request, price in (("r1", 40), ("r2", 100), ("r3", 70)):
        async with ledger.hold("ann", request, price, key=KEY) as hold:
            await hold.settle(event(hold, price))
    assert [used.price_micros for used in await ledger.usage("ann", 10)] == [0, 60, 40]


async def test_a_repeat_while_the_first_runs_reserves_nothing_more(ledger: Ledger):
    await ledger.credit("ann", 100, "c1")
    async with ledger.hold("ann", "r1", 100, key=KEY) as first, ledger.hold("ann", "r2", 100, key=KEY) as repeat:
        await first.settle(event(first, 100))
        await repeat.settle(event(repeat, 100))
    assert await ledger.balance("ann") == 0


async def test_a_repeat_that_ends_first_pays_from_the_firsts_reserve(ledger: Ledger):
    await ledger.credit("ann", 100, "c1")
    async with ledger.hold("ann", "r1", 100, key=KEY) as first, ledger.hold("ann", "r2", 100, key=KEY) as repeat:
        await repeat.settle(event(repeat, 100))
        await first.settle(event(first, 100))
    assert await ledger.balance("ann") == 0
    assert [used.price_micros for used in await ledger.usage("ann", 10)] == [0, 100]


@pytest.mark.parametrize("paid_by_first", [0, 30])
async def test_hanging_up_the_first_makes_the_repeat_pay(ledger: Ledger, paid_by_first: int):
    await ledger.credit("ann", 100, "c1")
    async with AsyncExitStack() as repeats:
        async with ledger.hold("ann", "r1", 100, key=KEY) as first:
            repeat = await repeats.enter_async_context(ledger.hold("ann", "r2", 100, key=KEY))
            await repeats.enter_async_context(ledger.hold("ann", "r3", 60, key=KEY))
            if paid_by_first:
                await first.settle(event(first, paid_by_first, "cancelled"))
        assert await ledger.balance("ann") == 0
        await repeat.settle(event(repeat, 100))
    assert await ledger.balance("ann") == 0
    assert sum(used.price_micros for used in await ledger.usage("ann", 10)) == 100


async def test_what_no_sibling_lacks_goes_back(ledger: Ledger):
    await ledger.credit("ann", 100, "c1")
    async with AsyncExitStack() as repeats:
        async with ledger.hold("ann", "r1", 100, key=KEY):
            repeat = await repeats.enter_async_context(ledger.hold("ann", "r2", 60, key=KEY))
            await repeat.extend(10)
            assert await ledger.balance("ann") == 0
        assert await ledger.balance("ann") == 30
        await repeat.extend(20)
        assert await ledger.balance("ann") == 10
    assert await ledger.balance("ann") == 100


async def test_a_siblings_reserve_from_before_the_wallet_is_not_money(ledger: Ledger):
    async with AsyncExitStack() as repeats:
        async with ledger.hold("ann", "r1", 100, key=KEY):
            await ledger.credit("ann", 100, "c1")
            repeat = await repeats.enter_async_context(ledger.hold("ann", "r2", 80, key=KEY))
            assert await ledger.balance("ann") == 20
        assert await ledger.balance("ann") == 20
        await repeat.settle(event(repeat, 80))
    assert await ledger.balance("ann") == 20


async def test_a_key_may_be_used_afresh_after_its_term(open_ledger: OpenLedger, store: LedgerStore):
    ledger = await open_ledger(key_ttl_s=0.05, lease_s=0.15)
    async with ledger.hold("ann", "r1", 10, key=KEY) as old:
        await asyncio.sleep(0.1)
        async with ledger.hold("ann", "r2", 10, key=IdempotencyKey("k", "other")) as new:
            await new.settle(event(new, 10))
        await old.settle(event(old, 10))
    assert [used.price_micros for used in await ledger.usage("ann", 10)] == [10, 10]
    await eventually(lambda: store.query("SELECT * FROM idempotency_keys") == [])


# Cancellation


class CancelAt:
    """Awaits a coroutine and cancels its task at the n-th await: at once, or just when it would wake up."""

    def __init__(self, work: Awaitable[None], n: int, *, on_waking: bool) -> None:
        self.work, self.n, self.on_waking = work, n, on_waking
        self.awaits = 0

    def __await__(self) -> Generator[Any, Any, None]:
        task = asyncio.current_task()
        steps = self.work.__await__()
        step, argument = steps.send, None
        while True:
            try:
                future = step(argument)
            except StopIteration:
                return
            if self.awaits == self.n and self.on_waking:
                future.add_done_callback(lambda _: task.cancel())
            elif self.awaits == self.n:
                asyncio.get_running_loop().call_soon(task.cancel)
            self.awaits += 1
            try:
                argument, step = (yield future), steps.send
            except BaseException as error:
                argument, step = error, steps.throw


@pytest.mark.parametrize("on_waking", [False, True])
@pytest.mark.parametrize("ending", ["settle", "release", "leave"])
async def test_no_cancellation_leaves_a_hold(ledger: Ledger, store: LedgerStore, ending: str, on_waking: bool):
    await ledger.credit("ann", 1000, "c1")

    async def work() -> None:
        async with ledger.hold("ann", "r", 10, key=KEY) as hold:
            await hold.extend(10)
            if ending == "settle":
                await hold.settle(event(hold, 20))
            elif ending == "release":
                await hold.release()

    number = 0
    while True:
        run = CancelAt(work(), number, on_waking=on_waking)
        await asyncio.wait([asyncio.ensure_future(awaiting(run))])
        await eventually(lambda: store.open_holds() == 0)
        assert await ledger.check() == []
        if run.awaits <= number:
            break
        number += 1
    assert number >= 3


async def awaiting(work: Awaitable[None]) -> None:
    await work


# Leases


async def test_a_dead_owners_holds_are_released_by_a_living_one(open_ledger: OpenLedger, store: LedgerStore):
    dead = await open_ledger(lease_s=60)
    await dead.credit("ann", 100, "c1")
    async with dead.hold("ann", "r1", 40) as hold, dead.hold("ann", "r2", 40) as other:
        store.expire_leases()
        living = await open_ledger(lease_s=0.3)  # at the start already
        assert await living.balance("ann") == 100
        with pytest.raises(HoldLost):
            await hold.extend(1)
        with pytest.raises(HoldLost):
            await hold.settle(event(hold, 40))
        await other.release(event(other, 0, "failed"))
        async with dead.hold("ann", "r3", 10):  # it has found its lease again
            await asyncio.sleep(0.3)
            assert await living.balance("ann") == 90
    assert [used.request_id for used in await living.usage("ann", 10)] == ["r2"]


async def test_a_lease_that_runs_out_later_is_noticed_too(open_ledger: OpenLedger, store: LedgerStore):
    dead, living = await open_ledger(lease_s=60), await open_ledger(lease_s=0.3)
    async with dead.hold("ann", "r1", 40):
        assert store.open_holds() == 1
        store.expire_leases()
        await eventually(lambda: store.query("SELECT state FROM holds") == [("lost",)])
    assert await living.check() == []


async def test_a_living_owner_keeps_its_holds_while_its_event_loop_stands_still(
    open_ledger: OpenLedger, store: LedgerStore
):
    first, second = await open_ledger(lease_s=3), await open_ledger(lease_s=3)

    def leases() -> list[float]:
        return [float(until) for (until,) in store.query("SELECT lease_until FROM owners ORDER BY id")]

    async with first.hold("ann", "r1", 40) as mine, second.hold("ann", "r2", 40) as theirs:
        before, deadline = leases(), time.monotonic() + 20
        while not all(now > then for now, then in zip(leases(), before, strict=True)):
            assert time.monotonic() < deadline, "a lease is not renewed"
            time.sleep(0.01)  # noqa: ASYNC251
        await mine.settle(event(mine, 40))
        await theirs.settle(event(theirs, 40))


async def test_close_releases_what_is_open_and_says_so_afterwards(open_ledger: OpenLedger, store: LedgerStore):
    closing_one, other = await open_ledger(), await open_ledger()
    await other.credit("ann", 100, "c1")
    async with closing_one.hold("ann", "r1", 40) as hold, other.hold("ann", "r2", 40) as theirs:
        await closing_one.close()
        await closing_one.close()
        assert await other.balance("ann") == 60
        with pytest.raises(Unavailable):
            await hold.settle(event(hold, 40))
        await theirs.settle(event(theirs, 40))
    with pytest.raises(Unavailable):
        await closing_one.balance("ann")
    assert len(store.query("SELECT * FROM owners")) == 1


# Death of whole processes

CHILD = """
import asyncio, sys, time
from api.src.domain import UsageEvent
from api.src.errors import HoldLost
from api.src.stores.ledger import IdempotencyKey
from api.src.stores.ledger_migrations import scripts_after
from api.src.stores.ledger_choice import ledger_at

def event(hold, price):
    return UsageEvent(hold.request_id, hold.account, "m", "v", 1, 1, "completed", price, time.time())

async def busy(ledger, name):
    for number in range(10**9):
        key = IdempotencyKey(f"{name}-{number // 3}", "")
        async with ledger.hold("ann", f"{name}-{number}", 10, key=key if number % 2 else None) as hold:
            await hold.extend(5)
            await hold.settle(event(hold, number % 16))
        if name == "0":
            print(number, flush=True)

async def work(ledger):
    await asyncio.gather(*(busy(ledger, str(name)) for name in range(8)))

async def wait(ledger):
    async with ledger.hold("ann", "slept", 10) as hold:
        print("held", flush=True)
        sys.stdin.readline()
        try:
            await hold.settle(event(hold, 10))
        except HoldLost:
            print("lost", flush=True)

async def start(ledger):
    pass

async def main(url, what, lease_s="60"):
    ledger = ledger_at(url, lease_s=float(lease_s))
    await ledger.start()
    await globals()[what](ledger)
    await ledger.close()

asyncio.run(main(*sys.argv[1:]))
"""


def child(store: LedgerStore, *what: str) -> subprocess.Popen[str]:
    """What it does, and for how many seconds a lease of its is."""
    command = [sys.executable, "-c", CHILD, store.url, *what]
    root = Path(__file__).parents[2]
    return subprocess.Popen(command, cwd=root, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)


async def test_kill_9_in_the_middle_of_work_loses_nothing(open_ledger: OpenLedger, store: LedgerStore):
    ledger = await open_ledger(lease_s=0.6)
    await ledger.credit("ann", 10**9, "c1")
    for round_number in range(3):
        with child(store, "work") as process:
            assert process.stdout is not None
            for _ in range(3 + 7 * round_number):
                assert await asyncio.to_thread(process.stdout.readline)
            process.send_signal(signal.SIGKILL)
        assert await ledger.check() == []
    store.expire_leases()
    await eventually(lambda: store.open_holds() == 0)
    charged = sum(used.price_micros for used in await ledger.usage(None, 10**6))
    assert await ledger.balance("ann") == 10**9 - charged


async def test_a_process_that_slept_beyond_its_lease_has_lost_its_hold(open_ledger: OpenLedger, store: LedgerStore):
    ledger = await open_ledger(lease_s=0.6)
    await ledger.credit("ann", 10, "c1")
    with child(store, "wait", "0.6") as process:
        assert process.stdout is not None
        assert await asyncio.to_thread(process.stdout.readline) == "held\n"
        process.send_signal(signal.SIGSTOP)
        await eventually(lambda: store.open_holds() == 0)
        process.send_signal(signal.SIGCONT)
        output = await asyncio.to_thread(process.communicate, "go on\n")
        assert output[0] == "lost\n"
    assert (process.returncode, await ledger.balance("ann")) == (0, 10)


# The books


async def test_migrations_run_once_when_all_start_at_once(store: LedgerStore):
    processes = [child(store, "start") for _ in range(3)]
    ledgers = [store.ledger() for _ in range(8)]
    await asyncio.gather(*(ledger.start() for ledger in ledgers))
    for process in processes:
        await asyncio.to_thread(process.communicate)
        assert process.returncode == 0
    assert store.schema() == max(scripts_after("sqlite", 0)) == max(scripts_after("postgres", 0))
    assert store.query("SELECT count(*) FROM accounts") == [(0,)]
    assert await ledgers[0].check() == []
    await asyncio.gather(*(ledger.close() for ledger in ledgers))


async def test_a_database_of_a_newer_version_is_refused(ledger: Ledger, store: LedgerStore):
    store.pretend_schema(9999)
    newer = store.ledger()
    with pytest.raises(RuntimeError, match="9999"):
        await newer.start()
    await newer.close()
    with pytest.raises(Unavailable):
        await newer.balance("ann")


@pytest.mark.parametrize("trouble", ["schema", "table"])
async def test_a_ledger_that_did_not_start_may_be_started_again(ledger: Ledger, store: LedgerStore, trouble: str):
    known = store.schema()
    again = store.ledger()
    for _ in range(2):
        if trouble == "schema":
            store.pretend_schema(9999)
        else:  # the file can be opened; only the first upkeep fails
            store.query("ALTER TABLE owners RENAME TO put_away")
        with pytest.raises((RuntimeError, Unavailable)):
            await again.start()
        with pytest.raises(Unavailable):
            await again.balance("ann")
        if trouble == "schema":
            store.pretend_schema(known)
        else:
            store.query("ALTER TABLE put_away RENAME TO owners")
    await again.start()
    assert await again.credit("ann", 100, "late") == 100
    async with again.hold("ann", "req_1", 60) as hold:
        await hold.settle(event(hold, 50))
    assert await again.balance("ann") == 50
    assert await again.check() == []
    await again.close()


@pytest.mark.parametrize(
    ("damage", "complaint"),
    [
        ("UPDATE balances SET micros = micros + 1 WHERE account = 'ann'", "account ann: the balance is"),
        ("DELETE FROM balances WHERE account = 'ann'", "account ann: the balance is"),
        ("UPDATE balances SET micros = -1 WHERE account = 'ann'", "below zero"),
        ("DELETE FROM entries WHERE kind = 'credit'", "account ann: the balance is"),
        ("UPDATE entries SET micros = micros + 1 WHERE kind = 'charge'", "though its entries leave"),
        ("DELETE FROM entries WHERE kind = 'release'", "though its entries leave"),
        ("UPDATE entries SET micros = -micros WHERE kind = 'charge'", "below zero"),
        ("UPDATE entries SET account = 'eve' WHERE kind = 'charge'", "not of its account eve"),
        ("UPDATE entries SET hold = 99 WHERE kind = 'charge'", "its hold 99"),
        ("UPDATE holds SET held = 5 WHERE state = 'settled'", "with 5 held"),
        ("UPDATE holds SET state = 'released' WHERE state = 'settled'", "released, charged 20"),
        ("UPDATE holds SET price = 3 WHERE state = 'settled'", "at a price of 3"),
        ("UPDATE holds SET wallet = 0 WHERE state = 'settled'", "account ann: the balance is"),
        ("DELETE FROM usage_events", "with 0 usage events"),
        ("UPDATE usage_events SET price_micros = 3", "of 3 in all"),
        ("UPDATE usage_events SET account = 'eve'", "not of its account eve"),
        ("INSERT INTO usage_events SELECT 9, hold, '', 'ann', '', '', 1, 1, '', 0, 0, '' FROM usage_events", "2 usage"),
        ("INSERT INTO usage_events VALUES (9, NULL, 'r', 'ann', '', '', 1, 1, '', 7, 0, '')", "no hold and costs 7"),
        (f"INSERT INTO usage_events VALUES (8, {_FREE}), (9, {_FREE})", "request r: 2 usage events"),
        ("UPDATE idempotency_keys SET charged = 21 WHERE value = 'k'", "charged 21, its holds were charged 20"),
        ("UPDATE idempotency_keys SET charged = 1 WHERE value = 'open'", "its holds were charged 0"),
        ("UPDATE holds SET price = 50 WHERE state = 'open'", "do not cover"),
    ],
)
async def test_the_checker_finds_planted_damage(store: LedgerStore, damage: str, complaint: str):
    ledger = store.ledger()
    await ledger.start()
    await ledger.credit("ann", 100, "c1")
    async with ledger.hold("ann", "r1", 30, key=KEY) as hold:
        await hold.settle(event(hold, 20))
    async with ledger.hold("ann", "r2", 30, key=IdempotencyKey("open", "")):
        assert await ledger.check() == []
        with pytest.raises(Exception, match="append-only"):
            store.query("DELETE FROM entries")
        store.drop_guards()
        store.query(damage)
        assert complaint in "\n".join(await ledger.check())
    await ledger.close()


def test_a_forgotten_close_does_not_keep_the_process_alive(store: LedgerStore):
    code = CHILD.replace("await ledger.close()", "pass")
    done = subprocess.run(
        [sys.executable, "-c", code, store.url, "start"], cwd=Path(__file__).parents[2], timeout=60, env=os.environ
    )
    assert done.returncode == 0
