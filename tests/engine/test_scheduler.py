"""What the scheduler promises, one promise a test, on a fake runner and a fake clock."""

from __future__ import annotations

import ast
import sys
from pathlib import Path

import numpy as np
import pytest

import api.src.engine.scheduler as scheduler_module
from api.src.engine.engine import EngineStopped
from api.src.engine.messages import FINISH_REASONS, Limits, Request
from api.src.engine.pending import Made
from api.src.engine.scheduler import Job, Repetition, Slot
from api.src.engine.steps import silent_tail
from tests.engine.fake_runner import House, Script


def _names(calls):
    return [name for name, _ in calls]


# --- one request ---


def test_a_request_is_prefilled_decoded_and_heard():
    house = House()
    listener = house.ask(Script(frames=10))
    house.run()
    assert listener.reason == "stop"
    assert listener.frames == 10
    assert listener.ticket.finish_reason == "stop"
    house.check_empty()


def test_the_first_frame_is_made_in_the_step_of_its_prefill_and_heard_first_thing_in_the_next():
    house = House()
    listener = house.ask()
    assert _names(house.step()) == ["prefill", "decode"]
    assert house.step()[0] == ("codec", [(0, 1)])
    assert listener.chunks == [1]


def test_chunks_grow_with_the_lead():
    house = House()
    listener = house.ask(Script(frames=60))
    house.run()
    assert listener.chunks[:5] == [1, 2, 4, 8, 16]
    assert max(listener.chunks) == 16


def test_chunks_stay_small_while_the_engine_is_barely_faster_than_sound():
    house = House({"decode": 0.06})
    listener = house.ask(Script(frames=40))
    house.run()
    assert listener.chunks[:8] == [1] * 8
    assert max(listener.chunks) < 8


def test_a_slow_engine_makes_larger_chunks_but_none_that_takes_seconds():
    house = House({"decode": 0.4})
    listener = house.ask(Script(frames=40))
    house.run()
    assert listener.chunks[:6] == [1, 2, 4, 4, 4, 4]


def test_a_lead_that_shrinks_makes_chunks_small_again():
    house = House({"decode": 0.01})
    listener = house.ask(Script(frames=100))
    while listener.frames < 31:
        house.step()
    house.clock.now += 3.0
    before = len(listener.chunks)
    house.run()
    assert listener.chunks[before - 1] == 16
    assert listener.chunks[before] == 1


def test_the_end_goes_with_the_last_chunk_where_there_is_one():
    house = House()
    listener = house.ask(Script(frames=6))
    house.run()
    assert listener.chunks == [1, 2, 3]
    assert [d.finish_reason for d in listener.got] == [None, None, "stop"]


def test_speech_without_a_frame_ends_too():
    house = House()
    listener = house.ask(Script(frames=0))
    house.run()
    assert (listener.reason, listener.frames, len(listener.got)) == ("stop", 0, 1)
    house.check_empty()


# --- a device that works while the host goes on ---


def _watched(house):
    """What is asked of the runner, and when its results are waited for, in their order."""
    order = []
    for name in ("decode", "codec"):
        original = getattr(house.runner, name)

        def asked(what, name=name, original=original):
            first = name == "codec" and all(slot.coded == 0 for slot, _ in what)
            order.append("first" if first else name)
            result = original(what)
            taken = result.get
            result.get = lambda: order.append(f"got {'first' if first else name}") or taken()
            return result

        setattr(house.runner, name, asked)
    return order


def test_results_are_waited_for_after_everything_was_asked_for():
    house = House(later=True)
    order = _watched(house)
    house.ask(Script(frames=30))
    house.step()
    assert order == ["decode", "got decode"]
    order.clear()
    house.step()
    assert order == ["first", "decode", "got first", "got decode"]


