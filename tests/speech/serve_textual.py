"""`qwen3-tts serve` around a backend that needs no voice: the arguments are, in seconds, its delay and its sound per
segment, and if need be a file that says how many segments of each run it may speak (while there is none: all). SIGUSR1
takes its voice for good."""

from __future__ import annotations

import asyncio
import math
import signal
import sys
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from api.src import cli
from api.src.errors import NeedsNewProcess
from api.src.main import create_app
from tests.speech.textual import TextualBackend


@dataclass
class Held(TextualBackend):
    """Is told by a file how far it may go, and by a signal to speak no more."""

    gate: Path | None = None

    async def turn(self, number: int) -> None:
        await super().turn(number)
        while number > self._allowed():  # noqa: ASYNC110 (another process writes it)
            await asyncio.sleep(0.01)

    async def died(self) -> NeedsNewProcess:
        lost = asyncio.Event()
        asyncio.get_running_loop().add_signal_handler(signal.SIGUSR1, lost.set)
        await lost.wait()
        self.ready = False
        return NeedsNewProcess("The device takes no more work.")

    def _allowed(self) -> float:
        if self.gate is None:
            return math.inf
        try:
            return int(self.gate.read_text() or 0)  # it may just be written
        except FileNotFoundError:
            return math.inf


def main() -> int:
    delay_s, seconds, *gate = sys.argv[1:]
    backend = Held(float(delay_s), seconds_per_segment=float(seconds), gate=Path(gate[0]) if gate else None)
    cli.create_app = partial(create_app, backend=backend)  # type: ignore[assignment]
    return cli.main(["serve"])


if __name__ == "__main__":
    sys.exit(main())
