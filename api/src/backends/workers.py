"""A pool of worker processes that speak the protocol of `wire`.

Owns the processes: starting, handing out, timing out, replacing and ending them. It does not know what they do.
A worker's program sends {"ready": true} once it can work, then answers each message with one message, and ends
when its standard input closes.
"""

from __future__ import annotations

import asyncio
import logging
import os
import sys
import time
from collections import deque
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path

from ..errors import NotReady, ShuttingDown, SpeechError, SynthesisFailed
from ..observe import detail
from . import wire

logger = logging.getLogger(__name__)

ATTEMPTS = 2
"""Workers that a job may crash before it is given up."""

GRACE_S = 1.0
"""How long a worker may take to end by itself once its input is closed."""

STDERR_TAIL = 2000
"""Bytes of a worker's last words that are kept for the log."""

# asyncio stops reading a pipe beyond its limit, and then never notices that the process has ended.
_UNBOUNDED = 2**30


def python_module(name: str, *arguments: str) -> tuple[list[str], dict[str, str]]:
    """The command that runs a module of this project in a process of its own, and what its environment needs."""
    # It finds what the server finds, wherever the server was started.
    path = os.pathsep.join([str(Path(__file__).parents[3]), *filter(None, sys.path)])
    return [sys.executable, "-P", "-m", name, *arguments], {"PYTHONPATH": path}


class WorkerDied(Exception):
    """The process ended, or its pipe broke, in the middle of a job."""


class Worker:
    """One process and its pipes."""

    def __init__(self, process: asyncio.subprocess.Process) -> None:
        assert process.stdin is not None
        assert process.stdout is not None
        assert process.stderr is not None
        self.pid = process.pid
        self.stderr_tail = b""
        self._process = process
        self._stdin, self._stdout = process.stdin, process.stdout
        self._busy = False
        self._draining = asyncio.create_task(self._drain(process.stderr))

    @classmethod
    async def spawn(cls, command: Sequence[str], environment: Mapping[str, str]) -> Worker:
        pipe = asyncio.subprocess.PIPE
        process = await asyncio.create_subprocess_exec(
            *command, stdin=pipe, stdout=pipe, stderr=pipe, limit=_UNBOUNDED, env={**os.environ, **environment}
        )
        return cls(process)

    @property
    def usable(self) -> bool:
        """Alive and not in the middle of a job."""
        return not self._busy and self._process.returncode is None and not self._stdout.at_eof()

    async def ask(self, header: Mapping[str, object]) -> wire.Message:
        """Send one job and wait for its answer; raises WorkerDied. Left early, the worker is unusable."""
        self._busy = True
        try:
            self._stdin.write(wire.pack(header))
            await self._stdin.drain()
        except ConnectionError as error:
            raise WorkerDied from error
        return await self.receive()

    async def receive(self) -> wire.Message:
        """Wait for the next message; raises WorkerDied."""
        self._busy = True
        try:
            header_length, payload_length = wire.LENGTHS.unpack(await self._stdout.readexactly(wire.LENGTHS.size))
            header = await self._stdout.readexactly(header_length)
            message = wire.unpack(header, await self._stdout.readexactly(payload_length))
        except (asyncio.IncompleteReadError, ConnectionError, ValueError) as error:
            raise WorkerDied from error
        self._busy = False
        return message

    def kill(self) -> None:
        with suppress(ProcessLookupError):
            self._process.kill()

    async def wait(self) -> int:
        return await self._process.wait()

    async def end(self) -> None:
        """Close the input, wait, kill if need be; afterwards nothing of the process is left."""
        self._stdin.close()
        try:
            async with asyncio.timeout(GRACE_S):
                await self._process.wait()
        except TimeoutError:
            self.kill()
            await self._process.wait()
        # Not awaited itself: a cancelled caller would cancel it, and the next one would be cancelled by it.
        await asyncio.wait([self._draining])

    async def _drain(self, stderr: asyncio.StreamReader) -> None:
        while block := await stderr.read(4096):
            self.stderr_tail = (self.stderr_tail + block)[-STDERR_TAIL:]