def test_bulk_sound_is_waited_for_behind_the_next_frame():
    house = House(later=True)
    listener = house.ask(Script(frames=60))
    while listener.frames < 7:
        house.step()
    order = _watched(house)
    while "codec" not in order:
        order.clear()
        house.step()
    assert order == ["decode", "codec", "got decode"]
    order.clear()
    house.step()
    assert order == ["decode", "got codec", "got decode"]
    house.run()
    assert listener.frames == 60
    house.check_empty()


@pytest.mark.parametrize("later", [False, True])
def test_an_end_that_shows_while_sound_is_on_its_way_waits_for_it(later):
    for frames in range(40):
        house = House(later=later)
        listener = house.ask(Script(frames=frames))
        house.run()
        assert (listener.reason, listener.frames) == ("stop", frames)
        house.check_empty()


def test_a_slot_that_is_left_while_sound_is_on_its_way_goes_to_the_next_without_it():
    house = House(slots=1, later=True)
    listener, mate = house.ask(Script(frames=60)), house.ask(Script(frames=5))
    while not house.engine._stepper._behind:
        house.step()
    before = listener.frames
    listener.ticket.cancel()
    house.run()
    assert (listener.reason, listener.frames) == ("cancelled", before)
    assert (mate.reason, mate.frames) == ("stop", 5)
    house.check_empty()


@pytest.mark.parametrize("later", [False, True])
def test_a_result_that_fails_ends_its_requests_alone(later):
    house = House(later=later)
    failing = house.ask(Script(frames=20, fails={"result"}))
    house.run()
    mate = house.ask(Script(frames=20))
    house.run()
    assert (failing.reason, mate.reason) == ("error", "stop")
    house.check_empty()


# --- many requests ---


def test_requests_join_and_leave_at_any_step():
    house = House(slots=3)
    long = house.ask(Script(frames=50))
    house.step()
    short = house.ask(Script(frames=3))
    calls = house.step()
    assert ("decode", [0, 1]) in calls
    while not short.finished:
        house.step()
    assert not long.finished
    third = house.ask(Script(frames=3))
    house.run()
    assert {x.reason for x in (long, short, third)} == {"stop"}
    house.check_empty()


def test_waiting_is_first_in_first_out_within_a_priority():
    house = House(slots=1)
    order = []
    scripts = {name: Script(frames=2) for name in "abcde"}
    for name, priority in zip("abcde", (0, 1, 0, 1, 0), strict=True):
        house.ask(scripts[name], priority=priority)
    names = {id(script): name for name, script in scripts.items()}
    original = house.runner.prefill
    house.runner.prefill = lambda slots: order.extend(names[id(s.job.request.prompt)] for s in slots) or original(slots)
    house.run()
    assert "".join(order) == "acebd"


def test_a_low_priority_is_served_in_time():
    house = House({"decode": 0.05}, slots=1, aging_s=2.0)
    low = house.ask(Script(frames=2), priority=1)
    began = house.clock.now
    while not low.finished:
        house.ask(Script(frames=4))  # urgent ones without end
        for _ in range(3):
            house.step()
        assert house.clock.now < began + 60
    assert low.reason == "stop"


def test_prompts_of_a_step_are_bounded_and_a_longer_one_goes_alone():
    house = House(slots=4, prompt_tokens=100)
    for tokens in (60, 40, 1, 500):
        house.ask(Script(frames=50), prompt_tokens=tokens)
    prefills = [what for _ in range(3) for name, what in house.step() if name == "prefill"]
    assert prefills == [[0, 1], [2], [3]]


def test_decoding_goes_on_beside_prefills():
    house = House(slots=8, prompt_tokens=20)
    house.ask(Script(frames=50))
    house.step()
    for _ in range(7):
        house.ask(Script(frames=50), prompt_tokens=20)
    for _ in range(7):
        calls = house.step()
        assert "prefill" in _names(calls)
        assert any(name == "decode" and 0 in what for name, what in calls)


