"""Laws of the scheduler under anything that may happen, and a long soak that must leave nothing.

The fake runner asserts what holds in every call: no slot used twice, sound in order, first chunks before anything else,
budgets, no frame ahead of the text. The listeners assert order, no gap and one end.
"""

from __future__ import annotations

import gc
import logging
import random
import weakref

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, invariant, multiple, precondition, rule

from tests.engine.fake_runner import House, Script

OUTBOX = 12


class Laws(RuleBasedStateMachine):
    """Three slots, small bounds, every kind of request. `later`: results come as from a device."""

    later = False

    listeners = Bundle("listeners")

    def __init__(self):
        super().__init__()
        self.house = House(
            {"call": 0.002, "prefill": 0.01, "decode": 0.01, "codec": 0.003},
            later=self.later,
            slots=3,
            prompt_tokens=30,
            codec_frames=8,
            chunk_frames=8,
            outbox_frames=OUTBOX,
            patience_s=20.0,
            repeat_frames=10,
            silence_frames=16,
        )
        self.all = []
        self.cancelled = []

    @rule(
        target=listeners,
        frames=st.one_of(st.none(), st.integers(0, 60)),
        tokens=st.integers(1, 40),
        most=st.integers(1, 80),
        priority=st.integers(0, 2),
        deadline=st.one_of(st.none(), st.floats(0, 5)),
        kind=st.sampled_from(["whole", "whole", "open", "empty"]),
        text_rows=st.integers(0, 6),
        takes=st.booleans(),
        stuck=st.sampled_from([None, None, "code", "silence"]),
        fails=st.sampled_from([None] * 6 + ["prefill", "decode", "codec", "append", "release", "result"]),
    )
    def submit(self, frames, tokens, most, priority, deadline, kind, text_rows, takes, stuck, fails):
        script = Script(frames=frames, text_rows=text_rows, fails={fails} - {None})
        if stuck == "code":
            script.code = lambda frame: min(frame, 20)
        if stuck == "silence":
            script.loud = lambda frame: frame < 12
        listener = self.house.ask(
            script,
            takes=takes,
            prompt_tokens=tokens,
            max_frames=most,
            priority=priority,
            deadline_s=deadline,
            text_open=kind != "whole",
            starts_empty=kind == "empty",
        )
        self.all.append(listener)
        return multiple(listener)

    @rule(listener=listeners)
    def cancel(self, listener):
        listener.ticket.cancel()
        if not listener.finished:
            self.cancelled.append(listener)

    @rule(listener=listeners, share=st.floats(0, 1))
    def take(self, listener, share):
        listener.take(round(share * (listener.frames - listener.taken)))

    @rule(listener=listeners, pieces=st.lists(st.integers(0, 9), max_size=5), frames=st.integers(0, 5))
    def append(self, listener, pieces, frames):
        if not listener.ticket._closed:
            listener.ticket.append(pieces, frames)

    @rule(listener=listeners)
    def finish(self, listener):
        listener.ticket.finish()

    @rule(seconds=st.floats(0, 8))
    def wait(self, seconds):
        self.house.clock.now += seconds

    @precondition(lambda self: self.all)
    @rule(steps=st.integers(1, 12))
    def step(self, steps):
        for _ in range(steps):
            calls = self.house.step()
            bulk = sum(n for name, what in calls if name == "codec" for _, n in what)
            assert bulk <= 8 + 3
            assert len([name for name, _ in calls if name == "decode"]) <= 1
            while self.cancelled:
                assert self.cancelled.pop().finished, "a cancelled request outlived a step"

    @invariant()
    def laws_hold(self):
        assert not self.house.runner.violations
        slots = self.house.scheduler.slots
        assert len(slots) + len(self.house.scheduler._free) == 3
        for index, slot in slots.items():
            assert slot.index == index
            assert slot.live
            assert slot.frames_done <= slot.job.max_frames
        live = {id(job.deliver) for job in self.house.engine._stepper.jobs}
        for listener in self.all:
            assert listener.finished != (id(listener) in live)
            assert listener.finished or listener.frames - listener.taken <= OUTBOX

    def teardown(self):
        """Whoever is left gets an end, in a bounded number of steps, once its listener takes and its text ends."""
        for listener in self.all:
            listener.takes = True
            listener.take(listener.frames - listener.taken)
            listener.ticket.finish()
        self.house.run(most=200 + 100 * len(self.all))
        assert all(listener.finished for listener in self.all)
        assert sum(self.house.engine.stats().finished.values()) == len(self.all)
        self.house.check_empty()


