"""The engine's thread: what other threads may do to it, sleeping, stopping, dying. Real clock, short waits."""

from __future__ import annotations

import random
import threading
import time
import weakref

import pytest

from api.src.engine.engine import Engine, EngineStopped
from api.src.engine.errors import DeviceLost
from api.src.engine.messages import Limits, Request
from tests.engine.fake_runner import FakeRunner, Listener, Script


class Heard(Listener):
    """A listener that other threads can wait for."""

    def __init__(self, takes=True):
        super().__init__(takes)
        self.sounding, self.over = threading.Event(), threading.Event()
        self.threads = set()

    def __call__(self, delivery):
        self.threads.add(threading.current_thread().name)
        super().__call__(delivery)
        if delivery.frames:
            self.sounding.set()
        if delivery.finish_reason:
            self.over.set()

    def wait(self):
        assert self.over.wait(20), "no end"
        return self.reason


class House:
    def __init__(self, **limits):
        self.limits = Limits(**({"slots": 4, "outbox_frames": 10_000} | limits))
        self.runner = FakeRunner(self.limits)
        self.engine = Engine(self.runner, self.limits)

    def ask(self, script=None, takes=True, **request):
        listener = Heard(takes)
        asked = {"prompt": script or Script(), "prompt_tokens": 10, "max_frames": 100_000} | request
        listener.ticket = self.engine.submit(Request(**asked), listener)
        return listener


@pytest.fixture
def make_house():
    before = threading.active_count()
    houses = []

    def make(**limits):
        houses.append(House(**limits))
        houses[-1].engine.start()
        return houses[-1]

    yield make
    for house in houses:
        assert house.engine.stop(20)
        assert not house.engine.running
        assert not house.runner.violations
        assert not house.runner.entered
    assert threading.active_count() == before


def test_speech_comes_from_the_engines_thread(make_house):
    house = make_house()
    assert house.engine.running
    listener = house.ask(Script(frames=30))
    assert listener.wait() == "stop"
    assert listener.frames == 30
    assert listener.threads == {"engine"}


def test_many_threads_submit_take_and_cancel_at_once(make_house):
    house = make_house(slots=3)
    listeners = []

    def ask(seed):
        random_ = random.Random(seed)
        for _ in range(40):
            listener = house.ask(Script(frames=random_.randint(0, 30)))
            listeners.append(listener)
            if random_.random() < 0.4:
                listener.ticket.cancel()

    threads = [threading.Thread(target=ask, args=(seed,)) for seed in range(5)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert {listener.wait() for listener in listeners} <= {"stop", "cancelled"}
    assert sum(house.engine.stats().finished.values()) == 200


def test_an_idle_engine_sleeps(make_house):
    house = make_house()
    waiting = house.ask(Script(frames=90, text_rows=3), text_open=True)
    assert waiting.sounding.wait(20)
    steps = []
    original = house.engine.step
    house.engine.step = lambda: steps.append(1) or original()
    for _ in range(20):  # some may be on their way
        before = len(steps)
        time.sleep(0.2)
        if len(steps) == before:
            break
    else:
        pytest.fail("it never sleeps")
    waiting.ticket.finish()
    assert waiting.wait() == "stop"


def test_an_idle_engine_wakes_for_a_deadline(make_house):
    house = make_house()
    began = time.monotonic()
    listener = house.ask(text_open=True, starts_empty=True, deadline_s=0.15)
    assert listener.wait() == "deadline"
    assert 0.14 < time.monotonic() - began < 10


def test_a_receiver_may_cancel(make_house):
    house = make_house()
    listener = house.ask(Script(frames=None))
    assert listener.sounding.wait(20)
    listener.ticket.cancel()
    assert listener.wait() == "cancelled"


def test_stop_ends_within_the_current_step(make_house):
    house = make_house()
    inside, go_on, decodes = threading.Event(), threading.Event(), []
    original = house.runner.decode

    def decode(slots):
        decodes.append(len(slots))
        inside.set()
        assert go_on.wait(20)
        return original(slots)

    house.runner.decode = decode
    running, waiting = house.ask(Script(frames=None)), house.ask(text_open=True, starts_empty=True)
    assert inside.wait(20)
    before = len(decodes)
    assert not house.engine.stop(0.05)
    with pytest.raises(EngineStopped):
        house.ask()
    go_on.set()
    assert house.engine.stop(20)
    assert (running.wait(), waiting.wait()) == ("cancelled", "cancelled")
    assert len(decodes) == before


def test_a_sleeping_engine_stops_at_once(make_house):
    house = make_house()
    time.sleep(0.05)
    began = time.monotonic()
    assert house.engine.stop(20)
    assert time.monotonic() - began < 5
    with pytest.raises(EngineStopped):
        house.engine.start()


def test_a_receiver_may_stop_the_engine(make_house):
    house = make_house()
    done = threading.Event()

    def deliver(delivery):
        house.engine.stop()
        if delivery.finish_reason:
            done.set()

    house.engine.submit(Request(prompt=Script(frames=None), prompt_tokens=1, max_frames=10**6), deliver)
    assert done.wait(20)
    assert house.engine.stop(20)


def test_a_dying_thread_leaves_nobody_waiting(make_house):
    house = make_house(slots=1)

    def decode(slots):
        raise SystemExit("the device has gone")

    house.runner.decode = decode
    listeners = [house.ask(), house.ask(text_open=True, starts_empty=True)]
    assert [listener.wait() for listener in listeners] == ["error", "error"]
    assert isinstance(listeners[0].got[-1].error, EngineStopped)
    assert house.engine.stop(20)
    assert not house.engine.running
    with pytest.raises(EngineStopped):
        house.ask()


def test_a_lost_device_ends_the_engine_and_everybody_hears_why(make_house):
    house = make_house(slots=4)
    waiting = house.ask(text_open=True, starts_empty=True)
    harmless = house.ask(Script(fails={"decode"}))
    assert harmless.wait() == "error"
    assert house.engine.running, "one request's failure is no death"
    house.runner.lost = True
    last = house.ask(Script(fails={"decode"}))
    assert (last.wait(), waiting.wait()) == ("error", "error")
    assert isinstance(last.got[-1].error, DeviceLost)
    assert isinstance(waiting.got[-1].error, DeviceLost)
    assert house.engine.stop(20)
    assert isinstance(house.engine.death, DeviceLost)
    with pytest.raises(EngineStopped):
        house.ask()


@pytest.mark.parametrize(
    ("script", "lost", "death"),
    [(Script(), False, type(None)), (Script(), False, EngineStopped), (Script(fails={"decode"}), True, DeviceLost)],
)
def test_an_engine_that_has_ended_holds_nothing_and_says_so(script, lost, death):
    limits, ended, finished = Limits(slots=1, repeat_period=1), threading.Event(), []
    runner = FakeRunner(limits)
    runner.lost = lost
    engine = Engine(runner, limits, finish=lambda: finished.append(threading.current_thread().name))
    engine.start(ended.set)
    listener = Heard()
    if death is EngineStopped:
        engine._post(lambda steps: die(steps._runner))
    engine.submit(Request(prompt=script, prompt_tokens=1, max_frames=10), listener)
    assert listener.over.wait(20)
    held = weakref.ref(runner)
    del runner
    if death is type(None):
        assert not ended.wait(0.05)
        assert engine.stop(20)
    assert ended.wait(20)
    assert finished == ["engine"]
    assert isinstance(engine.death, death)
    assert held() is None, "the listener and the engine are still there, the runner's tensors are not"


def die(runner):
    raise SystemExit("the device has gone")