class WorkerPool:
    """`size` processes of one program, kept alive at a bounded rate of restarts.

    `command` is the program with its arguments; `environment` is added to the server's own. A job may take
    `timeout_s`; a worker may take `boot_timeout_s` to get ready. A worker that lived for less than `settled_s`
    is replaced after a delay that doubles with each such death, from `delay_s` up to `settled_s`.
    """

    FAILING_AFTER = 3
    """Early deaths in a row, of every worker, after which waiting is pointless."""

    def __init__(
        self,
        name: str,
        command: Sequence[str],
        size: int,
        *,
        environment: Mapping[str, str] | None = None,
        timeout_s: float = 60.0,
        boot_timeout_s: float = 60.0,
        settled_s: float = 10.0,
        delay_s: float = 0.1,
    ) -> None:
        self.name = name
        self.restarts = 0
        self._command = command
        self._environment = environment or {}
        self._timeout_s, self._boot_timeout_s = timeout_s, boot_timeout_s
        self._settled_s, self._delay_s = settled_s, delay_s
        self._early_deaths = [0] * size
        self._alive: set[Worker] = set()
        self._workers: dict[int, Worker] = {}
        self._idle: deque[Worker] = deque()
        self._waiting: deque[asyncio.Future[Worker]] = deque()
        self._keepers: list[asyncio.Task[None]] = []
        self._jobs: set[asyncio.Task[wire.Message]] = set()
        self._stopped = False

    @property
    def pids(self) -> list[int]:
        """The processes that are ready."""
        return [worker.pid for worker in self._workers.values()]

    @property
    def failing(self) -> bool:
        """No worker is ready and all of them keep ending early."""
        return not self._workers and all(n >= self.FAILING_AFTER for n in self._early_deaths)

    async def start(self) -> None:
        """Start the workers and wait until one is ready; raises NotReady when they keep ending."""
        self._keepers = [asyncio.create_task(self._keep(slot)) for slot in range(len(self._early_deaths))]
        self._release(await self._acquire())

    async def stop(self) -> None:
        """End every process; jobs, running and waiting, fail."""
        self._stopped = True
        self._fail_waiting(ShuttingDown("The server is shutting down."))
        for keeper in self._keepers:
            keeper.cancel()
        await asyncio.gather(*self._keepers, return_exceptions=True)
        await asyncio.gather(*(worker.end() for worker in self._alive))
        await asyncio.gather(*self._jobs, return_exceptions=True)

    async def run(self, header: Mapping[str, object]) -> wire.Message:
        """Give a job to a worker and return its answer.

        A cancelled wait leaves the queue at once. A running job that is cancelled is finished by its worker,
        which then takes the next one. Raises SynthesisFailed (also on an answer with "error"), NotReady,
        ShuttingDown.
        """
        for _ in range(ATTEMPTS):
            worker = await self._acquire()
            job = asyncio.create_task(self._serve(worker, header))
            self._jobs.add(job)
            job.add_done_callback(self._forget)
            with suppress(WorkerDied):
                return await asyncio.shield(job)
        raise SynthesisFailed("The voice failed on this text.")

    async def _serve(self, worker: Worker, header: Mapping[str, object]) -> wire.Message:
        began = time.monotonic()
        detail(logger, "job given to a worker", pool=self.name, pid=worker.pid)
        try:
            async with asyncio.timeout(self._timeout_s):
                answer = await worker.ask(header)
        except TimeoutError:
            logger.warning("worker %s of %s hung and is replaced", worker.pid, self.name)
            raise SynthesisFailed("Speaking this text took too long.") from None
        finally:
            self._release(worker)
        detail(logger, "job answered", pid=worker.pid, ms=round((time.monotonic() - began) * 1000, 1))
        if "error" in answer.header:
            logger.warning("%s failed: %r", self.name, answer.header["error"])
            raise SynthesisFailed("The voice failed on this text.")
        return answer

    def _forget(self, job: asyncio.Task[wire.Message]) -> None:
        self._jobs.discard(job)
        if not job.cancelled():
            job.exception()  # marks it as seen: the caller may have left

    async def _acquire(self) -> Worker:
        if self._stopped:
            raise ShuttingDown("The server is shutting down.")
        while self._idle:
            worker = self._idle.popleft()
            if worker.usable:
                return worker
        if self.failing:
            raise self._not_ready()
        place: asyncio.Future[Worker] = asyncio.get_running_loop().create_future()
        self._waiting.append(place)
        try:
            return await place
        except asyncio.CancelledError:
            if place in self._waiting:
                self._waiting.remove(place)
            elif not place.cancelled() and place.exception() is None:
                self._release(place.result())  # it came in the same moment
            raise

    def _release(self, worker: Worker) -> None:
        if not worker.usable:
            worker.kill()
            return
        while self._waiting:
            place = self._waiting.popleft()
            if not place.done():
                place.set_result(worker)
                return
        self._idle.append(worker)

    def _fail_waiting(self, error: SpeechError) -> None:
        while self._waiting:
            place = self._waiting.popleft()
            if not place.done():
                place.set_exception(error)

    def _not_ready(self) -> NotReady:
        return NotReady("The voice cannot be started at the moment.", retry_after=int(self._settled_s) + 1)

    async def _keep(self, slot: int) -> None:
        while True:
            lived_s = await self._live(slot)
            early = lived_s < self._settled_s
            self._early_deaths[slot] = self._early_deaths[slot] + 1 if early else 0
            self.restarts += 1
            if self.failing:
                self._fail_waiting(self._not_ready())
            if early:
                delay_s = self._delay_s * 2 ** (self._early_deaths[slot] - 1)
                await asyncio.sleep(min(delay_s, self._settled_s))

    async def _live(self, slot: int) -> float:
        """One worker's life; how long it was ready, in seconds."""
        try:
            worker = await Worker.spawn(self._command, self._environment)
        except OSError as error:
            logger.warning("a worker of %s could not be started: %s", self.name, error)
            return 0.0
        self._alive.add(worker)
        lived_s = await self._serve_until_death(slot, worker)
        await worker.end()
        self._alive.discard(worker)
        last_words = worker.stderr_tail.decode(errors="replace")
        logger.warning("worker %s of %s ended (%s): %r", worker.pid, self.name, await worker.wait(), last_words)
        return lived_s

    async def _serve_until_death(self, slot: int, worker: Worker) -> float:
        try:
            async with asyncio.timeout(self._boot_timeout_s):
                await worker.receive()
        except (TimeoutError, WorkerDied):
            return 0.0
        began = time.monotonic()
        self._workers[slot] = worker
        try:
            self._release(worker)
            await worker.wait()
        finally:
            del self._workers[slot]
        return time.monotonic() - began
