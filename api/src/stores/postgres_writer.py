"""The thread that writes to a PostgreSQL ledger.

Owns its transactions, the lease, the migrations, and finding out what became of a commit whose answer was lost. All
acts that wait share one transaction of two round trips: begin, lock and load; store and commit. Where none of them must
see anything, the second one suffices: what they store may be stored twice, so that nobody need know whether it was.

A transaction begins by writing its number into its owner's row, which locks the row to its end. So whoever comes back
after a lost answer and can lock the row knows that the transaction has ended, and reads there whether it was
committed. Nothing but that second round trip can commit, and it is not sent before the row is locked.
"""

from __future__ import annotations

import asyncio
import logging
import math
import time
from collections.abc import Callable, Iterator, Sequence
from itertools import groupby
from typing import Any, TypeVar

import psycopg

from . import ledger_laws as laws
from .ledger_migrations import scripts_after
from .ledger_page import Act, Attempt, Page, attempt_all
from .ledger_writer import Job, LedgerWriter, Outcome, refused, unavailable, wanted
from .postgres_page import load, lock, store
from .postgres_session import Query, Rows, Session

_T = TypeVar("_T")

_MAX_ACTS = 200
"""Acts of one transaction: each may take one of the few thousand locks that a server has room for."""

_PAUSE_S = 0.05
_LONGEST_PAUSE_S = 1.0
_KEEP_OWNERS_S = 86400.0
"""For so long a dead owner may come back to ask whether its last transaction was committed."""

_MIGRATION_LOCK = 0x7474735F6C656467
_IDS_PER_OWNER = 2**32

_NOW = "extract(epoch FROM clock_timestamp())::float8"
_BEGIN: Query = ("BEGIN ISOLATION LEVEL READ COMMITTED", ())
_COMMIT: Query = ("COMMIT", ())
_DO_NOT_SYNC: Query = ("SET LOCAL synchronous_commit = off", ())
_RENEW = f"""
    INSERT INTO owners (id, number, lease_until, batch) VALUES (%s, %s, {_NOW} + %s, %s)
    ON CONFLICT (id) DO UPDATE SET lease_until = excluded.lease_until, batch = excluded.batch
    RETURNING {_NOW}
"""
_REGISTER = f"""
    INSERT INTO owners (id, number, lease_until, batch) VALUES (%s, nextval('owner_numbers'), {_NOW} + %s, 0)
    ON CONFLICT (id) DO UPDATE SET lease_until = excluded.lease_until
    RETURNING number
"""
_BATCH = "SELECT batch FROM owners WHERE id = %s FOR UPDATE"
_END_OTHERS = """
    SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE application_name = %s AND pid <> pg_backend_pid()
"""
_DEAD_HOLDS = f"""
    WITH dead AS (
        SELECT id FROM owners WHERE id <> %s AND lease_until <= {_NOW} FOR UPDATE SKIP LOCKED
    )
    SELECT id, account FROM holds WHERE state = 'open' AND owner <> %s AND (
        owner IN (SELECT id FROM dead) OR NOT EXISTS (SELECT 1 FROM owners WHERE owners.id = holds.owner)
    )
    LIMIT {_MAX_ACTS}
"""
_UNUSED = "NOT EXISTS (SELECT 1 FROM holds WHERE holds.key = idempotency_keys.id AND state = 'open')"
_OLD_KEYS = f"""
    SELECT id, account FROM idempotency_keys WHERE at <= {_NOW} - %s AND {_UNUSED} ORDER BY at LIMIT {_MAX_ACTS}
"""
_FORGET_KEYS = f"DELETE FROM idempotency_keys WHERE id = ANY(%s::bigint[]) AND {_UNUSED}"
_FORGET_OWNERS = f"""
    DELETE FROM owners WHERE id IN (
        SELECT id FROM owners WHERE id <> %s AND lease_until <= {_NOW} - {_KEEP_OWNERS_S} FOR UPDATE SKIP LOCKED
    )
"""
_MY_HOLDS = f"SELECT id, account FROM holds WHERE state = 'open' AND owner = %s LIMIT {_MAX_ACTS}"

