"""The laws of ledger.py as functions over a page of the books.

Owns every decision that moves money; how pages are loaded, locked and stored is the ledgers' business. Each function
raises before it has changed anything, so that those which share its page need not care.
"""

from __future__ import annotations

from ..domain import UsageEvent
from ..errors import HoldLost, InsufficientBalance, InvalidRequest
from .ledger import IdempotencyKey
from .ledger_page import Act, HoldRow, KeyRow, Page


def open_hold(
    page: Page,
    owner: str,
    key_ttl_s: float,
    account: str,
    request_id: str,
    micros: int,
    key: IdempotencyKey | None,
) -> int:
    """Reserve what the key, if any, does not cover yet; return the hold's id."""
    wallet = int(account in page.balances)
    used = None if key is None else _young_key(page, account, key, key_ttl_s)
    missing = micros if used is None else max(0, micros - _covered(page, used, wallet))
    _must_afford(page, account, wallet, missing)
    if key is not None and used is None:
        used = page.add_key(account, key)
    hold = page.add_hold(account, request_id, owner, None if used is None else used.id, micros, wallet)
    _reserve(page, hold, missing)
    return hold.id


def extend(page: Page, hold_id: int, micros: int) -> None:
    """Raise an open hold's price and reserve what that leaves uncovered."""
    hold = _open_hold(page, hold_id)
    price = hold.price + micros
    covered = hold.held if hold.key is None else _covered(page, page.keys[hold.key], hold.wallet)
    missing = max(0, price - covered)
    _must_afford(page, hold.account, hold.wallet, missing)
    page.change_hold(hold).price = price
    _reserve(page, hold, missing)


def settle(page: Page, hold_id: int, event: UsageEvent) -> None:
    """Close an open hold with a charge."""
    hold = _open_hold(page, hold_id)
    if event.account != hold.account or event.request_id != hold.request_id:
        raise ValueError("The usage event belongs to another request.")
    if not 0 <= event.price_micros <= hold.price:
        raise ValueError(f"{event.price_micros} micro-units do not fit into a hold of {hold.price}.")
    _end(page, hold, "settled", event.price_micros, event)


def charge(page: Page, owner: str, key_ttl_s: float, event: UsageEvent, key: IdempotencyKey | None) -> None:
    """Hold an event's price and settle it; once there is such a hold, nothing can keep it from being settled."""
    hold = open_hold(page, owner, key_ttl_s, event.account, event.request_id, event.price_micros, key)
    settle(page, hold, event)


def release(page: Page, hold_id: int, event: UsageEvent | None) -> None:
    """Close an open hold without a charge; a lost one is released already and only gets its event."""
    hold = page.holds.get(hold_id)
    if hold is not None and hold.state == "lost":
        if event is not None:
            page.add_event(hold, event, 0)
    elif hold is not None:
        _end(page, _open_hold(page, hold_id), "released", 0, event)


def releasing(account: str, hold_id: int, state: str) -> Act[None]:
    """Gives a hold back, whatever became of it before; `state` is what it is from then on."""
    return Act(account, lambda page: _release_if_open(page, hold_id, state), hold=hold_id)


def _release_if_open(page: Page, hold_id: int, state: str) -> None:
    hold = page.holds.get(hold_id)
    if hold is not None and hold.state == "open":
        _end(page, hold, state, 0, None)


def add_credit(page: Page, account: str, micros: int, reference: str) -> int:
    """Fill the wallet, once per reference; return the balance."""
    if (account, reference) not in page.credited:
        page.add_credit(account, micros, reference)
        page.add_wallet(account)
        page.move(account, micros)
    return page.balances[account]


def _open_hold(page: Page, hold_id: int) -> HoldRow:
    hold = page.holds.get(hold_id)
    # None: the database was killed and has forgotten a hold that it had not yet written down.
    if hold is None or hold.state == "lost":
        raise HoldLost("The server lost track of this request for too long to bill it. It was not charged.")
    if hold.state != "open":
        raise RuntimeError(f"The hold is {hold.state} already.")
    return hold


def _must_afford(page: Page, account: str, wallet: int, micros: int) -> None:
    balance = page.balances.get(account, 0)
    if wallet and micros > balance:
        raise InsufficientBalance(balance, micros)


def _reserve(page: Page, hold: HoldRow, micros: int) -> None:
    """Move `micros` from the balance, if the hold moves it, into the hold."""
    if hold.wallet:
        page.move(hold.account, -micros)
    _put(page, hold, micros)


def _put(page: Page, hold: HoldRow, micros: int) -> None:
    if micros:
        page.change_hold(hold).held += micros
        page.add_entry("hold", hold, micros)


def _end(page: Page, hold: HoldRow, state: str, price: int, event: UsageEvent | None) -> None:
    """Close an open hold: charge `price` less what its key has paid, hand the rest on or back."""
    key = None if hold.key is None else page.keys[hold.key]
    charge = price
    if key is not None:
        charge = max(0, price - key.charged)
        _pull(page, hold, key, charge - hold.held)
        if charge:
            page.change_key(key).charged += charge
    left = hold.held - charge
    page.change_hold(hold).state, hold.held = state, 0
    page.add_entry("charge", hold, charge)
    page.add_entry("release", hold, left)
    if key is not None:
        left -= _hand_on(page, key, hold.wallet, left)
    if hold.wallet:
        page.move(hold.account, left)
    if event is not None:
        page.add_event(hold, event, charge)


# Idempotency keys


def _young_key(page: Page, account: str, key: IdempotencyKey, ttl_s: float) -> KeyRow | None:
    """The key's row, unless its term is over or has not begun."""
    found = page.find_key(account, key.value)
    if found is None or found.at <= page.now - ttl_s:
        return None
    if not key.fits(found.digest):
        raise InvalidRequest(
            "This Idempotency-Key was used with a different request body.",
            param="Idempotency-Key",
            code="idempotency_key_reused",
        )
    return found


def _covered(page: Page, key: KeyRow, wallet: int) -> int:
    """What the key's requests have paid, and what those reserve that do or do not move the wallet."""
    return key.charged + sum(hold.held for hold in page.sharing(key.id, wallet))


def _pull(page: Page, hold: HoldRow, key: KeyRow, missing: int) -> None:
    """Take `missing` from the reserves of the key's other open holds."""
    for other in page.sharing(key.id, hold.wallet):
        part = min(other.held, missing)
        if part > 0 and other is not hold:
            page.change_hold(other).held -= part
            page.add_entry("release", other, part)
            _put(page, hold, part)
            missing -= part


def _hand_on(page: Page, key: KeyRow, wallet: int, left: int) -> int:
    """Give the dearest open hold of the key what it lacks (then all others are covered); return how much."""
    sharing = page.sharing(key.id, wallet)
    if not sharing:
        return 0
    heir = max(sharing, key=lambda hold: hold.price)
    part = min(left, max(0, heir.price - _covered(page, key, wallet)))
    _put(page, heir, part)
    return part
