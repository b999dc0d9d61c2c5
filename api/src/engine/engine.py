"""The engine's one thread: it takes requests from other threads, runs the steps, and hands out the sound.

Owns the thread and its inbox: whatever other threads want is done between two steps. What a step does is steps.py's.
Nothing here knows asyncio; who does, passes deliveries on with `call_soon_threadsafe`.
"""

from __future__ import annotations

import logging
import threading
import time
import traceback
from collections import deque
from collections.abc import Callable
from typing import Any

from .errors import DeviceLost
from .messages import Delivery, EngineStopped, FinishReason, Limits, Request, Stats
from .scheduler import Job
from .steps import Runner, SilentTail, Stepper, silent_tail

_log = logging.getLogger(__name__)

Command = Callable[[Stepper], None]
Deliver = Callable[[Delivery], None]
"""Called from the engine's thread: must be quick and never block. May come before `submit` returns."""


class Ticket:
    """The asker's end of a request. Thread-safe; without effect once the request has ended."""

    def __init__(self, engine: Engine, job: Job) -> None:
        self._engine, self._job, self._closed = engine, job, not job.open

    @property
    def finish_reason(self) -> FinishReason | None:
        """Why it ended, if it has."""
        return self._job.finish_reason

    def append(self, text: Any, frames: int = 0) -> None:
        """More text (what the runner understands), and by how many frames the budget grows for it.

        Raises:
            ValueError: the text is closed.
        """
        if self._closed:
            raise ValueError("the text of this request is closed")
        self._engine._post(lambda steps: steps.append(self._job, text, frames))

    def finish(self) -> None:
        """No more text will come."""
        if not self._closed:
            self._closed = True
            self._engine._post(lambda steps: steps.close_text(self._job))

    def taken(self, frames: int) -> None:
        """The receiver has passed on `frames` more: who does not say so is paused when its outbox is full."""
        self._engine._post(lambda steps: steps.taken(self._job, frames))

    def cancel(self) -> None:
        """End it before the next step. No more sound is delivered, only the end."""
        self._engine._post(lambda steps: steps.finish(self._job, "cancelled"))
        self._job.cancelled = True  # after the post: the thread may count on an end once it sees this


class Engine:
    """Runs a runner. `start` gives it its thread; without one, tests call `step` themselves.

    `silent_tail(samples, frames)` says how many frames at the end of a chunk are silent. `prepare` is called first in
    the thread, and `finish` at its end, when the runner is dropped: whoever still holds a dead engine holds no weights.
    `death`: what ended it, if nobody stopped it.
    """

    def __init__(
        self,
        runner: Runner,
        limits: Limits,
        *,
        clock: Callable[[], float] = time.monotonic,
        silent_tail: SilentTail = silent_tail,
        prepare: Callable[[], object] = lambda: None,
        finish: Callable[[], object] = lambda: None,
    ) -> None:
        self._stepper = Stepper(runner, limits, clock, silent_tail)
        self._clock, self._prepare, self._finish = clock, prepare, finish
        self._inbox: deque[Command] = deque()
        self._changed = threading.Condition()
        self._thread: threading.Thread | None = None
        self._stopping = False
        self._busy = False
        self.death: EngineStopped | DeviceLost | None = None

    # --- for other threads ---

    def start(self, ended: Callable[[], object] = lambda: None) -> None:
        """Start the thread. It can be started once. `ended` is its last act."""
        if self._thread is not None or self._stopping:
            raise EngineStopped("an engine can be started once")
        self._thread = threading.Thread(target=self._live, args=(ended,), name="engine", daemon=True)
        self._thread.start()

    def stop(self, timeout: float | None = None) -> bool:
        """End after the current step; what is not finished ends as "cancelled". Whether that was in time."""
        with self._changed:
            self._stopping = True
            self._changed.notify()
        if self._thread is None:
            self._end_all("cancelled")
        elif self._thread is not threading.current_thread():
            self._thread.join(timeout)
            return not self._thread.is_alive()
        return True

    def submit(self, request: Request, deliver: Deliver) -> Ticket:
        """Ask for speech. `deliver` gets the chunks in order, and exactly one delivery with a finish_reason.

        Raises:
            EngineStopped: nobody would serve it.
        """
        job = Job(request, deliver)
        with self._changed:
            if self._stopping:
                raise EngineStopped("the engine is not running")
            now = self._clock()
            self._stepper.jobs[job] = None
            self._inbox.append(lambda steps: steps.submit(job, now))
            self._changed.notify()
        return Ticket(self, job)

    @property
    def slots(self) -> int:
        """How many requests are spoken at once."""
        return self._stepper.scheduler.limits.slots

    @property
    def running(self) -> bool:
        """Whether requests are served."""
        return self._thread is not None and self._thread.is_alive() and not self._stopping

    def stats(self) -> Stats:
        """Figures of about now."""
        scheduler = self._stepper.scheduler
        slots = list(scheduler.slots.values())
        paused = sum(slot.paused for slot in slots)
        finished = dict(scheduler.finished)
        return Stats(scheduler.waiting, len(slots), paused, scheduler.pace, self._stepper.frames, finished)

    def _post(self, command: Command) -> None:
        with self._changed:
            if not self._stopping:
                self._inbox.append(command)
                self._changed.notify()

    # --- the engine's thread ---

    def _live(self, ended: Callable[[], object]) -> None:
        try:
            self._loop()
        finally:
            try:
                self._finish()
                self._prepare = self._finish = lambda: None
                self._stepper.let_go()
            finally:
                ended()

    def _loop(self) -> None:
        try:
            self._prepare()
            while self._wait():
                self.step()
        except BaseException as error:
            _log.critical("the engine's thread has died", exc_info=True)
            self.death = error if isinstance(error, DeviceLost) else EngineStopped(f"the engine has died: {error!r}")
            _forget_frames(error)
            self._end_all("error", self.death)
        else:
            self._end_all("cancelled")

    def _wait(self) -> bool:
        """Sleep until there is something to do. False: the engine is to stop."""
        with self._changed:
            if not (self._stopping or self._busy or self._inbox):
                at = self._stepper.scheduler.wake_at()
                self._changed.wait(None if at is None else max(0.0, at - self._clock()))
            return not self._stopping

    def step(self) -> bool:
        """What other threads wanted, then a step. Whether there was something to run."""
        for _ in range(len(self._inbox)):
            self._inbox.popleft()(self._stepper)
        self._busy = self._stepper.step()
        return self._busy

    def _end_all(self, reason: FinishReason, error: Exception | None = None) -> None:
        with self._changed:
            self._stopping = True
            self._inbox.clear()
        for job in list(self._stepper.jobs):
            self._stepper.finish(job, reason, error=error)


def _forget_frames(error: BaseException) -> None:
    """What an exception's frames hold, and those of the exceptions behind it: tensors, and whoever owns them."""
    following: BaseException | None = error
    while following is not None:
        traceback.clear_frames(following.__traceback__)
        following.__traceback__ = None
        following = following.__context__