def test_bulk_waits_for_first_frames_but_little_lead_does_not():
    house = House(slots=8, chunk_frames=4, codec_frames=8)
    house.ask(Script(frames=None), max_frames=1000)
    for _ in range(60):
        house.step()
    house.ask(Script(frames=None))
    assert "codec" not in _names(house.step())[1:]
    assert house.step()[0] == ("codec", [(1, 1)])
    house.clock.now += 60.0  # the lead is gone: what waited is urgent, before the decode
    house.ask(Script(frames=None))
    names = _names(house.step())
    assert names == ["prefill", "codec", "decode"]


def test_codec_work_of_a_step_is_bounded():
    house = House(slots=4, chunk_frames=8, codec_frames=8)
    for _ in range(4):
        house.ask(Script(frames=80))
    while house.engine._inbox or house.scheduler.slots:
        work = [frames for name, what in house.step() if name == "codec" for _, frames in what]
        assert sum(work) <= 8 + 4  # and a first frame of each
    assert not house.runner.violations


@pytest.mark.parametrize("others_wait", [True, False])
def test_a_finished_slot_is_flushed_before_first_frames_only_if_others_wait(others_wait):
    house = House()
    ending, running = house.ask(Script(frames=60)), house.ask(Script(frames=None))
    house.step()
    while not house.scheduler.slots[0].ending:
        house.step()
    assert house.scheduler.slots[0].pending
    running.ticket.cancel()
    for _ in range(1 + others_wait):
        house.ask(Script(frames=None))
    assert _names(house.step()) == (["prefill", "codec", "decode"] if others_wait else ["prefill", "decode"])
    house.run()
    assert (ending.reason, ending.frames) == ("stop", 60)


def _slot(**limits):
    return Slot(0, Job(Request(prompt=None, prompt_tokens=1, max_frames=999), print), Limits(**limits), now=0.0)


def test_a_lead_is_what_a_player_still_has_to_play():
    slot = _slot()
    slot.frames_done = slot.taken = 100
    slot.sounded(10, now=1.0)
    slot.sounded(5, now=1.2)
    assert slot.lead(1.5) == pytest.approx(15 * 0.08 - 0.5)
    assert slot.lead(3.0) == pytest.approx(15 * 0.08 - 2.0)
    slot.sounded(1, now=10.0)  # after a gap it plays on from here
    assert slot.lead(10.0) == pytest.approx(0.08)


def test_what_was_not_taken_was_not_played():
    slot = _slot()
    slot.sounded(10, now=0.0)
    slot.taken = 4
    assert slot.lead(100.0) == pytest.approx(6 * 0.08)


# --- ends ---


def test_the_frame_budget_ends_a_run_with_length():
    house = House()
    listener = house.ask(Script(frames=None), max_frames=37)
    house.run()
    assert (listener.reason, listener.frames) == ("length", 37)


@pytest.mark.parametrize("period", [1, 2, 4])
def test_a_run_in_a_circle_is_stuck(period):
    house = House(repeat_frames=20, repeat_period=4)
    listener = house.ask(Script(frames=None, code=lambda frame: frame if frame < 30 else frame % period))
    house.run()
    assert listener.reason == "stuck"
    assert 30 <= listener.frames <= 30 + 20 + period


def test_a_circle_longer_than_the_period_is_not_noticed():
    house = House(repeat_frames=20, repeat_period=4)
    listener = house.ask(Script(frames=None, code=lambda frame: frame % 5))
    house.run()
    assert listener.reason == "length"


def test_a_run_in_silence_is_stuck_and_a_pause_is_not():
    house = House(silence_frames=20)
    stuck = house.ask(Script(frames=None, loud=lambda frame: frame < 10))
    pauses = house.ask(Script(frames=90, loud=lambda frame: frame % 20 == 0))
    house.run()
    assert stuck.reason == "stuck"
    assert 30 <= stuck.frames <= 30 + 16
    assert (pauses.reason, pauses.frames) == ("stop", 90)


def test_speech_may_end_in_silence():
    house = House(silence_frames=10, chunk_frames=16)
    listener = house.ask(Script(frames=47, loud=lambda frame: frame < 31))
    house.run()
    assert listener.chunks == [1, 2, 4, 8, 16, 16]
    assert (listener.reason, listener.frames) == ("stop", 47)


