"""One speech request, listened to: when its bytes came, and what a listener would have heard.

Owns the client's side of HTTP (raw asyncio, httptools) and its clock, which starts when the request's bytes are written
to a connection that stands. Knows no server in particular, and judges nothing: a failure is an outcome like others.
"""

from __future__ import annotations

import asyncio
import io
import json
import time
from dataclasses import dataclass, field
from typing import Any, cast
from urllib.parse import urlsplit

import httptools
import numpy as np

from tests.bench.load import http_request
from tests.bench.playback import Playback
from tests.bench.workload import FRAME_S, Ask

SAMPLE_RATE = 24_000
FRAME_BYTES = round(2 * SAMPLE_RATE * FRAME_S)
"""80 ms of pcm: 3,840."""

AUDIBLE = 32_768 / 1000
"""-60 dBFS: the first sample above it is audible."""

_SAID = 300
"""Bytes of an error's answer that are kept."""


@dataclass(frozen=True)
class Target:
    """Where and how to ask. `fields` go into each body; `frames_field` is the one that takes the frames, if any.

    `keeps_body`: of pcm too, which is else forgotten as it comes.
    """

    base_url: str
    audio_format: str = "pcm"
    fields: dict[str, Any] = field(default_factory=dict)
    headers: dict[str, str] = field(default_factory=dict)
    frames_field: str = ""
    frames_extra: int = 0
    timeout_s: float = 120.0
    keeps_body: bool = False

    def request(self, ask: Ask) -> bytes:
        url = urlsplit(self.base_url)
        path = url.path.removesuffix("/").removesuffix("/v1") + "/v1/audio/speech"
        body = {"input": ask.text, "response_format": self.audio_format, **self.fields}
        if self.frames_field:
            body[self.frames_field] = ask.frames + self.frames_extra
        headers = {
            "Host": url.netloc,
            "Content-Type": "application/json",
            "Cache-Control": "no-store",
            "Connection": "close",
            **self.headers,
        }
        return http_request("POST", path, json.dumps(body).encode(), headers)

    async def connect(self, exchange: Exchange) -> None:
        """Raises OSError."""
        url = urlsplit(self.base_url)
        port = url.port or (443 if url.scheme == "https" else 80)
        loop = asyncio.get_running_loop()
        await loop.create_connection(lambda: exchange, url.hostname, port, ssl=url.scheme == "https" or None)


@dataclass
class Heard:
    """What came of one request; seconds from its sending, None where there was no such moment.

    `error` is None, or what went wrong: a status code, "timeout", "cut" and the like. `arrivals`: client clock, bytes.
    """

    ask: Ask
    sent_at: float
    lag_s: float = 0.0
    error: str | None = None
    said: str = ""
    first_byte_s: float | None = None
    first_frame_s: float | None = None
    audible_s: float | None = None
    total_s: float = 0.0
    audio_s: float = 0.0
    underruns: int = 0
    dry_s: float = 0.0
    arrivals: list[tuple[float, int]] = field(default_factory=list)
    body: list[bytes] = field(default_factory=list)

    def decode(self) -> None:
        """Count the seconds of an encoded sound: after the load, as it costs."""
        if self.error is None and self.body and not self.audio_s:
            try:
                self.audio_s = encoded_seconds(b"".join(self.body))
            except (OSError, ValueError) as error:  # av's errors are such
                self.error = f"undecodable: {type(error).__name__}"
        self.body.clear()


async def listen(target: Target, ask: Ask, due_at: float | None = None) -> Heard:
    """Ask, and take the whole answer. `due_at`: when it should have been sent (client clock)."""
    exchange = Exchange(Sound(target.audio_format == "pcm", target.keeps_body))
    heard = Heard(ask, time.perf_counter())
    try:
        async with asyncio.timeout(target.timeout_s):
            await target.connect(exchange)
            heard.sent_at = exchange.send(target.request(ask))
            heard.error = await exchange.done
    except TimeoutError:
        heard.error = "timeout"
    except OSError as error:
        heard.error = f"connection: {type(error).__name__}"
    finally:
        exchange.close()
    ended_at = exchange.now if heard.error is None else time.perf_counter()
    heard.lag_s = max(0.0, heard.sent_at - (heard.sent_at if due_at is None else due_at))
    heard.said = exchange.said.decode(errors="replace")
    heard.total_s = ended_at - heard.sent_at
    _measure(heard, exchange.sound)
    return heard


