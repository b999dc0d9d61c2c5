"""SIGTERM and SIGINT: first refuse and drain, only then let the web server stop.

uvicorn closes its listening socket at once on a signal, so `/ready` could not tell a load balancer that the
server is leaving. Here the first signal drains and the second ends the drain; the handler that stood before,
uvicorn's own, runs when the drain has ended, and at every further signal. A process that is of no more use ends itself
in the same way.
"""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import threading
from collections.abc import Callable, Coroutine, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

SPENT = 75
"""Exit status of a process that only a new one can replace: sysexits.h's EX_TEMPFAIL."""

GRACE_S = 15.0
"""Beyond the drain: for an orderly end, which a broken driver might keep from coming."""

_log = logging.getLogger(__name__)


class EndOfProcess:
    """The process's own wish to end, with the `status` that it is to end with (0 without that wish)."""

    def __init__(self, drain_timeout_s: float) -> None:
        self.status = 0
        self._patience_s = drain_timeout_s + GRACE_S

    def begin(self) -> None:
        """End as at SIGTERM, if need be by force, so that whoever watches over the process starts another one."""
        self.status = SPENT
        _log.critical("the process ends with status %d, to be started anew", SPENT)
        last = threading.Timer(self._patience_s, os._exit, [SPENT])
        last.daemon = True
        last.start()
        signal.raise_signal(signal.SIGTERM)


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
