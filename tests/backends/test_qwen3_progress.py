"""What a start shows of the weights' progress: a bar on a terminal, lines in the log elsewhere."""

import logging
import os
import pty
import select
import subprocess
import sys
import termios
from pathlib import Path

import pytest

from api.src.backends import qwen3_progress
from api.src.backends.qwen3_progress import WeightsProgress

ROOT = Path(__file__).parents[2]
PROGRAM = """
import time
from api.src.backends import qwen3_progress
qwen3_progress.SHOWN_AFTER_S = 0
with qwen3_progress.WeightsProgress("0.6b") as progress:
    for done in range(1, 5):
        time.sleep(0.15)  # tqdm draws ten times a second at most
        progress(done, 4)
"""


def test_a_terminal_has_a_bar_that_goes_when_all_is_there() -> None:
    main, terminal = pty.openpty()
    termios.tcsetwinsize(terminal, (24, 80))  # a new one has no columns
    subprocess.run([sys.executable, "-c", PROGRAM], cwd=ROOT, stderr=terminal, check=True, timeout=60)
    assert select.select([main], [], [], 10)[0]
    shown = os.read(main, 65536).decode()
    os.close(terminal)
    os.close(main)
    assert "weights of 0.6b" in shown
    assert "50%" in shown
    assert "2/4" in shown
    assert shown.endswith("\r")  # wiped out


def test_a_log_has_a_line_now_and_then_and_no_bar(
    caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(qwen3_progress, "LINE_EVERY_S", 0.0)
    with caplog.at_level(logging.INFO), WeightsProgress("0.6b") as progress:
        progress(1, 2)
        monkeypatch.setattr(qwen3_progress, "LINE_EVERY_S", 1000.0)
        progress(2, 2)
    assert [record.getMessage() for record in caplog.records] == ["0.6b: 1 of 2 weights are ready"]
    assert "weights of" not in capfd.readouterr().err
