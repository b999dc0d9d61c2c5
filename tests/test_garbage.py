"""The garbage collector: what a serving process spares it, and that hits give it nothing to do."""

from __future__ import annotations

import gc
import subprocess
import sys
from pathlib import Path

from tests.conftest import Server
from tests.speech.caller import Caller

HITS = 50
SERVE = """
import asyncio, gc, uvicorn
from api.src.cli import COLLECT_AFTER, _Server

async def app(scope, receive, send):
    assert scope["type"] == "lifespan"
    await receive()
    await send({"type": "lifespan.startup.complete"})

async def main():
    server = _Server(uvicorn.Config(app, port=0, log_config=None), 1.0)
    server.config.load()
    server.lifespan = server.config.lifespan_class(server.config)
    await server.startup()
    print(gc.get_threshold()[0] == COLLECT_AFTER, gc.get_freeze_count() > 10_000, len(gc.get_objects()) < 10_000)

asyncio.run(main())
"""


def test_a_serving_process_does_not_look_at_what_it_has_loaded() -> None:
    told = subprocess.run(
        [sys.executable, "-c", SERVE], cwd=Path(__file__).parents[1], capture_output=True, text=True, timeout=30
    )
    assert told.stdout == "True True True\n", told.stderr


def test_hits_leave_no_reference_cycles(server: Server) -> None:
    caller = Caller(server.url)
    try:
        for number in range(HITS + 5):
            if number == 5:  # the first one makes the sound, others what is made once
                gc.collect()
                gc.disable()
            caller.received = b""
            caller.ask(input="Hello.")
            assert caller.read_answer()
            assert ("x-cache: hit" in caller.read_head()) == (number > 0)
        assert gc.collect() < HITS // 2
    finally:
        gc.enable()
        caller.hang_up()
