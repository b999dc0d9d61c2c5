"""A runner without tensors that holds the engine to its contract, and a clock that tests move."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from api.src.engine.engine import Engine, Ticket
from api.src.engine.errors import DeviceLost
from api.src.engine.messages import Delivery, Limits, Request, Sound
from api.src.engine.pending import Made, Pending
from api.src.engine.scheduler import Slot, Work

SAMPLES = 4
"""Per frame; each sample of a frame is the frame's index + 1, so that order and gaps can be heard."""


class FakeClock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


@dataclass(eq=False)
class Script:
    """What the fake model does with a prompt: how many frames it speaks (None: for ever), and where it fails."""

    frames: int | None = 5
    code: Callable[[int], int] = lambda frame: frame
    loud: Callable[[int], bool] = lambda frame: True
    text_rows: int = 0
    fails: set[str] = field(default_factory=set)


class Entered:
    """What the fake arenas hold for a slot."""

    def __init__(self, slot: Slot) -> None:
        self.slot, self.script = slot, slot.job.request.prompt
        self.made = self.sounded = 0
        self.closed = not slot.job.open
        self.rows = self.script.text_rows + sum(len(piece) for piece in slot.job.text)


class Later:
    """A device's result. It is never ready before somebody waits for it; a planted failure shows only then."""

    def __init__(self, value: Any, fails: bool) -> None:
        self._value, self._fails, self._taken = value, fails, False

    def ready(self) -> bool:
        return False

    def get(self) -> Any:
        assert not self._taken, "a result was taken twice"
        self._taken = True
        if self._fails:
            raise RuntimeError("planted in a result")
        return self._value


class FakeRunner:
    """Asserts what a real runner relies on. `costs`: seconds of the clock per call and per unit of each operation.

    `later`: results come as from a device.
    """

    def __init__(self, limits: Limits, clock: FakeClock | None = None, *, later: bool = False, **costs: float) -> None:
        self.later = later
        self.lost = False
        self.limits, self.clock, self.costs = limits, clock, costs
        self.entered: dict[int, Entered] = {}
        self.calls: list[tuple[str, Any]] = []
        self.violations: list[str] = []

    def prefill(self, slots: Sequence[Slot]) -> list[int]:
        self._note("prefill", [slot.index for slot in slots], len(slots))
        tokens = sum(slot.job.request.prompt_tokens for slot in slots)
        self._expect(tokens <= self.limits.prompt_tokens or len(slots) == 1, "prompt budget")
        self._expect(not self._due_first(), "a first chunk waited behind a prefill")
        for slot in slots:
            self._expect(slot.index not in self.entered and 0 <= slot.index < self.limits.slots, "slot used twice")
            self.entered[slot.index] = Entered(slot)
        self._maybe_fail("prefill", slots)
        return [self.entered[slot.index].rows for slot in slots]

    def append(self, slot: Slot, text: Any, last: bool) -> int:
        self._note("append", slot.index, 1)
        entered = self._of(slot)
        self._expect(not entered.closed, "text after its end")
        entered.closed = last
        rows = len(text or ()) + last
        entered.rows += rows
        self._maybe_fail("append", [slot])
        return rows

    def decode(self, slots: Sequence[Slot]) -> Pending[list[int | None]]:
        self._note("decode", [slot.index for slot in slots], len(slots))
        self._expect(len({slot.index for slot in slots}) == len(slots), "a slot twice in a decode")
        self._maybe_fail("decode", slots)
        return self._result([self._frame(self._of(slot)) for slot in slots], slots)

    def codec(self, work: Sequence[Work]) -> Pending[list[Sound]]:
        self._note("codec", [(slot.index, frames) for slot, frames in work], sum(frames for _, frames in work))
        if any(self._of(slot).sounded for slot, _ in work):
            self._expect(not self._due_first(), "a first chunk waited behind other codec work")
        self._maybe_fail("codec", [slot for slot, _ in work])
        return self._result([self._sound(self._of(slot), frames) for slot, frames in work], [slot for slot, _ in work])

    def _result(self, value: Any, slots: Sequence[Slot]) -> Pending[Any]:
        fails = any("result" in slot.job.request.prompt.fails for slot in slots)
        return Later(value, fails) if self.later or fails else Made(value)

    def release(self, slot: Slot) -> None:
        self._expect(self.entered.pop(slot.index, None) is not None, "released twice")
        self._maybe_fail("release", [slot])

    def check(self) -> None:
        if self.lost:
            raise DeviceLost("planted")

    def _frame(self, entered: Entered) -> int | None:
        self._expect(entered.closed or entered.made < entered.rows, "ran ahead of the text")
        if entered.made == entered.script.frames:
            return None
        entered.made += 1
        return entered.script.code(entered.made - 1)

    def _sound(self, entered: Entered, frames: int) -> Sound:
        first = entered.sounded
        self._expect(first == entered.slot.coded, "the scheduler and the codec disagree")
        self._expect(0 < frames <= self.limits.chunk_frames and first + frames <= entered.made, "a chunk too long")
        entered.sounded += frames
        numbers = [i + 1 if entered.script.loud(i) else 0 for i in range(first, first + frames)]
        return Sound(np.repeat(np.array(numbers, np.float32), SAMPLES))

    def _due_first(self) -> bool:
        return any(e.made > 0 and e.sounded == 0 and not e.slot.job.cancelled for e in self.entered.values())

    def _of(self, slot: Slot) -> Entered:
        entered = self.entered.get(slot.index)
        self._expect(entered is not None and entered.slot is slot, "a slot that the request does not have")
        return entered

    def _note(self, name: str, what: Any, units: int) -> None:
        self.calls.append((name, what))
        if self.clock:
            self.clock.now += self.costs.get("call", 0.0) + self.costs.get(name, 0.0) * units

    def _expect(self, condition: bool, law: str) -> None:
        if not condition:  # kept too, as the engine catches what a runner raises
            self.violations.append(law)
            raise AssertionError(law)

    def _maybe_fail(self, name: str, slots: Sequence[Slot]) -> None:
        for slot in slots:
            if name in slot.job.request.prompt.fails:
                raise RuntimeError(f"planted in {name}")


