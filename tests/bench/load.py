"""A load client that costs little: one request, sent again and again over keep-alive connections.

Owns the counting of answers. Knows no server; what the machine allows it is measured by sending it to an
application that does nothing (bare.py).
"""

from __future__ import annotations

import asyncio
import time
from dataclasses import dataclass, field
from typing import Any

_HEAD_END = b"\r\n\r\n"
_BUFFER_BYTES = 256 * 1024


@dataclass
class Load:
    """What one stretch of load did. `seconds` ends with the last answer; `latencies` are seconds."""

    answers: int = 0
    seconds: float = 0.0
    latencies: list[float] = field(default_factory=list)

    @property
    def per_second(self) -> float:
        return self.answers / self.seconds


def http_request(method: str, path: str, body: bytes = b"", headers: dict[str, str] | None = None) -> bytes:
    """The bytes of one keep-alive request."""
    fields = {"Host": "localhost", "Content-Length": str(len(body)), **(headers or {})}
    lines = [f"{method} {path} HTTP/1.1", *(f"{name}: {value}" for name, value in fields.items())]
    return "\r\n".join(lines).encode() + _HEAD_END + body


async def press(port: int, request: bytes, *, concurrency: int, seconds: float, length: int) -> Load:
    """Keep `concurrency` connections busy with `request` for `seconds`.

    Every answer must be a 200 with a body of `length` bytes; else RuntimeError.
    """
    loop = asyncio.get_running_loop()
    load = Load()
    deadline = time.perf_counter() + seconds
    users = []
    for _ in range(concurrency):
        _, user = await loop.create_connection(lambda: _User(request, length, load, deadline), "127.0.0.1", port)
        users.append(user)
    started = time.perf_counter()
    for user in users:
        user.ask()
    try:
        await asyncio.gather(*(user.done for user in users))
    finally:
        for user in users:
            user.transport.close()
    load.seconds = time.perf_counter() - started
    return load


class _User(asyncio.BufferedProtocol):
    """One connection: asks, waits for the whole answer, asks again until the deadline."""

    def __init__(self, request: bytes, length: int, load: Load, deadline: float) -> None:
        self._request = request
        self._length = length
        self._load = load
        self._deadline = deadline
        self._buffer = memoryview(bytearray(_BUFFER_BYTES))
        self._head = bytearray()
        self._left: int | None = None  # None: the head is not complete yet
        self.done: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    def connection_made(self, transport: Any) -> None:
        self.transport = transport

    def ask(self) -> None:
        self._head.clear()
        self._left = None
        self._asked_at = time.perf_counter()
        self.transport.write(self._request)

    def get_buffer(self, sizehint: int) -> memoryview:
        return self._buffer

    def buffer_updated(self, nbytes: int) -> None:
        if self._left is None:
            self._head += self._buffer[:nbytes]
            self._read_head()
        else:
            self._left -= nbytes
        if self._left == 0:
            self._answered()

    def _read_head(self) -> None:
        end = self._head.find(_HEAD_END)
        if end < 0:
            return
        head = bytes(self._head[:end]).lower()
        if not head.startswith(b"http/1.1 200 ") or b"\r\ncontent-length: %d" % self._length not in head:
            self._fail(f"unexpected answer: {bytes(self._head)[:300]!r}")
            return
        self._left = self._length - (len(self._head) - end - len(_HEAD_END))

    def _answered(self) -> None:
        now = time.perf_counter()
        self._load.answers += 1
        self._load.latencies.append(now - self._asked_at)
        if now < self._deadline:
            self.ask()
        else:
            self.done.set_result(None)

    def _fail(self, message: str) -> None:
        if not self.done.done():
            self.done.set_exception(RuntimeError(message))

    def connection_lost(self, exc: Exception | None) -> None:
        self._fail("the server closed the connection")
