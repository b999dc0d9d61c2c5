"""Stops an account whose requests keep failing, for a while and in this process: a breaker for each.

What a failure is: an error that is the caller's own, or a synthesis that failed, also after the first byte. Not one:
to have no valid key or no credit, to be refused by a limit, to find the server busy or away, to hang up.
"""

from __future__ import annotations

import logging
import math
import time
from collections import OrderedDict
from collections.abc import Callable, MutableMapping
from contextlib import ExitStack
from datetime import UTC, datetime, timedelta
from typing import Any

from ..breaker import Attempt, Breaker, BreakerOpen
from ..domain import Account
from ..errors import SpeechError, TooManyFailures
from ..observe import Metrics

OPEN_S = 10.0
LONGEST_S = 600.0
MOST = 10_000
"""Accounts that are watched; beyond them those that have not asked for the longest are forgotten."""

NOBODY_ALONE = "anonymous"
"""Everyone without a key: one stranger would stop all the others."""

_KEY = "tts.conduct"
_EXCUSED = frozenset({401, 402, 408, 429, 499})
_FAILED = frozenset({500, 502, 504})
_log = logging.getLogger(__name__)


class Conduct:
    """How one request of a watched account ends."""

    def __init__(self, account: Account, breaker: Breaker, attempt: Attempt, stack: ExitStack) -> None:
        self._account = account
        self._breaker = breaker
        self._attempt = attempt
        self._stack = stack
        self._late: int | None = None

    def cut(self, status: int) -> None:
        """The answer ended before its end, for an error that has this status; 499 where the client hung up."""
        self._late = status

    def judge(self, status: int) -> None:
        """The answer has ended."""
        with self._stack:
            status = self._late or status
            if _is_failure(status):
                self._fail()
            elif 200 <= status < 300:
                self._attempt.succeed()

    def _fail(self) -> None:
        before = self._breaker.state
        self._attempt.fail()
        if self._breaker.state == "open" and before != "open":
            fields = {"account": self._account.name, "seconds": round(self._breaker.retry_after)}
            _log.warning("an account is stopped: its requests keep failing", extra={"fields": fields})


class AccountBreakers:
    """A breaker for each account, and for each end user of one. `failures` in a row open it; 0: nobody is stopped."""

    def __init__(self, failures: int, metrics: Metrics, *, clock: Callable[[], float] = time.monotonic) -> None:
        self._failures = failures
        self._metrics = metrics
        self._clock = clock
        self._breakers: OrderedDict[tuple[str, str], Breaker] = OrderedDict()
        metrics.stopped_accounts.set_function(self._count)

    def watch(self, account: Account, scope: MutableMapping[str, Any]) -> None:
        """Let a request pass, whose end `judge` then sees; raises TooManyFailures where the account is stopped."""
        if not self._failures or account.admin or account.name == NOBODY_ALONE:
            return
        stack, breaker = ExitStack(), self._breaker(account)
        try:
            attempt = stack.enter_context(breaker.attempt())
        except BreakerOpen as error:
            self._metrics.refused.labels("failures").inc()
            raise _stopped(error.retry_after) from None
        scope[_KEY] = Conduct(account, breaker, attempt, stack)

    def _breaker(self, account: Account) -> Breaker:
        key = account.name, account.user
        breaker = self._breakers.get(key)
        if breaker is None:
            breaker = Breaker(failures=self._failures, open_s=OPEN_S, longest_s=LONGEST_S, clock=self._clock)
            self._breakers[key] = breaker
            if len(self._breakers) > MOST:
                self._breakers.popitem(last=False)
        self._breakers.move_to_end(key)
        return breaker

    def _count(self) -> int:
        return sum(breaker.state != "closed" for breaker in self._breakers.values())


def cut(scope: MutableMapping[str, Any], error: BaseException) -> None:
    """The answer to a watched request was cut short by `error`, or by its client."""
    conduct: Conduct | None = scope.get(_KEY)
    if conduct is not None:
        conduct.cut(error.status if isinstance(error, SpeechError) else 499)


def judge(scope: MutableMapping[str, Any], status: int) -> None:
    """The answer to any request has ended, as `status`."""
    conduct: Conduct | None = scope.get(_KEY)
    if conduct is not None:
        conduct.judge(status)


def _is_failure(status: int) -> bool:
    return status in _FAILED or (400 <= status < 500 and status not in _EXCUSED)


def _stopped(seconds: float) -> TooManyFailures:
    whole = max(1, math.ceil(seconds))
    until = datetime.now(UTC) + timedelta(seconds=whole)
    return TooManyFailures(
        f"The requests of this account keep failing, so it is stopped until {until:%Y-%m-%d %H:%M:%S} UTC."
        " The first one that succeeds after that ends it; one that fails stops it for longer.",
        retry_after=whole,
    )
