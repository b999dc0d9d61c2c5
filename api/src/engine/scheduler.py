"""Who is served when: decisions over slots, without tensors, threads or a clock of its own.

Owns the line of waiting requests, the counters of the slots, the plan of each step, and why a request ends.
Does not own what a slot holds in tensors (the runner), nor threads and delivery (engine.py).
The order of work within a step: first chunks > prefill > codec with little lead > decode > bulk codec.
Times are seconds of the caller's clock; lengths of sound are frames.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from itertools import count
from typing import Any

from .messages import FINISH_REASONS, Delivery, FinishReason, Limits, Request

_PACE_WEIGHT = 0.2
"""Of the newest step in the running mean of what a step takes."""

_SAFETY = 2
"""A chunk is made only if the listener's lead lasts for this many times what its frames take."""

_SLOW_CHUNK_S = 2.0
"""What a chunk may take to make where the engine is slower than sound."""


class Job:
    """One request on its way. `text`: the pieces appended so far; `open`: more may come."""

    def __init__(self, request: Request, deliver: Callable[[Delivery], None]) -> None:
        self.request, self.deliver = request, deliver
        self.text: list[Any] = []
        self.open = request.text_open
        self.max_frames = request.max_frames
        self.number = 0
        self.arrived = 0.0
        self.slot: Slot | None = None
        self.cancelled = False
        self.finish_reason: FinishReason | None = None

    @property
    def deadline(self) -> float:
        """When its first sound is due: only for a request with a deadline_s."""
        return self.arrived + (self.request.deadline_s or 0.0)


class Slot:
    """One job in one place of the arenas, from its prefill on. The runner reads `index`, `job`, `frames_done`, `coded`.

    Of its frames, `coded` were given to the codec, `delivered` came back as sound, and `taken` the listener has.
    """

    def __init__(self, index: int, job: Job, limits: Limits, now: float) -> None:
        self.index, self.job, self._limits = index, job, limits
        self.frames_done = 0
        self.coded = 0
        self.delivered = 0
        self.taken = 0
        self.text_rows: int | None = None
        self.ending: FinishReason | None = None
        self.active_at = now
        self.silent = 0
        self.repetition = Repetition(limits.repeat_period)
        self._chunk = 0
        self._plays_until = now

    @property
    def live(self) -> bool:
        """Whether the job still has this slot."""
        return self.job.slot is self

    @property
    def pending(self) -> int:
        """Frames that wait for the codec."""
        return self.frames_done - self.coded

    @property
    def done(self) -> bool:
        """Whether nothing is left to be made or heard."""
        return self.ending is not None and self.delivered == self.frames_done

    def ends_with(self, frames: int) -> bool:
        """Whether a chunk of the next `frames` is its last."""
        return self.ending is not None and self.pending == frames

    @property
    def paused(self) -> bool:
        """Whether the listener is too far behind."""
        return self.frames_done - self.taken >= self._limits.outbox_frames

    @property
    def starved(self) -> bool:
        """Whether the next frame needs text that has not come. What there is, is known from the prefill on."""
        return self.job.open and self.text_rows is not None and self.frames_done >= self.text_rows

    @property
    def waits(self) -> bool:
        """Whether it can only go on when text comes or its listener takes something."""
        return self.ending is None and (self.starved or self.paused)

    @property
    def runs(self) -> bool:
        """Whether the next frame can be made."""
        return self.live and self.ending is None and not self.waits

    def lead(self, now: float) -> float:
        """Seconds of sound that the listener has ahead; below 0, how long it has had none.

        A player plays on from the moment that a chunk comes, and what has not been taken cannot have been played.
        """
        played = self._plays_until - now
        untaken = (self.delivered - self.taken) * self._limits.frame_s
        return max(played, untaken) if untaken > 0 else played

    def due(self, now: float, pace: float) -> int:
        """Frames for the codec to make now, or 0; `pace`: seconds that a step takes.

        Chunks double while the lead lasts until the next one is there. If the engine is slower than sound, no size
        prevents the gaps, and large ones cost the least.
        """
        if self.coded > self.delivered:  # the chunk before is not there yet
            return 0
        if self.coded == 0:
            return min(1, self.pending)
        longest = self.lead(now) / _SAFETY if pace < self._limits.frame_s else _SLOW_CHUNK_S
        wanted = min(2 * self._chunk, self._limits.chunk_frames)
        while wanted > 1 and wanted * pace > longest:
            wanted //= 2
        frames = min(self.pending, self._limits.chunk_frames)
        if self.ending is not None or frames == 0:
            return frames
        whole: int = 1 << (frames.bit_length() - 1)  # one call of the codec, shared by slots with chunks of one size
        return whole if self.starved or self.pending >= wanted else 0

    def stick(self) -> None:
        """End a run that goes nowhere; what it made last is not worth hearing."""
        self.ending = "stuck"
        self.frames_done = self.coded

    def sounded(self, frames: int, now: float) -> None:
        """A chunk went to the listener."""
        self.delivered += frames
        self._chunk = frames
        self._plays_until = max(self._plays_until, now) + frames * self._limits.frame_s


