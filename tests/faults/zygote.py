"""A process that has imported the server and forks one at a word: a killed server is back within milliseconds.

Reads lines of JSON from standard input, each the environment of a server, and answers with its process id. Servers
speak as serve_textual.py does. Ends, with all of its servers, when its input closes.
"""

from __future__ import annotations

import json
import os
import signal
import sys
from functools import partial

from api.src import cli
from api.src.main import create_app
from tests.speech.textual import TextualBackend

DELAY_S = 0.01
SEGMENT_S = 0.1


def main() -> None:
    """Fork until the input ends."""
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody waits for the dead
    children: list[int] = []
    for line in sys.stdin:
        child = os.fork()
        if child == 0:
            _serve(json.loads(line))
        children.append(child)
        print(child, flush=True)
    for child in children:
        try:
            os.kill(child, signal.SIGKILL)
        except ProcessLookupError:
            continue


def _serve(environment: dict[str, str]) -> None:
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    os.environ.update(environment)
    os.dup2(os.open(environment["LOG"], os.O_WRONLY | os.O_CREAT | os.O_APPEND), sys.stderr.fileno())
    backend = TextualBackend(delay_s=DELAY_S, seconds_per_segment=SEGMENT_S)
    cli.create_app = partial(create_app, backend=backend)  # type: ignore[assignment]
    os._exit(cli.main(["serve"]))


if __name__ == "__main__":
    main()
