"""`qwen3-tts serve` around a backend that needs no voice: the arguments are, in seconds, its
delay and its sound per segment."""

from __future__ import annotations

import sys
from functools import partial

from api.src import cli
from api.src.main import create_app
from tests.speech.textual import TextualBackend


def main() -> int:
    delay_s, seconds = map(float, sys.argv[1:])
    backend = TextualBackend(delay_s=delay_s, seconds_per_segment=seconds)
    cli.create_app = partial(create_app, backend=backend)  # type: ignore[assignment]
    return cli.main(["serve"])


if __name__ == "__main__":
    sys.exit(main())