def test_guards_can_be_switched_off():
    house = House(silence_frames=0, repeat_frames=0)
    listener = house.ask(Script(frames=None, code=lambda frame: 7, loud=lambda frame: False))
    house.run()
    assert listener.reason == "length"


@pytest.mark.parametrize("phase", ["queued", "prefilled", "decoding", "paused", "starved", "flushing"])
def test_a_cancellation_frees_the_slot_within_one_step(phase):
    house = House(slots=1, outbox_frames=16)
    other = house.ask(Script(frames=50)) if phase == "queued" else None
    script = Script(frames=40 if phase == "flushing" else None, text_rows=3)
    listener = house.ask(script, takes=phase != "paused", text_open=phase == "starved")
    steps = {"queued": 1, "prefilled": 1, "decoding": 10, "paused": 40, "starved": 10, "flushing": 0}[phase]
    for _ in range(steps):
        house.step()
    if phase == "flushing":
        while not (house.scheduler.slots and house.scheduler.slots[0].ending):
            house.step()
    next_one = house.ask(Script(frames=2))
    before = listener.frames
    listener.ticket.cancel()
    calls = house.step()
    assert listener.reason == "cancelled"
    assert listener.frames == before
    if other is None:
        assert ("prefill", [0]) in calls  # the next one has the slot in the same step
    house.run()
    assert next_one.reason == "stop"
    house.check_empty()


def test_a_cancellation_during_a_step_delivers_no_more_sound():
    house = House()
    listener = house.ask(Script(frames=50))
    house.step()
    original = house.runner.codec

    def codec(work):
        listener.ticket.cancel()
        return original(work)

    house.runner.codec = codec
    house.run()
    assert (listener.reason, listener.frames) == ("cancelled", 0)
    house.check_empty()


def test_a_first_sound_that_comes_too_late_is_dropped():
    house = House(slots=1)
    house.ask(Script(frames=None), max_frames=10_000)
    late = house.ask(deadline_s=2.0)
    house.step()
    house.clock.now += 1.9
    house.step()
    assert not late.finished
    house.clock.now += 0.2
    house.step()
    assert late.reason == "deadline"


def test_a_deadline_is_for_the_first_sound_only():
    house = House()
    listener = house.ask(Script(frames=50), deadline_s=2.0)
    house.step()
    house.step()
    house.clock.now += 100.0
    house.run()
    assert listener.reason == "stop"
    house.check_empty()


def test_reasons_are_counted():
    house = House(slots=4, repeat_frames=10)
    house.ask()
    house.ask(Script(frames=None), max_frames=5)
    house.ask(Script(frames=None, code=lambda frame: 1))
    house.ask(Script(fails={"decode"})).ticket.cancel()
    house.ask(Script(fails={"prefill"}))
    house.run()
    house.ask(deadline_s=0.0)
    house.run()
    stats = house.engine.stats()
    assert stats.finished == dict.fromkeys(FINISH_REASONS, 1)
    assert (stats.active, stats.waiting, stats.paused) == (0, 0, 0)
    assert stats.frames > 0


# --- slow readers, open text ---


def test_a_slow_reader_pauses_its_own_slot_only():
    house = House(outbox_frames=20)
    slow = house.ask(Script(frames=90), takes=False)
    quick = house.ask(Script(frames=90))
    house.run()
    assert quick.reason == "stop"
    assert not slow.finished
    assert house.engine.stats().paused == 1
    assert house.step() == []
    while not slow.finished:
        assert slow.frames > slow.taken, "paused, with nothing to take"
        slow.take(slow.frames - slow.taken)
        house.run()
        assert slow.frames - slow.taken <= 20
    assert slow.frames == 90
    house.check_empty()


