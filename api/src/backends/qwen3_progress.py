"""How far the weights of a checkpoint have come, for whoever watches the server start.

Owns a bar on a terminal, and lines in the log elsewhere. What is counted is the engine's (forms.Progress).
"""

from __future__ import annotations

import logging
import sys
import time
from types import TracebackType
from typing import Self

from tqdm import tqdm

SHOWN_AFTER_S = 1.0
"""What is over sooner needs no bar."""
LINE_EVERY_S = 10.0

logger = logging.getLogger(__name__)


class WeightsProgress:
    """Counts weights as they get their form; used in the thread that loads. Leaving the context removes the bar."""

    def __init__(self, name: str) -> None:
        self._name = name
        self._bar = tqdm(
            desc=f"weights of {name}",
            unit="weight",
            delay=SHOWN_AFTER_S,
            leave=False,
            disable=not sys.stderr.isatty(),  # a log is no place for a bar
        )
        self._said = time.monotonic()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bar.close()

    def __call__(self, done: int, total: int) -> None:
        """`done` of `total` weights have their form."""
        self._bar.total = total
        self._bar.update(done - self._bar.n)
        if self._bar.disable and time.monotonic() > self._said + LINE_EVERY_S:
            self._said = time.monotonic()
            logger.info("%s: %d of %d weights are ready", self._name, done, total)
