"""A page of the books: the rows that some operations must see, and what they change in them.

Owns no decision (ledger_laws.py) and no database: ledgers load a page, locked against everybody else, and store what
changed, in one transaction.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, Generic, Literal, NamedTuple, TypeVar

from ..domain import UsageEvent
from .ledger import IdempotencyKey

_T = TypeVar("_T")

NewId = Callable[[Literal["holds", "idempotency_keys"]], int]


@dataclass(slots=True)
class HoldRow:
    """`held` is what is reserved now; `wallet` is 1 where its entries move the account's balance, else 0."""

    id: int
    account: str
    request_id: str
    owner: str
    key: int | None
    price: int
    held: int
    wallet: int
    state: str
    at: float


@dataclass(slots=True)
class KeyRow:
    """`charged` is what all its requests paid together; `at` is its first use."""

    id: int
    account: str
    value: str
    digest: str
    charged: int
    at: float


class EntryRow(NamedTuple):
    kind: str
    account: str
    hold: int | None
    micros: int
    reference: str | None
    at: float


class EventRow(NamedTuple):
    """A usage event, with the hold that it ended, if any, and what that was really charged."""

    hold: int | None
    request_id: str
    account: str
    model: str
    voice: str
    characters: int
    audio_ms: int
    outcome: str
    price_micros: int
    at: float
    end_user: str

    @classmethod
    def of(cls, event: UsageEvent, hold: int | None, charged: int) -> EventRow:
        who = (hold, event.request_id, event.account, event.model, event.voice, event.characters)
        return cls(*who, event.audio_ms, event.outcome, charged, event.at, event.user)


@dataclass(frozen=True, slots=True)
class Act(Generic[_T]):
    """One operation on one account: what it must see, and what it does.

    A page for it has the account's balance, and where they are named the hold, the idempotency key of that value,
    all open holds of either's key, and whether the reference was credited. Without an account it must see nothing,
    and may happen twice.
    """

    account: str | None
    apply: Callable[[Page], _T]
    hold: int | None = None
    key: str | None = None
    reference: str | None = None


class Attempt(NamedTuple):
    """What came of an act: its result, or why it did not happen."""

    result: Any
    failure: Exception | None


def attempt_all(acts: Iterable[Act[Any]], page: Page) -> list[Attempt]:
    """Let acts happen on one page, one after another; those that the laws refuse leave no mark on it."""
    return [_attempt(act, page) for act in acts]


def _attempt(act: Act[Any], page: Page) -> Attempt:
    try:
        return Attempt(act.apply(page), None)
    except Exception as error:
        return Attempt(None, error)


class Page:
    """Rows as they are now, and apart what is new and what changed; a new row is not among the changed ones.

    `now` is Unix time in seconds. `moved` is by how much the balance of a wallet changed.
    """

    __slots__ = (
        "_named",
        "_new_id",
        "_sharing",
        "balances",
        "changed_holds",
        "changed_keys",
        "credited",
        "entries",
        "events",
        "holds",
        "keys",
        "moved",
        "new_holds",
        "new_keys",
        "new_wallets",
        "now",
        "records",
    )

    def __init__(self, now: float, new_id: NewId) -> None:
        self.now = now
        self._new_id = new_id
        self.balances: dict[str, int] = {}
        self.holds: dict[int, HoldRow] = {}
        self.keys: dict[int, KeyRow] = {}
        self.credited: set[tuple[str, str]] = set()
        self._named: dict[tuple[str, str], KeyRow] = {}
        self._sharing: dict[int, list[HoldRow]] = {}
        self.moved: dict[str, int] = {}
        self.new_wallets: set[str] = set()
        self.new_holds: dict[int, HoldRow] = {}
        self.new_keys: dict[int, KeyRow] = {}
        self.changed_holds: dict[int, HoldRow] = {}
        self.changed_keys: dict[int, KeyRow] = {}
        self.entries: list[EntryRow] = []
        self.events: list[EventRow] = []
        self.records: list[EventRow] = []
        """Events without a hold, which may be stored already."""

    def load(
        self,
        balances: Iterable[tuple[Any, ...]] = (),
        keys: Iterable[tuple[Any, ...]] = (),
        holds: Iterable[tuple[Any, ...]] = (),
        credits: Iterable[tuple[Any, ...]] = (),
    ) -> None:
        """Take stored rows: (account, micros), the columns of KeyRow and HoldRow, (account, reference)."""
        if balances:
            self.balances.update(balances)
        for row in keys:
            self._know_key(KeyRow(*row))
        for row in holds:
            self._know_hold(HoldRow(*row))
        if credits:
            self.credited.update(credits)

    def find_key(self, account: str, value: str) -> KeyRow | None:
        """The latest key of that value."""
        return self._named.get((account, value))

    def sharing(self, key: int, wallet: int) -> list[HoldRow]:
        """The open holds of a key, of those that do or do not move the wallet, oldest first."""
        mine = [hold for hold in self._sharing.get(key, ()) if hold.state == "open" and hold.wallet == wallet]
        return sorted(mine, key=lambda hold: (hold.at, hold.id))

    def add_wallet(self, account: str) -> None:
        if account not in self.balances:
            self.balances[account] = 0
            self.new_wallets.add(account)

    def add_key(self, account: str, key: IdempotencyKey) -> KeyRow:
        row = KeyRow(self._new_id("idempotency_keys"), account, key.value, key.digest, 0, self.now)
        self.new_keys[row.id] = row
        self._know_key(row)
        return row

    def add_hold(self, account: str, request_id: str, owner: str, key: int | None, price: int, wallet: int) -> HoldRow:
        id = self._new_id("holds")
        row = HoldRow(id, account, request_id, owner, key, price, 0, wallet, "open", self.now)
        self.new_holds[id] = row
        self._know_hold(row)
        return row

    def add_entry(self, kind: str, hold: HoldRow, micros: int) -> None:
        """An amount of 0 makes no entry."""
        if micros:
            self.entries.append(EntryRow(kind, hold.account, hold.id, micros, None, self.now))

    def add_credit(self, account: str, micros: int, reference: str) -> None:
        self.credited.add((account, reference))
        self.entries.append(EntryRow("credit", account, None, micros, reference, self.now))

    def add_event(self, hold: HoldRow, event: UsageEvent, charged: int) -> None:
        self.events.append(EventRow.of(event, hold.id, charged))

    def move(self, account: str, micros: int) -> None:
        """Add to the balance of an account with a wallet."""
        if micros and account in self.balances:
            self.balances[account] += micros
            self.moved[account] = self.moved.get(account, 0) + micros

    def change_hold(self, hold: HoldRow) -> HoldRow:
        """Say that a row is about to change."""
        if hold.id not in self.new_holds:
            self.changed_holds[hold.id] = hold
        return hold

    def change_key(self, key: KeyRow) -> KeyRow:
        """Say that a row is about to change."""
        if key.id not in self.new_keys:
            self.changed_keys[key.id] = key
        return key

    def _know_key(self, key: KeyRow) -> None:
        self.keys[key.id] = key
        named = self._named.get((key.account, key.value))
        if named is None or named.at <= key.at:
            self._named[key.account, key.value] = key

    def _know_hold(self, hold: HoldRow) -> None:
        self.holds[hold.id] = hold
        if hold.key is not None:
            self._sharing.setdefault(hold.key, []).append(hold)