_OWN_FAULTS = (psycopg.DataError, psycopg.IntegrityError, psycopg.ProgrammingError, ValueError)
"""What an act's own values can cause; all else is the database's trouble, and may pass."""

_log = logging.getLogger(__name__)


class PostgresWriter(LedgerWriter):
    """Makes Acts happen, and keeps the lease of `owner`: `lease_s` seconds, renewed by every transaction.

    A database that is away for `patience_s` seconds makes what waits Unavailable; a lost answer is asked for until it
    is known. Starting raises psycopg.Error, or RuntimeError for a database of a newer version.
    """

    _max_batch = _MAX_ACTS

    def __init__(self, url: str, owner: str, lease_s: float, key_ttl_s: float, patience_s: float) -> None:
        super().__init__("postgres-writer", self._keep_up, lease_s / 3)
        self._name_there = f"qwen3-tts ledger {owner}"
        self._session = Session(url, self._name_there, patience_s)
        self._owner = owner
        self._lease_s = lease_s
        self._key_ttl_s = key_ttl_s
        self._patience_s = patience_s
        self._longest_pause_s = min(_LONGEST_PAUSE_S, self._tick_s)
        self._batch = 0
        self._number = 0
        self._ids = 0
        self._renewed: float | None = None
        self._returned = -math.inf
        self.away_since: float | None = None
        """When the database was found to be away, by the monotonic clock."""

    def submit(self, act: Act[_T], durable: bool) -> asyncio.Future[_T]:
        """Queue an act; see StoredLedger.submit."""
        return self._enqueue(act, durable)

    # The thread

    def _open(self) -> None:
        deadline = time.monotonic() + self._patience_s
        while True:
            try:
                self._connect()
                self._session.script(_migrate)
                self._number = self._session.run((_REGISTER, (self._owner, self._lease_s)))[0][0][0]
                return
            except Exception as error:
                self._session.close()
                given_up = self._last is not None or time.monotonic() > deadline
                if given_up or not isinstance(error, psycopg.OperationalError):
                    raise
                time.sleep(_PAUSE_S)

    def _shut(self) -> None:
        self._session.close()

    def _pause(self) -> float:
        return self._tick_s if self.away_since is None else self._longest_pause_s

    def _execute(self, jobs: list[Job]) -> Iterator[Outcome]:
        for is_act, group in groupby(jobs, key=lambda job: isinstance(job.work, Act)):
            if is_act:
                yield from self._commit(list(group))
            else:
                yield from (self._do_chore(job) for job in group)

    def _do_chore(self, job: Job) -> Outcome:
        """Run a function of ours, again for as long as acts would be tried."""
        chore: Callable[[], BaseException | None] = job.work
        pause = _PAUSE_S
        while True:
            try:
                result = chore()
            except Exception as error:
                self._note_trouble(error)
                if not isinstance(error, psycopg.OperationalError) or job.since + self._patience_s < time.monotonic():
                    return Outcome(job.future, None, unavailable(error))
                time.sleep(pause)
                pause = min(2 * pause, self._longest_pause_s)
            else:
                return Outcome(job.future, result, None)

    def _commit(self, jobs: list[Job]) -> list[Outcome]:
        """Make acts happen; those that have waited for too long are given up, and it is certain that they did not.

        Acts that must see nothing are the exception: nothing is certain of them.
        """
        pause = _PAUSE_S
        error: Exception | None = None
        while jobs := self._in_time(jobs, error):
            try:
                return self._transact(jobs)
            except _OWN_FAULTS as fault:
                if len(jobs) > 1:  # one of them harms nobody else
                    return [outcome for job in jobs for outcome in self._commit([job])]
                self._note_trouble(fault)
                return [Outcome(jobs[0].future, None, _failure(jobs[0].work, fault))]
            except _Unknown as unknown:
                return [Outcome(job.future, None, unavailable(unknown)) for job in jobs]
            except psycopg.Error as trouble:
                error = trouble
                self._note_trouble(trouble)
                time.sleep(pause)
                pause = min(2 * pause, self._longest_pause_s)
            except Exception as fault:
                _log.exception("the ledger's writer failed")
                self._session.close()
                return [Outcome(job.future, None, unavailable(fault)) for job in jobs]
        return []

    def _in_time(self, jobs: list[Job], error: Exception | None) -> list[Job]:
        """Answer the jobs that have waited for too long, and return the others that are still wanted."""
        oldest = time.monotonic() - self._patience_s
        in_time: list[Job] = []
        late: list[Job] = []
        for job in wanted(jobs):
            (late if job.since < oldest and isinstance(job.work, Act) else in_time).append(job)
        if late:
            self._answer([Outcome(job.future, None, unavailable(error)) for job in late])
        return in_time

    def _note_trouble(self, error: BaseException) -> None:
        """Log it, but an absence only once."""
        if self.away_since is None:
            _log.warning("a ledger transaction failed: %s: %s", type(error).__name__, str(error).partition("\n")[0])
        if not self._session.connected and self.away_since is None:
            self.away_since = time.monotonic()

    # Transactions

    def _transact(self, jobs: Sequence[Job]) -> list[Outcome]:
        acts = [job.work for job in jobs]
        if all(act.account is None for act in acts):
            return self._store_blindly(jobs)
        head = self._head(durable=any(job.durable for job in jobs))
        loading = load(acts)
        rows = self._ask(*head, lock(act.account for act in acts), *loading.values())
        page = self._page(rows[len(head) - 1], dict(zip(loading, rows[len(head) + 1 :], strict=True)))
        attempts = attempt_all(acts, page)
        self._store(page)
        return _outcomes(jobs, attempts)

    def _store_blindly(self, jobs: Sequence[Job]) -> list[Outcome]:
        page = Page(time.time(), self._new_id)
        attempts = attempt_all([job.work for job in jobs], page)
        self._ask(_BEGIN, *store(page), _COMMIT)
        self.transactions += 1
        return _outcomes(jobs, attempts)

    def _head(self, *, durable: bool) -> list[Query]:
        """The beginning of a transaction. Its last query locks our row and tells the time."""
        self._batch += 1
        renew = (_RENEW, (self._owner, self._number, self._lease_s, self._batch))
        return [_BEGIN, renew] if durable else [_BEGIN, _DO_NOT_SYNC, renew]

    def _ask(self, *queries: Query) -> list[Rows]:
        if not self._session.connected:
            self._connect()
        return self._session.run(*queries)

    def _page(self, renewed: Rows, rows: dict[str, Rows]) -> Page:
        self._renewed = time.monotonic()
        page = Page(renewed[0][0], self._new_id)
        page.load(**rows)
        return page

    def _new_id(self, table: str) -> int:
        self._ids += 1
        return self._number * _IDS_PER_OWNER + self._ids

    def _store(self, page: Page, *more: Query) -> None:
        """Store and commit. Raises psycopg.Error if that did not happen, _Unknown if nobody can say."""
        try:
            self._session.run(*store(page), *more, _COMMIT)
        except psycopg.Error as error:
            if self._session.connected:
                raise
            self._note_trouble(error)
            if not self._was_committed():
                raise
        self.transactions += 1

    def _was_committed(self) -> bool:
        """Whether the transaction whose answer was lost came to be. Asks until there is an answer.

        Raises _Unknown if the ledger is being closed and the database stays away.
        """
        asked = time.monotonic()
        pause = _PAUSE_S
        while True:
            try:
                found = self._ask((_BATCH, (self._owner,)))[0]
            except psycopg.Error as error:
                if self._last is not None and time.monotonic() - asked > self._patience_s:
                    raise _Unknown from error
                self._collect()
                self._backlog.extend(self._in_time([self._backlog.popleft() for _ in range(len(self._backlog))], error))
                time.sleep(pause)
                pause = min(2 * pause, self._longest_pause_s)
            else:
                return bool(found) and found[0][0] == self._batch

    def _connect(self) -> None:
        """Connect, and end what an earlier connection of ours may have left behind there."""
        self._session.connect()
        self._session.run((_END_OTHERS, (self._name_there,)))
        if self.away_since is not None:
            _log.warning("the ledger's database is back after %.1f s", time.monotonic() - self.away_since)
        self.away_since = None

    # Leases

    def _keep_up(self) -> None:
        """Renew the lease, release the holds of the dead, forget old keys."""
        now = time.monotonic()
        if self._renewed is not None and now - self._renewed >= self._lease_s:
            self._returned = now
        # Whoever could not renew its own lease does not judge others for as long: the database was away for them too.
        may_judge = now - self._returned >= self._lease_s
        while self._clear_up(may_judge):
            pass

    def _clear_up(self, may_judge: bool) -> bool:
        """Do a part of the upkeep; return whether there may be more."""
        head = self._head(durable=False)
        dead = (_DEAD_HOLDS, (self._owner, self._owner)) if may_judge else ("SELECT 1 WHERE false", ())
        *_, renewed, lost, old = self._ask(*head, dead, (_OLD_KEYS, (self._key_ttl_s,)))
        forget = (_FORGET_KEYS, ([key for key, _ in old],))
        self._release(renewed, lost, "lost", {account for _, account in old}, forget, (_FORGET_OWNERS, (self._owner,)))
        return _MAX_ACTS in (len(lost), len(old))

    def leave(self) -> None:
        """Release our own holds and give up the lease."""
        while True:
            *_, renewed, mine = self._ask(*self._head(durable=False), (_MY_HOLDS, (self._owner,)))
            more = len(mine) == _MAX_ACTS
            forget = [] if more else [("DELETE FROM owners WHERE id = %s", (self._owner,))]
            self._release(renewed, mine, "released", set(), *forget)
            if not more:
                return

    def _release(self, renewed: Rows, holds: Rows, state: str, accounts: set[str], *more: Query) -> None:
        """Go on with a transaction that has begun: release these holds, and do more under these accounts' locks."""
        acts = [laws.releasing(account, hold, state) for hold, account in holds]
        loading = load(acts)
        _, *rows = self._session.run(lock(accounts | {act.account for act in acts}), *loading.values())
        page = self._page(renewed, dict(zip(loading, rows, strict=True)))
        for act in acts:
            act.apply(page)
        self._store(page, *more)


class _Unknown(Exception):
    """Nobody can say whether a transaction was committed."""


def _outcomes(jobs: Sequence[Job], attempts: Sequence[Attempt]) -> list[Outcome]:
    return [Outcome(job.future, *attempt) for job, attempt in zip(jobs, attempts, strict=True)]


def _failure(act: Act[Any], fault: Exception) -> Exception:
    """What is told of an act whose own values the database does not take."""
    if act.account is None:
        return refused(fault)
    return unavailable(fault) if isinstance(fault, psycopg.Error) else fault


def _migrate(run: Callable[[str], Rows]) -> None:
    """Apply the numbered scripts that the database has not seen, all in one transaction, one process at a time."""
    run("SET LOCAL statement_timeout = 0; SET LOCAL lock_timeout = 0")
    run(f"SELECT pg_advisory_xact_lock({_MIGRATION_LOCK})")
    run("CREATE TABLE IF NOT EXISTS ledger_migrations (number INTEGER PRIMARY KEY)")
    ((version,),) = run("SELECT coalesce(max(number), 0) FROM ledger_migrations")
    for number, script in scripts_after("postgres", version).items():
        run(script)
        run(f"INSERT INTO ledger_migrations VALUES ({number})")
