"""What the tests over HTTP share: texts, requests by hand, and what came back as sound or events."""

from __future__ import annotations

import json
import socket
from collections.abc import Mapping
from typing import Any, get_args
from urllib.parse import urlsplit

import httpx
import numpy as np

from api.src.domain import SAMPLE_RATE, AudioFormat, Samples

FORMATS: tuple[AudioFormat, ...] = get_args(AudioFormat)

OPENAI_MODELS = ["tts-1", "tts-1-hd", "gpt-4o-mini-tts", "gpt-4o-mini-tts-2025-12-15"]

PARTS = (
    "The river runs past the old mill and on into the valley. ",
    "Two boats lie at the bank, and nobody seems to own either of them. ",
    "In the evening the lamps are lit, one after another, along the whole shore. ",
    "Then the last ferry leaves, and everything is quiet until the morning.",
)
"""Sentences that the segmenter keeps apart."""

STORY = "".join(PARTS)

FAILS_LATE = PARTS[0] + "But this sentence is the one where it must FAIL, and long after the first sound."
"""FakeBackend speaks the first segment of this and raises at the second."""

BYTES_PER_SECOND = 2 * SAMPLE_RATE
"""Of PCM, s16le mono."""


def speak(client: httpx.Client, text: str = PARTS[0], headers: Mapping[str, str] = {}, **fields: Any) -> httpx.Response:
    """Post a speech request and read the whole answer."""
    return client.post("/v1/audio/speech", json={"input": text, **fields}, headers=headers)


def usage(client: httpx.Client, headers: Mapping[str, str] = {}, **query: Any) -> dict[str, Any]:
    answer = client.get("/v1/usage", headers=headers, params=query)
    assert answer.status_code == 200, answer.text
    body: dict[str, Any] = answer.json()
    return body


def assert_error(answer: httpx.Response, status: int, *, code: str | None = None, param: str | None = None) -> str:
    """The answer is an error in OpenAI's shape with FastAPI's `detail` beside it; returns its message."""
    assert answer.status_code == status, answer.text
    assert answer.headers["content-type"] == "application/json"
    body = answer.json()
    assert set(body) == {"error", "detail"}
    error = body["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert error["message"]
    assert error["message"] == body["detail"]
    assert error["param"] == param
    if code is not None:
        assert error["code"] == code
    message: str = error["message"]
    return message


def pitch(samples: Samples) -> float:
    """The strongest frequency, in Hz."""
    spectrum = np.abs(np.fft.rfft(samples * np.hanning(len(samples))))
    return float(np.argmax(spectrum)) * SAMPLE_RATE / len(samples)


def events(body: str) -> list[dict[str, Any]]:
    """The data of server-sent events, each of which names its type twice."""
    found = []
    for block in body.removesuffix("\n\n").split("\n\n"):
        name, data = block.split("\n")
        event = json.loads(data.removeprefix("data: "))
        assert name == f"event: {event['type']}"
        found.append(event)
    return found


class RawClient:
    """One HTTP/1.1 connection by hand: hangs up when it likes, and sees how the server ends an answer."""

    def __init__(self, url: str) -> None:
        target = urlsplit(url)
        self.socket = socket.create_connection((target.hostname, target.port), timeout=20)
        self.received = b""

    def __enter__(self) -> RawClient:
        return self

    def __exit__(self, *_: object) -> None:
        self.socket.close()

    def send(self, head: str, body: bytes = b"", *, length: int | None = None) -> None:
        """Send a request; `head` is the request line and header lines, `length` what the body claims."""
        lines = [*head.strip().splitlines(), "Host: test", f"Content-Length: {len(body) if length is None else length}"]
        self.socket.sendall("\r\n".join(lines).encode("latin-1") + b"\r\n\r\n" + body)

    def speak(self, headers: str = "", **fields: Any) -> None:
        self.send(f"POST /v1/audio/speech HTTP/1.1\n{headers}", json.dumps({"input": STORY, **fields}).encode())

    def read_sound(self, size: int) -> bytes:
        """Read the head of the answer and then until at least `size` bytes of the raw body are there."""
        while len(self.received.partition(b"\r\n\r\n")[2]) < size:
            data = self.socket.recv(65536)
            assert data, f"the server hung up early: {self.received[:400]!r}"
            self.received += data
        return self.received.partition(b"\r\n\r\n")[2]

    def read_to_end(self) -> bytes:
        while data := self.socket.recv(65536):
            self.received += data
        return self.received
