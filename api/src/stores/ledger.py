"""The words of billing: a hold, the ledger that gives holds, and the laws that every ledger keeps.

Owns the protocol alone. The laws as code are ledger_laws.py's, where the money is stored belongs to the
implementations (ledger_sqlite.py, ledger_postgres.py), what something costs to rates.py, and when to hold, extend and
settle to the service.

Amounts are integer micro-units from 0 to MAX_MICROS. The laws:

Holds. A hold reserves its price before any work and ends exactly once: settled, released, or lost (released
by another process because its owner's lease ran out). Closed, its holds - releases - charges make 0.

Entries. Credit, hold, charge and release are appended and never changed. A balance, kept in the same
transaction, is sum(credits) - sum(holds) + sum(releases) and never below zero. An account without a wallet
(never credited) is unlimited; a hold that was opened before its account had a wallet never moves the wallet,
not even at its end.

Usage. What a hold settled is told in the same transaction. What costs nothing and has no idempotency key needs no
hold: its usage event may be told later (ledger_write_behind.py), and is stored once for each request's id.

Charges. What is there already, so that nothing comes between the hold and its end, has both in one transaction.

Owners. Each ledger object owns the holds it gave and renews its lease three times per term. A living ledger
releases the holds of owners whose lease has run out, never those of a living one. Leases compare the wall
clocks of the processes, or the database's where it has one; a clock that jumps by more than a lease loses holds
(HoldLost), never money.

Idempotency. The requests of one key together cost what the dearest that was settled costs, and none gets its
sound for nothing because another hung up:
- a repeat reserves only what the key's other holds have not charged or reserved yet;
- a settle charges only what has not been charged under the key yet, and takes what it lacks from the reserves
  of the key's other open holds (a release there, a hold here);
- what is left when a hold closes goes first to an open hold of the key, up to what that one lacks of its
  price (a release here, a hold there), and only the rest to the balance.
Hence charges and reserves of a key always cover the price of each of its open holds, and a settle within the
hold's price cannot fail for want of money. Reserves move only between holds that are alike in moving the
wallet or not. A key's first use fixes its digest and starts its term; after it the key may be used afresh.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass
from typing import Protocol

from ..domain import UsageEvent
from .digests import same_body

MAX_MICROS = 2**53 - 1
"""The largest single amount: exact in every database, in JSON too, and far from overflow in a sum."""


@dataclass(frozen=True, slots=True)
class IdempotencyKey:
    """The client's word that two requests are the same one.

    `digest` is of the body that came with it, `also` what the same body may have been known by before; see digests.py.
    """

    value: str
    digest: str
    also: tuple[str, ...] = ()

    def fits(self, stored: str) -> bool:
        """Whether a digest that was stored under this value is of the same body, as far as can be said."""
        return same_body(stored, (self.digest, *self.also))


class Hold(Protocol):
    """Money reserved for one request.

    Every method may raise Unavailable; then nothing has happened, or, where the answer of a database was lost and it
    cannot be asked, it may have. Either way a settle may be repeated with the same event, and leaving the hold without
    doing so gives back what was not settled.
    """

    @property
    def id(self) -> int: ...

    @property
    def account(self) -> str: ...

    @property
    def request_id(self) -> str: ...

    @property
    def micros(self) -> int:
        """The price: the most that this hold may charge, extensions included."""
        ...

    async def settle(self, event: UsageEvent) -> None:
        """Charge `event.price_micros` less what its key has paid, give the rest back, store the event.

        The stored event carries what was really charged. Durable when it returns.
        Raises ValueError if the event costs more than `micros` or belongs to another request (the hold stays
        open), HoldLost if another process has released the hold, RuntimeError if it was closed before.
        """
        ...

    async def release(self, event: UsageEvent | None = None) -> None:
        """Give everything back; a usage event may be stored, at a price of 0.

        Raises RuntimeError if the hold was closed before; a lost one is released already: no error.
        """
        ...

    async def extend(self, micros: int) -> None:
        """Reserve `micros` more. Raises InsufficientBalance, HoldLost, RuntimeError if the hold is closed."""
        ...


class Ledger(Protocol):
    """Keeps the laws above. Used from one event loop; several processes may share one store."""

    async def start(self) -> None:
        """Open the store, apply its migrations, take a lease, release the holds of the dead."""
        ...

    async def close(self) -> None:
        """Release this ledger's open holds, give up its lease, close the store. May be called twice."""
        ...

    def hold(
        self, account: str, request_id: str, micros: int, *, key: IdempotencyKey | None = None
    ) -> AbstractAsyncContextManager[Hold]:
        """Reserve `micros` on entering; leaving without settle or release gives all back.

        No cancellation, neither while entering nor while leaving, leaves a hold behind.
        Raises InsufficientBalance, InvalidRequest (the key came with another body before), Unavailable.
        """
        ...

    async def charge(self, event: UsageEvent, *, key: IdempotencyKey | None = None) -> None:
        """Hold `event.price_micros` and settle it at once; see Hold.settle. Durable when it returns.

        Whoever is cancelled, or gets Unavailable, has had a charge only if its transaction was under way by then.
        Raises InsufficientBalance, InvalidRequest (the key came with another body before), Unavailable, and ValueError
        for an amount that is out of range.
        """
        ...

    async def credit(self, account: str, micros: int, reference: str) -> int:
        """Add to the account's wallet, which this makes if need be; return the new balance.

        A reference that the account was credited under before changes nothing.
        """
        ...

    async def balance(self, account: str) -> int | None:
        """What may still be reserved; None where the account has no wallet and is unlimited."""
        ...

    async def record(self, events: Sequence[UsageEvent]) -> None:
        """Store events of requests that cost nothing and had no hold, each once by its request's id.

        May be repeated with the same events, in any mixture. Raises ValueError, with none of them stored, if one costs
        something or is nothing that can be stored, Unavailable if nothing is certain.
        """
        ...

    async def usage(self, account: str | None, limit: int, *, user: str | None = None) -> list[UsageEvent]:
        """The latest `limit` events of one account, or of all (None), newest first.

        With `user` those of this end user alone; the empty one is nobody.
        """
        ...

    async def accounts(self) -> dict[str, int | None]:
        """Every account that was ever credited or that used anything, with its balance."""
        ...

    async def check(self) -> list[str]:
        """Every broken law, in words; empty when the books are sound. Runs beside ongoing work."""
        ...
