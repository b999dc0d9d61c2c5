"""The arithmetic of the shared words."""

from __future__ import annotations

from api.src.domain import ModelStats


def test_counts_go_on_from_those_of_an_engine_that_is_gone() -> None:
    gone = ModelStats(
        waiting=3, active=2, paused=1, step_seconds=0.5, frames=100, finished={"stop": 7, "length": 1}, uncaptured=2
    )
    now = ModelStats(waiting=1, active=1, step_seconds=0.25, frames=11, finished={"stop": 2, "stuck": 1})
    ends = {"stop": 9, "length": 1, "stuck": 1}
    both = ModelStats(waiting=1, active=1, step_seconds=0.25, frames=111, finished=ends, uncaptured=2)
    assert now.after(gone) == both
    assert ModelStats().after(both) == ModelStats(frames=111, finished=ends, uncaptured=2)
