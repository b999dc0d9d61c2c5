"""One HTTP connection by hand: half requests, sudden hang-ups, readers that do not read."""

from __future__ import annotations

import json
import re
import socket
import struct
from types import TracebackType
from typing import Any, Self
from urllib.parse import urlsplit


class Caller:
    """Connected at once. `receive_buffer` bounds the bytes that the kernel takes for a reader that does not read."""

    def __init__(self, url: str, *, receive_buffer: int | None = None, timeout: float = 30) -> None:
        address = urlsplit(url)
        self.socket = socket.socket()
        self.socket.settimeout(timeout)
        if receive_buffer is not None:
            self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_buffer)
        self.socket.connect((address.hostname, address.port))
        self.received = b""

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.socket.close()

    def ask(self, path: str = "/v1/audio/speech", *, no_store: bool = False, cut: int = 0, **fields: Any) -> None:
        """Send a speech request, less its last `cut` bytes."""
        body = json.dumps(fields).encode()
        head = f"POST {path} HTTP/1.1\r\nHost: test\r\nContent-Length: {len(body)}\r\n"
        head += "Cache-Control: no-store\r\n" if no_store else ""
        request = head.encode() + b"\r\n" + body
        self.socket.sendall(request[: len(request) - cut])

    def read(self) -> bytes:
        """What comes next; empty once the server has ended the connection."""
        data = self.socket.recv(65536)
        self.received += data
        return data

    def hurry(self) -> None:
        """Let the kernel take as much as it likes from now on."""
        self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1 << 20)

    def read_head(self) -> str:
        """The status line and the headers, in lower case."""
        while b"\r\n\r\n" not in self.received:
            assert self.read(), f"the server hung up early: {self.received!r}"
        return self.received.partition(b"\r\n\r\n")[0].decode("latin-1").lower()

    def read_answer(self) -> bytes:
        """The whole body. Raises ConnectionError if the server ends it early."""
        length = re.search(r"content-length: (\d+)", self.read_head())
        while not self._is_whole(None if length is None else int(length[1])):
            if not self.read():
                raise ConnectionError("the answer was cut")
        body = self.received.partition(b"\r\n\r\n")[2]
        return body if length else unchunked(body)

    @property
    def has_all(self) -> bool:
        """Whether an answer has come, and is whole."""
        if b"\r\n\r\n" not in self.received:
            return False
        length = re.search(r"content-length: (\d+)", self.read_head())
        return self._is_whole(None if length is None else int(length[1]))

    def _is_whole(self, length: int | None) -> bool:
        if length is None:
            return self.received.endswith(b"\r\n0\r\n\r\n")
        return len(self.received.partition(b"\r\n\r\n")[2]) == length

    def hang_up(self, *, reset: bool = False) -> None:
        """Close the connection, with a reset instead of a farewell if asked to."""
        if reset:
            self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.socket.close()


def unchunked(data: bytes) -> bytes:
    """The content of a body in chunked transfer coding."""
    content, position = b"", 0
    while True:
        end = data.index(b"\r\n", position)
        size = int(data[position:end], 16)
        if size == 0:
            return content
        content += data[end + 2 : end + 2 + size]
        position = end + 4 + size
