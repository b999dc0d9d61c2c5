"""The connection to a remote server: pooled, bounded in time, tried again before the first byte, behind a breaker.

Owns tries and their times. What an answer means is `remote_faults`' and `remote_sound`'s.
"""

from __future__ import annotations

import asyncio
import json
import logging
import random
import time
import uuid
from collections.abc import AsyncGenerator, AsyncIterator, Mapping
from contextlib import AsyncExitStack, aclosing, asynccontextmanager, suppress
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlsplit

import httpx

from ..breaker import Breaker, BreakerOpen
from ..domain import AudioChunk, Segment
from ..errors import SpeechError, UpstreamUnavailable
from ..observe import detail
from . import remote_faults
from .remote_faults import Fault
from .remote_sound import Sound

logger = logging.getLogger(__name__)

CONNECTIONS = 64
"""At once: twice what the server asks for by default, for each response may have a segment ahead."""

KEPT_FOR_S = 4.0
"""Less than the 5 s after which uvicorn, for one, closes a connection that idles."""

BACKOFF_S = 0.25
"""Before the second try, at most; doubled before each further one."""

LONGEST_WAIT_S = 5.0
"""What a Retry-After may ask a request to wait here; where it asks for more, the client is told instead."""

MAX_DOCUMENT = 4 * 1024 * 1024
"""Bytes of a list or an error that are read."""


@dataclass(frozen=True, slots=True)
class Remote:
    """A remote server and how it is asked. Times are in seconds.

    `url` is what OpenAI's clients call the base URL; without a path, /v1 is meant. `first_byte_s` runs from each try's
    start to its first byte of sound, and bounds each pause after it; `total_s` is for one segment, all tries together.
    """

    url: str
    api_key: str | None = field(default=None, repr=False)
    sample_rate: int = 24_000
    connect_s: float = 5.0
    first_byte_s: float = 20.0
    total_s: float = 120.0
    retries: int = 2

    @property
    def base(self) -> str:
        """The URL that paths are appended to."""
        url = self.url.rstrip("/")
        return url if urlsplit(url).path else f"{url}/v1"


