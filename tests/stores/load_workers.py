"""Processes that work on a ledger until they are told to stop, and say a line for each thing done."""

from __future__ import annotations

import asyncio
import subprocess
import sys
import threading
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path

from tests.stores.ledgers import eventually

ROOT = Path(__file__).parents[2]

UNTIL_TOLD = """
import sys, threading
told = threading.Event()
threading.Thread(target=lambda: (sys.stdin.read(), told.set()), daemon=True).start()
"""
"""What a program begins with that works until `told` is set."""


class Worker:
    """A program in a process of its own; `lines` are those that it has said so far."""

    def __init__(self, code: str, *arguments: str) -> None:
        pipe = subprocess.PIPE
        command = [sys.executable, "-c", UNTIL_TOLD + code, *arguments]
        self.process = subprocess.Popen(command, cwd=ROOT, stdin=pipe, stdout=pipe, stderr=pipe, text=True)
        self.lines: list[str] = []
        self.errors = ""
        self._readers = [threading.Thread(target=read, daemon=True) for read in (self._listen, self._note_errors)]
        for reader in self._readers:
            reader.start()

    def kill(self) -> None:
        """Kill -9."""
        self.process.kill()

    async def end(self) -> int:
        """Tell it to stop, and wait for its end; its exit status."""
        assert self.process.stdin is not None
        self.process.stdin.close()
        status = await asyncio.to_thread(self.process.wait)
        for reader in self._readers:
            await asyncio.to_thread(reader.join)
        return status

    def _listen(self) -> None:
        assert self.process.stdout is not None
        with self.process.stdout as said:
            for line in said:
                self.lines.append(line.rstrip("\n"))

    def _note_errors(self) -> None:
        assert self.process.stderr is not None
        with self.process.stderr as said:
            self.errors = said.read()


@asynccontextmanager
async def working(count: int, code: str, *arguments: str) -> AsyncIterator[list[Worker]]:
    """So many, each with its number behind the arguments. At the end those that live must end in peace."""
    workers = [Worker(code, *arguments, str(number)) for number in range(count)]
    try:
        for worker in workers:
            await work_goes_on([worker])
        yield workers
        for worker in workers:
            killed = worker.process.poll() is not None
            assert await worker.end() == 0 or killed, worker.errors
    finally:
        for worker in workers:
            worker.kill()
            await worker.end()


async def work_goes_on(workers: Sequence[Worker], lines: int = 10) -> None:
    """Wait until they have said so many lines more."""

    def said() -> int:
        return sum(len(worker.lines) for worker in workers)

    enough = said() + lines
    await eventually(lambda: said() >= enough or all(worker.process.poll() is not None for worker in workers), 60)
    assert said() >= enough, [worker.errors for worker in workers]
