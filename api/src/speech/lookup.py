"""What a database says, remembered for a short while: most requests ask nobody.

Owns the time for which an answer holds, how many are kept, and what becomes of questions while the database is away.
Knows nothing of what is asked.
"""

from __future__ import annotations

import asyncio
import logging
import math
import time
from collections import OrderedDict
from collections.abc import Awaitable, Callable, Hashable, Mapping
from itertools import islice
from typing import Generic, NamedTuple, TypeVar

from ..errors import Unavailable

K = TypeVar("K", bound=Hashable)
V = TypeVar("V")

_BATCH = 500
"""Questions of one query."""

_PAUSE_S = 1.0
"""After a failure nobody waits for the database, and it is not asked, for so long."""

_log = logging.getLogger(__name__)


class _Answer(NamedTuple, Generic[V]):
    value: V
    asked: float
    """When the question was put, by the monotonic clock: the answer is as old as that."""


class Lookup(Generic[K, V]):
    """Answers by key; None for what there is not. Used from one event loop.

    `fetch` gets up to 500 keys and answers those that there are; it raises Unavailable. All that wait share one query,
    and there is never more than one at a time: neither many callers nor many guesses press the database.

    An answer holds for `refresh_s`; after half of that it is asked for anew while it still serves. While the database
    fails, or does not answer within `patience_s`, an answer is believed until it is `believe_s` old; that there is
    nothing, only if `believe_absence`. At most `size` answers are kept, and as many absences, the least recently used
    dropped first.
    """

    def __init__(
        self,
        fetch: Callable[[list[K]], Awaitable[Mapping[K, V]]],
        *,
        refresh_s: float,
        believe_absence: bool = False,
        believe_s: float = 600.0,
        patience_s: float = 2.0,
        size: int = 10_000,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._fetch = fetch
        self._refresh_s = refresh_s
        self._believe_s = believe_s
        self._believe_absence = believe_absence
        self._patience_s = patience_s
        self._size = size
        self._clock = clock
        self._present: OrderedDict[K, _Answer[V]] = OrderedDict()
        self._absent: OrderedDict[K, _Answer[None]] = OrderedDict()
        self._asked: dict[K, asyncio.Future[V | None]] = {}
        self._waiting: dict[K, asyncio.Future[V | None]] = {}
        self._work: asyncio.Task[None] | None = None
        self._away_until = -math.inf
        self._failing = False
        self._forgotten = 0

    async def find(self, key: K) -> V | None:
        """The value. Raises Unavailable where it is not known and cannot be asked for."""
        now = self._clock()
        answer = self._remembered(key)
        age = math.inf if answer is None else now - answer.asked
        if answer is not None:
            if age < self._refresh_s / 2:
                return answer.value
            if age < self._refresh_s or (self._failing and self._believed(answer, age)):
                if now >= self._away_until:
                    self._ask(key)  # for those who come later
                return answer.value
        try:
            return await self._wait(key, now)
        except Unavailable:
            if answer is None or not self._believed(answer, age):
                raise
            return answer.value

    def forget(self, concerns: Callable[[K, V], bool]) -> None:
        """Forget what concerns somebody, and all absences; what is being asked counts as asked before."""
        for key in [key for key, answer in self._present.items() if concerns(key, answer.value)]:
            del self._present[key]
        self._absent.clear()
        self._asked = dict(self._waiting)
        self._forgotten += 1

    async def close(self) -> None:
        """Ask nothing more; whoever waits gets Unavailable."""
        if (work := self._work) is not None:
            work.cancel()
            await asyncio.wait([work])

    def _remembered(self, key: K) -> _Answer[V] | _Answer[None] | None:
        if (present := self._present.get(key)) is not None:
            self._present.move_to_end(key)
            return present
        if (absent := self._absent.get(key)) is not None:
            self._absent.move_to_end(key)
        return absent

    def _believed(self, answer: _Answer[V] | _Answer[None], age: float) -> bool:
        """Whether it may serve although it is too old."""
        return age < self._believe_s and (answer.value is not None or self._believe_absence)

    async def _wait(self, key: K, now: float) -> V | None:
        if now < self._away_until:
            raise _away()
        asked = self._ask(key)
        try:
            async with asyncio.timeout(self._patience_s):
                return await asyncio.shield(asked)
        except TimeoutError:
            self._note_failure()
            raise _away() from None

    def _note_failure(self) -> None:
        self._failing, self._away_until = True, self._clock() + _PAUSE_S

    # --- asking ---

    def _ask(self, key: K) -> asyncio.Future[V | None]:
        asked = self._asked.get(key)
        if asked is None:
            loop = asyncio.get_running_loop()
            asked = self._asked[key] = self._waiting[key] = loop.create_future()
            asked.add_done_callback(_look_at)
            if self._work is None:
                self._work = loop.create_task(self._answer_all(), name="look-up")
        return asked

    async def _answer_all(self) -> None:
        try:
            while self._waiting:
                batch = dict(islice(self._waiting.items(), _BATCH))
                for key in batch:
                    del self._waiting[key]
                await self._answer_some(batch)
        finally:
            self._work = None
            self._fail(self._waiting, _away())  # there are some only when this is cancelled
            self._waiting.clear()

    async def _answer_some(self, batch: dict[K, asyncio.Future[V | None]]) -> None:
        asked_at, forgotten = self._clock(), self._forgotten
        try:
            found = await self._fetch(list(batch))
        except BaseException as error:
            self._note_failure()
            self._fail(batch, error if isinstance(error, Exception) else _away())
            if not isinstance(error, Exception):
                raise
            if not isinstance(error, Unavailable):
                _log.exception("a look-up failed")
            return
        self._failing, self._away_until = False, -math.inf
        for key, asked in batch.items():
            value = found.get(key)
            if forgotten == self._forgotten:
                self._keep(key, value, asked_at)
            self._no_longer_asked(key, asked)
            if not asked.done():
                asked.set_result(value)

    def _fail(self, batch: dict[K, asyncio.Future[V | None]], error: Exception) -> None:
        for key, asked in batch.items():
            self._no_longer_asked(key, asked)
            if not asked.done():
                asked.set_exception(error)

    def _no_longer_asked(self, key: K, asked: asyncio.Future[V | None]) -> None:
        if self._asked.get(key) is asked:
            del self._asked[key]

    def _keep(self, key: K, value: V | None, asked_at: float) -> None:
        self._present.pop(key, None)
        self._absent.pop(key, None)
        if value is None:
            self._absent[key] = _Answer(None, asked_at)
        else:
            self._present[key] = _Answer(value, asked_at)
        for answers in (self._present, self._absent):
            if len(answers) > self._size:
                answers.popitem(last=False)


def _away() -> Unavailable:
    return Unavailable("API keys cannot be looked up at the moment. Please try again.")


def _look_at(asked: asyncio.Future[V | None]) -> None:
    """Whoever was cancelled or has given up waiting does not look any more; asyncio would complain."""
    if not asked.cancelled():
        asked.exception()
