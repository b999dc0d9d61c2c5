"""Trying again, for ever, what does not work yet, or no more. Owns the pauses alone: what is tried is others'."""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Awaitable, Callable
from typing import NoReturn

from .errors import NeedsNewProcess

FIRST_PAUSE_S, LONGEST_PAUSE_S = 1.0, 60.0
"""Between two tries: doubled from the first to the longest, less up to half of it by chance, so that those who failed
together do not come back together."""

Failed = Callable[[Exception, float], None]
"""Gets what went wrong, and the seconds until the next try."""


class Pauses:
    """One after the other."""

    def __init__(self) -> None:
        self._longest = FIRST_PAUSE_S

    def next(self) -> float:
        """Seconds."""
        longest, self._longest = self._longest, min(2 * self._longest, LONGEST_PAUSE_S)
        return longest * random.uniform(0.5, 1.0)


async def until_it_works(work: Callable[[], Awaitable[None]], *, failed: Failed) -> None:
    """Run `work` until it ends without an exception.

    Nothing of a failure is kept: its traceback might hold on to gigabytes.
    """
    pauses = Pauses()
    while True:
        wait = pauses.next()
        try:
            await work()
        except Exception as error:
            failed(error, wait)
        else:
            return
        await asyncio.sleep(wait)


async def keep_working(
    start: Callable[[], Awaitable[None]],
    died: Callable[[], Awaitable[Exception]],
    *,
    works: Callable[[], None],
    failed: Failed,
    running: bool = False,
) -> NoReturn:
    """Start, and start again after each failure and each death; `running`: the first start has been.

    `died` answers when what was started has ended by itself. Pauses grow on over lives shorter than the longest one.
    Raises:
        NeedsNewProcess: it is in vain to go on.
    """
    pauses = Pauses()
    while True:
        try:
            if not running:
                await start()
        except NeedsNewProcess:
            raise
        except Exception as error:
            failed(error, wait := pauses.next())
        else:
            works()
            began = time.monotonic()
            death = await died()
            if isinstance(death, NeedsNewProcess):
                raise death
            if time.monotonic() - began > LONGEST_PAUSE_S:
                pauses = Pauses()
            failed(death, wait := pauses.next())
        running = False
        await asyncio.sleep(wait)
