"""What the tests of this folder ask for, and how they wait for it."""

from __future__ import annotations

import asyncio
import itertools
import os
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from api.src.domain import SpeechRequest
from api.src.speech.generation import Generation
from api.src.speech.service import Qwen3TTSService

StartService = Callable[..., Any]

_numbers = itertools.count()


def speech_request(text: str, **fields: Any) -> SpeechRequest:
    """A request for pcm with an id of its own."""
    request = SpeechRequest(f"req_{next(_numbers)}", "anonymous", "tts-1", text, "alloy", format="pcm")
    return replace(request, **fields)


async def collect(service: Qwen3TTSService, request: SpeechRequest) -> bytes:
    """All bytes of an answer, as generate_speech yields them."""
    return b"".join([chunk.data async for chunk in service.generate_speech(request)])


def wait_until(condition: Callable[[], bool], seconds: float = 30, why: Callable[[], str] = str) -> None:
    """Wait for what other threads do; `why` says what there is instead."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"it did not come to pass: {why()}"
        time.sleep(0.002)


async def eventually(condition: Callable[[], bool], seconds: float = 30) -> None:
    """Wait for what other tasks of the same event loop do."""
    async with asyncio.timeout(seconds):
        while not condition():  # noqa: ASYNC110 (what is waited for tells nobody)
            await asyncio.sleep(0.001)


def stalled(generation: Generation) -> Callable[[], bool]:
    """Whether nothing has moved for a while: in looks, not in seconds, for this process may be stopped itself."""
    seen: list[tuple[int, int]] = [(0, -1)]

    def check() -> bool:
        looks, length = seen[0]
        seen[0] = (looks + 1, length) if generation._length == length else (0, generation._length)
        return looks > 150

    return check


def open_files() -> int:
    """Descriptors of this process, those of its servers and clients included, those of its ledgers not.

    SQLite closes a descriptor of a file only once no other connection of the process has a lock on it.
    """
    return sum("/ledger.db" not in _target(number) for number in os.listdir("/proc/self/fd"))


def _target(descriptor: str) -> str:
    try:
        return os.readlink(f"/proc/self/fd/{descriptor}")
    except OSError:  # of the listing itself
        return ""
