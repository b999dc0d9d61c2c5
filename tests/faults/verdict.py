"""What must hold after the fault run, told from the clients' attempts and the books alone.

Owns the laws, as lists of what breaks them. A request is found in the books by its id, which its answer's head told the
client; what got no head is known by its account, and by its key.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from api.src.domain import UsageEvent
from tests.faults.house import CACHED, FULL, PAID, House
from tests.faults.load import Attempt

UNCLEAR = ("cut", "silent", "left")
"""Whether such an attempt was charged, its client cannot know."""


@dataclass(frozen=True)
class Books:
    """The ledger after the run. `keys`: what was charged under each idempotency key, by account and key."""

    events: list[UsageEvent]
    keys: dict[tuple[str, str], int]
    balances: dict[str, int]
    credited: dict[str, int]
    open_holds: int


def read_books(house: House) -> Books:
    def rows(sql: str) -> list[tuple]:  # type: ignore[type-arg]
        return house.postgres.execute(house.database, sql)

    events = rows(
        "SELECT request_id, account, model, voice, characters, audio_ms, outcome, price_micros, at FROM usage_events"
    )
    return Books(
        [UsageEvent(*row) for row in events],
        {
            (account, key): charged
            for account, key, charged in rows("SELECT account, value, charged FROM idempotency_keys")
        },
        dict(rows("SELECT account, micros FROM balances")),
        dict(rows("SELECT account, sum(micros)::bigint FROM entries WHERE kind = 'credit' GROUP BY account")),
        rows("SELECT count(*) FROM holds WHERE state = 'open'")[0][0],
    )


def faults(attempts: Sequence[Attempt], books: Books, both_away: Sequence[tuple[float, float]]) -> list[str]:
    """Every broken law in words. `both_away`: when neither Redis nor the database was there for the servers.

    Events of free answers that ended then were in a server's memory alone, and may have died with it.
    """
    return [
        *(f"false bytes: {attempt}" for attempt in attempts if attempt.outcome == "false"),
        *_doubled(books.events),
        *_whole_ones(attempts, books, both_away),
        *_refused_ones(attempts, books),
        *_unclear_ones(attempts, books),
        *_keys(attempts, books),
        *_balances(books),
    ]


def _doubled(events: Iterable[UsageEvent]) -> Iterator[str]:
    for request_id, count in Counter(event.request_id for event in events).items():
        if count > 1:
            yield f"{count} usage events of {request_id}"


def _whole_ones(attempts: Iterable[Attempt], books: Books, both_away: Sequence[tuple[float, float]]) -> Iterator[str]:
    """Received whole: charged exactly once, at its price; those under a key together, see _keys."""
    found = {event.request_id: event for event in books.events}
    for attempt in attempts:
        if attempt.outcome != "whole":
            continue
        event = found.get(attempt.request_id)
        if event is None:
            memory_alone = attempt.model != PAID and any(start <= attempt.ended <= end for start, end in both_away)
            if not memory_alone:
                yield f"no usage event of a whole answer: {attempt}"
        elif not attempt.key and event.price_micros != price(attempt):
            yield f"charged {event.price_micros} for {price(attempt)}: {attempt}"


def _refused_ones(attempts: Iterable[Attempt], books: Books) -> Iterator[str]:
    charged = {event.request_id for event in books.events if event.price_micros}
    for attempt in attempts:
        if attempt.outcome == "refused" and attempt.request_id in charged:
            yield f"charged for silence: {attempt}"


def _unclear_ones(attempts: Sequence[Attempt], books: Books) -> Iterator[str]:
    """Cut: charged at most once (see _doubled) and at most its price. No head: no more charges than such attempts."""
    by_id = {attempt.request_id: attempt for attempt in attempts if attempt.request_id}
    strangers = Counter[str]()
    for event in books.events:
        attempt = by_id.get(event.request_id)
        if attempt is None:
            strangers[event.account] += 1
        elif event.price_micros > full_price(attempt):
            yield f"charged {event.price_micros} of at most {full_price(attempt)}: {attempt}"
    silent = Counter(attempt.account for attempt in attempts if attempt.outcome == "silent")
    for account, count in strangers.items():
        if count > silent[account]:
            yield f"{account}: {count} events of answers without a head, of which there were {silent[account]}"


def _keys(attempts: Iterable[Attempt], books: Books) -> Iterator[str]:
    """Under one key together: what the dearest that was settled costs."""
    groups = defaultdict[tuple[str, str], list[Attempt]](list)
    for attempt in attempts:
        if attempt.key:
            groups[attempt.account, attempt.key].append(attempt)
    for key, group in groups.items():
        charged = books.keys.get(key, 0)
        least = max((price(attempt) for attempt in group if attempt.outcome == "whole"), default=0)
        most = full_price(group[0]) if any(attempt.outcome in UNCLEAR for attempt in group) else least
        if not least <= charged <= most:
            yield f"charged {charged}, not {least} to {most}, under one key: {group}"


def _balances(books: Books) -> Iterator[str]:
    spent = Counter[str]()
    for event in books.events:
        spent[event.account] += event.price_micros
    for account, balance in books.balances.items():
        if balance != books.credited[account] - spent[account]:
            yield f"{account} has {balance}, was credited {books.credited[account]} and spent {spent[account]}"
    if books.open_holds:
        yield f"{books.open_holds} holds have outlived their lease"


def price(attempt: Attempt) -> int:
    """Of a whole answer."""
    return _micros(len(attempt.text), CACHED if attempt.cache == "hit" else FULL) if attempt.model == PAID else 0


def full_price(attempt: Attempt) -> int:
    return _micros(len(attempt.text), FULL) if attempt.model == PAID else 0


def _micros(characters: int, rate: int) -> int:
    return -(-characters * rate // 1000)
