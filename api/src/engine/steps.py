"""One step after the other, in one thread: schedule, run, commit.

Owns the order in which a plan is carried out, what a failure ends, and each job's one end. Decides nothing
(scheduler.py), touches no tensor (the runner), knows no threads (engine.py).

A device works while the host goes on: the whole plan is asked for first, then what comes back is waited for, in the
order in which it comes. Bulk sound, the last of a step, is waited for in the next step, when the device has that step's
frames to make. A frame is asked for when the codes of the one before are known, and not earlier. So the device waits
for the host's schedule between two frames; but a frame asked for ahead would keep everyone who comes waiting for a
frame more, and be made in vain at the end of each speech.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from .errors import EngineError
from .messages import Delivery, FinishReason, Limits, Sound
from .pending import Pending
from .scheduler import Job, Scheduler, Slot, Work

SILENCE_RMS = 1e-3
"""-60 dB of full scale: below this a frame is silent. Pauses of recorded speech have more noise than that."""

SilentTail = Callable[[NDArray[np.float32], int], int]
"""(samples, frames) -> how many frames at the end of them are silent."""

_log = logging.getLogger(__name__)


class Runner(Protocol):
    """What carries out a plan. All calls come from the engine's thread; results are in the order of the slots.

    An exception, of the call or of its result, ends the requests of that call alone (a failed prefill of several is
    tried again one by one). Calls take effect in their order, whether or not anybody has waited for their results.
    """

    def prefill(self, slots: Sequence[Slot]) -> Sequence[int]:
        """Enter each slot with `job.request` and the pieces `job.text`, closed unless `job.open`.

        Returns how many frames the text of each is good for; of no matter if it is closed.
        """
        ...

    def append(self, slot: Slot, text: Any, last: bool) -> int:
        """More text for a slot (None: none), `last` if it ends there. Returns for how many frames more it is good."""
        ...

    def decode(self, slots: Sequence[Slot]) -> Pending[Sequence[int | None]]:
        """Make each slot's next frame: its first code, or None where the speech has ended without a frame."""
        ...

    def codec(self, work: Sequence[Work]) -> Pending[Sequence[Sound]]:
        """The sound of each slot's next n frames, which begin at frame `slot.coded`.

        First chunks come in a call of their own, so that they need not wait behind other work.
        """
        ...

    def release(self, slot: Slot) -> None:
        """Forget the slot, whatever state it is in."""
        ...

    def check(self) -> None:
        """Asked after a call has failed: raises DeviceLost where all later ones would fail too."""
        ...


Commit = Callable[[], None]
"""What is left to do when a result is there; it waits for it."""


