"""Slow and dead readers over the connections that `qwen3-tts serve` accepts."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.speech.asking import wait_until
from tests.speech.caller import Caller
from tests.speech.launching import Process
from tests.speech.textual import sentences

TEXT = sentences(50)
SMALL_BUFFER = 8192


def served(caller: Caller) -> bool:
    """Whether the kernel still holds the server's end of the caller's connection."""
    port = caller.socket.getsockname()[1]
    rows = [line.split() for line in Path("/proc/net/tcp").read_text().splitlines()[1:]]
    return any(int(remote.rpartition(":")[2], 16) == port for _, _, remote, *_ in rows)


@pytest.mark.slow
def test_a_connection_that_idles_outlives_its_client_s_patience(launch: Callable[..., Process]) -> None:
    """httpx, and so the openai package, lets go of one after 5 s: until then nobody else may have."""
    process = launch(0.0)
    with Caller(process.url) as client:
        for pause in (6.0, 0.0):
            client.socket.sendall(b"GET /healthz HTTP/1.1\r\nHost: test\r\n\r\n")
            client.received = b""
            assert "200 ok" in client.read_head()
            time.sleep(pause)


@pytest.mark.skipif(not Path("/proc/net/tcp").exists(), reason="looks into /proc/net/tcp")
def test_a_connection_that_nobody_reads_goes_away(launch: Callable[..., Process]) -> None:
    process = launch(0.0, stall_timeout_s=1, segment_seconds=5)
    with Caller(process.url, receive_buffer=SMALL_BUFFER) as dead:
        wait_until(lambda: served(dead))
        dead.ask(input=TEXT, response_format="pcm")
        dead.read_head()
        wait_until(lambda: not served(dead))


@pytest.mark.slow
def test_a_slow_reader_is_not_cut(launch: Callable[..., Process]) -> None:
    """At some 130 kB/s a kernel that buffers by the megabyte would show no progress for seconds."""
    process = launch(0.0, stall_timeout_s=6, segment_seconds=5)
    with Caller(process.url, receive_buffer=SMALL_BUFFER) as slow:
        slow.ask(input=TEXT, response_format="pcm", no_store=True)
        until = time.monotonic() + 12
        while time.monotonic() < until:
            assert slow.socket.recv(4096)
            time.sleep(0.03)
    assert "response cut: TimeoutError" not in "".join(process.log)