def test_a_reader_that_takes_crumbs_gets_everything():
    house = House(outbox_frames=16, chunk_frames=16)
    slow = house.ask(Script(frames=70), takes=False)
    while not slow.finished:
        house.run()
        if not slow.finished:
            assert slow.frames > slow.taken
            slow.take(1)
    assert slow.frames == 70


def test_a_listener_that_never_takes_loses_its_slot_at_last():
    house = House(slots=1, outbox_frames=20, patience_s=30.0)
    slow, other = house.ask(Script(frames=100), takes=False), house.ask()
    house.run()
    assert not other.got
    assert house.scheduler.wake_at() == pytest.approx(house.clock.now + 30.0, abs=0.5)
    house.clock.now += 31.0
    house.run()
    assert slow.reason == "deadline"
    assert other.reason == "stop"


def test_a_listener_that_takes_now_and_then_keeps_its_slot():
    house = House(outbox_frames=20, patience_s=30.0)
    slow = house.ask(Script(frames=90), takes=False)
    for _ in range(60):
        house.run()
        house.clock.now += 25.0
        slow.take(1)
    house.run()
    assert not slow.finished
    assert 60 < slow.frames <= 60 + 20


def test_open_text_waits_for_more_and_goes_on():
    house = House()
    listener = house.ask(Script(frames=20, text_rows=3), text_open=True)
    house.run()
    assert listener.frames == 3  # all that could be made is heard, though no chunk is full
    listener.ticket.append([1, 2])
    house.run()
    assert listener.frames == 5
    listener.ticket.finish()
    house.run()
    assert (listener.reason, listener.frames) == ("stop", 20)


def test_a_prompt_without_text_takes_no_slot():
    house = House(slots=1)
    empty = house.ask(Script(frames=4), text_open=True, starts_empty=True)
    other = house.ask()
    house.run()
    assert other.reason == "stop"
    assert house.engine.stats().waiting == 0
    empty.ticket.append([1, 2])
    empty.ticket.append([3])
    house.run()
    assert empty.frames == 3
    empty.ticket.finish()
    house.run()
    assert (empty.reason, empty.frames) == ("stop", 4)


def test_text_that_ends_before_it_began_is_silence():
    house = House()
    listener = house.ask(text_open=True, starts_empty=True)
    listener.ticket.finish()
    house.run()
    assert (listener.reason, listener.frames) == ("stop", 0)
    with pytest.raises(ValueError, match="closed"):
        listener.ticket.append([1])
    house.check_empty()


def test_text_that_came_while_waiting_is_part_of_the_prefill():
    house = House(slots=1)
    house.ask(Script(frames=3))
    listener = house.ask(Script(frames=9, text_rows=1), text_open=True)
    listener.ticket.append([1, 2])
    listener.ticket.finish()
    house.run()
    assert (listener.reason, listener.frames) == ("stop", 9)
    assert "append" not in _names(house.runner.calls)


def test_appended_text_extends_the_frame_budget():
    house = House()
    listener = house.ask(Script(frames=None, text_rows=5), text_open=True, max_frames=10)
    listener.ticket.append([1], frames=7)
    listener.ticket.finish()
    house.run()
    assert (listener.reason, listener.frames) == ("length", 17)


# --- failures ---


@pytest.mark.parametrize("where", ["decode", "codec"])
def test_a_failed_call_ends_those_in_it_and_the_engine_lives_on(where):
    house = House()
    bad, mate = house.ask(Script(frames=50, fails={where})), house.ask(Script(frames=50))
    house.run()
    assert bad.reason == mate.reason == "error"
    assert str(bad.got[-1].error) == f"planted in {where}"
    assert bad.got[-1].error.__traceback__ is None
    after = house.ask()
    house.run()
    assert after.reason == "stop"
    house.check_empty()


def test_what_failed_in_a_step_has_no_part_in_the_rest_of_it():
    house = House()
    script = Script(frames=None)
    house.ask(script)
    original = house.scheduler.schedule

    def schedule(now):
        plan = original(now)
        if plan.bulk and plan.decode:
            script.fails.add("decode")
        return plan

    house.scheduler.schedule = schedule
    house.run()
    assert "decode" in script.fails
    house.check_empty()