class Stepper:
    """Carries out what the scheduler plans. `jobs`: those that have not ended, in the order of their arrival."""

    def __init__(self, runner: Runner, limits: Limits, clock: Callable[[], float], silent_tail: SilentTail) -> None:
        self.scheduler = Scheduler(limits)
        self.jobs: dict[Job, None] = {}
        self.frames = 0
        self._runner: Runner = runner
        self._clock = clock
        self._silent_tail = silent_tail
        self._behind: list[Commit] = []  # of the last step: its bulk

    # --- what requests do ---

    def submit(self, job: Job, now: float) -> None:
        """As Scheduler.submit."""
        if job.finish_reason is None:
            self.scheduler.submit(job, now)

    def append(self, job: Job, text: Any, frames: int) -> None:
        """As Scheduler.append, and on to the runner if the prompt is in."""
        if job.finish_reason is None:
            self.scheduler.append(job, text, frames)
            self._feed(job.slot, text, last=False)

    def close_text(self, job: Job) -> None:
        """No more text comes. A job that never got any is over."""
        job.open = False
        if job.finish_reason is None and job.request.starts_empty and not job.text:
            self.finish(job, "stop")
        self._feed(job.slot, None, last=True)

    def _feed(self, slot: Slot | None, text: Any, last: bool) -> None:
        """Text for a prompt that is in already; for one that waits, it is part of the prefill."""
        if slot is None:
            return
        try:
            self.scheduler.fed(slot, self._runner.append(slot, text, last), self._clock())
        except Exception as error:
            self._fail([slot], error)

    def taken(self, job: Job, frames: int) -> None:
        """As Scheduler.taken."""
        self.scheduler.taken(job, frames)

    def let_go(self) -> None:
        """Drop the runner, and all memory with it, once every job has ended; there is no step after that."""
        assert not self.jobs
        del self._runner
        self._behind = []

    # --- a step ---

    def step(self) -> bool:
        """Schedule, run, commit. Whether there was something to run. Raises DeviceLost."""
        started = self._clock()
        for job in self.scheduler.expired(started):
            self.finish(job, "deadline")
        plan = self.scheduler.schedule(started)
        commits = self._behind + self._codec(plan.first)
        self._prefill(plan.prefill)
        commits += self._codec(plan.urgent) + self._decode(plan.decode)
        self._behind = self._codec(plan.bulk)
        for commit in commits:
            commit()
        if plan.decode:
            self.scheduler.stepped(self._clock() - started)
        return bool(plan or commits)

    def _prefill(self, slots: Sequence[Slot]) -> None:
        if not slots or self._prefilled(slots, alone=len(slots) == 1):
            return
        for slot in slots:  # all of them first, as nobody knows how far it got
            self._release(slot)
        for slot in slots:
            self._prefilled([slot], alone=True)

    def _prefilled(self, slots: Sequence[Slot], alone: bool) -> bool:
        """Whether that is settled: an error is a slot's own only if it is `alone`."""
        try:
            entered = list(zip(slots, self._runner.prefill(slots), strict=True))
        except Exception as error:
            if alone:
                self._fail(slots, error)
            return alone
        for slot, text_rows in entered:
            self.scheduler.fed(slot, text_rows, self._clock())
        return True

    def _decode(self, slots: Sequence[Slot]) -> list[Commit]:
        slots = [slot for slot in slots if slot.runs]
        if not slots:
            return []
        try:
            made = self._runner.decode(slots)
        except Exception as error:
            self._fail(slots, error)
            return []
        return _settled(made, lambda: self._decoded(slots, made))

    def _decoded(self, slots: Sequence[Slot], made: Pending[Sequence[int | None]]) -> None:
        try:
            codes = list(zip(slots, made.get(), strict=True))
        except Exception as error:
            self._fail(slots, error)
            return
        for slot, code in codes:
            if not slot.live or slot.ending is not None:  # sound that came meanwhile has ended it
                continue
            self.scheduler.decoded(slot, code, self._clock())
            self.frames += code is not None
            if slot.done:
                self.finish(slot.job, slot.ending or "stop")

    def _codec(self, work: Sequence[Work]) -> list[Commit]:
        work = [(slot, frames) for slot, frames in work if slot.live]
        if not work:
            return []
        try:
            made = self._runner.codec(work)
        except Exception as error:
            self._fail([slot for slot, _ in work], error)
            return []
        for slot, frames in work:
            self.scheduler.coding(slot, frames)
        return _settled(made, lambda: self._sounded(work, made))

    def _sounded(self, work: Sequence[Work], made: Pending[Sequence[Sound]]) -> None:
        try:
            chunks = list(zip(work, made.get(), strict=True))
            tails = [self._silent_tail(sound.samples, frames) for (_, frames), sound in chunks]
        except Exception as error:
            self._fail([slot for slot, _ in work], error)
            return
        for ((slot, frames), sound), tail in zip(chunks, tails, strict=True):
            if not slot.live or slot.job.cancelled:  # the end of who cancels comes before the next step
                continue
            chunk = Delivery(slot.delivered, frames, sound)
            self.scheduler.sounded(slot, frames, tail, self._clock())
            if slot.done:
                self.finish(slot.job, slot.ending or "stop", chunk)
            else:
                self._deliver(slot.job, chunk)

    # --- ends ---

    def _fail(self, slots: Sequence[Slot], error: Exception) -> None:
        if isinstance(error, EngineError):  # the request's own fault
            _log.warning("a request was refused: %s", error)
        else:
            _log.error("a step failed for %d requests", len(slots), exc_info=error)
            self._runner.check()
        error.with_traceback(None)  # whoever keeps the error shall not keep the step's tensors
        for slot in slots:
            self.finish(slot.job, "error", error=error)

    def finish(
        self, job: Job, reason: FinishReason, last: Delivery | None = None, error: Exception | None = None
    ) -> None:
        """The one end of a job; `last`: the chunk that goes with it."""
        if job.finish_reason is not None:
            return
        self.jobs.pop(job, None)
        slot = self.scheduler.end(job, reason)
        if slot is not None:
            self._release(slot)
        last = last or Delivery(slot.delivered if slot else 0, 0)
        self._deliver(job, replace(last, finish_reason=reason, error=error))

    def _release(self, slot: Slot) -> None:
        try:
            self._runner.release(slot)
        except Exception:
            _log.exception("slot %d could not be released", slot.index)

    def _deliver(self, job: Job, delivery: Delivery) -> None:
        try:
            job.deliver(delivery)
        except Exception as error:
            _log.exception("a receiver failed")
            self.finish(job, "error", error=error)  # no more than a note if this was the end


def _settled(made: Pending[Any], commit: Commit) -> list[Commit]:
    """Nothing, if that can be done at once."""
    if not made.ready():
        return [commit]
    commit()
    return []


def silent_tail(samples: NDArray[np.float32], frames: int) -> int:
    """How many frames at the end of `samples` are below SILENCE_RMS."""
    for silent, frame in enumerate(reversed(np.array_split(samples, frames))):
        if np.sqrt(np.mean(np.square(frame))) >= SILENCE_RMS:
            return silent
    return frames