class Repetition:
    """How long first codes have been going around in a circle of at most `period`."""

    def __init__(self, period: int) -> None:
        self._last: deque[int] = deque(maxlen=period)
        self._runs = [0] * period

    def add(self, code: int) -> int:
        """One frame more; the longest run of codes that equal those of one period before."""
        for period, before in enumerate(reversed(self._last)):
            self._runs[period] = self._runs[period] + 1 if code == before else 0
        self._last.append(code)
        return max(self._runs)


class Line:
    """Jobs in the order of a number that comes with each; equals in the order of their arrival."""

    def __init__(self) -> None:
        self._entries: list[tuple[float, int, Job]] = []

    def __len__(self) -> int:
        return len(self._entries)

    def add(self, at: float, job: Job) -> None:
        """Take a place."""
        insort(self._entries, (at, job.number, job), key=lambda entry: entry[:2])

    def discard(self, at: float, job: Job) -> None:
        """Leave the place, if the job has one."""
        place = bisect_left(self._entries, (at, job.number), key=lambda entry: entry[:2])
        if place < len(self._entries) and self._entries[place][2] is job:
            del self._entries[place]

    def first(self) -> tuple[float, Job] | None:
        """Who stands in front, and the number."""
        return (self._entries[0][0], self._entries[0][2]) if self._entries else None


Work = tuple[Slot, int]
"""A slot, and how many of its next frames the codec shall turn into sound."""


@dataclass(frozen=True)
class Plan:
    """One step, in the order of its work. A slot of `decode` may have stopped running by the time it is its turn."""

    first: list[Work] = field(default_factory=list)
    prefill: list[Slot] = field(default_factory=list)
    urgent: list[Work] = field(default_factory=list)
    decode: list[Slot] = field(default_factory=list)
    bulk: list[Work] = field(default_factory=list)

    def __bool__(self) -> bool:
        return bool(self.first or self.prefill or self.urgent or self.decode or self.bulk)


