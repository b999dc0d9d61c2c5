"""`qwen3-tts serve` around a backend that needs no voice: the argument is its delay per segment in seconds."""

from __future__ import annotations

import sys
from functools import partial

from api.src import cli
from api.src.main import create_app
from tests.speech.textual import TextualBackend


def main() -> int:
    cli.create_app = partial(create_app, backend=TextualBackend(delay_s=float(sys.argv[1])))  # type: ignore[assignment]
    return cli.main(["serve"])


if __name__ == "__main__":
    sys.exit(main())