def _measure(heard: Heard, sound: Sound) -> None:
    def since(moment: float | None) -> float | None:
        return None if moment is None else moment - heard.sent_at

    heard.arrivals, heard.body = sound.arrivals, sound.body
    heard.first_byte_s = since(sound.first_at)
    heard.first_frame_s, heard.audible_s = since(sound.frame_at), since(sound.audible_at)
    if heard.error is None and sound.first_at is None:
        heard.error = "no sound"
    if heard.error is None and sound.pcm:
        heard.audio_s = sound.bytes / 2 / SAMPLE_RATE
        player = Playback()
        for moment, length in sound.arrivals:
            player.arrive(moment, length / 2 / SAMPLE_RATE)
        heard.underruns, heard.dry_s = player.underruns, player.dry_s


class Sound:
    """The bytes of one answer as they come; of pcm also when they fill a frame and when they can be heard."""

    def __init__(self, pcm: bool, keeps_body: bool = False) -> None:
        self.pcm, self.keeps_body = pcm, keeps_body or not pcm
        self.bytes = 0
        self.arrivals: list[tuple[float, int]] = []
        self.body: list[bytes] = []
        self.first_at: float | None = None
        self.frame_at: float | None = None
        self.audible_at: float | None = None
        self._odd = b""

    def take(self, now: float, data: bytes) -> None:
        self.bytes += len(data)
        if self.arrivals and self.arrivals[-1][0] == now:  # one read of the socket may hold several pieces
            self.arrivals[-1] = (now, self.arrivals[-1][1] + len(data))
        else:
            self.arrivals.append((now, len(data)))
        if self.first_at is None:
            self.first_at = now
        if self.keeps_body:
            self.body.append(data)
        if self.pcm:
            self._hear(now, data)

    def _hear(self, now: float, data: bytes) -> None:
        if self.frame_at is None and self.bytes >= FRAME_BYTES:
            self.frame_at = now
        if self.audible_at is None and self._is_audible(data):
            self.audible_at = now

    def _is_audible(self, data: bytes) -> bool:
        data = self._odd + data
        whole = len(data) & ~1
        self._odd = data[whole:]
        samples = np.frombuffer(data[:whole], "<i2")
        return bool(samples.size) and max(int(samples.max()), -int(samples.min())) > AUDIBLE


class Exchange(asyncio.Protocol):
    """One request and its answer on a connection of their own. `done` gives what went wrong, or None."""

    def __init__(self, sound: Sound) -> None:
        self.sound = sound
        self.done: asyncio.Future[str | None] = asyncio.get_running_loop().create_future()
        self.now = 0.0
        self.said = b""
        self._parser = httptools.HttpResponseParser(self)
        self._transport: asyncio.Transport | None = None
        self._status = 0
        self._bounded = False  # by a length or by chunks; else the connection's end is the body's

    def send(self, request: bytes) -> float:
        """Write the request; the moment before."""
        assert self._transport is not None
        sent_at = time.perf_counter()
        self._transport.write(request)
        return sent_at

    def close(self) -> None:
        if self._transport is not None:
            self._transport.abort()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)

    def data_received(self, data: bytes) -> None:
        self.now = time.perf_counter()
        try:
            self._parser.feed_data(data)
        except httptools.HttpParserError as error:
            self._end(f"not HTTP: {type(error).__name__}")

    def connection_lost(self, exc: Exception | None) -> None:
        complete = self._status == 200 and not self._bounded and exc is None
        self._end(None if complete else "cut")

    def _end(self, error: str | None) -> None:
        if not self.done.done():
            self.done.set_result(error)

    # --- called by the parser ---

    def on_header(self, name: bytes, value: bytes) -> None:
        self._bounded = self._bounded or name.lower() in (b"content-length", b"transfer-encoding")

    def on_headers_complete(self) -> None:
        self._status = self._parser.get_status_code()

    def on_body(self, data: bytes) -> None:
        if self._status == 200:
            self.sound.take(self.now, data)
        elif len(self.said) < _SAID:
            self.said += data[: _SAID - len(self.said)]

    def on_message_complete(self) -> None:
        self._end(None if self._status == 200 else str(self._status))


def encoded_seconds(body: bytes) -> float:
    """Seconds of sound in a whole encoded file, as a decoder counts them (the encoder's own padding included)."""
    import av

    with av.open(io.BytesIO(body)) as container:
        return sum(frame.samples / frame.sample_rate for frame in container.decode(audio=0))