class Client:
    """Asks one remote server. Used on one event loop, from `open` to `close`."""

    def __init__(self, remote: Remote, breaker: Breaker) -> None:
        self.breaker = breaker
        self._remote = remote
        self._http: httpx.AsyncClient | None = None

    def open(self) -> None:
        """Get ready to connect; connects to nothing yet."""
        remote = self._remote
        authorization = {"Authorization": f"Bearer {remote.api_key}"} if remote.api_key else {}
        self._http = httpx.AsyncClient(
            headers={"Accept-Encoding": "identity", **authorization},
            timeout=httpx.Timeout(remote.first_byte_s, connect=remote.connect_s, pool=remote.connect_s),
            limits=httpx.Limits(max_connections=CONNECTIONS, keepalive_expiry=KEPT_FOR_S),
        )

    async def close(self) -> None:
        if self._http is not None:
            await self._http.aclose()
            self._http = None

    async def document(self, path: str) -> Any:
        """A JSON document, asked for once; raises Fault."""
        try:
            async with asyncio.timeout(self._remote.first_byte_s), self._asked("GET", path) as answer:
                body = await _read(answer)
        except TimeoutError:
            raise remote_faults.timed_out() from None
        try:
            return json.loads(body)
        except (ValueError, RecursionError):
            raise remote_faults.invalid("is not JSON") from None

    async def speech(self, body: Mapping[str, Any], segment: Segment) -> AsyncGenerator[AudioChunk, None]:
        """The sound of one segment while it comes. Closing the generator ends the request at the remote server.

        Raises UpstreamFailed, UpstreamUnavailable, UpstreamRefused, RateLimited: nothing was heard, or not all.
        """
        deadline = asyncio.get_running_loop().time() + self._remote.total_s
        # One key for all tries: a server that knows such keys charges them once.
        headers = {"Idempotency-Key": uuid.uuid4().hex}
        tried, last = 0, None
        while True:
            heard = False
            try:
                async with aclosing(self._try(body, headers, segment, deadline)) as chunks:
                    async for chunk in chunks:
                        heard = True
                        yield chunk
                return
            except BreakerOpen as refusal:
                raise last or _kept_away(refusal.retry_after) from None
            except Fault as fault:
                tried, last = tried + 1, fault.error
                logger.warning("the remote server failed a segment, try %d: %s", tried, _reason(fault))
                if heard or not fault.again or tried > self._remote.retries or fault.wait > LONGEST_WAIT_S:
                    raise fault.error from None
                await asyncio.sleep(max(fault.wait, _backoff(tried)))

    async def _try(
        self, body: Mapping[str, Any], headers: Mapping[str, str], segment: Segment, deadline: float
    ) -> AsyncGenerator[AudioChunk, None]:
        with self.breaker.attempt() as attempt:
            try:
                async with asyncio.timeout_at(deadline), aclosing(self._answer(body, headers, segment)) as chunks:
                    async for chunk in chunks:
                        yield chunk
            except (Fault, TimeoutError) as error:
                fault = error if isinstance(error, Fault) else remote_faults.timed_out()
                if fault.alive is not None:
                    (attempt.succeed if fault.alive else attempt.fail)()
                raise fault from None
            attempt.succeed()

    async def _answer(
        self, body: Mapping[str, Any], headers: Mapping[str, str], segment: Segment
    ) -> AsyncGenerator[AudioChunk, None]:
        began = time.perf_counter()
        detail(logger, "asking the remote server", start=segment.start, end=segment.end, breaker=self.breaker.state)
        async with AsyncExitStack() as stack:
            try:
                async with asyncio.timeout(self._remote.first_byte_s):
                    answer = await stack.enter_async_context(
                        self._asked("POST", "/audio/speech", json=body, headers=headers)
                    )
                    sound = Sound(answer.headers, self._remote.sample_rate, segment)
                    parts = await stack.enter_async_context(aclosing(_parts(answer)))
                    first = await anext(parts, b"")
                    detail(logger, "the remote server began to answer", ms=_ms_since(began))
            except TimeoutError:
                raise remote_faults.timed_out() from None
            if (chunk := sound.take(first)) is not None:
                yield chunk
            async for data in parts:
                if (chunk := sound.take(data)) is not None:
                    yield chunk
            sound.finish()
            detail(logger, "the remote server's answer is whole", ms=_ms_since(began))

    @asynccontextmanager
    async def _asked(self, method: str, path: str, **request: Any) -> AsyncIterator[httpx.Response]:
        """The answer to a request, its body not read yet; Fault unless it is a 200."""
        if self._http is None:
            raise Fault(UpstreamUnavailable("The server is not connected."), alive=None)
        async with AsyncExitStack() as stack:
            try:
                url = self._remote.base + path
                answer = await stack.enter_async_context(self._http.stream(method, url, **request))
            except httpx.HTTPError as error:
                raise remote_faults.of_transport(error) from None
            if answer.status_code != 200:
                said = b""
                with suppress(Fault):
                    said = await _read(answer)
                raise remote_faults.of_answer(answer.status_code, answer.headers, said, secret=self._remote.api_key)
            yield answer


async def _parts(answer: httpx.Response) -> AsyncGenerator[bytes, None]:
    """The body's bytes as they come; Fault where the connection is lost before the body's own end."""
    try:
        async for part in answer.aiter_raw():
            yield part
    except httpx.HTTPError as error:
        raise remote_faults.of_transport(error) from None


async def _read(answer: httpx.Response) -> bytes:
    """The whole of a document; Fault if it is lost midway, or beyond measure."""
    body = bytearray()
    async with aclosing(_parts(answer)) as parts:
        async for part in parts:
            body += part
            if len(body) > MAX_DOCUMENT:
                raise remote_faults.invalid("is too large")
    return bytes(body)


def _kept_away(retry_after: float) -> SpeechError:
    message = "The remote server keeps failing, and is not asked for a while."
    return UpstreamUnavailable(message, retry_after=max(1, round(retry_after + 0.5)))


def _ms_since(began: float) -> float:
    return round((time.perf_counter() - began) * 1000, 1)


def _backoff(tried: int) -> float:
    """Seconds before the next try, with jitter: those who failed together shall not come back together."""
    longest: float = BACKOFF_S * 2 ** (tried - 1)
    return longest * random.uniform(0.5, 1.0)


def _reason(fault: Fault) -> str:
    """For the log, in our own words: those of a refusal may quote the client."""
    error = fault.error
    return f"refused with status {error.status}" if fault.alive else error.message
