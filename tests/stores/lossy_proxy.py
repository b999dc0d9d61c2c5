"""A proxy before PostgreSQL that loses requests or answers at the worst moment: around a COMMIT."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from contextlib import suppress
from typing import Literal, Self

Loss = Literal["request", "answer", "silence", "late"]
Away = Literal["", "refuse", "silence"]


class LossyProxy:
    """Forwards `port` to a unix socket. Harmless until `lose` or `go_away`; `losses` counts what was lost.

    The next COMMIT is, with its connection, lost on the way (`request`) or answered in vain (`answer`); or the answer
    just never comes (`silence`); or the COMMIT is delivered only when `deliver` is called (`late`).
    """

    def __init__(self, socket: str) -> None:
        self._socket = socket
        self._loss: str = ""
        self._then: str = ""
        self._away: str = ""
        self._silences: list[asyncio.Event] = []
        self._writers: list[asyncio.StreamWriter] = []
        self._tasks: set[asyncio.Task[None]] = set()
        self._late: tuple[asyncio.StreamWriter, bytes] | None = None
        self.losses = 0

    async def __aenter__(self) -> Self:
        self._server = await asyncio.start_server(self._accept, "127.0.0.1", 0)
        self.port = self._server.sockets[0].getsockname()[1]
        return self

    async def __aexit__(self, *_: object) -> None:
        self._server.close()
        self._cut(self._writers)
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    def lose(self, loss: Loss, then: Away = "") -> None:
        self._loss, self._then = loss, then

    def go_away(self, how: Away) -> None:
        """Refuse: cut all connections, and new ones at once. Silence: accept them all, and never answer on any."""
        self._away = how
        if how == "refuse":
            self._cut(self._writers)
        else:
            for silent in self._silences:
                silent.set()

    def recover(self) -> None:
        """Forward what comes on new connections; those that fell silent stay so."""
        self._away = ""

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        if self._away == "refuse":
            writer.close()
            return
        there_reader, there_writer = await asyncio.open_unix_connection(self._socket)
        pair = [writer, there_writer]
        self._writers += pair
        silent = asyncio.Event()
        self._silences.append(silent)
        if self._away == "silence":
            silent.set()

        async def request(data: bytes) -> None:
            if self._loss and b"\0COMMIT\0" in data:
                await self._lose(data, pair, silent)
            elif not silent.is_set():
                there_writer.write(data)

        async def answer(data: bytes) -> None:
            if not silent.is_set():
                writer.write(data)

        for source, forward in ((reader, request), (there_reader, answer)):
            task = asyncio.create_task(self._pump(source, forward, pair, silent))
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)

    async def _pump(
        self,
        source: asyncio.StreamReader,
        forward: Callable[[bytes], Awaitable[None]],
        pair: list[asyncio.StreamWriter],
        silent: asyncio.Event,
    ) -> None:
        with suppress(ConnectionError):
            while data := await source.read(65536):
                await forward(data)
        if not silent.is_set():
            self._cut(pair)

    async def _lose(self, data: bytes, pair: list[asyncio.StreamWriter], silent: asyncio.Event) -> None:
        loss, self._loss = self._loss, ""
        self._away = self._then
        self.losses += 1
        silent.set()
        if loss == "late":
            self._late = pair[1], data
            return
        if loss != "request":
            pair[1].write(data)
            await asyncio.sleep(0.2)  # it is committed
        if loss != "silence":
            self._cut(pair)

    async def deliver(self) -> None:
        """Deliver what is late, if the other side still takes it."""
        if self._late is not None:
            writer, data = self._late
            with suppress(ConnectionError):
                writer.write(data)
                await writer.drain()
            await asyncio.sleep(0.3)

    def _cut(self, writers: list[asyncio.StreamWriter]) -> None:
        for writer in list(writers):
            writer.close()
            if writer in self._writers:
                self._writers.remove(writer)
