"""A remote speech server that misbehaves as it is told, byte by byte, on a real socket and an event loop of its own."""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from tests.ports import free_port

Answer = Callable[[asyncio.StreamWriter], Awaitable[None]]
"""What it does with one request; the connection stays open afterwards, unless `hang_up` has ended it."""

MODELS = {"object": "list", "data": [{"id": "gpt-9"}, {"id": "tts-1"}, {"id": "tts-1-hd"}]}
VOICES = {"voices": [{"id": "alloy", "language": "english"}, {"id": "Vera", "name": "Vera V.", "language": "German"}]}
SECRET = "sk-planted-upstream"


def tone(seconds: float = 1.0, sample_rate: int = 24_000) -> bytes:
    """Sound as servers send it, never silent at its beginning or end."""
    times = np.arange(int(seconds * sample_rate)) / sample_rate
    return (12_000 * np.cos(2 * np.pi * 220 * times)).astype("<i2").tobytes()


def head(status: int = 200, **headers: object) -> bytes:
    lines = [f"HTTP/1.1 {status} Whatever", *(f"{name.replace('_', '-')}: {value}" for name, value in headers.items())]
    return "\r\n".join(lines).encode() + b"\r\n\r\n"


def whole(body: bytes, status: int = 200, *, length: int | None = None, **headers: object) -> Answer:
    """A body with its length, or with a lie about it, in which case the connection is closed after it."""

    async def answer(writer: asyncio.StreamWriter) -> None:
        said = len(body) if length is None else length
        kind = {"Content_Type": "audio/pcm", **headers}
        writer.write(head(status, Content_Length=said, **kind) + body)
        await writer.drain()
        if said > len(body):
            writer.close()

    return answer


def document(body: object, status: int = 200, **headers: object) -> Answer:
    return whole(json.dumps(body).encode(), status, **{"Content_Type": "application/json", **headers})


def refusal(status: int, message: str = "It will not.", **fields: object) -> Answer:
    """An error in OpenAI's shape."""
    headers = {name: fields.pop(name) for name in list(fields) if name[0].isupper()}
    error = {"message": message, "type": "some_error", "param": None, "code": None, **fields}
    return document({"error": error}, status, **headers)


def chunked(*pieces: bytes, ends: bool = True, pause_s: float = 0.0, **headers: object) -> Answer:
    """A body in chunks, so long apart. Without `ends` the connection is closed where the next one would come."""

    async def answer(writer: asyncio.StreamWriter) -> None:
        writer.write(head(**{"Content_Type": "audio/pcm", "Transfer_Encoding": "chunked", **headers}))
        for number, piece in enumerate(pieces):
            if number:
                await asyncio.sleep(pause_s)
            writer.write(b"%x\r\n%s\r\n" % (len(piece), piece))
            await writer.drain()
        if ends:
            writer.write(b"0\r\n\r\n")
        else:
            writer.close()

    return answer


def bare(*parts: bytes) -> Answer:
    """These very bytes, and then the end of the connection."""

    async def answer(writer: asyncio.StreamWriter) -> None:
        for part in parts:
            writer.write(part)
            await writer.drain()
        writer.close()

    return answer


def silent_after(data: bytes) -> Answer:
    """These bytes, and nothing more on a connection that stays open."""

    async def answer(writer: asyncio.StreamWriter) -> None:
        writer.write(data)
        await asyncio.sleep(60)

    return answer


def late(seconds: float, then: Answer) -> Answer:
    async def answer(writer: asyncio.StreamWriter) -> None:
        await asyncio.sleep(seconds)
        await then(writer)

    return answer


def held(until: threading.Event, then: Answer) -> Answer:
    """Nothing, until the test says so."""

    async def answer(writer: asyncio.StreamWriter) -> None:
        while not until.is_set():  # noqa: ASYNC110 (the test is in another thread)
            await asyncio.sleep(0.002)
        await then(writer)

    return answer


def endless() -> Answer:
    async def answer(writer: asyncio.StreamWriter) -> None:
        writer.write(head(Content_Type="audio/pcm", Transfer_Encoding="chunked"))
        piece = tone(1.0)
        while True:
            writer.write(b"%x\r\n%s\r\n" % (len(piece), piece))
            await writer.drain()

    return answer


