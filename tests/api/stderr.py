"""The log as the tests of it read it: JSON lines on standard error."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from typing import Any

StderrLines = Callable[[], list[str]]
"""What the fixture `stderr_lines` gives."""


def records(lines: list[str]) -> list[dict[str, Any]]:
    for line in lines:
        assert line.isascii(), line
        assert line.isprintable(), line
    return [json.loads(line) for line in lines]


def accesses(lines: list[str]) -> list[dict[str, Any]]:
    return [record for record in records(lines) if record["logger"] == "api.access"]


def until(condition: Callable[[], bool]) -> None:
    """A request's line is written after its answer has been sent."""
    deadline = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.005)