class Scheduler:
    """A fixed number of slots, and those who wait for one. Not thread-safe."""

    def __init__(self, limits: Limits) -> None:
        self.limits = limits
        self.slots: dict[int, Slot] = {}
        self.finished: dict[FinishReason, int] = dict.fromkeys(FINISH_REASONS, 0)
        self.pace = 0.0
        self._free = list(reversed(range(limits.slots)))
        self._line = Line()
        self._deadlines = Line()
        self._numbers = count()

    # --- what requests do ---

    def submit(self, job: Job, now: float) -> None:
        """Wait for a slot."""
        job.number, job.arrived = next(self._numbers), now
        if job.request.deadline_s is not None:
            self._deadlines.add(job.deadline, job)
        if not job.request.starts_empty:
            self._line.add(self._place(job), job)

    def append(self, job: Job, text: Any, frames: int) -> None:
        """More text, and `frames` more of budget for it."""
        if job.request.starts_empty and not job.text:
            self._line.add(self._place(job), job)
        job.text.append(text)
        job.max_frames += frames

    def taken(self, job: Job, frames: int) -> None:
        """The listener took `frames` more of what was delivered."""
        if job.slot is not None:
            job.slot.taken = min(job.slot.taken + frames, job.slot.delivered)

    def end(self, job: Job, reason: FinishReason) -> Slot | None:
        """Forget the job; the slot that it had is free."""
        job.finish_reason = reason
        self.finished[reason] += 1
        self._line.discard(self._place(job), job)
        self._deadlines.discard(job.deadline, job)
        slot, job.slot = job.slot, None
        if slot is not None:
            del self.slots[slot.index]
            self._free.append(slot.index)
        return slot

    # --- a step ---

    def expired(self, now: float) -> list[Job]:
        """The jobs whose first sound is overdue, and those of slots that have waited for too long."""
        late = []
        while (first := self._deadlines.first()) and first[0] <= now:
            self._deadlines.discard(*first)
            late.append(first[1])
        patience = self.limits.patience_s
        if patience is not None:
            late += [s.job for s in self._waiters() if s.active_at + patience <= now and s.job not in late]
        return late

    def wake_at(self) -> float | None:
        """When `expired` must be asked next; None if there is nothing to wait for."""
        first, patience = self._deadlines.first(), self.limits.patience_s
        times = [first[0]] if first else []
        if patience is not None:
            times += [slot.active_at + patience for slot in self._waiters()]
        return min(times, default=None)

    def schedule(self, now: float) -> Plan:
        """What to do in this step.

        Bulk work waits while a slot is about to make its first frame, until a shrinking lead makes it urgent.
        """
        prefill = self._admit(now)
        first: list[Work] = []
        urgent: list[Work] = []
        bulk: list[Work] = []
        for slot in sorted(self.slots.values(), key=lambda slot: slot.lead(now)):
            if frames := slot.due(now, self.pace):
                into = first if slot.coded == 0 else urgent if self._urgent(slot, now) else bulk
                into.append((slot, frames))
        decode = [slot for slot in self.slots.values() if slot.runs]
        if any(slot.frames_done == 0 for slot in decode):
            bulk = []
        urgent = list(_within(self.limits.codec_frames, urgent))
        bulk = list(_within(self.limits.codec_frames - sum(frames for _, frames in urgent), bulk))
        return Plan(first, prefill, urgent, decode, bulk)

    def fed(self, slot: Slot, text_rows: int, now: float) -> None:
        """A prompt or more text is in; `text_rows`: for how many frames more it is good."""
        slot.text_rows = (slot.text_rows or 0) + text_rows
        slot.active_at = now

    def decoded(self, slot: Slot, code: int | None, now: float) -> None:
        """A frame was made, `code` being its first; None: the speech has ended, and there was no frame."""
        slot.active_at = now
        if code is None:
            slot.ending = "stop"
            return
        slot.frames_done += 1
        if 0 < self.limits.repeat_frames <= slot.repetition.add(code):
            slot.stick()
        elif slot.frames_done >= slot.job.max_frames:
            slot.ending = "length"

    def coding(self, slot: Slot, frames: int) -> None:
        """The codec works on the slot's next `frames`."""
        slot.coded += frames

    def sounded(self, slot: Slot, frames: int, silent_tail: int, now: float) -> None:
        """`frames` went to the listener, of which the last `silent_tail` were silent."""
        if slot.delivered == 0:
            self._deadlines.discard(slot.job.deadline, slot.job)
        slot.active_at = now
        slot.sounded(frames, now)
        slot.silent = slot.silent + frames if silent_tail == frames else silent_tail
        if slot.ending is None and 0 < self.limits.silence_frames <= slot.silent:
            slot.stick()

    def stepped(self, seconds: float) -> None:
        """A step that made frames took `seconds`."""
        self.pace += (seconds - self.pace) * (_PACE_WEIGHT if self.pace else 1.0)

    @property
    def waiting(self) -> int:
        """Requests that could take a slot."""
        return len(self._line)

    def _waiters(self) -> list[Slot]:
        return [slot for slot in self.slots.values() if slot.waits]

    def _place(self, job: Job) -> float:
        """In the line: each level of priority counts as having come `aging_s` later, so that nobody starves."""
        return job.arrived + job.request.priority * self.limits.aging_s

    def _urgent(self, slot: Slot, now: float) -> bool:
        scarce = self.waiting > 0 or len(self._free) < self.limits.slots // 4
        blocks = slot.ending is not None and scarce
        return blocks or slot.lead(now) < self.limits.little_lead_s + self.pace  # bulk may come a step later

    def _admit(self, now: float) -> list[Slot]:
        """Give free slots to those in front, as far as the prompts' bound goes; nobody overtakes."""
        admitted: list[Slot] = []
        left = self.limits.prompt_tokens
        while self._free and (first := self._line.first()):
            job = first[1]
            if admitted and job.request.prompt_tokens > left:
                break
            left -= job.request.prompt_tokens
            self._line.discard(*first)
            job.slot = Slot(self._free.pop(), job, self.limits, now)
            self.slots[job.slot.index] = job.slot
            admitted.append(job.slot)
        return admitted


def _within(budget: int, work: Iterable[Work]) -> Iterable[Work]:
    """As much of the work, from the front, as the budget of frames allows."""
    for slot, frames in work:
        frames = min(frames, budget)
        if frames > 0:
            yield slot, frames
            budget -= frames
