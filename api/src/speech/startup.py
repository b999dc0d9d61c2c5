"""From a process that answers to a server that speaks: in the background, first the ledger and then the backend.

Owns the order, what is said meanwhile, and that a backend that dies later is started again. Whatever fails is tried
again for ever, also what only somebody's hand can cure: a file that is put right, a disk that is mounted, a database
that is upgraded need no new process then. What is wrong with the settings themselves is found before, by whoever builds
the parts, and ends the process; so does a backend that only a new process can help.
"""

from __future__ import annotations

import asyncio
import logging
import math
import time
from collections.abc import Callable

from ..backends.base import Backend
from ..domain import Readiness
from ..errors import NeedsNewProcess, NotReady, SpeechError
from ..patience import keep_working, until_it_works
from ..stores.ledger import Ledger

SEE_THE_LOG = "The log says why."

_log = logging.getLogger(__name__)


class Startup:
    """Begun once, on an event loop; cancelled when the server is to end. `end_process`: so that another one begins."""

    def __init__(self, ledger: Ledger, backend: Backend, end_process: Callable[[], None]) -> None:
        self._ledger, self._backend, self._end_process = ledger, backend, end_process
        self._ledger_open = self._spoke = False
        self._task: asyncio.Task[None] | None = None
        self._told = asyncio.Event()
        self._trouble = ""
        self._fault = ""
        self._next_try = 0.0

    def begin(self) -> None:
        self._task = asyncio.create_task(self._run(), name="start-up")

    async def first_outcome(self) -> None:
        """Wait until all is started, or for the first failure: raises NotReady, in more words than clients get."""
        await self._told.wait()
        if self._fault:
            raise NotReady(self._fault)

    async def cancel(self) -> None:
        if self._task is not None:
            self._task.cancel()
            await asyncio.wait([self._task])
        if not self._told.is_set():
            self._fault = "The server is shutting down."
            self._told.set()

    def readiness(self) -> Readiness:
        """The backend's own word once the ledger is open; with what went wrong last, until it is ready."""
        if not self._ledger_open:
            return Readiness(False, "ledger", self._trouble or "The ledger is being opened.")
        now = self._backend.readiness()
        if now.ready or not self._trouble:
            return now
        return Readiness(False, now.phase, now.reason or self._trouble)

    @property
    def retry_after(self) -> int:
        """Whole seconds until the next try, at least one."""
        return max(1, math.ceil(self._next_try - time.monotonic()))

    async def _run(self) -> None:
        await until_it_works(self._ledger.start, failed=self._ledger_failed)
        self._ledger_open, self._trouble = True, ""
        try:
            await keep_working(
                self._backend.start, self._backend.died, works=self._backend_works, failed=self._backend_failed
            )
        except NeedsNewProcess as error:
            self._fault = self._trouble = error.message
            self._told.set()
            _log.critical("the %s backend is lost: %s", self._backend.name, error.message)
            self._end_process()

    def _backend_works(self) -> None:
        self._trouble = self._fault = ""
        self._spoke = True
        self._told.set()
        _log.info("ready to speak with the %s backend", self._backend.name)

    def _ledger_failed(self, error: Exception, wait: float) -> None:
        # A database's own words name hosts and users: those are for the log.
        self._note("the ledger", error, wait, public=f"The ledger cannot be opened. {SEE_THE_LOG}")

    def _backend_failed(self, error: Exception, wait: float) -> None:
        reason = error.message if isinstance(error, SpeechError) else f"The backend cannot be started. {SEE_THE_LOG}"
        self._note(f"the {self._backend.name} backend", error, wait, public=reason)

    def _note(self, what: str, error: Exception, wait: float, *, public: str) -> None:
        known = isinstance(error, SpeechError)
        trouble = "does not speak any more" if self._spoke else "cannot be started"
        fault = f"{what} {trouble}: {error if known else type(error).__name__}"
        again = fault == self._fault
        self._fault, self._trouble, self._next_try = fault, public, time.monotonic() + wait
        self._told.set()
        # The same again is no news, and a traceback says what an unknown one is.
        _log.log(
            logging.INFO if again else logging.WARNING if known else logging.ERROR,
            "%s; tried again in %.1f s",
            fault,
            wait,
            exc_info=None if known or again else error,
        )
