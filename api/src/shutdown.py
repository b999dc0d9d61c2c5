"""SIGTERM and SIGINT: first refuse and drain, only then let the web server stop.

uvicorn closes its listening socket at once on a signal, so `/ready` could not tell a load balancer that the
server is leaving. Here the first signal drains and the second ends the drain; the handler that stood before,
uvicorn's own, runs when the drain has ended, and at every further signal.
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

    def stop(number: int) -> None:
        handler = earlier[signal.Signals(number)]
        if callable(handler):
            handler(number, None)

    def act(number: int) -> None:
        if not draining:
            draining.append(loop.create_task(drain()))
            draining[0].add_done_callback(lambda _: stop(number))
        elif not draining[0].done():
            draining[0].cancel()
        else:
            stop(number)

    def on_signal(number: int, frame: FrameType | None) -> None:
        loop.call_soon_threadsafe(act, number)

    for number in earlier:
        signal.signal(number, on_signal)
    try:
        yield
    finally:
        for number, handler in earlier.items():
            signal.signal(number, handler)