@dataclass
class Asked:
    """One request as it came. `left`: the connection was gone before its answer had ended."""

    method: str
    path: str
    headers: Mapping[str, str]
    body: dict[str, Any]
    connection: int
    left: threading.Event = field(default_factory=threading.Event)


class FaultyUpstream:
    """Answers speech by the `speech` list, of which the last stays; models and voices likewise. Keeps all requests."""

    def __init__(self) -> None:
        self.speech: Sequence[Answer] = [whole(tone())]
        self.models: Answer = document(MODELS)
        self.voices: Answer = document(VOICES)
        self.asked: list[Asked] = []
        self.port = free_port()  # to which it comes back
        self.loop = asyncio.new_event_loop()
        self._server: asyncio.Server | None = None
        self._connections = 0

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    @property
    def spoken(self) -> list[Asked]:
        """The speech requests alone."""
        return [asked for asked in self.asked if asked.path == "/v1/audio/speech"]

    def call(self, work: Awaitable[Any]) -> Any:
        async def run() -> Any:
            return await work

        return asyncio.run_coroutine_threadsafe(run(), self.loop).result(20)

    def up(self) -> None:
        """Listen, on the port that it had before if it had one."""
        self._server = self.call(asyncio.start_server(self._serve, "127.0.0.1", self.port))
        self.port = self._server.sockets[0].getsockname()[1]

    def down(self) -> None:
        """Stop listening and cut every connection."""
        self.call(self._close())

    async def _close(self) -> None:
        assert self._server is not None
        for listening in self._server.sockets:
            self.loop.remove_reader(listening.fileno())
        for _ in range(5):  # what was accepted just before comes to have a task, which a closed server cannot give it
            await asyncio.sleep(0)
        self._server.close()
        tasks = asyncio.all_tasks() - {asyncio.current_task()}
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await asyncio.sleep(0)  # transports close a moment later

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._connections += 1
        number = self._connections
        try:
            while (asked := await _read(reader, number)) is not None:
                self.asked.append(asked)
                await self._answer(asked, reader, writer)
        except (ConnectionError, asyncio.IncompleteReadError, asyncio.CancelledError):
            pass
        finally:
            await _closed(writer)

    async def _answer(self, asked: Asked, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        answering = asyncio.ensure_future(self._choose(asked)(writer))
        leaving = asyncio.ensure_future(reader.read(1))  # a client sends nothing while it waits
        try:
            await asyncio.wait([answering, leaving], return_when=asyncio.FIRST_COMPLETED)
            if not answering.done():
                asked.left.set()
        finally:
            answering.cancel()
            leaving.cancel()
            await asyncio.gather(answering, leaving, return_exceptions=True)

    def _choose(self, asked: Asked) -> Answer:
        if asked.path == "/v1/audio/speech":
            return self.speech[min(len(self.spoken), len(self.speech)) - 1]
        found = {"/v1/models": self.models, "/v1/audio/voices": self.voices}
        return found.get(asked.path) or document({"detail": "Not Found"}, 404)


async def _closed(writer: asyncio.StreamWriter) -> None:
    writer.close()
    try:
        async with asyncio.timeout(5):
            await writer.wait_closed()
    except (TimeoutError, ConnectionError):
        writer.transport.abort()


async def _read(reader: asyncio.StreamReader, connection: int) -> Asked | None:
    try:
        text = (await reader.readuntil(b"\r\n\r\n")).decode()
    except asyncio.IncompleteReadError:
        return None
    first, *lines = text.strip().split("\r\n")
    headers = {name.lower(): value for name, _, value in (line.partition(": ") for line in lines)}
    body = await reader.readexactly(int(headers.get("content-length", 0)))
    method, path, _ = first.split(" ")
    return Asked(method, path, headers, json.loads(body) if body else {}, connection)


@contextmanager
def faulty_upstream() -> Iterator[FaultyUpstream]:
    """A server that listens already."""
    upstream = FaultyUpstream()
    thread = threading.Thread(target=upstream.loop.run_forever, name="faulty upstream")
    thread.start()
    try:
        upstream.up()
        try:
            yield upstream
        finally:
            upstream.down()
    finally:
        upstream.loop.call_soon_threadsafe(upstream.loop.stop)
        thread.join(10)
        upstream.loop.close()