class Listener:
    """A receiver that checks the order of what it gets. `takes`: acknowledge at once."""

    def __init__(self, takes: bool = True) -> None:
        self.takes = takes
        self.ticket: Ticket | None = None
        self.got: list[Delivery] = []
        self.frames = self.taken = 0
        self.raises = False

    def __call__(self, delivery: Delivery) -> None:
        assert not self.finished, "a delivery after the end"
        self.got.append(delivery)
        if self.raises:
            raise RuntimeError("planted in a receiver")
        assert delivery.first_frame == self.frames, "a gap"
        heard = [] if delivery.sound is None else delivery.sound.samples[::SAMPLES]
        assert len(heard) == delivery.frames
        assert all(x in (0, self.frames + i + 1) for i, x in enumerate(heard)), "another frame's sound"
        self.frames += delivery.frames
        if self.takes and delivery.frames:
            self.take(delivery.frames)

    @property
    def finished(self) -> bool:
        return bool(self.got) and self.got[-1].finish_reason is not None

    @property
    def reason(self) -> str | None:
        return self.got[-1].finish_reason if self.got else None

    @property
    def chunks(self) -> list[int]:
        return [delivery.frames for delivery in self.got if delivery.frames]

    def take(self, frames: int) -> None:
        self.taken += frames
        if self.ticket:
            self.ticket.taken(frames)


class House:
    """An engine without its thread, on a fake runner and a fake clock."""

    def __init__(self, costs: dict[str, float] | None = None, *, later: bool = False, **limits: Any) -> None:
        self.clock = FakeClock()
        self.limits = Limits(**({"slots": 2} | limits))
        self.runner = FakeRunner(self.limits, self.clock, later=later, **(costs or {"call": 0.001}))
        self.engine = Engine(self.runner, self.limits, clock=self.clock)

    @property
    def scheduler(self) -> Any:
        return self.engine._stepper.scheduler

    def ask(self, script: Script | None = None, *, takes: bool = True, **request: Any) -> Listener:
        listener = Listener(takes)
        asked = {"prompt": script or Script(), "prompt_tokens": 10, "max_frames": 100} | request
        listener.ticket = self.engine.submit(Request(**asked), listener)
        return listener

    def run(self, most: int = 2000) -> int:
        """Step until there is nothing to do; returns the number of steps."""
        for steps in range(most):
            if not self.engine.step() and not self.engine._inbox:
                return steps
        raise AssertionError(f"still busy after {most} steps")

    def step(self) -> list[tuple[str, Any]]:
        """One step's calls."""
        self.runner.calls.clear()
        self.engine.step()
        return list(self.runner.calls)

    def check_empty(self) -> None:
        scheduler = self.scheduler
        assert not self.runner.violations
        assert not self.runner.entered
        assert not scheduler.slots
        assert not self.engine._stepper.jobs
        assert len(scheduler._line) == len(scheduler._deadlines) == 0
        assert sorted(scheduler._free) == list(range(self.limits.slots))
