"""For tests that measure times, or are impatient on purpose: a machine that stands still for a moment says nothing."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any, TypeVar

TRIES = 6
_Test = TypeVar("_Test", bound=Callable[..., Any])


def tried_again(*errors: type[Exception]) -> Callable[[_Test], _Test]:
    """Let a test fail with one of these only if it does so `TRIES` times in a row, as where something is broken.

    Not for what may go wrong now and then by itself: that would hide it.
    """

    def decorate(test: _Test) -> _Test:
        @functools.wraps(test)
        async def later(*arguments: Any, **fixtures: Any) -> None:
            for _ in range(TRIES - 1):
                try:
                    return await test(*arguments, **fixtures)
                except errors as error:
                    print(f"tried again: {error!r}")
            return await test(*arguments, **fixtures)

        @functools.wraps(test)
        def at_once(*arguments: Any, **fixtures: Any) -> None:
            for _ in range(TRIES - 1):
                try:
                    return test(*arguments, **fixtures)
                except errors as error:
                    print(f"tried again: {error!r}")
            return test(*arguments, **fixtures)

        return later if inspect.iscoroutinefunction(test) else at_once  # type: ignore[return-value]

    return decorate


measured_again = tried_again(AssertionError)
"""For times and rates."""
