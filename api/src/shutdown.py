"""SIGTERM and SIGINT: first refuse and drain, only then let the web server stop.

uvicorn closes its listening socket at once on a signal, so `/ready` could not tell a load balancer that the
server is leaving. Here the first signal drains; the handler that stood before, uvicorn's own, runs when the
drain has ended, or at the second signal.
"""

from __future__ import annotations

import asyncio
import signal
import threading
from collections.abc import Callable, Coroutine, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any


@contextmanager
def drain_on_signal(drain: Callable[[], Coroutine[Any, Any, None]]) -> Iterator[None]:
    """Within the context, a first SIGTERM or SIGINT runs `drain` before the earlier handler.

    Does nothing outside the main thread, where Python allows no signal handlers.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    loop = asyncio.get_running_loop()
    earlier = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    draining: list[asyncio.Task[None]] = []

    async def drain_then_stop(number: int) -> None:
        try:
            await drain()
        finally:
            stop(number, None)

    def stop(number: int, frame: FrameType | None) -> None:
        handler = earlier[signal.Signals(number)]
        if callable(handler):
            handler(number, frame)

    def begin(number: int) -> None:
        if not draining:
            draining.append(loop.create_task(drain_then_stop(number)))

    def on_signal(number: int, frame: FrameType | None) -> None:
        if draining:
            stop(number, frame)
        else:
            loop.call_soon_threadsafe(begin, number)

    for number in earlier:
        signal.signal(number, on_signal)
    try:
        yield
    finally:
        for number, handler in earlier.items():
            signal.signal(number, handler)
