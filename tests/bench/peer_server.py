"""A minimal OpenAI-compatible server around packages that have none of their own for preset voices.

    python -m tests.bench.peer_server official|faster FOLDER PORT [DEVICE]

`official`: qwen-tts as its README calls it, which gives the sound of a text when it is whole. `faster`:
faster-qwen3-tts, streamed in chunks of `chunk_size` frames (a field of the request; 12 is the package's default).
Runs in the package's own virtual environment and needs nothing else. Both speak one request at a time, the others wait:
neither package can be asked from two threads. Answers pcm alone; GET is 200 and says the versions once the
checkpoint is loaded and warm.
"""

from __future__ import annotations

import http.server
import json
import sys
import threading
from collections.abc import Iterator
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from typing import Any, Protocol

import numpy as np

LANGUAGE = "English"
CHUNK_FRAMES = 12
PACKAGES = ("qwen-tts", "qwen-tts-hf", "faster-qwen3-tts", "torch", "transformers")
_BACKLOG = 1024


class Peer(Protocol):
    """What is behind the server."""

    def speak(self, body: dict[str, Any]) -> Iterator[np.ndarray]:
        """The sound of a request's body in pieces, float samples at 24 kHz."""
        ...


class Official:
    """qwen-tts (0.1.1)."""

    def __init__(self, folder: str, device: str) -> None:
        _need_torchaudio()
        import torch
        from qwen_tts import Qwen3TTSModel

        dtype = torch.float32 if device == "cpu" else torch.bfloat16
        self._model = Qwen3TTSModel.from_pretrained(folder, device_map=device, dtype=dtype)

    def speak(self, body: dict[str, Any]) -> Iterator[np.ndarray]:
        sounds, _ = self._model.generate_custom_voice(**_asked(body))
        yield sounds[0]


class Faster:
    """faster-qwen3-tts (0.5.4)."""

    def __init__(self, folder: str, device: str) -> None:
        from faster_qwen3_tts import FasterQwen3TTS

        self._model = FasterQwen3TTS.from_pretrained(folder, device=device)

    def speak(self, body: dict[str, Any]) -> Iterator[np.ndarray]:
        chunk_size = int(body.get("chunk_size", CHUNK_FRAMES))
        for samples, _, _ in self._model.generate_custom_voice_streaming(**_asked(body), chunk_size=chunk_size):
            yield samples


PEERS = {"official": Official, "faster": Faster}


def server(peer: Peer, port: int) -> http.server.ThreadingHTTPServer:
    """A server on 127.0.0.1 that asks `peer` for one sound at a time; not serving yet."""
    turn = threading.Lock()

    class Handler(http.server.BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"
        disable_nagle_algorithm = True

        def do_GET(self) -> None:
            data = json.dumps(versions()).encode()
            self.send_response(200)
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            if body.get("response_format") != "pcm":
                self.send_error(400, "pcm alone")
                return
            with turn, suppress(ConnectionError):  # the client has gone
                self._answer(body)

        def _answer(self, body: dict[str, Any]) -> None:
            begun = False
            for samples in peer.speak(body):
                if not begun:
                    begun = True
                    self.send_response(200)
                    self.send_header("Content-Type", "audio/pcm")
                    self.send_header("Transfer-Encoding", "chunked")
                    self.end_headers()
                if data := pcm(samples):
                    self.wfile.write(b"%x\r\n" % len(data) + data + b"\r\n")
            if begun:
                self.wfile.write(b"0\r\n\r\n")
            else:
                self.send_error(500, "no sound")

        def log_message(self, format: str, *args: object) -> None:
            pass

    class Server(http.server.ThreadingHTTPServer):
        request_queue_size = _BACKLOG
        daemon_threads = True

    return Server(("127.0.0.1", port), Handler)


def versions() -> dict[str, str]:
    """Of the packages that are here."""
    found = {}
    for name in PACKAGES:
        with suppress(PackageNotFoundError):
            found[name] = version(name)
    return found


def pcm(samples: np.ndarray) -> bytes:
    """Float samples as 16-bit little-endian ones."""
    return (np.clip(np.asarray(samples, np.float32), -1, 1) * 32767).astype("<i2").tobytes()


def _asked(body: dict[str, Any]) -> dict[str, Any]:
    asked = {"text": body["input"], "speaker": body["voice"], "language": body.get("language", LANGUAGE)}
    return asked | {name: int(body[name]) for name in ("max_new_tokens",) if name in body}


def _need_torchaudio() -> None:
    """qwen-tts imports it, also where it does not fit torch; a preset voice does not use it."""
    try:
        import torchaudio  # noqa: F401
    except (ImportError, OSError):
        from tests.engine.make_golden_codec import stub_torchaudio

        stub_torchaudio()


def main() -> None:
    kind, folder, port, *device = sys.argv[1:]
    peer = PEERS[kind](folder, device[0] if device else "cuda")
    for _ in peer.speak({"input": "Ready when you are.", "voice": "vivian", "max_new_tokens": 30}):
        pass
    server(peer, int(port)).serve_forever()


if __name__ == "__main__":
    main()
