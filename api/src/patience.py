"""Trying again, for ever, what does not work yet. Owns the pauses alone: what is tried is others'."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Awaitable, Callable

FIRST_PAUSE_S, LONGEST_PAUSE_S = 1.0, 60.0
"""Between two tries: doubled from the first to the longest, less up to half of it by chance, so that those who failed
together do not come back together."""


async def until_it_works(work: Callable[[], Awaitable[None]], *, failed: Callable[[Exception, float], None]) -> None:
    """Run `work` until it ends without an exception; `failed` gets each one, and the seconds until the next try.

    Nothing of a failure is kept: its traceback might hold on to gigabytes.
    """
    pause = FIRST_PAUSE_S
    while True:
        wait = pause * random.uniform(0.5, 1.0)
        try:
            await work()
        except Exception as error:
            failed(error, wait)
        else:
            return
        await asyncio.sleep(wait)
        pause = min(2 * pause, LONGEST_PAUSE_S)
