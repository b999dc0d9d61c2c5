"""The simulation where the answer is known by hand, and the scheduler's priorities as it shows them."""

from __future__ import annotations

import json
import random
from collections.abc import Iterable
from itertools import pairwise
from pathlib import Path

import pytest

from api.src.engine.messages import Limits
from api.src.engine.pending import Made
from tests.bench.playback import Playback
from tests.bench.simulate import (
    CostRunner,
    Point,
    Simulation,
    Speech,
    closed_loop,
    figures,
    main,
    open_loop,
    sustainable,
)
from tests.bench.step_costs import PRESETS, Costs, Curve
from tests.bench.workload import FRAME_S, MEAN_FRAMES, arrivals, ask

ROUND = {
    "source": "round numbers",
    "frame": {"1": 10, "8": 20},
    "prefill": {"1": 5},
    "codec": {"1": 2},
    "first_codec": {"1": 4},
    "step": 1,
    "network": 3,
}


def costs(**changes: object) -> Costs:
    """Milliseconds: a frame 10 (more than one slot: 20), a prefill 5, a codec call 2 or 4, a step 1, the network 3."""
    return Costs.of(ROUND | changes)


def simulated(
    costs: Costs, times: Iterable[float], *, frames: int = 20, rows: int = 10, repeats: int = 0, **limits: int
) -> tuple[Simulation, Point]:
    """Requests of one length at these times."""
    simulation = Simulation(costs, Limits(**{"slots": 8} | limits), lambda number: Speech(frames, rows))
    simulation.run(times, repeats)
    return simulation, figures(1.0, simulation)


# --- costs ---


def test_a_curve_is_straight_between_its_points() -> None:
    curve = Curve({10: 1.0, 20: 3.0, 40: 5.0})
    assert [1000 * curve.seconds(size) for size in (1, 10, 15, 20, 30, 50)] == pytest.approx([1, 1, 2, 3, 4, 6])
    assert [1000 * curve.padded(size) for size in (1, 11, 20, 21, 50)] == pytest.approx([1, 3, 3, 5, 6])
    assert Curve({4: 2.0}).seconds(9) == 0.002


def test_chunks_of_one_length_share_a_call() -> None:
    by_frames = costs(codec={"1": 1, "101": 101})
    assert by_frames.codec_s([4]) == pytest.approx(0.004)
    assert by_frames.codec_s([4, 4, 16]) == pytest.approx(0.008 + 0.016)
    each_call = costs(codec={"1": 2})
    assert each_call.codec_s([16]) == pytest.approx(0.002)
    assert each_call.codec_s([13]) == pytest.approx(0.006)  # 8 + 4 + 1
    assert each_call.codec_s([13, 5]) == pytest.approx(0.006)


def test_measured_costs_are_read_from_json(tmp_path: Path) -> None:
    file = tmp_path / "costs.json"
    file.write_text(json.dumps({"device": "x", "costs": ROUND | {"codec_lengths": [1, 4, 2]}}))
    read = Costs.read(file)
    assert (read.source, read.network_s, read.codec_lengths) == ("round numbers", 0.003, (4, 2, 1))
    assert read.frame.padded(3) == 0.020
    file.write_text(json.dumps({"source": "x", "frame": {"1": 1}}))
    with pytest.raises(ValueError, match="prefill, codec, first_codec"):
        Costs.read(file)


def test_presets_say_that_they_are_estimates() -> None:
    assert all("ESTIMATE" in preset.source for preset in PRESETS.values())


# --- playback ---


def test_a_player_that_runs_dry_waits_and_plays_on() -> None:
    player = Playback()
    player.arrive(9.0, 0.0)
    assert player.first_at is None
    player.arrive(10.0, 1.0)
    player.arrive(10.5, 1.0)
    player.arrive(12.0, 0.5)
    assert (player.underruns, player.dry_s) == (0, 0.0)
    player.arrive(13.0, 0.5)
    assert (player.underruns, player.dry_s) == (1, 0.5)
    player.arrive(13.75, 0.25)
    assert (player.underruns, player.dry_s) == (2, 0.75)
    assert (player.first_at, player.sound_s, player.lead(13.5)) == (10.0, 3.25, 0.5)


def test_a_slack_covers_short_gaps_alone() -> None:
    player = Playback(slack_s=0.1)
    for at in (0.0, 1.05, 2.25):
        player.arrive(at, 1.0)
    assert player.underruns == 1
    assert player.dry_s == pytest.approx(0.2)


