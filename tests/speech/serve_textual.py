"""`qwen3-tts serve` around a backend that needs no voice: the arguments are, in seconds, its
delay and its sound per segment. SIGUSR1 takes its voice for good."""

from __future__ import annotations

import asyncio
import signal
import sys
from functools import partial

from api.src import cli
from api.src.errors import NeedsNewProcess
from api.src.main import create_app
from tests.speech.textual import TextualBackend


class LosableBackend(TextualBackend):
    async def died(self) -> NeedsNewProcess:
        lost = asyncio.Event()
        asyncio.get_running_loop().add_signal_handler(signal.SIGUSR1, lost.set)
        await lost.wait()
        self.ready = False
        return NeedsNewProcess("The device takes no more work.")


def main() -> int:
    delay_s, seconds = map(float, sys.argv[1:])
    backend = LosableBackend(delay_s=delay_s, seconds_per_segment=seconds)
    cli.create_app = partial(create_app, backend=backend)  # type: ignore[assignment]
    return cli.main(["serve"])


if __name__ == "__main__":
    sys.exit(main())
