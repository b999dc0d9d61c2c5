"""Whole services killed with -9 at random instants, two at a time on one cache folder and one ledger."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
KILLS = 210


@pytest.mark.slow
def test_no_false_hit_no_lost_money_no_litter(tmp_path: Path) -> None:
    # A process of its own, without threads: only such a one may fork.
    result = subprocess.run(
        [sys.executable, "-m", "tests.speech.kill_workers", str(tmp_path), str(KILLS), "11"],
        cwd=ROOT,
        env=os.environ | {"OPENBLAS_NUM_THREADS": "1", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=200,
    )
    assert result.returncode == 0, result.stderr
    report = json.loads(result.stdout)
    seen = report["seen"]
    assert report["wrong"] == [], seen
    assert "F" not in seen, "an answer had false bytes"
    assert "died" not in seen, result.stderr
    assert seen["killed"] >= KILLS
    assert seen["open holds"] == 0
    # What makes the above worth something: all of it was under way when the workers died.
    assert seen["m"] > 50, seen
    assert seen["h"] > 50, seen
    assert seen["p"] > 10, f"the wallet was never empty: {seen}"
    assert seen["lost holds"] > 50, seen
    assert seen["settled holds"] > 100, seen
    assert seen["temp files"] > 20, seen
    assert seen["in the end hit"] > 0, seen
    assert result.stderr == ""