def test_a_bad_prompt_fails_alone():
    house = House(slots=4)
    bad, *good = [house.ask(Script(fails={"prefill"} if i == 0 else set())) for i in range(4)]
    house.run()
    assert bad.reason == "error"
    assert {x.reason for x in good} == {"stop"}
    house.check_empty()


def test_failed_text_fails_its_request():
    house = House()
    listener = house.ask(Script(text_rows=1, fails={"append"}), text_open=True)
    house.run()
    listener.ticket.append([1])
    house.run()
    assert listener.reason == "error"
    house.check_empty()


def test_a_failed_release_loses_no_slot():
    house = House(slots=1)
    listeners = [house.ask(Script(frames=2, fails={"release"})) for _ in range(3)]
    house.run()
    assert {x.reason for x in listeners} == {"stop"}
    house.check_empty()


def test_a_wrong_number_of_results_is_a_failure():
    house = House()
    house.runner.decode = lambda slots: Made([])
    listener = house.ask()
    house.run()
    assert listener.reason == "error"
    house.check_empty()


def test_a_receiver_that_raises_is_given_up():
    house = House()
    listener, mate = house.ask(Script(frames=20)), house.ask(Script(frames=20))
    listener.raises = True
    house.run()
    assert [d.finish_reason for d in listener.got] == [None, "error"]
    assert mate.reason == "stop"
    house.check_empty()


def test_stopping_ends_everybody_and_refuses_newcomers():
    house = House(slots=1)
    listeners = [house.ask(Script(frames=None)) for _ in range(3)]
    house.step()
    assert house.engine.stop()
    assert house.engine.stop()
    assert {x.reason for x in listeners} == {"cancelled"}
    with pytest.raises(EngineStopped):
        house.ask()
    listeners[0].ticket.cancel()
    house.check_empty()


# --- parts ---


def test_a_silent_tail_is_counted_in_frames():
    samples = np.zeros(40, np.float32)
    assert silent_tail(samples, 4) == 4
    samples[15] = 0.5
    assert silent_tail(samples, 4) == 2
    assert silent_tail(samples[:39], 4) == 2  # a cut frame
    samples[-1] = np.nan
    assert silent_tail(np.full(8, np.nan, np.float32), 2) == 2


def test_repetition_counts_the_longest_circle():
    repetition = Repetition(3)
    assert [repetition.add(code) for code in (1, 2, 3, 1, 2, 3, 3, 3)] == [0, 0, 0, 1, 2, 3, 1, 2]


@pytest.mark.parametrize(
    "limits",
    [{"slots": 0}, {"prompt_tokens": 0}, {"codec_frames": 8}, {"slots": 100}, {"outbox_frames": 8}],
)
def test_limits_that_could_block_are_refused(limits):
    with pytest.raises(ValueError, match="must be"):
        Limits(**limits)


def test_requests_that_mean_nothing_are_refused():
    with pytest.raises(ValueError, match="1 or more"):
        Request(prompt=None, prompt_tokens=1, max_frames=0)
    with pytest.raises(ValueError, match="open text"):
        Request(prompt=None, prompt_tokens=1, max_frames=1, starts_empty=True)


def test_scheduling_needs_neither_torch_nor_anything_of_the_server():
    folder = Path(scheduler_module.__file__).parent
    allowed = set(sys.stdlib_module_names) | {"numpy", "errors", "messages", "pending", "scheduler", "steps"}
    for name in ("messages", "pending", "scheduler", "steps", "engine"):
        for node in ast.walk(ast.parse((folder / f"{name}.py").read_text())):
            if isinstance(node, ast.Import):
                assert {alias.name.partition(".")[0] for alias in node.names} <= allowed
            elif isinstance(node, ast.ImportFrom):
                assert node.level <= 1
                assert str(node.module).partition(".")[0] in allowed