# --- one stream, by hand ---


def test_first_audio_of_one_stream_is_the_sum_of_its_parts() -> None:
    simulation, point = simulated(costs(), [7.0])
    assert [call.kind for call in simulation.runner.calls[:4]] == ["prefill", "decode", "first", "decode"]
    assert point.first_ms_p50 == pytest.approx(1 + 5 + 10 + 1 + 4 + 3)
    assert point.batch == 1


def test_the_second_of_two_waits_for_the_step_in_between() -> None:
    """It comes 2 ms after the first one, so 1 + 5 + 10 - 2 ms before the second step, whose first chunk comes first."""
    _, point = simulated(costs(), [0.0, 0.002])
    assert point.first_ms_p50 == pytest.approx(24)
    assert point.first_ms_p99 == pytest.approx(14 + (1 + 4 + 5 + 20) + (1 + 4) + 3)


@pytest.mark.parametrize(("frame", "breaks"), [(79.0, False), (80.0, False), (80.5, True)])
def test_underruns_exactly_when_a_step_is_longer_than_a_frame(frame: float, breaks: bool) -> None:
    """One frame at a time, a codec that takes no time: each chunk comes a step after the one before."""
    free = costs(frame={"1": frame}, prefill={"1": 0}, codec={"1": 0}, first_codec={"1": 0}, step=0)
    _, point = simulated(free, [0.0], frames=50, chunk_frames=1)
    assert (point.underruns, point.broken) == ((49, 1) if breaks else (0, 0))
    assert point.dry_s == pytest.approx(49 * 0.0005 if breaks else 0)


def test_saturation_comes_where_the_costs_put_it() -> None:
    """Four slots, 50 frames of 20 ms: 4 requests a second, less the step or two in which a slot changes hands."""
    flat = costs(frame={"1": 20}, prefill={"1": 0}, codec={"1": 0}, first_codec={"1": 0}, step=0, network=0)
    _, below = simulated(flat, [n / 3.7 for n in range(200)], frames=50, slots=4)
    _, above = simulated(flat, [n / 4.3 for n in range(200)], frames=50, slots=4)
    assert below.first_ms_p99 < 100
    assert below.audio_s_per_s == pytest.approx(3.7 * 50 * FRAME_S, rel=0.02)
    assert above.first_ms_p99 > 1000
    assert 50 / 52 * 4 * FRAME_S / 0.02 <= above.audio_s_per_s <= 4 * FRAME_S / 0.02
    assert sustainable([below, above], 100) == 1.0
    assert sustainable([above, below], 100) is None


@pytest.mark.parametrize("rate", [5, 30])
def test_littles_law(rate: float) -> None:
    """Requests in the engine = their rate x the time that each is there."""
    simulation = Simulation(PRESETS["h200-1.7b"], Limits(slots=64), lambda number: Speech(52, 26))
    simulation.run(arrivals(3, rate, 400))
    point, heard = figures(rate, simulation), simulation.requests
    there = sum(r.ended_at - r.asked_at for r in heard)
    network = PRESETS["h200-1.7b"].network_s * len(heard)
    duration = simulation.clock.now - heard[0].asked_at
    assert point.present == pytest.approx((there - network) / duration, rel=0.05)


def test_a_closed_loop_keeps_its_streams_busy() -> None:
    point = closed_loop(PRESETS["h200-1.7b"], Limits(slots=16), streams=8)
    assert point.requests == 8 * 20
    assert 6 < point.batch <= 8
    assert point.shares["decode"] + point.shares["codec"] > 0.7


