"""One request's side of a spoken answer: its billing hold and its cursor into the encoded bytes.

Misses, joins and hits are all listeners; only what they listen to differs.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncGenerator, Awaitable, Callable, Coroutine, Sequence
from contextlib import AsyncExitStack, aclosing
from dataclasses import dataclass, replace
from typing import Any, Literal

from ..domain import Outcome, SpeechChunk, UsageEvent
from ..errors import NotReady, ShuttingDown, SpeechError, TimedOut, UpstreamUnavailable
from ..observe import Metrics, RequestLog, detail, request_log, span
from ..stores.ledger import Hold, IdempotencyKey, Ledger
from .gate import Standing, Turn
from .recording import characters_heard
from .source import Script, Source

CacheStatus = Literal["miss", "join", "hit", "bypass"]

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Usage:
    """Tokens of one answer, as OpenAI's `speech.audio.done` event reports them.

    In: the text's, in the model's own vocabulary, or characters where it has none. Out: frames of FRAME_SECONDS of
    what the backend made, whoever it was first made for; `speed` changes nothing.
    """

    input_tokens: int
    output_tokens: int


class Listener:
    """From the request's arrival to its last byte, or to its hang-up.

    `start` then iterate `chunks`; `close` at any time, from any state, gives everything back in a task of
    the service (an `await` in the `finally` of a response would be cancelled again by the hang-up).
    The request's log line gets the model, the cache status, when the first sound came, and how much there was.

    Whom the script names may turn out to be away. Before the first sound `find_other` is asked for a script of somebody
    else's, with the names of those who were tried; all that depends on who speaks (cache key, price, headers) is then
    that one's.
    """

    def __init__(
        self,
        script: Script,
        *,
        turn: Turn | None,
        find_source: Callable[[Script], Awaitable[tuple[Source, CacheStatus]]],
        ledger: Ledger,
        find_other: Callable[[frozenset[str]], Script | None],
        price: Callable[[Script, int, bool], int],
        spawn: Callable[[Coroutine[Any, Any, None]], asyncio.Task[None]],
        metrics: Metrics,
        input_tokens: Callable[[Script], int],
        timeout_s: float,
        on_close: Callable[[Listener], None],
    ) -> None:
        self.script = script
        self.cache_status: CacheStatus = "bypass"
        self._turn = turn
        self._gate = AsyncExitStack()
        self._find_source, self._find_other = find_source, find_other
        self._tried: frozenset[str] = frozenset()
        self._ledger = ledger
        self._price = price
        self._spawn = spawn
        self._metrics = metrics
        self._count_tokens, self._input_tokens = input_tokens, input_tokens(script)
        self._timeout_s = timeout_s
        self._on_close = on_close
        self._log = request_log.get(RequestLog())
        self._log.fields["model"] = script.request.model
        self._stack = AsyncExitStack()
        self._source: Source | None = None
        self._hold: Hold | None = None
        self._settling: asyncio.Task[None] | None = None
        self._paid = False
        self._sent = 0
        self._failed = False
        self._whole = False
        self._starting: asyncio.Task[Any] | None = None
        self._closed = False

    async def start(self) -> None:
        """Pass the gate, find the source, hold the price, and wait for the first sound.

        What is there as a whole is paid for at once: nothing comes between its hold and its end.

        Raises RateLimited, Overloaded, InsufficientBalance, InvalidRequest (a reused idempotency key), TimedOut,
        SynthesisFailed, ShuttingDown: everything that can still be answered as a proper HTTP error.
        """
        self._starting = asyncio.current_task()
        try:
            async with asyncio.timeout(self._timeout_s):
                if self._turn is not None:
                    await self._gate.enter_async_context(self._turn)
                await self._listen()
                while (absence := await self._absence()) is not None:
                    await self._turn_to_another(absence)
                    await self._listen()
        except TimeoutError:
            raise TimedOut("No sound within the time limit.") from None
        except asyncio.CancelledError:
            self._require_open()
            raise
        finally:
            self._starting = None
            if self._source is not None:
                self._metrics.speech.labels(self.cache_status).inc()
            if self._closed:
                self._leave()
        self._note_first_sound(self._log.seconds)

    async def _listen(self) -> None:
        self._source, self.cache_status = await self._find_source(self.script)
        self._log.fields["cache"] = self.cache_status
        if self._source.in_memory:
            await self._charge_price()
        else:
            await self._hold_price()

    async def _absence(self) -> NotReady | UpstreamUnavailable | None:
        """Wait for the first sound: None; or for the news that who should speak cannot be had."""
        assert self._source is not None
        try:
            await self._source.sounding()
        except (NotReady, UpstreamUnavailable) as error:
            return error
        return None

    async def _turn_to_another(self, absence: NotReady | UpstreamUnavailable) -> None:
        """Give back what was borrowed for the script, and take the next one; raises `absence` where there is none."""
        tried = self.script.request.backend
        self._tried |= {tried}
        other = self._find_other(self._tried)
        if other is None:
            raise absence
        assert self._source is not None
        self._source.detach()
        self._source = self._hold = None
        given_back, self._stack = self._spawn(self._stack.aclose()), AsyncExitStack()
        self.script, self._input_tokens = other, self._count_tokens(other)
        self._log.fields["model"] = other.request.model
        _log.info("the %s backend cannot be had, %s is asked: %s", tried, other.request.backend, absence.code)
        await asyncio.shield(given_back)

    async def chunks(self) -> AsyncGenerator[SpeechChunk, None]:
        """The encoded bytes as they come; the price is settled before the chunk that `is_last`.

        A chunk counts as sent once the next one is asked for.
        """
        async with aclosing(self._read()) as parts:
            async for chunk in parts:
                yield chunk
                self._sent += len(chunk.data)

    async def whole(self) -> bytes:
        """All the bytes in one piece: unless it becomes whole, nothing of it was sent and nothing more is paid."""
        return b"".join([chunk.data async for chunk in self._read()])

    async def _read(self) -> AsyncGenerator[SpeechChunk, None]:
        assert self._source is not None
        offset, is_last = 0, False
        while not is_last:
            try:
                data, is_last = await self._source.read(offset)
            except SpeechError:
                self._failed = True
                raise
            finally:
                self._require_open()
            offset += len(data)
            if is_last:
                if not self._paid:
                    await self._settle(len(self.script.request.text), "completed")
                self._whole = True
            yield SpeechChunk(data, is_last)

    @property
    def audio_ms(self) -> int:
        """Milliseconds of sound so far; all of it once the last chunk has come."""
        return self._source.audio_ms if self._source else 0

    @property
    def frames(self) -> int:
        """Codec frames of what the backend has made of it so far; all of them once the last chunk has come."""
        return self._source.frames if self._source else 0

    @property
    def length(self) -> int | None:
        """Bytes of the whole answer where they are known from the start, as for a hit; else None."""
        return self._source.length if self._source else None

    @property
    def in_memory(self) -> bool:
        """Whether the whole answer comes as one chunk, without a wait for sound."""
        return self._source is not None and self._source.in_memory

    @property
    def standings(self) -> Sequence[Standing]:
        """How the caller stands with its bounds; empty where there are none, or the gate was not reached."""
        return self._turn.standings() if self._turn else ()

    @property
    def usage(self) -> Usage:
        return Usage(self._input_tokens, self.frames)

    def close(self) -> None:
        """Leave; a second call does nothing."""
        if self._closed:
            return
        self._closed = True
        if self._starting is None:
            self._leave()
        else:
            self._starting.cancel()  # and then leaves

    def _leave(self) -> None:
        if self._whole:
            self._metrics.speech_seconds.labels(self.cache_status).observe(self._log.seconds)
        detail(_log, "left", sent=self._sent, failed=self._failed, ms=self._ms)
        if self._source is not None:
            self._log.fields |= {"audio_ms": self.audio_ms, "frames": self.frames}
            self._source.detach()
        if self._turn is not None:
            self._turn.heard = self._characters_used()
            self._spawn(self._gate.aclose())
        if self._settling is None and not self._paid:
            self._spawn(self._unwind())
        self._on_close(self)

    @property
    def _ms(self) -> float:
        """Since the request's arrival."""
        return round(self._log.seconds * 1000, 1)

    def _note_first_sound(self, seconds: float) -> None:
        self._metrics.first_sound.labels(self.cache_status).observe(seconds)
        self._log.fields["first_sound_ms"] = round(seconds * 1000, 1)

    def _require_open(self) -> None:
        """Raise ShuttingDown if the service has closed this listener under the request that waits for it."""
        if self._closed:
            raise ShuttingDown("The server is shutting down.")

    async def _hold_price(self) -> None:
        request = self.script.request
        price = self._price(self.script, len(request.text), self.cache_status == "hit")
        with span("ledger hold"):
            holding = self._ledger.hold(request.account, request.id, price, key=self._idempotency_key())
            self._hold = await self._stack.enter_async_context(holding)
        detail(_log, "price held", micros=price, ms=self._ms)

    async def _charge_price(self) -> None:
        event = self._event(len(self.script.request.text), "completed")
        with span("ledger charge", outcome=event.outcome, micros=event.price_micros):
            await self._ledger.charge(event, key=self._idempotency_key())
        self._paid = True
        detail(_log, "price charged", outcome=event.outcome, micros=event.price_micros, ms=self._ms)

    def _idempotency_key(self) -> IdempotencyKey | None:
        request = self.script.request
        if not request.idempotency_key:
            return None
        return IdempotencyKey(request.idempotency_key, request.body_digest, request.older_digests)

    async def _settle(self, characters: int, outcome: Outcome) -> None:
        # In a task of its own: once begun, it ends, whatever happens to the response.
        self._settling = self._spawn(self._settle_hold(characters, outcome))
        await asyncio.shield(self._settling)

    async def _settle_hold(self, characters: int, outcome: Outcome) -> None:
        async with self._stack:
            if self._hold is not None:
                event = self._event(characters, outcome)
                with span("ledger settle", outcome=event.outcome, micros=event.price_micros):
                    await self._hold.settle(event)
                detail(_log, "price settled", outcome=event.outcome, micros=event.price_micros, ms=self._ms)

    def _characters_heard(self) -> int:
        return characters_heard(self._source.marks, self._sent) if self._source else 0

    def _characters_used(self) -> int:
        """What counts towards the day: what is billed, and would be if it had a price."""
        if self._paid:
            return len(self.script.request.text)
        if self._settling is None:
            return 0 if self._failed else self._characters_heard()
        lost = self._settling.done() and (self._settling.cancelled() or self._settling.exception() is not None)
        return 0 if lost else len(self.script.request.text)

    async def _unwind(self) -> None:
        heard = self._characters_heard()
        if heard and not self._failed:
            await self._settle_hold(heard, "cancelled")
            return
        async with self._stack:
            if heard and self._hold is not None:  # our fault: it leaves a trace but costs nothing
                await self._hold.release(replace(self._event(heard, "failed"), price_micros=0))

    def _event(self, characters: int, outcome: Outcome) -> UsageEvent:
        request, hit = self.script.request, self.cache_status == "hit"
        return UsageEvent(
            request_id=request.id,
            account=request.account,
            model=self.script.asked_model,
            voice=self.script.voice.id,
            characters=characters,
            audio_ms=self.audio_ms,
            outcome="cached" if hit and outcome == "completed" else outcome,
            price_micros=self._price(self.script, characters, hit),
            at=time.time(),
            user=request.user,
        )