class LawsOfDevices(Laws):
    later = True


TestLaws, TestLawsOfDevices = Laws.TestCase, LawsOfDevices.TestCase
TestLaws.settings = TestLawsOfDevices.settings = settings(
    max_examples=50, stateful_step_count=40, deadline=None, suppress_health_check=list(HealthCheck)
)


def test_the_wait_for_a_slot_is_bounded():
    """However requests come, none is overtaken by one that came more than aging_s per level of priority later."""
    random_ = random.Random(5)
    house = House({"call": 0.01}, slots=2, aging_s=1.0, prompt_tokens=50)
    admitted = []
    original = house.runner.prefill
    house.runner.prefill = lambda slots: admitted.extend(slot.job for slot in slots) or original(slots)
    for _ in range(600):
        for _ in range(random_.choice((0, 0, 0, 1, 2))):
            tokens, frames = random_.randint(1, 80), random_.randint(0, 12)
            house.ask(Script(frames=frames), prompt_tokens=tokens, priority=random_.choice((0, 1, 3)))
        house.step()
    house.run(most=10_000)
    for place, job in enumerate(admitted):
        overtakers = [other for other in admitted[:place] if other.arrived > job.arrived + job.request.priority]
        assert not overtakers
    house.check_empty()


def test_a_soak_of_ten_thousand_requests_leaves_nothing(caplog):
    caplog.set_level(logging.CRITICAL, "api.src.engine.steps")  # what pytest keeps of a log keeps the requests
    random_ = random.Random(11)
    house = House(
        {"call": 0.001, "decode": 0.0005, "codec": 0.0002},
        slots=8,
        prompt_tokens=100,
        chunk_frames=8,
        codec_frames=24,
        outbox_frames=32,
        patience_s=5.0,
        repeat_frames=10,
    )
    live, remembered, reasons, submitted = [], [], {}, 0
    failures = [set()] * 60 + [{"prefill"}, {"decode"}, {"codec"}, {"release"}]
    while submitted < 10_000 or live:
        while submitted < 10_000 and len(live) < 24:
            submitted += 1
            stuck = random_.random() < 0.2
            script = Script(
                frames=random_.choice((0, 1, 2, 3, 5, 8, 13, None)),
                code=(lambda frame: 3) if stuck else (lambda frame: frame),
                text_rows=random_.randint(0, 3),
                fails=random_.choice(failures),
            )
            listener = house.ask(
                script,
                takes=random_.random() < 0.9,
                prompt_tokens=random_.randint(1, 60),
                max_frames=random_.randint(1, 20),
                priority=random_.randint(0, 1),
                deadline_s=random_.choice((None, None, 0.02)),
                text_open=random_.random() < 0.1,
            )
            live.append(listener)
            remembered.append(weakref.ref(script))
        for listener in random_.sample(live, min(4, len(live))):
            chance = random_.random()
            if chance < 0.1:
                listener.ticket.cancel()
            elif chance < 0.6:
                listener.ticket.finish()
                listener.take(listener.frames - listener.taken)
        house.engine.step()
        house.runner.calls.clear()
        for listener in [x for x in live if x.finished]:
            live.remove(listener)
            reasons[listener.reason] = reasons.get(listener.reason, 0) + 1
    house.run()  # what listeners took of their last chunk is still on its way
    house.check_empty()
    assert reasons == house.engine.stats().finished
    print(f"\nended: {reasons}")
    assert min(reasons.values()) > 10
    del listener, script
    gc.collect()
    assert sum(ref() is not None for ref in remembered) == 0
