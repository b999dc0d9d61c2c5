"""A speech server that makes nothing: frames of pcm after a delay and then at a pace, each stamped with its time.

    python -m tests.bench.paced_server PORT FRAMES GAP_S

Owns the other end of the load client's calibration: what lies between a stamp and the client's own clock is the error
of the client (and the kernel's part). In tests it is a server whose every moment is known.
"""

from __future__ import annotations

import asyncio
import contextlib
import struct
import sys
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass

import uvloop

FRAME_BYTES = 3840
STAMP = struct.Struct("<d")
_HEAD = b"HTTP/1.1 200 OK\r\nContent-Type: audio/pcm\r\nTransfer-Encoding: chunked\r\nConnection: close\r\n\r\n"
_SOUND = b"\x00\x10" * (FRAME_BYTES // 2)
_OK = b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\nConnection: close\r\n\r\n"


@dataclass(frozen=True)
class Pace:
    """`silent`: frames of silence at the start (these carry no stamp). `cut_after`: frames before the line is cut."""

    frames: int = 20
    delay_s: float = 0.0
    gap_s: float = 0.0
    silent: int = 0
    cut_after: int | None = None
    status: bytes = b"200"

    async def answer(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.closing(writer), contextlib.suppress(ConnectionError, asyncio.IncompleteReadError):
            head = await reader.readuntil(b"\r\n\r\n")
            if head.startswith(b"GET"):
                writer.write(_OK)
                return
            length = head.lower().partition(b"content-length:")[2].partition(b"\r")[0]
            await reader.readexactly(int(length))
            await self._speak(writer)

    async def _speak(self, writer: asyncio.StreamWriter) -> None:
        await asyncio.sleep(self.delay_s)
        if self.status != b"200":
            writer.write(_OK.replace(b"200 OK", self.status + b" No"))
            return
        writer.write(_HEAD)
        due = time.perf_counter()
        for number in range(self.frames):
            if number == self.cut_after:
                return
            await asyncio.sleep(max(0.0, due - time.perf_counter()))
            silent = number < self.silent
            frame = bytes(FRAME_BYTES) if silent else STAMP.pack(time.perf_counter()) + _SOUND[STAMP.size :]
            writer.write(b"%x\r\n" % len(frame) + frame + b"\r\n")
            due += self.gap_s
        writer.write(b"0\r\n\r\n")
        await writer.drain()


@contextlib.asynccontextmanager
async def serving(pace: Pace, port: int = 0) -> AsyncIterator[str]:
    """Serve on this event loop; the base URL."""
    server = await asyncio.start_server(pace.answer, "127.0.0.1", port, backlog=1024)
    async with server:
        yield "http://127.0.0.1:{1}".format(*server.sockets[0].getsockname())


async def _main(port: int, pace: Pace) -> None:
    async with serving(pace, port):
        await asyncio.Event().wait()


if __name__ == "__main__":
    uvloop.run(_main(int(sys.argv[1]), Pace(int(sys.argv[2]), gap_s=float(sys.argv[3]))))