def test_work_that_fails_gives_no_figures(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(CostRunner, "codec", lambda self, work: Made([]))  # fewer sounds than asked for
    with pytest.raises(RuntimeError, match="without all its sound"):
        simulated(costs(), [0.0])


# --- a device that works while the host goes on ---


def test_the_first_chunk_goes_beside_the_next_frame() -> None:
    """The second step asks for its frame before it waits: that ends 10 ms after, and not 4 + 10."""
    simulation, point = simulated(costs(queued=True, shared=0), [7.0])
    kinds = {call.kind: call for call in simulation.runner.calls[:4]}
    assert kinds["first"].at == pytest.approx(7.017)
    assert kinds["decode"].at == pytest.approx(7.017)  # of the second step, after the host's ms
    assert point.first_ms_p50 == pytest.approx(1 + 5 + 10 + 1 + 4 + 3)
    shared, _ = simulated(costs(queued=True, shared=0.5), [7.0])
    assert {call.kind: call for call in shared.runner.calls[:4]}["decode"].at == pytest.approx(7.019)


def test_bulk_sound_ends_while_the_host_prepares_the_next_frame() -> None:
    """Ten frames: in turn the codec's calls and the host's ms add to each frame; queued, only what nothing covers."""
    in_turn, queued = (simulated(costs(codec={"1": 4}, queued=queued, shared=0), [0.0])[0] for queued in (False, True))
    codec_s = sum(call.seconds for call in in_turn.runner.calls if call.kind == "codec")
    steps = sum(call.kind == "decode" for call in in_turn.runner.calls)
    saved = in_turn.clock.now - queued.clock.now
    assert 0.004 + 0.001 <= saved <= codec_s + 0.001 * steps


# --- priorities ---


class Watching(CostRunner):
    """Notes when the codec works on more than first chunks while a first chunk, or a first frame, waits."""

    simulation: Simulation
    behind_codec = before_frame = others = 0

    def codec(self, work):
        slots = self.simulation.engine._stepper.scheduler.slots.values()
        waiting = [slot for slot in slots if slot.coded == 0]
        if any(slot.coded for slot, _ in work):
            self.others += 1
            self.behind_codec += any(slot.frames_done > 0 for slot in waiting if slot.active_at < self.step_at)
            leads = [slot.lead(self._clock.now) for slot, _ in work]
            self.before_frame += bool(waiting) and min(leads) > Limits.little_lead_s
        return super().codec(work)


def test_first_chunks_never_wait_for_bulk_codec_work(monkeypatch: pytest.MonkeyPatch) -> None:
    preset = PRESETS["h200-1.7b"]
    simulation = Simulation(preset, Limits(slots=64), lambda number: Speech(30 + (7 * number) % 50, 26))
    watching = Watching(preset, simulation.clock)
    watching.simulation, simulation.runner = simulation, watching
    simulation.engine._stepper._runner = watching
    step = simulation.engine.step
    monkeypatch.setattr(simulation.engine, "step", lambda: (setattr(watching, "step_at", simulation.clock.now), step()))
    simulation.run(arrivals(1, 30.0, 300))
    assert watching.others > 300
    assert (watching.behind_codec, watching.before_frame) == (0, 0)


def test_a_long_prompt_does_not_starve_decode() -> None:
    """A stream plays on while prompts of 50 ms come as fast as they can: one of them for each of its frames."""
    slow = costs(prefill={"10": 5, "1000": 50})
    simulation = Simulation(slow, Limits(slots=8), lambda number: Speech(100, 1000) if number else Speech(60, 10))
    simulation.run([0.0] + [0.1 + 0.01 * n for n in range(40)])
    assert simulation.requests[0].player.underruns == 0
    kinds = [call.kind for call in simulation.runner.calls if call.kind in ("prefill", "decode")]
    assert ("prefill", "prefill") not in pairwise(kinds)


# --- the same again ---


def test_the_same_seed_gives_the_same_point() -> None:
    def point(seed: int) -> Point:
        return open_loop(PRESETS["h200-1.7b"], Limits(slots=32), rate=20, requests=60, seed=seed)

    assert point(1) == point(1)
    assert point(1) != point(2)
    frames = [ask(0, number).frames for number in range(3000)]
    assert sum(frames) / len(frames) == pytest.approx(MEAN_FRAMES, rel=0.05)
    random.seed(5)
    assert ask(0, 7) == ask(0, 7)


def test_the_last_line_holds_the_figures(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    plot = tmp_path / "plot.svg"
    arguments = ["--rates=1,40,80", "--streams=1,8", "--requests=60", "--seconds=0", f"--plot={plot}"]
    assert main([*arguments, "--limit=chunk_frames=8", "--slots=2"]) == 0
    printed = capsys.readouterr().out
    found = json.loads(printed.splitlines()[-1])
    assert "ESTIMATE" in printed.splitlines()[0]
    assert found["limits"]["chunk_frames"] == 8
    assert [point["load"] for point in found["open"]] == [1, 40], "the series ends with saturation"
    assert [point["load"] for point in found["closed"]] == [1, 8]
    assert found["sustainable_per_s"] == 1
    assert "Sustainable (p95 first audio within 40 ms, no underrun): 1 requests a second" in printed
    assert plot.read_text().count("<polyline") == 2
