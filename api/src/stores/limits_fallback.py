"""Limits shared through Redis as long as it can be had, and this process's own while it cannot."""

from __future__ import annotations

import logging
from collections.abc import Callable

from ..breaker import Breaker, BreakerOpen
from .limits import Ask, Limiter, LimiterAway, Verdict

_log = logging.getLogger(__name__)


class FallbackLimiter:
    """Asks `shared`; where that is away, `spare`, which begins with nothing counted. Requests never wait for it twice.

    A request leaves where it has entered. `on_change` is told whether the spare one is in use, once a change.
    """

    def __init__(
        self, shared: Limiter, spare: Limiter, *, on_change: Callable[[bool], None], breaker: Breaker | None = None
    ) -> None:
        self._shared, self._spare = shared, spare
        self._on_change = on_change
        self._breaker = breaker or Breaker(failures=3, open_s=1.0, longest_s=10.0)
        self._away = False
        self._in_spare: set[str] = set()

    def breakers(self) -> dict[str, str]:
        """The state of its circuit breaker, by what that guards."""
        return {"limits_redis": self._breaker.state}

    async def start(self) -> None:
        await self._spare.start()
        await self._shared.start()

    async def close(self) -> None:
        await self._shared.close()
        await self._spare.close()

    async def enter(self, ask: Ask) -> Verdict:
        try:
            with self._breaker.attempt() as attempt:
                try:
                    verdict = await self._shared.enter(ask)
                except LimiterAway as error:
                    attempt.fail()
                    self._note(self._breaker.state != "closed", str(error))
                    raise
                attempt.succeed()
                self._note(False, "")
                return verdict
        except (BreakerOpen, LimiterAway):
            return await self._enter_spare(ask)

    async def leave(self, ask: Ask, characters: int) -> None:
        if ask.id in self._in_spare:
            self._in_spare.discard(ask.id)
            await self._spare.leave(ask, characters)
        else:
            await self._shared.leave(ask, characters)

    async def _enter_spare(self, ask: Ask) -> Verdict:
        verdict = await self._spare.enter(ask)
        if verdict.admitted:
            self._in_spare.add(ask.id)
        return verdict

    def _note(self, away: bool, fault: str) -> None:
        if away == self._away:
            return
        self._away = away
        if away:
            _log.warning("Redis cannot be had (%s): this process limits by its own counters until it can", fault)
        else:
            _log.info("Redis is back: limits are shared again")
        self._on_change(away)
