"""The counters of the limits in Redis: exact for all processes that share it.

A place has a lease that its process renews, so that those of a dead process come back. Keys expire by themselves and
hold digests instead of names. A request in vain is not repeated: whoever asks decides what to do without Redis.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from hashlib import sha1
from typing import Any

from redis.asyncio import Redis
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff
from redis.exceptions import NoScriptError

from .limits import Alert, Ask, Caps, LimiterAway, Tally, Verdict
from .limits_scripts import ENTER, LEAVE, RENEW

PREFIX = "tts:limits:"
TIMEOUT_S = 0.5
"""Seconds to a connection and to each answer."""

KEPT_MS = 25 * 3600 * 1000
"""Milliseconds after its last use that a key is kept: until its day is over."""

BATCH = 256
"""Calls that are sent to Redis at once, at most."""

_SHA = {script: sha1(script.encode(), usedforsecurity=False).hexdigest() for script in (ENTER, LEAVE, RENEW)}


@dataclass(frozen=True, slots=True)
class _Call:
    script: str
    keys: Sequence[str]
    arguments: Sequence[str | int]
    answer: asyncio.Future[Any]


class _Courier:
    """Runs scripts in the order of their calls, over one connection: those that wait go together, in one batch."""

    def __init__(self, client: Redis) -> None:
        self._client = client
        self._waiting: list[_Call] = []
        self._task: asyncio.Task[None] | None = None

    async def call(self, script: str, keys: Sequence[str], arguments: Sequence[str | int]) -> Any:
        """What the script answers; raises LimiterAway. A call whose caller is cancelled is made all the same."""
        answer = asyncio.get_running_loop().create_future()
        self._waiting.append(_Call(script, keys, arguments, answer))
        if self._task is None or self._task.done():
            self._task = asyncio.create_task(self._deliver(), name="limits in Redis")
        return await answer

    async def close(self) -> None:
        if self._task is not None:
            await asyncio.wait([self._task])
        await self._client.aclose()

    async def _deliver(self) -> None:
        while batch := self._waiting[:BATCH]:
            del self._waiting[:BATCH]
            try:
                answers = await self._run(batch)
            except Exception as error:  # whatever it is: nobody may wait for an answer that does not come
                # Those behind would wait as long and in vain.
                batch, self._waiting = [*batch, *self._waiting], []
                answers = [error] * len(batch)
            for call, answer in zip(batch, answers, strict=True):
                _tell(call.answer, answer)

    async def _run(self, batch: Sequence[_Call]) -> list[Any]:
        answers = await self._send(batch)
        if any(isinstance(answer, NoScriptError) for answer in answers):
            for script in _SHA:
                await self._client.script_load(script)
            again = [number for number, answer in enumerate(answers) if isinstance(answer, NoScriptError)]
            for number, answer in zip(again, await self._send([batch[number] for number in again]), strict=True):
                answers[number] = answer
        return answers

    async def _send(self, batch: Sequence[_Call]) -> list[Any]:
        async with self._client.pipeline(transaction=False) as pipeline:
            for call in batch:
                pipeline.evalsha(_SHA[call.script], len(call.keys), *call.keys, *call.arguments)
            return list(await pipeline.execute(raise_on_error=False))


def _tell(waiter: asyncio.Future[Any], answer: Any) -> None:
    if waiter.done():  # cancelled
        return
    if isinstance(answer, Exception):
        waiter.set_exception(LimiterAway(type(answer).__name__))
    else:
        waiter.set_result(answer)


class RedisLimiter:
    """A Limiter in Redis at `url`. `clock` (microseconds since 1970) is for tests: without it, Redis's own counts."""

    def __init__(
        self,
        url: str,
        on_alert: Callable[[Alert], None],
        *,
        lease_s: float = 30.0,
        timeout_s: float = TIMEOUT_S,
        clock: Callable[[], int] | None = None,
    ) -> None:
        self._url = url
        self._on_alert = on_alert
        self._lease_s = lease_s
        self._timeout_s = timeout_s
        self._clock = clock
        self._courier: _Courier | None = None
        self._held: dict[str, Ask] = {}
        self._owed: dict[str, tuple[Ask, int]] = {}
        self._owing = asyncio.Event()
        self._keeper: asyncio.Task[None] | None = None

    async def start(self) -> None:
        """Does not wait for Redis: that it is away is found out by asking."""
        client = Redis.from_url(
            self._url,
            socket_timeout=self._timeout_s,
            socket_connect_timeout=self._timeout_s,
            retry=Retry(NoBackoff(), 0),
        )
        self._courier = _Courier(client)
        self._keeper = asyncio.create_task(self._keep(), name="leases in Redis")

    async def close(self) -> None:
        """Give back what is still owed, if Redis can be had now; else its leases run out."""
        if self._keeper is not None:
            self._keeper.cancel()
            await asyncio.wait([self._keeper])
        if self._courier is not None:
            await self._settle_debts()
            await self._courier.close()

    async def enter(self, ask: Ask) -> Verdict:
        caps = [cap for subject in ask.subjects for cap in _numbers(subject.caps)]
        arguments = [self._time(), ask.id, round(self._lease_s * 1e6), ask.characters, KEPT_MS, *caps]
        lasting = any(subject.caps.lasting for subject in ask.subjects)
        try:
            now, admitted, *figures = await self._call(ENTER, _keys(ask), arguments)
        except (LimiterAway, asyncio.CancelledError):
            if lasting:  # Redis may have counted it before the answer was lost
                self._owe(ask, 0)
            raise
        if self._owed:  # it answers, so it can be told now
            self._owing.set()
        if admitted and lasting:
            self._held[ask.id] = ask
        tallies = [Tally(*figures[i : i + 3]) for i in range(0, len(figures), 3)]
        return Verdict(ask, now, tallies, bool(admitted))

    async def leave(self, ask: Ask, characters: int) -> None:
        if self._held.pop(ask.id, None) is None:
            return
        try:
            await self._give_back(ask, characters)
        except (LimiterAway, asyncio.CancelledError) as error:
            self._owe(ask, characters)
            if isinstance(error, asyncio.CancelledError):
                raise

    async def _give_back(self, ask: Ask, characters: int) -> None:
        """Harmless if it was given back already: a place that is not taken counts nothing."""
        thresholds = [subject.caps.alert_characters_per_day for subject in ask.subjects]
        answer = await self._call(LEAVE, _keys(ask), [ask.id, characters, *thresholds])
        for subject, passed, day in zip(ask.subjects, answer[::2], answer[1::2], strict=True):
            if passed:
                self._on_alert(Alert.of(subject, passed, day))

    def _owe(self, ask: Ask, characters: int) -> None:
        self._owed[ask.id] = ask, characters
        self._owing.set()

    async def _keep(self) -> None:
        """Renew leases and pay debts, three times a lease and whenever there is a new debt."""
        while True:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(self._lease_s / 3):
                    await self._owing.wait()
            self._owing.clear()
            with contextlib.suppress(LimiterAway):
                await self._renew()
            await self._settle_debts()

    async def _renew(self) -> None:
        places = defaultdict(list)
        for ask in self._held.values():
            for subject in ask.subjects:
                places[_places_key(subject.key)].append(ask.id)
        for key, ids in places.items():
            await self._call(RENEW, [key], [self._time(), round(self._lease_s * 1e6), *ids])

    async def _settle_debts(self) -> None:
        for id, (ask, characters) in list(self._owed.items()):
            try:
                await self._give_back(ask, characters)
            except LimiterAway:
                return
            self._owed.pop(id, None)

    def _time(self) -> str | int:
        return "" if self._clock is None else self._clock()

    async def _call(self, script: str, keys: Sequence[str], arguments: Sequence[str | int]) -> Any:
        if self._courier is None:
            raise LimiterAway("not started")
        return await self._courier.call(script, keys, arguments)


def _keys(ask: Ask) -> list[str]:
    return [key for subject in ask.subjects for key in (PREFIX + subject.key, _places_key(subject.key))]


def _places_key(key: str) -> str:
    return f"{PREFIX}{key}:places"


def _numbers(caps: Caps) -> tuple[int, int, int, int]:
    return caps.requests_per_minute, caps.concurrent, caps.characters_per_day, caps.alert_characters_per_day
