"""Whether an account may ask now: its bounds, those of its end user and the deployment's, all at once.

Owns no counter (stores/limits.py) and no HTTP. What it lets in is a context manager, entered before anything is looked
up or held, and left once the answer has ended or its client has gone.
"""

from __future__ import annotations

import math
import random
import time
from collections.abc import Sequence
from functools import lru_cache
from types import TracebackType

from ..domain import Account, Bounds
from ..errors import QuotaExceeded, RateLimited, TooManyAtOnce
from ..observe import Metrics
from ..stores.limits import Ask, Caps, Limiter, Refusal, Standing, Subject, Verdict
from .alerts import Alerts

__all__ = ["Gate", "Standing", "Turn"]

REMEMBERED = 1024
"""Accounts whose bounds are kept worked out."""

MAX_PLACE_WAIT = 60
_SMOOTHING = 0.2
"""Weight of the newest request in the moving average of their lengths."""


class Gate:
    """Lets requests in by the counters of `limiter`; `defaults` are the bounds of accounts without their own.

    Closes `alerts` after the limiter, which calls it back.
    """

    def __init__(self, limiter: Limiter, defaults: Bounds, metrics: Metrics, alerts: Alerts) -> None:
        self._limiter = limiter
        self._alerts = alerts
        self._defaults = defaults
        self._metrics = metrics
        self._subjects = lru_cache(REMEMBERED)(self._find_subjects)
        self._mean_s = 0.0

    async def start(self) -> None:
        await self._limiter.start()

    async def close(self) -> None:
        """Whoever was let in has left."""
        await self._limiter.close()
        await self._alerts.close()

    def turn(self, caller: Account | None, characters: int) -> Turn | None:
        """One request of `caller`, to be entered. None where nothing bounds it: the admin, or nobody in particular."""
        if caller is None or caller.admin:
            return None
        subjects = self._subjects(caller)
        return Turn(self, Ask(f"{random.getrandbits(96):024x}", subjects, characters)) if subjects else None

    def _find_subjects(self, caller: Account) -> tuple[Subject, ...]:
        found = [Subject.of(caller.name, "", Caps.of(caller.bounds, self._defaults))]
        if caller.user:
            found.append(Subject.of(caller.name, caller.user, Caps.of(caller.user_bounds, self._defaults)))
        return tuple(subject for subject in found if subject.caps)

    async def admit(self, ask: Ask) -> Verdict:
        """The counters' verdict, good or bad; a bad one is counted in the metrics."""
        verdict = await self._limiter.enter(ask)
        for refusal in self._worst(verdict)[:1]:
            self._metrics.refused.labels(refusal.kind).inc()
        return verdict

    async def dismiss(self, ask: Ask, heard: int, seconds: float) -> None:
        """Give a place back; `seconds`: how long it was taken."""
        self._mean_s = seconds if not self._mean_s else self._mean_s + _SMOOTHING * (seconds - self._mean_s)
        await self._limiter.leave(ask, heard)

    def error(self, verdict: Verdict) -> RateLimited:
        """What is answered to a request that was not admitted: of several bounds the one that lasts longest."""
        return _error(self._worst(verdict)[0], verdict.ask, self.wait_s(self._worst(verdict)[0]))

    def wait_s(self, refusal: Refusal) -> int:
        """Whole seconds until a request may fit; for a place, the mean time that one is taken by their number."""
        if refusal.wait is not None:
            return max(1, math.ceil(refusal.wait / 1e6))
        return min(MAX_PLACE_WAIT, max(1, math.ceil(self._mean_s / refusal.limit)))

    def _worst(self, verdict: Verdict) -> Sequence[Refusal]:
        return sorted(verdict.refusals(), key=self.wait_s, reverse=True)


class Turn:
    """One request at the gate. `heard`: characters of its text that count once it leaves, none until it is set."""

    def __init__(self, gate: Gate, ask: Ask) -> None:
        self._gate = gate
        self._ask = ask
        self._verdict: Verdict | None = None
        self._entered = 0.0
        self.heard = 0

    async def __aenter__(self) -> Turn:
        """Raises RateLimited, QuotaExceeded, TooManyAtOnce."""
        self._verdict = await self._gate.admit(self._ask)
        if not self._verdict.admitted:
            raise self._gate.error(self._verdict)
        self._entered = time.monotonic()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self._gate.dismiss(self._ask, self.heard, time.monotonic() - self._entered)

    def standings(self) -> Sequence[Standing]:
        """How the caller stands with its bounds since the gate has judged this request; empty before."""
        return self._verdict.standings() if self._verdict else ()


def _error(refusal: Refusal, ask: Ask, seconds: int) -> RateLimited:
    whose = "This user" if refusal.subject.user else "This account"
    if refusal.kind == "requests":
        message = f"{whose} may make {refusal.limit} requests a minute. Try again in {seconds} s."
        return RateLimited(message, retry_after=seconds)
    if refusal.kind == "concurrent":
        message = f"{whose} may have {refusal.limit} requests running at once, and has. Try again in {seconds} s."
        return TooManyAtOnce(message, retry_after=seconds)
    message = (
        f"{whose} may have {refusal.limit} characters spoken a day. {refusal.left} are left until midnight UTC:"
        f" too few for the {ask.characters} of this text."
    )
    return QuotaExceeded(message, retry_after=seconds)
