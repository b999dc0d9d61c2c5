"""The engine's benchmark in its smallest form: the tiny checkpoint."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

pytest.importorskip("torch")
from tests.bench import engine
from tests.bench.step_costs import Costs
from tests.bench.workload import ask


@pytest.mark.slow
def test_the_smallest_run_measures_everything_and_its_costs_can_be_simulated(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "costs.json"
    assert (
        engine.main(["--smoke", "--device", "cpu", "--dtype", "float32", "--costs", str(file), "--profile", "2"]) == 0
    )
    printed = capsys.readouterr().out
    assert "10 frames of 2 slots" in printed
    assert "aten::" in printed, "no operation in the profile"
    figures = json.loads(printed.splitlines()[-1])
    assert [loop["streams"] for loop in figures["loops"]] == [1, 2]
    for loop in figures["loops"]:
        assert loop["realtime"] == pytest.approx(loop["frames_per_s"] * 0.08, rel=0.05)
        assert 0 < loop["first_ms"][0] <= loop["first_ms"][1]
    assert figures["frame_floor_ms"] > 0
    costs = Costs.read(file)
    assert costs.frame.seconds(1) > 0
    assert costs.codec.seconds(16) > costs.codec.seconds(1)


def test_every_frame_that_was_asked_for_is_counted() -> None:
    from api.src.engine.loading import load_model
    from tests.engine.checkpoints import tiny

    model = load_model(tiny("custom_voice"), slots=2, positions=512)
    model.engine.start()
    streams = [engine.Stream(model, [number, number + 2], 20) for number in (0, 1)]
    for stream in streams:
        stream.next()
    for number, stream in enumerate(streams):
        assert stream.ended.wait(60)
        assert stream.error is None
        assert stream.frames == ask(0, number, 20).frames + ask(0, number + 2, 20).frames
        assert len(stream.first_s) == 2
    assert model.engine.stop(30)
